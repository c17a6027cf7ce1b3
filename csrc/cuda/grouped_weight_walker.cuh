// The arithmetic of grouped_weight: a warp walks down a column of 8 output pixels and sums all taps
// of 8 channels × 8 out channels.
#pragma once

#include "cuda/grouped_weight_tiles.cuh"
#include "cuda/ptx/max.cuh"
#include "cuda/ptx/mma.cuh"

namespace convops::cuda::grouped_weight {

// An operand as the tensor cores get it: they ignore the last 13 bits.
template <bool kIeee>
struct Operand {
  uint32_t hi, lo;

  __device__ __forceinline__ explicit Operand(float x) {
    hi = __float_as_uint(x) + 0x1000u;  // to nearest
    lo = kIeee ? __float_as_uint(x - __uint_as_float(hi & 0xffffe000u)) : 0;
  }
};
// The same in a register of its own: an operand that shares one with another would be copied whole.
__device__ __forceinline__ uint32_t again(uint32_t operand) {
  return __float_as_uint(__uint_as_float(operand) + 0.f);
}

// The pieces of an input row as an MMA's operand of two pieces on top of each other, 8 channels ×
// 8 pixels each: {upper, lower, upper, lower} of a lane's two pixels. Those of the first and the
// last column of the kernel share an MMA; that of the middle one shares it with its own lo, so that
// hi·hi and lo·hi are one MMA.
template <typename Shape, bool kIeee>
struct InputRow {
  uint32_t outer_hi[4], outer_lo[4], middle[4];

  __device__ __forceinline__ void set(const float (&x)[Shape::kValues]) {
    constexpr int kLast = Shape::kKernel - 1, kMiddle = Shape::kKernel / 2;
#pragma unroll
    for (int pixel = 0; pixel < 2; ++pixel) {
      const int first = pixel * Shape::kStride;
      const Operand<kIeee> left(x[first]), middle_(x[first + kMiddle]), right(x[first + kLast]);
      outer_hi[2 * pixel] = left.hi;
      outer_hi[2 * pixel + 1] = right.hi;
      outer_lo[2 * pixel] = left.lo;
      outer_lo[2 * pixel + 1] = right.lo;
      middle[2 * pixel] = again(middle_.hi);
      middle[2 * pixel + 1] = kIeee ? again(middle_.lo) : 0;
    }
  }
};

// The largest operands of the lane's channel and out channel.
struct Magnitudes {
  float input = 0, grad = 0;

  // Whether the split of some channel or a product of two lost bits for being too small.
  __device__ __forceinline__ bool too_small() const {
    constexpr float kLeastOperand = 0x1p-100f, kLeastProduct = 0x1p-90f;
    float least[2] = {input, grad};
#pragma unroll
    for (float& m : least) {
      for (int lanes = 1; lanes < 4; lanes *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, lanes));
      if (m == 0) m = INFINITY;
      for (int lanes = 4; lanes < kWarp; lanes *= 2) m = fminf(m, __shfl_xor_sync(~0u, m, lanes));
    }
    return fminf(least[0], least[1]) < kLeastOperand || least[0] * least[1] < kLeastProduct;
  }
};

// What a warp keeps while it walks down a column. Of a tap a lane has the sums of one channel and
// two out channels.
template <typename Shape, bool kIeee>
struct Walker {
  using Row = InputRow<Shape, kIeee>;
  Row window[Shape::kInputRows];
  float sums[Shape::kTaps][2] = {};
  Magnitudes magnitudes;

  __device__ __forceinline__ void load_row(int row, const float* from) {
    float x[Shape::kValues];
    // Aligned to 16 bytes for a stride of 2, else to 8, from element kFirst on.
    constexpr int kFirst = Shape::kShift % 2;
    if constexpr (kFirst == 1) x[0] = from[0];
    if constexpr (Shape::kStride == 2) {
      const float4 v = *reinterpret_cast<const float4*>(from + kFirst);
      x[kFirst] = v.x, x[kFirst + 1] = v.y, x[kFirst + 2] = v.z, x[kFirst + 3] = v.w;
    } else {
      const float2 v = *reinterpret_cast<const float2*>(from + kFirst);
      x[kFirst] = v.x, x[kFirst + 1] = v.y;
      if constexpr (Shape::kValues == 4) x[3] = from[3];
    }
#pragma unroll
    for (const float value : x) magnitudes.input = ptx::max_nan(magnitudes.input, fabsf(value));
    window[row].set(x);
  }

