// Random convolutions of small integers, of which every algorithm makes the same sums.
#pragma once

#include <string>
#include <vector>

#include "problem.h"
#include "random.h"

namespace simulation {

struct Convolution {
  convops::ConvProblem problem;
  std::vector<float> source, weight, bias;  // bias: empty without
  std::vector<float> result;                // by definition, in the order of the tensor's memory,
                                            // rounded
  std::string text;

  const convops::Tensor4& source_shape() const;
  const convops::Tensor4& result_shape() const;
};

std::vector<float> by_definition(const Convolution& convolution);

// Themes: "any", and what of that is rare: "patches", cells of several sources that come by bulk
// copies; "boxes", gradients of strides that leave in boxes; "rows", few and long ones, which are
// cut; "kinds", rows that begin anywhere; "images", many and small ones;
// "last", of 16 bits in channels_last.
Convolution random_convolution(Random& random, const std::string& theme);

}  // namespace simulation
