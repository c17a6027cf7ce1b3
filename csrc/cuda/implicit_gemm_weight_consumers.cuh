// The consumers of implicit_gemm_weight's main kernel: raw grad_output → registers, times cells of
// the input → sums of all taps, in registers from the first row to the last.
#pragma once

#include "cuda/implicit_gemm_weight_stages.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace convops::cuda::implicit_gemm_weight {

// A lane's operand of a step: rows `lane / 4` and 8 more, pixels 2t, 2t + 1, 2t + 8, 2t + 9 with
// t = lane % 4.
template <typename T>
struct GradStep {
  uint32_t high[4], low[4];

  // `from` is the lane's first pixel; it is aligned to a pair where it is `even`.
  __device__ __forceinline__ void load(const float* from, int pitch, bool even, float upper,
                                       float lower) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* at = from + i % 2 * 8 * pitch + i / 2 * 8;
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
  __device__ __forceinline__ void load(const uint16_t* from, int pitch, bool even) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t* at = from + i % 2 * 8 * pitch + i / 2 * 8;
      if (even) {
        high[i] = *reinterpret_cast<const uint32_t*>(at);
      } else {  // of the words on either side
        const auto* words = reinterpret_cast<const uint32_t*>(at - 1);
        high[i] = __funnelshift_r(words[0], words[1], 16);
      }
    }
  }
};

template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[T::kSums], const uint32_t (&a)[4],
                                         ptx::Cells b, int accumulate) {
  if constexpr (std::is_same_v<typename T::Element, __nv_bfloat16>)
    ptx::wgmma_bf16(sums, a, b, accumulate);
  else
    ptx::wgmma(sums, a, b, accumulate);
}

