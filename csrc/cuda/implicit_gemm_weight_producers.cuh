// The producers of implicit_gemm_weight's main kernel: grad_output → raw stages and their scales;
// input → cells of fp16.
#pragma once

#include "cuda/implicit_gemm_weight_stages.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"

namespace convops::cuda::implicit_gemm_weight {

// Copies boxes of out channels × pixels of a row, zeros outside of the tensor.
template <typename T>
class Loader {
 public:
  __device__ Loader(const WeightGemm& g, const Place& place)
      : row_(g, place), channel_(place.group * g.out_channels + place.out_channel) {}

  // The next row, if there is one, by one thread.
  __device__ void load(const WeightGemm& g, const WeightOperands& operands, Header& header,
                       uint8_t* raw) {
    if (row_.done()) return;
    uint64_t* const full = &header.raw_full[stage_.index];
    ptx::barrier_wait(&header.raw_empty[stage_.index], stage_.parity ^ 1);
    ptx::expect_bytes(full, T::kRawBytes);
    const int kind = row_.y % g.row_kinds;
    const int32_t at[4] = {row_.x, row_.y / g.row_kinds, channel_, row_.image};
    ptx::copy_box(raw + stage_.index * T::kRawBytes, &operands.maps[kind], at, full);
    ptx::barrier_arrive(full);
    stage_.next();
    row_.next(g);
  }

 private:
  Rows row_;
  int channel_;
  Stage<T::kStages> stage_;
};

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

// Finds the largest of every out channel's row, eight lanes together, and gives it a scale.
// Neighbours of the row's that are in its first and last 16 bytes count too, NaNs do not: consumers
// see them. The first thread is the loader: it copies a row when its stage is free, which is when
// the consumers have done the row before the one that has just got its scales. (Not to wait there,
// and copy when a stage is next found free, takes kb55 in tf32 from 2.28 to 4.14 ms.)
template <typename T>
__device__ __forceinline__ void run_scalers(const WeightGemm& g, const WeightOperands& operands,
                                            const Place& place, Header& header, uint8_t* raw) {
  constexpr int kLanes = 8, kGroups = kScalerWarps * kWarp / kLanes;
  constexpr int kVectors = kStagePixels / kVector / kLanes;
  static_assert(kVectors * kVector * kLanes == kStagePixels);
  constexpr int kCount = T::kTile.out_channels() / kGroups;  // rows of a group
  static_assert(kCount * kGroups == T::kTile.out_channels() && kCount <= kLanes);
  const int thread = int(threadIdx.x) - kScalers * kWarp;
  const int lane = thread % kLanes, first = thread / kLanes * kCount;
  Loader<T> loader(g, place);
  if (thread == 0)
    for (int i = 0; i < T::kStages - 1; ++i) loader.load(g, operands, header, raw);
  bool fits = true;
  Stage<T::kStages> stage;
  const int rows = int(place.end - place.begin);
  for (int row = 0; row < rows; ++row, stage.next()) {
    ptx::barrier_wait(&header.raw_full[stage.index], stage.parity);
    const float4* from = reinterpret_cast<const float4*>(raw + stage.index * T::kRawBytes) +
                         first * (kRawPitch / kVector);
    float largest[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i, from += kRawPitch / kVector) {
      largest[i] = 0;
#pragma unroll
      for (int j = 0; j <= kVectors; ++j) {  // the last is the same for all lanes
        const float4 v = from[j * kLanes + (j < kVectors ? lane : 0)];
        largest[i] =
            fmaxf(fmaxf(largest[i], fmaxf(fabsf(v.x), fabsf(v.y))), fmaxf(fabsf(v.z), fabsf(v.w)));
      }
    }
    const Scale scale = choose_scale(__float_as_uint(scatter_max(largest, lane)));
    fits &= scale.fits;
    if (lane < kCount)
      header.row_scale[stage.index][first + lane] = {scale.factor, scale.magnitude * kHalfUnit};
    ptx::barrier_arrive(&header.raw_scaled[stage.index]);
    if (thread == 0) loader.load(g, operands, header, raw);
  }
  if (!fits) operands.bad_blocks[blockIdx.x] = 1;
}

// Each thread has a column of the rows: copies all channels of a pixel to its own places in raw
// memory, rows ahead, scales and splits them. The scale is the row's, of all channels together.
template <typename T>
__device__ __forceinline__ void run_converters(const WeightGemm& g, const WeightOperands& operands,
                                               const Place& place, Header& header, uint8_t* cells,
                                               float* raw) {
  constexpr int kChannels = T::kBlockOctets * kOctet;
  const int thread = int(threadIdx.x) - kConverters * kWarp, warp = thread / kWarp;
  const float* const first =
      operands.input + (int64_t(place.group) * g.channels + place.channel) * g.channel_stride;
  const int top = place.tap_h * g.dilation_h - g.padding_h;
  const int left = place.tap_w * g.dilation_w - g.padding_w + thread;
  raw += thread;
  // The next row to copy; a run begins with the rows of all taps.
  Rows row(g, place);
  int tap = 0;
  int copied = 0;
  const auto copy = [&](int stage) {
    if (!row.done()) {
      if (thread < kCells) {
        const int h = row.y + top + tap * g.dilation_h, w = row.x + left;
        const bool inside = unsigned(h) < unsigned(g.height) && unsigned(w) < unsigned(g.width);
        const int count = inside ? g.channels - place.channel : 0;
        const float* from = first + row.image * g.image_stride + h * g.row_stride + w;
        const auto to = uint32_t(__cvta_generic_to_shared(raw + stage * T::kInputFloats));
#pragma unroll
        for (int i = 0; i < kChannels; ++i, from += g.channel_stride)
          ptx::copy_float(to + i * kCells * 4, i < count ? from : operands.input, i < count);
      }
      ++copied;
      if (tap < T::kKernelH - 1)
        ++tap;
      else if (row.next(g))
        tap = 0;
    }
    ptx::copy_commit();
  };
  float x[kChannels];
  const auto store = [&](float factor, int slot) {
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
                                           (slot * T::kOctets + octet % T::kOctets) * kPlane) +
                  thread;
      const auto write = [&] {
        to[0] = make_uint4(high[0], high[1], high[2], high[3]);
        if constexpr (T::kParts == 2)
          to[T::kPartBytes / 16] = make_uint4(low[0], low[1], low[2], low[3]);
      };
      write();
      to += T::kRing * T::kOctets * kPlane / 16;
      if (slot < T::kKernelH - 1) write();
    }
  };

  bool fits = true;