  // A stage of output rows, zeros beyond the last; fresh: the halo is in shared memory, not in the
  // window.
  __device__ __forceinline__ void step(const Arguments& a, const float* input, const float* grad,
                                       bool fresh) {
    if (fresh) {
#pragma unroll
      for (int i = 0; i < Shape::kHalo; ++i) load_row(i, input + i * a.input.pitch);
    } else {
#pragma unroll
      for (int i = 0; i < Shape::kHalo; ++i) window[i] = window[Shape::kNewRows + i];
    }
    float outer[Shape::kKernel][4] = {}, middle[Shape::kKernel][4] = {};
    input += Shape::kHalo * a.input.pitch;
#pragma unroll
    for (int r = 0; r < kRows; ++r, grad += a.grad.pitch) {
#pragma unroll
      for (int i = 0; i < Shape::kStride; ++i, input += a.input.pitch)
        load_row(Shape::kHalo + r * Shape::kStride + i, input);
      const float2 g = *reinterpret_cast<const float2*>(grad);
      magnitudes.grad = ptx::max_nan(ptx::max_nan(magnitudes.grad, fabsf(g.x)), fabsf(g.y));
      const Operand<kIeee> left(g.x), right(g.y);
      const uint32_t hi[2] = {left.hi, right.hi}, lo[2] = {left.lo, right.lo};
      const Row* const taps = window + r * Shape::kStride;
#pragma unroll
      for (int kh = 0; kh < Shape::kKernel; ++kh) ptx::mma_tf32(middle[kh], taps[kh].middle, hi);
      if constexpr (Shape::kKernel > 1)
#pragma unroll
        for (int kh = 0; kh < Shape::kKernel; ++kh) ptx::mma_tf32(outer[kh], taps[kh].outer_hi, hi);
      if constexpr (kIeee) {
#pragma unroll
        for (int kh = 0; kh < Shape::kKernel; ++kh) ptx::mma_tf32(middle[kh], taps[kh].middle, lo);
        if constexpr (Shape::kKernel > 1) {
#pragma unroll
          for (int kh = 0; kh < Shape::kKernel; ++kh)
            ptx::mma_tf32(outer[kh], taps[kh].outer_hi, lo);
#pragma unroll
          for (int kh = 0; kh < Shape::kKernel; ++kh)
            ptx::mma_tf32(outer[kh], taps[kh].outer_lo, hi);
        }
      }
    }
    constexpr int kLast = Shape::kKernel - 1, kMiddle = Shape::kKernel / 2;
#pragma unroll
    for (int kh = 0; kh < Shape::kKernel; ++kh)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float (*const row)[2] = sums + kh * Shape::kKernel;
        row[kMiddle][side] += kIeee ? middle[kh][side] + middle[kh][2 + side] : middle[kh][side];
        if constexpr (Shape::kKernel > 1) {
          row[0][side] += outer[kh][side];
          row[kLast][side] += outer[kh][2 + side];
        }
      }
  }

  // The same sums by fused multiply-adds. Pixels outside the output are left out, zeros outside the
  // input are multiplied.
  __device__ __forceinline__ void step_exactly(const Arguments& a, const float* input,
                                               const float* grad, int rows, int pixels) {
    float d[Shape::kTaps][2] = {};
#pragma unroll 1
    for (int r = 0; r < rows; ++r)
#pragma unroll 1
      for (int pixel = 0; pixel < pixels; ++pixel) {
        const float* x = input + r * Shape::kStride * a.input.pitch + pixel * Shape::kStride;
        const float* g = grad + r * a.grad.pitch + pixel;
        const float left = g[0], right = g[a.grad.plane];
#pragma unroll
        for (int tap = 0; tap < Shape::kTaps; ++tap) {
          const float value = x[tap / Shape::kKernel * a.input.pitch + tap % Shape::kKernel];
          d[tap][0] = fmaf(value, left, d[tap][0]);
          d[tap][1] = fmaf(value, right, d[tap][1]);
        }
      }
#pragma unroll
    for (int tap = 0; tap < Shape::kTaps; ++tap) {
      sums[tap][0] += d[tap][0];
      sums[tap][1] += d[tap][1];
    }
  }

  __device__ __forceinline__ void sums_to_zero() {
#pragma unroll
    for (float (&pair)[2] : sums) pair[0] = pair[1] = 0;
  }

  __device__ __forceinline__ bool failed() const {
    // Rounding may turn a NaN to zero, but the maximum of a NaN is one.
    bool finite = magnitudes.input < INFINITY && magnitudes.grad < INFINITY;
#pragma unroll
    for (const float (&pair)[2] : sums)
      finite &= fabsf(pair[0]) < INFINITY && fabsf(pair[1]) < INFINITY;
    return magnitudes.too_small() | !finite;  // all lanes take part in the first
  }
};

}  // namespace convops::cuda::grouped_weight
