// The consumers of implicit_gemm_weight's main kernel: raw grad_output → registers, times cells of
// the input → sums of all taps, in registers from the first row to the last.
#pragma once

#include "cuda/implicit_gemm_weight_stages.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace convops::cuda::implicit_gemm_weight {

// A lane's operand of a step: rows `lane / 4` and 8 more, pixels 2t, 2t + 1, 2t + 8, 2t + 9 with
// t = lane % 4.
template <typename T>
struct GradStep {
  uint32_t high[4], low[4];

  // `from` is the lane's first pixel; it is aligned to 8 bytes where it is `even`.
  __device__ __forceinline__ void load(const float* from, bool even, float upper, float lower) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* at = from + i % 2 * 8 * kRawPitch + i / 2 * 8;
      float2 v;
      if (even)
        v = *reinterpret_cast<const float2*>(at);
      else
        v = {at[0], at[1]};
      const float factor = i % 2 == 0 ? upper : lower;
      v = {v.x * factor, v.y * factor};
      high[i] = pack(v.x, v.y);
      if constexpr (T::kParts == 2) low[i] = pack_rest(v.x, v.y, high[i]);
    }
  }
};

template <typename T>
__device__ __forceinline__ void run_consumers(const WeightGemm& g, const WeightOperands& operands,
                                              const Place& place, Header& header,
                                              const uint8_t* cells, const uint8_t* raw) {
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int group = warp / 4, t = lane % 4;
  const int out = (T::kTile.wide ? group * 64 : 0) + warp % 4 * 16 + lane / 4;
  const ptx::Cells all_cells = ptx::cells(
      uint32_t(__cvta_generic_to_shared(cells)) + (T::kTile.wide ? 0 : group * T::kGroupBytes),
      kPlane);
  // Instructions set `sums` before they add to them.
  float sums[T::kKernelW][T::kSums], totals[T::kKernelW][T::kSums];
#pragma unroll
  for (int tap = 0; tap < T::kKernelW; ++tap)
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) {
      totals[tap][i] = 0;
      asm("" : "=f"(sums[tap][i]));
    }

  Stage<T::kStages> stage;
  Stage<T::kRing> slot, newest;  // of the row's first tap, and the next that is to come
  int come = 0;                  // slots from the first tap's that are known to be full
  bool fits = true;              // whether float32 holds what sums are worth
  for (Rows row(g, place); !row.done();) {
    for (; come < T::kKernelH; ++come, newest.next())
      ptx::barrier_wait(&header.cells_full[newest.index], newest.parity);
    ptx::barrier_wait(&header.raw_scaled[stage.index], stage.parity);
    const int begin = g.row_begins[row.y % g.row_kinds];
    const bool even = begin % 2 == 0;
    const float* from = reinterpret_cast<const float*>(raw + stage.index * T::kRawBytes) +
                        out * kRawPitch + begin + 2 * t;
    const float2 upper = header.row_scale[stage.index][out];
    const float2 lower = header.row_scale[stage.index][out + 8];
    const ptx::Cells window = all_cells + slot.index * (T::kOctets * kPlane / 16);

    GradStep<T> steps[2];  // the tensor cores read one while the other is loaded
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const GradStep<T>& a = steps[step % 2];
      steps[step % 2].load(from + step * kStepPixels, even, upper.x, lower.x);
      ptx::wgmma_fence();
#pragma unroll
      for (int tap = 0; tap < T::kKernelW; ++tap) {
        const ptx::Cells b = window + (step * kStepPixels + tap * g.dilation_w);
        if constexpr (T::kProducts == 3) {
          ptx::wgmma(sums[tap], a.high, b + T::kPartBytes / 16, step > 0);
          ptx::wgmma(sums[tap], a.low, b, 1);
          ptx::wgmma(sums[tap], a.high, b, 1);
        } else {
          ptx::wgmma(sums[tap], a.high, b, step > 0);
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
    }
    // What a sum of each row of the kernel is worth, read by the lane that says later that the
    // slot is free.
    float worth[T::kKernelH];
    Stage<T::kRing> tap_slot = slot;
#pragma unroll
    for (float& unit : worth) {
      unit = __shfl_sync(~0u, lane == 0 ? header.cells_unit[tap_slot.index] : 0.f, 0);
      tap_slot.next();
    }
    ptx::wgmma_wait<0>();
    // The row's first tap is nobody else's, at a run's end all are.
    const bool ends = row.next(g) || row.done();
    ptx::barrier_arrive(&header.raw_empty[stage.index]);
    stage.next();
    for (int left = ends ? T::kKernelH : 1; left > 0; --left, --come, slot.next())
      if (lane == 0) ptx::barrier_arrive(&header.cells_empty[slot.index]);
#pragma unroll
    for (int kh = 0; kh < T::kKernelH; ++kh) {
      const float units[2] = {upper.y * worth[kh], lower.y * worth[kh]};
      fits &= units[0] > 0 && units[1] > 0;
#pragma unroll
      for (int tap = 0; tap < T::kKernelW; ++tap)
#pragma unroll
        for (int j = 0; j < T::kOctets * 4; ++j) {
          const int i = kh * T::kOctets * 4 + j;
          totals[tap][i] = fmaf(sums[tap][i], units[j / 2 % 2], totals[tap][i]);
        }
    }
  }

  // Nor do totals where an operand is infinite or NaN, or a sum too large.
  float* const to = operands.partial + place.split * g.weights();
#pragma unroll
  for (int kh = 0; kh < T::kKernelH; ++kh)
#pragma unroll
    for (int j = 0; j < T::kOctets * 4; ++j) {
      const int h = place.tap_h + kh, out_channel = place.out_channel + out + j % 4 / 2 * 8;
      const int channel = place.channel + (T::kTile.wide ? 0 : group * T::kOctets * kOctet) +
                          j / 4 * kOctet + 2 * t + j % 2;
      if (h >= g.kernel_h || out_channel >= g.out_channels || channel >= g.channels) continue;
      const int64_t line =
          ((int64_t(place.group) * g.out_channels + out_channel) * g.channels + channel) *
              g.kernel_h +
          h;
#pragma unroll
      for (int tap = 0; tap < T::kKernelW; ++tap) {
        const float total = totals[tap][kh * T::kOctets * 4 + j];
        fits &= fabsf(total) < INFINITY;
        if (place.tap_w + tap < g.kernel_w) to[line * g.kernel_w + place.tap_w + tap] = total;
      }
    }
  if (!fits) operands.bad_blocks[blockIdx.x] = 1;
}

}  // namespace convops::cuda::implicit_gemm_weight
