// The producers of implicit_gemm_weight's main kernel for float32: grad_output → raw stages and
// their scales; input → cells of fp16.
#pragma once

#include "cuda/implicit_gemm_weight_loader.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"

namespace convops::cuda::implicit_gemm_weight {

// Reduces the lanes' m[0 .. kCount - 1] over groups of eight lanes: lane i of a group gets the
// largest m[i % kCount].
template <int kCount>
__device__ __forceinline__ float scatter_max(float (&m)[kCount], int lane) {
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? m[i + half] : m[i], sent = upper ? m[i] : m[i + half];
      m[i] = fmaxf(kept, __shfl_xor_sync(~0u, sent, half));
    }
  }
#pragma unroll
  for (int lanes = kCount; lanes < 8; lanes *= 2)
    m[0] = fmaxf(m[0], __shfl_xor_sync(~0u, m[0], lanes));
  return m[0];
}

// Whether lanes are quiet in a channel of the group's, which then is loud in the others: an input
// that is zero there would leave only the quiet. Two of them, if there are three that are `filled`:
// one alone may have a single small number. Those beyond `last` have what that one has.
template <int kLanes, int kCount>
__device__ __forceinline__ bool is_loud_elsewhere(unsigned quiet, unsigned filled, int lane,
                                                  int last) {
  const int group = int(threadIdx.x) % kWarp - lane;  // its first lane
  const auto count = [&](unsigned channels, int i) {
    const unsigned lanes = __ballot_sync(~0u, (channels >> i & 1) != 0 && lane <= last);
    return __popc(lanes >> group & ((1u << kLanes) - 1));
  };
  bool is = false;
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) {
    const int most = count(filled, i) - 1;
    is |= count(quiet, i) >= max(1, min(2, most));
  }
  return is;
}

// Finds the largest of every out channel's in a stage, eight lanes together, and gives it a scale.
// Neighbours of a row's that are in its first and last 16 bytes count too, NaNs do not: consumers
// see them. The first thread is the loader: it copies a row when its stage is free, which is when
// the consumers have done the row before the one that has just got its scales. (Not to wait there,
// and copy when a stage is next found free, takes kb55 in tf32 from 2.28 to 4.14 ms.)
template <typename T>
__device__ __forceinline__ void run_scalers(const WeightGemm& g, const WeightOperands& operands,
                                            const Place& place, Header& header, uint8_t* raw) {
  constexpr int kLanes = 8, kGroups = T::kScalerWarps * kWarp / kLanes;
  constexpr int kCount = T::kTile.out_channels() / kGroups;  // rows of a group
  static_assert(kCount * kGroups == T::kTile.out_channels() && kCount <= kLanes);
  const int thread = int(threadIdx.x) - T::kScalers * kWarp;
  const int lane = thread % kLanes, first = thread / kLanes * kCount;
  Loader<T> loader(g, place);
  if (thread == 0)
    for (int i = 0; i < T::kStages - 1; ++i) loader.load(g, operands, header, raw);
  bool fits = true;
  Stage stage;
  const int stage_rows = T::stage_rows(g);
  const int pitch = T::pitch(g) / kVector, last = pitch - kReach / kVector;  // in vectors
  for (int left = int(place.end - place.begin); left > 0;
       left -= stage_rows, stage.next(T::kStages)) {
    ptx::barrier_wait(&header.raw_full[stage.index], stage.parity);
    const float4* from =
        reinterpret_cast<const float4*>(raw + stage.index * T::kRawBytes) + first * pitch;
    float largest[kCount] = {};
    for (int box = min(left, stage_rows); box > 0; --box, from += T::kTile.out_channels() * pitch)
#pragma unroll
      for (int j = 0; j <= kStagePixels / kVector / kLanes; ++j) {
        if (j * kLanes > last) break;
        const float4* at = from + min(j * kLanes + lane, last);
#pragma unroll
        for (int i = 0; i < kCount; ++i, at += pitch)
          largest[i] = fmaxf(fmaxf(largest[i], fmaxf(fabsf(at->x), fabsf(at->y))),
                             fmaxf(fabsf(at->z), fabsf(at->w)));
      }
    float own[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) own[i] = largest[i];
    const Scale scale = choose_scale(__float_as_uint(scatter_max(largest, lane)));
    fits &= scale.fits;
    if constexpr (T::kTile.narrow) {
      // Channels of which all that the lane has is too small to split.
      const float smallest = g.smallest * scale.magnitude * kHalfUnit;
      const int group = int(threadIdx.x) % kWarp - lane;  // its first lane
      unsigned quiet = 0, filled = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float least = __shfl_sync(~0u, smallest, group + i);
        filled |= unsigned(own[i] != 0) << i;
        quiet |= unsigned(own[i] < least) << i;
      }
      quiet &= filled;
      if (__any_sync(~0u, quiet != 0))
        fits &= !is_loud_elsewhere<kLanes, kCount>(quiet, filled, lane, last);
    }
    if (lane < kCount)
      header.row_scale[stage.index][first + lane] = {scale.factor, scale.magnitude * kHalfUnit};
    ptx::barrier_arrive(&header.raw_scaled[stage.index]);
    if (thread == 0) loader.load(g, operands, header, raw);
  }
  if (!fits) operands.bad_blocks[blockIdx.x] = 1;
}

