// What a convolution is by its definition, in double, and how far a kernel's sums may be off.
#pragma once

#include <vector>

#include "problem.h"

namespace simulation {

// Elements in the order of the sizes, without gaps.
struct Dense {
  int64_t size[4];
  std::vector<double> values;

  double& at(int64_t a, int64_t b, int64_t c, int64_t d) {
    return values[size_t(((a * size[1] + b) * size[2] + c) * size[3] + d)];
  }
};

Dense read_tensor(const convops::Tensor4& shape, convops::DType dtype, const void* data);
double read_element(convops::DType dtype, const void* data, int64_t index);
void write_element(convops::DType dtype, void* data, int64_t index, double value);

// Of one result.
struct Expected {
  double value = 0, magnitude = 0;  // sums of products and of their absolutes
  double squares = 0;               // of products
  int64_t terms = 0;

  void add(double a, double b);
  // Infinities and NaN must be what they are.
  bool accepts(double result, const convops::ConvProblem& problem) const;
};

// In the order of the result's sizes. `bias`: empty without. Products with the zeros of padding
// count in forward and backward-weight.
std::vector<Expected> define(const convops::ConvProblem& problem, Dense& input, Dense& weight,
                             Dense& output, const std::vector<double>& bias);

}  // namespace simulation
