// The inner loops along W, compiled for several generations of vector units; the processor's own is
// chosen when the library is loaded.
#pragma once

#include <cstdint>

namespace convops::cpu {

// sums[i] += factor · x[i].
void multiply_add(float* sums, const float* x, float factor, int64_t count);
void multiply_add(double* sums, const double* x, double factor, int64_t count);

// Σ x[i] · y[i].
float dot(const float* x, const float* y, int64_t count);
double dot(const double* x, const double* y, int64_t count);

}  // namespace convops::cpu
