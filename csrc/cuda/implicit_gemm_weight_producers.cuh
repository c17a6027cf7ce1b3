// The producers of implicit_gemm_weight's main kernel: grad_output → raw stages and their scales;
// input → cells of fp16.
#pragma once

#include <cuda_fp16.h>

#include "cuda/implicit_gemm_scale.cuh"
#include "cuda/implicit_gemm_weight_stages.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/max.cuh"

namespace convops::cuda::implicit_gemm_weight {

using implicit_gemm::choose_scale;
using implicit_gemm::Scale;

constexpr float kHalfUnit = 0x1p-14f;  // what 1 stands for where the largest is 1 to 2

// By one thread: a box of out channels × pixels a row; zeros outside of the tensor.
template <typename T>
__device__ __forceinline__ void run_loader(const WeightGemm& g, const WeightOperands& operands,
                                           const Place& place, Header& header, uint8_t* raw) {
  Stage<T::kStages> stage;
  const int channel = place.group * g.out_channels + place.out_channel;
  for (Rows row(g, place); !row.done(); row.next(g), stage.next()) {
    uint64_t* const full = &header.raw_full[stage.index];
    ptx::barrier_wait(&header.raw_empty[stage.index], stage.parity ^ 1);
    ::cuda::ptx::mbarrier_arrive_expect_tx(::cuda::ptx::sem_release, ::cuda::ptx::scope_cta,
                                           ::cuda::ptx::space_shared, full, T::kRawBytes);
    const int kind = row.y % g.row_kinds;
    const int32_t at[4] = {row.x, row.y / g.row_kinds, channel, row.image};
    ptx::copy_box(raw + stage.index * T::kRawBytes, &operands.maps[kind], at, full);
  }
}

// Finds the largest of every out channel's row, eight lanes together. Neighbours of the row's that
// are in its first and last 16 bytes count too.
template <typename T>
__device__ __forceinline__ void run_scalers(const WeightGemm& g, const WeightOperands& operands,
                                            const Place& place, Header& header,
                                            const uint8_t* raw) {
  constexpr int kLanes = 8, kRowsAtOnce = kScalerWarps * kWarp / kLanes;
  constexpr int kVectors = kStagePixels / kVector / kLanes;
  static_assert(kVectors * kVector * kLanes == kStagePixels);
  static_assert(T::kTile.out_channels() % (kWarp / kLanes) == 0, "a warp's lanes end together");
  const int lane = int(threadIdx.x) % kLanes;
  const int first = (int(threadIdx.x) - (kLoader + 1) * kWarp) / kLanes;
  bool fits = true;
  Stage<T::kStages> stage;
  for (Rows row(g, place); !row.done(); row.next(g), stage.next()) {
    ptx::barrier_wait(&header.raw_full[stage.index], stage.parity);
    const float4* from = reinterpret_cast<const float4*>(raw + stage.index * T::kRawBytes) + lane;
#pragma unroll 2
    for (int i = first; i < T::kTile.out_channels(); i += kRowsAtOnce) {
      const float4* vectors = from + i * (kRawPitch / kVector);
      float largest = 0;
      const auto note = [&](const float4& v) {
        largest = ptx::max_nan(largest, ptx::max_nan(ptx::max_nan(fabsf(v.x), fabsf(v.y)),
                                                     ptx::max_nan(fabsf(v.z), fabsf(v.w))));
      };
#pragma unroll
      for (int j = 0; j < kVectors; ++j) note(vectors[j * kLanes]);
      if (lane == 0) note(vectors[kVectors * kLanes]);
#pragma unroll
      for (int lanes = 1; lanes < kLanes; lanes *= 2)
        largest = ptx::max_nan(largest, __shfl_xor_sync(~0u, largest, lanes));
      const Scale scale = choose_scale(__float_as_uint(largest));
      fits &= scale.fits;
      if (lane == 0) header.row_scale[stage.index][i] = {scale.factor, scale.magnitude * kHalfUnit};
    }
    __syncwarp();
    if (threadIdx.x % kWarp == 0) ptx::barrier_arrive(&header.raw_scaled[stage.index]);
  }
  if (!fits) operands.bad_blocks[blockIdx.x] = 1;
}

// Each thread has a column of the rows: reads all channels of a pixel, scales and splits them. The
// scale is the row's, of all channels together.
template <typename T>
__device__ __forceinline__ void run_converters(const WeightGemm& g, const WeightOperands& operands,
                                               const Place& place, Header& header, uint8_t* cells) {
  constexpr int kChannels = T::kBlockOctets * kOctet;
  const int thread = int(threadIdx.x) - kConverters * kWarp, warp = thread / kWarp;
  const float* const first =
      operands.input + (int64_t(place.group) * g.channels + place.channel) * g.channel_stride;
  const int top = place.tap_h * g.dilation_h - g.padding_h;
  const int left = place.tap_w * g.dilation_w - g.padding_w + thread;
  float x[kChannels];
  const auto read = [&](const Rows& row, int tap) {
    const int h = row.y + top + tap * g.dilation_h, w = row.x + left;
    const bool inside =
        unsigned(h) < unsigned(g.height) && unsigned(w) < unsigned(g.width) && thread < kCells;
    const int count = inside ? g.channels - place.channel : 0;
    const float* from = first + row.image * g.image_stride + h * g.row_stride + w;
#pragma unroll
    for (int i = 0; i < kChannels; ++i, from += g.channel_stride)
      x[i] = i < count ? __ldg(from) : 0;
  };
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
  Rows row(g, place);
  int tap = 0;
  if (!row.done()) read(row, tap);
  Stage<T::kRing> slot;
  for (uint32_t turn = 0; !row.done(); turn ^= 1, slot.next()) {
    float largest = 0;
#pragma unroll
    for (const float value : x) largest = ptx::max_nan(largest, fabsf(value));
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
    __syncwarp();
    if (thread % kWarp == 0) ptx::barrier_arrive(&header.cells_full[slot.index]);
    // A run begins with the rows of all taps.
    if (tap < T::kKernelH - 1)
      ++tap;
    else if (row.next(g))
      tap = 0;
    if (!row.done()) read(row, tap);
  }
  if (!fits) operands.bad_blocks[blockIdx.x] = 1;
}

}  // namespace convops::cuda::implicit_gemm_weight
