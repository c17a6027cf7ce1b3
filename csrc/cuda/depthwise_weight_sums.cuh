// The sums that the threads of depthwise_weight keep, of compiled and of run-time shapes.
#pragma once

#include "cuda/depthwise_weight_tile.cuh"

namespace convops::cuda::depthwise_weight {

// Of a strip. 7 divides the planes of ImageNet's networks (56, 28, 14, 7); more rows would share
// more input rows between them but leave small planes few threads.
constexpr int kStripRows = 7;
// Larger kernels are another algorithm's: here they would be short of registers or shared memory.
constexpr int kMaxTaps = 49;

__device__ __forceinline__ float sum_of_warp(float sum) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  return sum;
}

// Adds the sums of a warp's lanes. In each step lanes pair up and keep one half of the sums each:
// about two shuffles a sum instead of five.
template <int kCount>
class LaneSums {
 public:
  static __device__ __forceinline__ void add(float (&sums)[kCount], float* result) {
    reduce_half<kCount, kWarp / 2>(sums);
#pragma unroll
    for (int i = 0; i < kept(); ++i) {
      const int slot = slot_of<kCount, kWarp / 2>(i, threadIdx.x % kWarp);
      if (slot < kCount) result[slot] = sums[i];
    }
  }

 private:
  // Sums that a lane has left.
  static __device__ constexpr int kept() {
    int n = kCount;
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) n = (n + 1) / 2;
    return n;
  }
  template <int kN, int kLanes>
  static __device__ __forceinline__ void reduce_half(float (&sums)[kCount]) {
    if constexpr (kLanes > 0) {
      constexpr int kHalf = (kN + 1) / 2;
      const bool upper = threadIdx.x & kLanes;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float low = sums[i], high = i + kHalf < kN ? sums[i + kHalf] : 0.f;
        const float sent = __shfl_xor_sync(~0u, upper ? low : high, kLanes);
        sums[i] = (upper ? high : low) + sent;
      }
      reduce_half<kHalf, kLanes / 2>(sums);
    }
  }
  // Which the lane's i-th sum is; kCount where it is none.
  template <int kN, int kLanes>
  static __device__ __forceinline__ int slot_of(int i, int lane) {
    if constexpr (kLanes == 0) {
      return i;
    } else {
      constexpr int kHalf = (kN + 1) / 2;
      i = slot_of<kHalf, kLanes / 2>(i, lane);
      if (i >= kHalf) return kCount;
      if (lane & kLanes) i += kHalf;
      return i < kN ? i : kCount;
    }
  }
};
template <int kCount>
__device__ __forceinline__ void add_lanes(float (&sums)[kCount], float* result) {
  LaneSums<kCount>::add(sums, result);
}

// A shape with compiled sizes: a strip a thread. kShift_: a tile of the input begins so many
// columns before the first that is needed, where vectors of memory begin, so that copies are large.
template <int kH_, int kW_, int kStride_, int kShift_ = 0>
struct StripSums {
  static constexpr int kH = kH_, kW = kW_, kStride = kStride_, kTaps = kH * kW;
  static constexpr int kShift = kShift_;
  static constexpr bool kFixed = true, kStrided = kStride > 1;
  // Registers for that many blocks a multiprocessor: the sums, the gradients of kH / kStride rows
  // and an input row.
  static constexpr int kBlocks = kTaps > 25 ? 4 : kTaps > 9 ? 5 : 6;
  static constexpr int kInputRows = (kStripRows - 1) * kStride + kH;
  static constexpr int kVectors = (kShift + (kVector - 1) * kStride + kW + kVector - 1) / kVector;

  float sums[kTaps] = {};
  // The thread's image of a step and its strip's place in the tile, in floats. Strips lie side by
  // side, then below one another, then in the next image.
  int plane, input_place, grad_place;

  __device__ __forceinline__ explicit StripSums(const Gradient& p) {
    const Tiling& t = p.tiling;
    const Split across = split(threadIdx.x, t.columns / kVector);
    const Split down = split(across.quotient, t.rows / kStripRows);
    const int row = down.remainder * kStripRows, column = across.remainder * kVector;
    plane = down.quotient;
    input_place = plane * t.input.floats() + row * kStride * t.input.pitch + column * kStride;
    grad_place = plane * t.grad.floats() + row * t.grad.pitch + column;
  }

