// Depthwise convolution with the kernel's size, stride and dilation as run-time numbers.
//
// A thread owns kGenericRows results of one column; lanes lie along columns, so what a warp reads
// of shared memory is one wavefront at stride 1 whatever the dilation. Backward-input goes by
// phases: the results h with (h + padding) mod stride = phase are a convolution of stride 1 with
// every (stride / gcd(stride, dilation))th tap, dilated by dilation / gcd. A block computes one
// phase.
#pragma once

#include "cuda/definition.cuh"
#include "cuda/depthwise_tile.cuh"

namespace convops::cuda::depthwise {

constexpr int kGenericRows = 7;
// Strips of a block: with large halos a tile must be larger than what its threads compute at once.
constexpr int kGenericStrips = 8 * kMaxThreads;

// One dimension of a block's convolution: the result at first + i · step is the sum over t < taps
// of from[begin + i · stride + t · dilation] · weight[tap_first + t · tap_step].
struct Axis {
  int first, step, stride;
  int begin, dilation, taps;
  int tap_first, tap_step;
};

__host__ __device__ inline int greatest_common_divisor(int a, int b) {
  while (b != 0) {
    const int rest = a % b;
    a = b, b = rest;
  }
  return a;
}

__host__ __device__ inline Axis make_axis(bool backward, int padding, int stride, int dilation,
                                          int kernel, int phase) {
  if (!backward) return {0, 1, stride, -padding, dilation, kernel, 0, 1};
  // First result and cell of the phase: first + padding = cell · stride + phase.
  const int cell = phase >= padding ? 0 : (padding - phase + stride - 1) / stride;
  const int divisor = greatest_common_divisor(stride, dilation), tap_step = stride / divisor;
  int tap = 0;
  while (tap < kernel && (phase - tap * dilation) % stride != 0) ++tap;
  const int taps = tap < kernel ? (kernel - 1 - tap) / tap_step + 1 : 0;
  const int step = dilation / divisor;
  return {cell * stride + phase - padding,
          stride,
          1,
          cell + (phase - tap * dilation) / stride - (taps - 1) * step,
          step,
          taps,
          tap + (taps - 1) * tap_step,
          -tap_step};
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    generic_kernel(const __grid_constant__ Parameters p, const T* __restrict__ from,
                   const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ to) {
  extern __shared__ __align__(16) uint32_t shared[];
  __shared__ Place place;
  const Tile& tile = p.tile;
  const ConvProblem& problem = p.problem;
  const int kernel_h = int(problem.weight.size[2]), kernel_w = int(problem.weight.size[3]);
  const int height = int(p.to.size[2]), width = int(p.to.size[3]);
  float* const taps = reinterpret_cast<float*>(shared);
  uint32_t* const windows = shared + tile.planes * tile.taps;
  find_place(p, blockIdx.x, place);
  __syncthreads();

  const Axis h = make_axis(p.is_backward(), int(problem.padding.h), int(problem.stride.h),
                           int(problem.dilation.h), kernel_h, place.phase_h);
  const Axis w = make_axis(p.is_backward(), int(problem.padding.w), int(problem.stride.w),
                           int(problem.dilation.w), kernel_w, place.phase_w);
  const int h0 = h.begin + place.tile_h * tile.rows * h.stride;
  const int w0 = w.begin + place.tile_w * tile.columns * w.stride;
  const int pitch = tile.pitch * kPerWord<T>, row_pitch = h.stride * pitch;
  const int shift_step = sizeof(T) == 4 ? 0 : int(p.from.stride[2] & 1);
  const int strips = place.count * tile.strips * tile.lanes;
  bool finite = true;
  for (int begin = 0; begin < strips; begin += blockDim.x) {
    const int lane = (begin + threadIdx.x) % tile.lanes, rest = (begin + threadIdx.x) / tile.lanes;
    const int strip = rest % tile.strips, plane = rest / tile.strips;
    const bool works = plane < place.count;
    float sums[kGenericRows] = {};
    for (int i = 0; i < p.sums; ++i) {
      const T* const source = from + i * p.from.stride[1];
      if (begin == 0) {  // where planes add up, threads have one strip each
        if (i > 0) __syncthreads();
        load_windows(p, place, source, h0, w0, windows);
        const bool mine =
            load_weights(p, place, weight + i * problem.weight.stride[0], kernel_h, kernel_w, taps);
        finite &= await_windows(p, place, source, h0, w0, windows, mine);
      }
      if (!works) continue;
      const int row = strip * kGenericRows * h.stride;
      const int shift =
          word_shift(source + place.planes[plane].from + (h0 + row) * p.from.stride[2] + w0);
      const T* const window = reinterpret_cast<const T*>(windows) +
                              (plane * tile.window_rows + row) * pitch + lane * w.stride;
      for (int th = 0; th < h.taps; ++th) {
        const T* line = window + th * h.dilation * pitch;
        const float* tap =
            taps + plane * tile.taps + (h.tap_first + th * h.tap_step) * kernel_w + w.tap_first;
        for (int tw = 0; tw < w.taps; ++tw, line += w.dilation, tap += w.tap_step) {
#pragma unroll
          for (int r = 0; r < kGenericRows; ++r) {
            const int late = shift ^ ((r * h.stride + th * h.dilation) & shift_step);
            sums[r] += *tap * convert<float>(line[r * row_pitch + late]);
          }
        }
      }
    }

    const int column = w.first + (place.tile_w * tile.columns + lane) * w.step;
    if (!works || column >= width) continue;
    const Plane& result = place.planes[plane];
    const float added = bias ? convert<float>(bias[result.channel * problem.bias_stride]) : 0;
    const auto row_of = [&](int r) {
      return h.first + (place.tile_h * tile.rows + strip * kGenericRows + r) * h.step;
    };
    T* const results = to + result.to + column;
    if (!finite && p.is_backward()) {
#pragma unroll 1
      for (int r = 0; r < kGenericRows && row_of(r) < height; ++r)
        results[row_of(r) * p.to.stride[2]] = convert<T>(backward_input_element(
            p.problem, from, weight, result.image, result.channel, row_of(r), column));
      continue;
    }
#pragma unroll
    for (int r = 0; r < kGenericRows; ++r)
      if (row_of(r) < height)
        results[row_of(r) * p.to.stride[2]] = convert<T>(bias ? sums[r] + added : sums[r]);
  }
}

}  // namespace convops::cuda::depthwise