// Copies a thread's cell of the channels of the sum from `k` on, where a stride makes several of a
// channel; `from` is what phase 0 of the tensor's first channel reads, (h, w) of the tensor.
template <int kChannels, int kPitch>
__device__ __forceinline__ void copy_phases(const WeightGemm& g, const Place& place,
                                            const float* input, const float* from, int h, int w,
                                            int k, uint32_t to) {
  const int channel = g.by_phases.quotient(k), phase = k - channel * g.phases();
  int phase_h = g.by_phases_w.quotient(phase), phase_w = phase - phase_h * g.phases_w;
  from += (place.group * g.group_channels() + channel) * g.channel_stride + phase_h * g.row_stride +
          phase_w;
#pragma unroll 1
  for (int i = 0; i < kChannels; ++i, ++k, to += kPitch) {
    const bool inside = k < g.channels && unsigned(h + phase_h) < unsigned(g.height) &&
                        unsigned(w + phase_w) < unsigned(g.width);
    ptx::copy_float(to, inside ? from : input, inside);
    ++from;
    if (++phase_w < g.phases_w) continue;
    phase_w = 0;
    from += g.row_stride - g.phases_w;
    if (++phase_h < g.phases_h) continue;
    phase_h = 0;
    from += g.channel_stride - g.phases_h * g.row_stride;
  }
}