  // The row of the strip that tap row kh multiplies with input row r; -1 if none.
  static __device__ constexpr int strip_row(int r, int kh) {
    const int row = r - kh;
    return row >= 0 && row % kStride == 0 && row / kStride < kStripRows ? row / kStride : -1;
  }

  __device__ __forceinline__ void add(const Gradient& p, const float* input, const float* grad,
                                      int planes) {
    if (plane >= planes) return;
    const Tiling& t = p.tiling;
    input += input_place;
    grad += grad_place;

    float4 gradients[kStripRows];
#pragma unroll
    for (int r = 0; r < kInputRows; ++r) {
      if (const int row = strip_row(r, 0); row >= 0)
        gradients[row] = *reinterpret_cast<const float4*>(grad + row * t.grad.pitch);
      float values[kVectors * kVector];
#pragma unroll
      for (int i = 0; i < kVectors; ++i)
        *reinterpret_cast<float4*>(values + i * kVector) =
            *reinterpret_cast<const float4*>(input + r * t.input.pitch + i * kVector);
#pragma unroll
      for (int kh = 0; kh < kH; ++kh) {
        const int row = strip_row(r, kh);
        if (row < 0) continue;
        const float4 g = gradients[row];
#pragma unroll
        for (int kw = 0; kw < kW; ++kw) {
          float& sum = sums[kh * kW + kw];
          sum += g.x * values[kShift + kw];
          sum += g.y * values[kShift + kStride + kw];
          sum += g.z * values[kShift + 2 * kStride + kw];
          sum += g.w * values[kShift + 3 * kStride + kw];
        }
      }
    }
  }

  __device__ __forceinline__ void reduce(const Window&, float (&result)[kMaxWarps][kMaxTaps]) {
    add_lanes(sums, result[threadIdx.x / kWarp]);
  }
};

// Any shape of up to kWarpTaps · kMaxWarps taps: warp w has taps w, w + warps, ... and all of the
// tile.
template <int kWarpTaps>
struct WarpSums {
  static constexpr bool kFixed = false, kStrided = false;
  static constexpr int kShift = 0;
  static constexpr int kTaps = kWarpTaps * kMaxWarps, kBlocks = 5;

  float sums[kWarpTaps] = {};

  __device__ __forceinline__ explicit WarpSums(const Gradient&) {}

  __device__ __forceinline__ void add(const Gradient& p, const float* input, const float* grad,
                                      int planes) {
    const Tiling& t = p.tiling;
    const Window& window = p.window;
    int offsets[kWarpTaps];
#pragma unroll
    for (int i = 0; i < kWarpTaps; ++i) {
      // A tap too many is the last once more.
      const int tap = min(i * kMaxWarps + int(threadIdx.x) / kWarp, window.taps() - 1);
      const int kh = tap / window.kernel_w, kw = tap % window.kernel_w;
      offsets[i] = kh * window.dilation_h * t.input.pitch + kw * window.dilation_w;
    }
    int lanes = kWarp;
    while (lanes > 1 && lanes / 2 >= t.columns) lanes /= 2;
    const int lane = threadIdx.x % kWarp, step = kWarp / lanes;
    float parts[kWarpTaps] = {};  // of this step, so that no chain of sums is as long as the chunk
    for (int plane = 0; plane < planes; ++plane) {
      const float* plane_input = input + plane * t.input.floats();
      const float* plane_grad = grad + plane * t.grad.floats();
      for (int column = lane % lanes; column < t.columns; column += lanes) {
#pragma unroll 4
        for (int row = lane / lanes; row < t.rows; row += step) {
          const float gradient = plane_grad[row * t.grad.pitch + column];
          const float* x =
              plane_input + row * window.stride_h * t.input.pitch + column * window.stride_w;
#pragma unroll
          for (int i = 0; i < kWarpTaps; ++i) parts[i] += gradient * x[offsets[i]];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kWarpTaps; ++i) sums[i] += parts[i];
  }

  // The others' taps are zero in a warp's row.
  __device__ __forceinline__ void reduce(const Window& window,
                                         float (&result)[kMaxWarps][kMaxTaps]) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (int tap = lane; tap < window.taps(); tap += kWarp) result[warp][tap] = 0;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kWarpTaps; ++i) {
      const int tap = i * kMaxWarps + warp;
      const float sum = sum_of_warp(sums[i]);
      if (lane == 0 && tap < window.taps()) result[warp][tap] = sum;
    }
  }
};

}  // namespace convops::cuda::depthwise_weight
