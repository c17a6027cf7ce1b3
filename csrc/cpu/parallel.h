// Loops over torch's thread pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace convops::cpu {

// Work worth another thread, in elements touched: about 10 µs of it.
constexpr int64_t kGrainElements = 16384;

// Calls f(i) for every i in [0, count); `elements` is what one call touches.
template <typename F>
void parallel_for(int64_t count, int64_t elements, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements));
  if (count <= grain) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace convops::cpu
