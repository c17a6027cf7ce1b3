// The consumers of implicit_gemm_weight's main kernel: raw grad_output → registers, times cells of
// the input → sums of all taps, in registers from the first row to the last.
#pragma once

#include "cuda/implicit_gemm_weight_stages.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/thread.cuh"
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
  const int pitch = T::pitch(g), ring = T::ring(g);
  const int out = (T::kTile.wide ? group * 64 : 0) + warp % 4 * 16 + lane / 4;
  // Out channels lie ordered by kinds, 16 or more of one: a warp's are.
  const int kind = out / (T::kTile.out_channels() >> T::channel_kinds_log(g));
  // The lane's first elements in a row's boxes: of channels, 16 bytes of a pixel's swizzled 128.
  const bool by_channels = T::kHalf && g.grad_last;
  const int box_pixels = by_channels ? pitch - kReach : pitch;
  const int chunk = (out - lane / 4) / kOctet + lane / 8 % 2;
  const int lane_at =
      by_channels
          ? (chunk / kOctet * box_pixels + lane / 16 * kOctet + lane % kOctet) * kBoxChannels +
                (chunk % kOctet ^ lane % kOctet) * kOctet
          : out * pitch + 2 * t;
  const ptx::Cells all_cells = ptx::cells(
      uint32_t(__cvta_generic_to_shared(cells)) + (T::kTile.wide ? 0 : group * T::kGroupBytes),
      pitch * kOctet * 2);
  // Instructions set `sums` before they add to them. Of 16 bits their totals are in the part.
  float sums[T::kKernelW][T::kSums];
  [[maybe_unused]] float totals[T::kHalf ? 1 : T::kKernelW][T::kHalf ? 1 : T::kSums] = {};
#pragma unroll
  for (int tap = 0; tap < T::kKernelW; ++tap)
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) asm("" : "=f"(sums[tap][i]));
  bool fits = true;
  [[maybe_unused]] int summed = 0;  // rows
  // float32 does not hold what is infinite or NaN in an operand, nor a sum too large.
  const auto store = [&](const float (&values)[T::kKernelW][T::kSums]) {
    int row = out;
    ptx::keep(row);  // or places would be computed before the loop, for which there is no room
    const int kinds_log = T::channel_kinds_log(g);
    const int kind_channels = T::kTile.out_channels() >> kinds_log;
    const int kind = row / kind_channels, first = row - kind * kind_channels;
    float* const to = operands.partial + place.split * g.weights();
    const auto taps_of = [&](int of, int j) {
      const int out_channel = place.out_channel + ((first + j % 4 / 2 * 8) << kinds_log) + kind;
      const int channel = place.channel + (T::kLayered ? of * T::kTile.slot_channels() : 0) +
                          (T::kTile.wide ? 0 : group * T::kOctets * kOctet) + j / 4 * kOctet +
                          2 * t + j % 2;
      return g.taps(place.group, out_channel, channel);
    };
    const auto store_taps = [&](const WeightGemm::Taps& taps, int of, int j) {
      const int tap_h = place.tap_h + (T::kLayered ? 0 : of);
#pragma unroll
      for (int tap = 0; tap < T::kKernelW; ++tap) {
        float total = values[tap][of * T::kOctets * 4 + j];
        const int64_t at = g.weight(taps, tap_h, place.tap_w + tap);
        if (at >= 0) {
          if (T::kHalf && summed > kPromotedRows) total += to[at];
          to[at] = total;
        }
        fits &= fabsf(total) < INFINITY;
      }
    };
    // In the orders for which there are registers.
    if constexpr (T::kHalf) {
#pragma unroll
      for (int j = 0; j < T::kOctets * 4; ++j) {
        WeightGemm::Taps taps = taps_of(0, j);
#pragma unroll
        for (int of = 0; of < T::kWindow; ++of) {
          if (T::kLayered) taps = taps_of(of, j);
          store_taps(taps, of, j);
        }
      }
    } else {
#pragma unroll
      for (int of = 0; of < T::kWindow; ++of)
#pragma unroll
        for (int j = 0; j < T::kOctets * 4; ++j) store_taps(taps_of(of, j), of, j);
    }
  };

  Stage stage;
  int box = 0;         // the row's in the stage
  Stage slot, newest;  // of the row's first tap, and the next that is to come
  int come = 0;        // slots from the first tap's that are known to be full
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
    const auto* const from = boxes + box * T::kTile.out_channels() * box_pixels + lane_at + begin;
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
        else if (by_channels)
          ptx::load_transposed(a.high,
                               uint32_t(__cvta_generic_to_shared(from + pixel * kBoxChannels)));
        else
          a.load(from + pixel, pitch, even);
        ptx::wgmma_fence();
        ptx::Cells b = window + pixel;
#pragma unroll
        for (int tap = 0; tap < T::kKernelW; ++tap, b = b + g.dilation_w) {
          if constexpr (T::kProducts == 3) {
            ptx::wgmma(sums[tap], a.high, b + T::kPartBytes / 16, pixel > 0);
            ptx::wgmma(sums[tap], a.low, b, 1);
            ptx::wgmma(sums[tap], a.high, b, 1);
          } else {
            multiply<T>(sums[tap], a.high, b,
                        pixel > 0 || (T::kHalf && summed % kPromotedRows > 0));
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
    if constexpr (T::kHalf) {
      if (++summed % kPromotedRows == 0 || row.done()) store(sums);
    } else {
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
  }
  if constexpr (!T::kHalf) store(totals);
  if (!fits) operands.bad_blocks[blockIdx.x] = 1;
}

}  // namespace convops::cuda::implicit_gemm_weight