// Each thread of a group has a cell of the slots, or of one of as many slots as rows share a stage:
// copies all channels of a pixel to its own places in raw memory, slots ahead, scales and splits
// them. The scale is that of all these slots and channels.
template <typename T>
__device__ __forceinline__ void run_converters(const WeightGemm& g, const WeightOperands& operands,
                                               const Place& place, Header& header, uint8_t* cells,
                                               float* raw) {
  constexpr int kChannels = T::kBlockOctets * kOctet, kCells = T::kCells;
  constexpr int kInputStages = T::kInputStages;
  constexpr int kThreads = T::kGroupWarps * kWarp;  // of a group
  const int index = int(threadIdx.x) - T::kConverters * kWarp;
  const int group = T::kConverterGroups > 1 ? index / kThreads : 0, thread = index % kThreads,
            warp = thread / kWarp;
  // The thread's row of those of a turn, and its cell there.
  const int stage_rows = T::stage_rows(g), pitch = T::pitch(g), ring = T::ring(g);
  const int sharing = T::kTile.narrow ? thread / pitch : 0, cell = thread - sharing * pitch;
  const bool works = thread < kCells && sharing < stage_rows;
  raw += group * T::kGroupFloats + thread;
  Slots<T> slots{Rows(g, place)};  // to copy
  for (int i = 0; i < group; ++i) slots.next(g);
  const auto* const input = static_cast<const float*>(operands.input);
  int ahead = 0;  // slots that are copied, but not converted
  const auto copy = [&](int stage) {
    if (works) {
      Slots<T> own = slots;
      for (int i = 0; i < sharing; ++i) own.next(g);
      if (!own.row.done()) {
        const SlotPlace at(g, place, own);
        const int channel = at.channel, h = at.h, w = at.w + cell * g.stride_w;
        const float* from = input + own.row.image * g.image_stride + h * g.row_stride + w;
        const auto to = uint32_t(__cvta_generic_to_shared(raw + stage * T::kInputFloats));
        if (!T::kGeneral || g.phases() == 1) {
          const bool inside = unsigned(h) < unsigned(g.height) && unsigned(w) < unsigned(g.width);
          const int count = inside ? g.channels - channel : 0;
          from += (place.group * g.channels + channel) * g.channel_stride;
#pragma unroll
          for (int i = 0; i < kChannels; ++i, from += g.channel_stride)
            ptx::copy_float(to + i * kCells * 4, i < count ? from : input, i < count);
        } else {
          copy_phases<kChannels, kCells * 4>(g, place, input, from, h, w, channel, to);
        }
      }
    }
    for (int i = 0; i < stage_rows; ++i, slots.next(g)) ahead += !slots.row.done();
#pragma unroll
    for (int i = 0; i < T::kConverterGroups - 1; ++i) slots.next(g);
    ptx::copy_commit();
  };
  float x[kChannels];
  const auto store = [&](float factor, int slot) {
    const int plane = pitch * kOctet * 2;
#pragma unroll
    for (int octet = 0; octet < T::kBlockOctets; ++octet) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = x[octet * kOctet + 2 * i] * factor;
        const float b = x[octet * kOctet + 2 * i + 1] * factor;
        high[i] = pack(a, b);
        if constexpr (T::kParts == 2) low[i] = pack_rest(a, b, high[i]);
      }
      uint4* to = reinterpret_cast<uint4*>(cells + octet / T::kOctets * T::kGroupBytes +
                                           (slot * T::kOctets + octet % T::kOctets) * plane) +
                  cell;
      const auto write = [&] {
        to[0] = make_uint4(high[0], high[1], high[2], high[3]);
        if constexpr (T::kParts == 2)
          to[T::kPartBytes / 16] = make_uint4(low[0], low[1], low[2], low[3]);
      };
      write();
      to += ring * T::kOctets * pitch;
      if (slot < T::kTile.mirrored()) write();
    }
  };

#pragma unroll 1
  for (int i = 0; i < kInputStages - 1; ++i) copy(i);
  Stage slot, stage;
  for (int i = 0; i < group + sharing; ++i) slot.next(ring);
  for (; ahead > 0; ahead -= stage_rows, stage.next(kInputStages)) {
    uint32_t* const maxima = header.largest[group][stage.index];
    copy((stage.index + kInputStages - 1) % kInputStages);
    ptx::copy_wait<kInputStages - 1>();
    const bool active = works && sharing < ahead;
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      x[i] = active ? raw[stage.index * T::kInputFloats + i * kCells] : 0;
    float largest = 0;
#pragma unroll
    for (const float value : x) largest = fmaxf(largest, fabsf(value));
    maxima[warp] = __reduce_max_sync(~0u, __float_as_uint(largest));
    ptx::sync_threads<kThreads>(1 + group);
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < T::kGroupWarps; ++i) most = max(most, maxima[i]);
    const Scale scale = choose_scale(most);
    // Where as many numbers as half a channel's are too small to split, that is no accident.
    const float smallest = g.smallest * scale.magnitude * kHalfUnit;
    int tiny = 0;
#pragma unroll
    for (const float value : x) tiny += fabsf(value) < smallest && value != 0;
    const bool many = __reduce_add_sync(~0u, tiny) >= kWarp / 2;
    if (many || !scale.fits) operands.bad_blocks[blockIdx.x] = 1;

    if (active) {
      ptx::barrier_wait(&header.cells_empty[slot.index], slot.parity ^ 1);
      store(scale.factor, slot.index);
      if (cell == 0) header.cells_unit[slot.index] = scale.magnitude * kHalfUnit;
      ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
      ptx::barrier_arrive(&header.cells_full[slot.index]);
    }
    for (int i = 0; i < T::kConverterGroups * stage_rows; ++i) slot.next(ring);
  }
}

}  // namespace convops::cuda::implicit_gemm_weight