template <typename T>
__device__ __forceinline__ void run_consumers(const WeightGemm& g, const WeightOperands& operands,
                                              const Place& place, Header& header,
                                              const uint8_t* cells, const uint8_t* raw) {
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int group = warp / 4, t = lane % 4;
  const int pitch = T::pitch(g), ring = T::ring(g), channel_kinds = T::channel_kinds(g);
  const int out = (T::kTile.wide ? group * 64 : 0) + warp % 4 * 16 + lane / 4;
  // Out channels lie ordered by kinds, 16 or more of one: a warp's are.
  const int kind_channels = T::kTile.out_channels() / channel_kinds, kind = out / kind_channels;
  // Where boxes are of channels: the matrices' rows of a lane, 16 bytes of a pixel's swizzled 128.
  const int pixels = pitch - kReach, chunk = (out - lane / 4) / kOctet + lane / 8 % 2;
  const int channels_at =
      (chunk / kOctet * pixels + lane / 16 * kOctet + lane % kOctet) * kBoxChannels +
      (chunk % kOctet ^ lane % kOctet) * kOctet;
  const ptx::Cells all_cells = ptx::cells(
      uint32_t(__cvta_generic_to_shared(cells)) + (T::kTile.wide ? 0 : group * T::kGroupBytes),
      pitch * kOctet * 2);
  // Instructions set `sums` before they add to them.
  float sums[T::kKernelW][T::kSums], totals[T::kKernelW][T::kSums];
#pragma unroll
  for (int tap = 0; tap < T::kKernelW; ++tap)
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) {
      totals[tap][i] = 0;
      asm("" : "=f"(sums[tap][i]));
    }

  Stage stage;
  int box = 0;         // the row's in the stage
  Stage slot, newest;  // of the row's first tap, and the next that is to come
  int come = 0;        // slots from the first tap's that are known to be full
  bool fits = true;    // whether float32 holds what sums are worth
  int held = 0;        // rows in the sums
  for (Rows row(g, place); !row.done();) {
    for (; come < T::kWindow; ++come, newest.next(ring))
      ptx::barrier_wait(&header.cells_full[newest.index], newest.parity);
    if (box == 0)
      ptx::barrier_wait(T::kHalf ? &header.raw_full[stage.index] : &header.raw_scaled[stage.index],
                        stage.parity);
    const int begin = g.grad_kinds.begins[g.grad_kinds.kind(kind, row.y)];
    const bool even = begin % 2 == 0;
    const auto* const boxes =
        reinterpret_cast<const typename T::Raw*>(raw + stage.index * T::kRawBytes);
    const auto* const from = boxes + (box * T::kTile.out_channels() + out) * pitch + begin + 2 * t;
    const uint32_t channels_from = uint32_t(
        __cvta_generic_to_shared(boxes + box * T::kTile.out_channels() * pixels + channels_at));
    float2 upper{1, 1}, lower{1, 1};
    if constexpr (!T::kHalf) {
      upper = header.row_scale[stage.index][out];
      lower = header.row_scale[stage.index][out + 8];
    }
    const ptx::Cells window = all_cells + slot.index * (T::kOctets * pitch);

    GradStep<T> steps[2];  // the tensor cores read one while the other is loaded
    constexpr int kSteps = T::kGeneral ? 2 : kStagePixels / kStepPixels;  // at once
    const int end = T::kGeneral ? min(kStagePixels, g.out_width - row.x) : kStagePixels;
    for (int first = 0; first < end; first += kSteps * kStepPixels)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int pixel = first + step * kStepPixels;
        if (T::kTile.narrow && step > 0 && pixel >= end) break;  // the next channel begins
        GradStep<T>& a = steps[step % 2];
        if constexpr (!T::kHalf)
          a.load(from + pixel, pitch, even, upper.x, lower.x);
        else if (g.grad_last)
          ptx::load_transposed(a.high, channels_from + pixel * kBoxChannels * 2);
        else
          a.load(from + pixel, pitch, even);
        ptx::wgmma_fence();
#pragma unroll
        for (int tap = 0; tap < T::kKernelW; ++tap) {
          const ptx::Cells b = window + (pixel + tap * g.dilation_w);
          if constexpr (T::kProducts == 3) {
            ptx::wgmma(sums[tap], a.high, b + T::kPartBytes / 16, pixel > 0);
            ptx::wgmma(sums[tap], a.low, b, 1);
            ptx::wgmma(sums[tap], a.high, b, 1);
          } else {
            multiply<T>(sums[tap], a.high, b, pixel > 0 || held > 0);
          }
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
      }
    // What a sum of each slot is worth, read by the lane that says later that the slot is free.
    float worth[T::kWindow];
    Stage tap_slot = slot;
#pragma unroll
    for (float& unit : worth) {
      unit =
          T::kHalf ? 1 : __shfl_sync(~0u, lane == 0 ? header.cells_unit[tap_slot.index] : 0.f, 0);
      tap_slot.next(ring);
    }
    ptx::wgmma_wait<0>();
    // The row's first tap is nobody else's, at a run's end all are, and layers always.
    const bool ends = row.next(g) || row.done() || T::kLayered;
    if (++box == T::stage_rows(g)) {
      ptx::barrier_arrive(&header.raw_empty[stage.index]);
      stage.next(T::kStages);
      box = 0;
    }
    for (int left = ends ? T::kWindow : 1; left > 0; --left, --come, slot.next(ring))
      if (lane == 0) ptx::barrier_arrive(&header.cells_empty[slot.index]);
    if (T::kHalf && ++held < kPromotedRows && !row.done()) continue;
    held = 0;
#pragma unroll
    for (int of = 0; of < T::kWindow; ++of) {
      const float units[2] = {upper.y * worth[of], lower.y * worth[of]};
      fits &= units[0] > 0 && units[1] > 0;
#pragma unroll
      for (int tap = 0; tap < T::kKernelW; ++tap)
#pragma unroll
        for (int j = 0; j < T::kOctets * 4; ++j) {
          const int i = of * T::kOctets * 4 + j;
          totals[tap][i] = fmaf(sums[tap][i], units[j / 2 % 2], totals[tap][i]);
        }
    }
  }

  // Nor do totals where an operand is infinite or NaN, or a sum too large.
  float* const to = operands.partial + place.split * g.weights();
#pragma unroll
  for (int of = 0; of < T::kWindow; ++of)
#pragma unroll
    for (int j = 0; j < T::kOctets * 4; ++j) {
      const int out_channel =
          place.out_channel + (out % kind_channels + j % 4 / 2 * 8) * channel_kinds + kind;
      const int channel = place.channel + (T::kLayered ? of * T::kTile.slot_channels() : 0) +
                          (T::kTile.wide ? 0 : group * T::kOctets * kOctet) + j / 4 * kOctet +
                          2 * t + j % 2;
      const int tap_h = place.tap_h + (T::kLayered ? 0 : of);
#pragma unroll
      for (int tap = 0; tap < T::kKernelW; ++tap) {
        const float total = totals[tap][of * T::kOctets * 4 + j];
        fits &= fabsf(total) < INFINITY;
        const int64_t at = g.weight(place.group, out_channel, channel, tap_h, place.tap_w + tap);
        if (at >= 0) to[at] = total;
      }
    }
  if (!fits) operands.bad_blocks[blockIdx.x] = 1;
}

}  // namespace convops::cuda::implicit_gemm_weight
