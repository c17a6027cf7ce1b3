// Stands for csrc/cuda/ptx/max.cuh.
#pragma once

#include <cmath>

namespace convops::cuda::ptx {

inline float max_nan(float a, float b) { return std::isnan(a) || a > b ? a : b; }

}  // namespace convops::cuda::ptx
