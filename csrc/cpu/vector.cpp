#include "cpu/vector.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CONVOPS_CLONES \
  __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define CONVOPS_CLONES
#endif

namespace convops::cpu {

CONVOPS_CLONES void multiply_add(float* sums, const float* x, float factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sums[i] += factor * x[i];
}

CONVOPS_CLONES void multiply_add(double* sums, const double* x, double factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sums[i] += factor * x[i];
}

CONVOPS_CLONES float dot(const float* x, const float* y, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i] * y[i];
  return sum;
}

CONVOPS_CLONES double dot(const double* x, const double* y, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i] * y[i];
  return sum;
}

}  // namespace convops::cpu