#pragma unroll
  for (int i = 0; i < kInputStages - 1; ++i) copy(i);
  Stage<T::kRing> slot;
  Stage<kInputStages> stage;
  for (int converted = 0; converted < copied; ++converted, slot.next(), stage.next()) {
    const int turn = converted % 2;
    copy((stage.index + kInputStages - 1) % kInputStages);
    ptx::copy_wait<kInputStages - 1>();
#pragma unroll
    for (int i = 0; i < kChannels; ++i)
      x[i] = thread < kCells ? raw[stage.index * T::kInputFloats + i * kCells] : 0;
    float largest = 0;
#pragma unroll
    for (const float value : x) largest = fmaxf(largest, fabsf(value));
    header.largest[turn][warp] = __reduce_max_sync(~0u, __float_as_uint(largest));
    ptx::sync_threads<kConverterWarps * kWarp>(1);
    uint32_t most = 0;
#pragma unroll
    for (const uint32_t bits : header.largest[turn]) most = max(most, bits);
    const Scale scale = choose_scale(most);
    // Where as many numbers as half a channel's are too small to split, that is no accident.
    const float smallest = g.smallest * scale.magnitude * kHalfUnit;
    int tiny = 0;
#pragma unroll
    for (const float value : x) tiny += fabsf(value) < smallest && value != 0;
    fits &= scale.fits && __reduce_add_sync(~0u, tiny) < kWarp / 2;

    ptx::barrier_wait(&header.cells_empty[slot.index], slot.parity ^ 1);
    if (thread < kCells) store(scale.factor, slot.index);
    if (thread == 0) header.cells_unit[slot.index] = scale.magnitude * kHalfUnit;
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    ptx::barrier_arrive(&header.cells_full[slot.index]);
  }
  if (!fits) operands.bad_blocks[blockIdx.x] = 1;
}

}  // namespace convops::cuda::implicit_gemm_weight
