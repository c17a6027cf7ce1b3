// tma_im2col_weight of float32: TF32 tensor cores, one product for `tf32`, three of numbers in two
// parts for `ieee` (see tma_im2col_weight_sm90.cu for what is computed, tma_im2col_weight.cuh for
// how data comes there).
//
// Pixels are k's, and of TF32 wgmma reads operands from shared memory only where k's are
// neighbours. So the input's slots are operand A, from registers, and the block's out channels, of
// which there are fewer, are turned once in shared memory, as B:
//
//   turning warps   boxes of 32 pixels × 32 out channels → the same as rows of pixels, in parts
//   consumers       slots → registers, split; times B, for all out channels of the tile
//
// Which channel is a row of A, or a column of B, and which pixel a k, is free as long as all agree.
// It is chosen so that a lane takes neighbours at once, lanes that load or store together find
// their swizzled 16 bytes in different banks, and a warp's sums leave in whole lines.
//
// TF32 has float32's range, so data needs no scales. What is too large for its parts, infinite or
// NaN makes a sum that is not finite, and such are summed again by their definition.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tf32_parts.cuh"
#include "cuda/tma_im2col_weight.cuh"

namespace convops::cuda {
namespace {

using namespace tma_im2col_weight;

constexpr int kTurningWarps = 2;
constexpr int kStepPixels = 8;  // k's of an instruction

template <PixelTile kTile, int kProducts_>
struct FloatTraits : Traits<kTile, 4 * slot_warpgroups(kTile), kTurningWarps,
                            kProducts_ == 1 ? 0 : kTile.out_boxes> {
  static constexpr int kProducts = kProducts_;
  // Instructions of a warpgroup side by side, and neighbouring channels of a lane, rows of them.
  static constexpr int kRows = kTile.slots / (2 * slot_warpgroups(kTile));
  static constexpr int kVector = 2 * kRows;
  static constexpr int kSums = kTile.out_channels() / 2;  // of a thread's instruction
};

// Step s of a stage has its eight pixels from 8s on: k's t and t + 4 (t below 4) are 2t and 2t + 1.
__device__ __forceinline__ int step_pixel(int k) { return k % 4 * 2 + k / 4; }
// Where a channel of a pixel is in a box of the copy engine's.
__device__ __forceinline__ int box_place(int pixel, int channel) {
  return pixel * kMapRowBytes + (channel / 4 ^ pixel % 8) * 16 + channel % 4 * 4;
}

// Turns boxes of out channels in place; second parts come behind them. A lane has four out channels
// 4q ... of four pixels, k's of half a step: they become four rows, q and every eighth from there.
template <typename T>
__device__ __forceinline__ void turn(Header& header, uint8_t* ring) {
  using Parts = Tf32Parts<T::kProducts>;
  constexpr PixelTile kTile = T::kTile;
  constexpr int kHalves = 2, kQuads = kTile.side / 4 * kTile.side / 4 / kWarp;  // of a lane
  const int warp = int(threadIdx.x) / kWarp - T::kConsumerWarps - 1;
  const int lane = int(threadIdx.x) % kWarp, quad = lane % 8;
  Stage<T::kStages> stage;
#pragma unroll 1
  for (int i = header.share.begin; i < header.share.end; ++i, stage.next()) {
    ptx::barrier_wait(&header.full[stage.index], stage.parity);
#pragma unroll 1
    for (int j = warp; j < kTile.out_boxes; j += kTurningWarps) {
      uint8_t* const box = ring + stage.index * T::kStageBytes + j * kTile.box_bytes();
      float4 channels[kQuads][4];
#pragma unroll
      for (int item = 0; item < kQuads; ++item)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int chunk = lane / 8 + item * 4;  // of k's
          const int pixel = chunk / kHalves * kStepPixels + step_pixel(chunk % kHalves * 4 + k);
          channels[item][k] = *reinterpret_cast<const float4*>(box + box_place(pixel, quad * 4));
        }
      __syncwarp();
#pragma unroll
      for (int item = 0; item < kQuads; ++item) {
        const int chunk = lane / 8 + item * 4;
        const auto store_row = [&](int row, float a, float b, float c, float d) {
          const Parts parts[] = {Parts::of(a), Parts::of(b), Parts::of(c), Parts::of(d)};
          uint8_t* const to = box + (quad + 8 * row) * kMapRowBytes + (chunk ^ quad) * 16;
#pragma unroll
          for (int part = 0; part < Parts::kCount; ++part)
            *reinterpret_cast<uint4*>(to + part * kTile.out_boxes * kTile.box_bytes()) = {
                parts[0].part[part], parts[1].part[part], parts[2].part[part], parts[3].part[part]};
        };
        const auto& [a, b, c, d] = channels[item];
        store_row(0, a.x, b.x, c.x, d.x);
        store_row(1, a.y, b.y, c.y, d.y);
        store_row(2, a.z, b.z, c.z, d.z);
        store_row(3, a.w, b.w, c.w, d.w);
      }
    }
    ::cuda::ptx::fence_proxy_async(::cuda::ptx::space_shared);
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&header.turned[stage.index]);
  }
}

// The out channel of the tile that is B's column.
__device__ __forceinline__ int out_channel_of(int column) {
  return column / 32 * 32 + column % 8 * 4 + column % 32 / 8;
}

// The first of a lane's channels among those of the tile's slots: a warp's rows of instructions are
// lane / 4 and 8 more.
template <typename T>
__device__ __forceinline__ int lane_channel() {
  return int(threadIdx.x) / 4 * T::kVector;
}

// Of one pixel.
template <typename T>
struct Channels {
  float of[T::kVector];

  __device__ __forceinline__ static Channels load(const uint8_t* from) {
    if constexpr (T::kVector == 4) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      return {four.x, four.y, four.z, four.w};
    } else {
      const float2 two = *reinterpret_cast<const float2*>(from);
      return {two.x, two.y};
    }
  }
};

// A lane's neighbouring channels of a slot for each out channel: eight lanes' are a line.
template <typename T>
__device__ __forceinline__ void store_sums(const WeightPixels& g, const Share& share,
                                           const WeightSums& to,
                                           const float (&sums)[T::kRows][T::kSums], float unscale) {
  constexpr int kSide = T::kTile.side;
  const int t = int(threadIdx.x) % 4, place = lane_channel<T>();
  const int slot = share.slot + place / kSide;
  if (slot >= g.slots) return;
  const int block = g.by_taps.quotient(slot), tap = slot - block * g.taps;
  const int tap_h = g.by_kernel_w.quotient(tap), tap_w = tap - tap_h * g.kernel_w;
  const int64_t first = int64_t{share.group} * g.merged * g.out_channels;
  float* const part = static_cast<float*>(to.first) + share.split * g.weights() + tap_h * to.tap_h +
                      tap_w * to.tap_w;
#pragma unroll
  for (int i = 0; i < T::kSums / 2; ++i) {
    const int at = i / 2 * 4 + i % 2;
    const int out_channel = share.out_channel + out_channel_of(i / 2 * 8 + 2 * t + i % 2);
    const int others = g.merged > 1 ? g.by_channels.quotient(out_channel) * g.channels : 0;
    const int channel = block * kSide + place % kSide - others;
    if (out_channel >= g.merged * g.out_channels ||
        first + out_channel >= int64_t{g.groups} * g.out_channels ||
        unsigned(channel) >= unsigned(g.channels))
      continue;
    float* const result = part + (first + out_channel) * to.out_channel + channel;
    if constexpr (T::kRows == 2)
      *reinterpret_cast<float4*>(result) = {sums[0][at] * unscale, sums[0][at + 2] * unscale,
                                            sums[1][at] * unscale, sums[1][at + 2] * unscale};
    else
      *reinterpret_cast<float2*>(result) = {sums[0][at] * unscale, sums[0][at + 2] * unscale};
  }
}

template <typename T>
__device__ __forceinline__ void run_consumers(const WeightPixels& g, const WeightSums& to,
                                              Header& header, const uint8_t* ring) {
  using Operand = Tf32Operand<T::kProducts, 4>;
  constexpr PixelTile kTile = T::kTile;
  constexpr bool kPromotes = T::kProducts > 1;
  constexpr int kOutBytes = kTile.out_boxes * kTile.box_bytes();
  constexpr int kSteps = kTile.side / kStepPixels;
  const int lane = int(threadIdx.x) % kWarp, place = lane_channel<T>();
  // Of the lane's two pixels of a step.
  const uint8_t* const slots = ring + kOutBytes + T::kTurnedBoxes * kTile.box_bytes() +
                               place / kTile.side * kTile.box_bytes();
  const int at[] = {box_place(step_pixel(lane % 4), place % kTile.side),
                    box_place(step_pixel(lane % 4 + 4), place % kTile.side)};
  const ptx::LaidMatrix turned = ptx::boxes(uint32_t(__cvta_generic_to_shared(ring)), 0);
  float sums[T::kRows][T::kSums], totals[T::kRows][T::kSums];
#pragma unroll
  for (int i = 0; i < T::kRows * T::kSums; ++i)
    sums[i / T::kSums][i % T::kSums] = totals[i / T::kSums][i % T::kSums] = 0;
  Operand operands[2][T::kRows];  // the tensor cores read one while the other is made
  Stage<T::kStages> stage;
  const int begin = header.share.begin, end = header.share.end;
#pragma unroll 1
  for (int i = begin; i < end; ++i, stage.next()) {
    const uint8_t* const from = slots + stage.index * T::kStageBytes;
    const int b = stage.index * T::kStageBytes / 16;
    ptx::barrier_wait(&header.full[stage.index], stage.parity);
    ptx::barrier_wait(&header.turned[stage.index], stage.parity);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      constexpr int kStepBytes = kStepPixels * kMapRowBytes;
      const auto even = Channels<T>::load(from + step * kStepBytes + at[0]);
      const auto odd = Channels<T>::load(from + step * kStepBytes + at[1]);
      ptx::wgmma_wait<1>();  // the operand's registers are free
      auto& a = operands[step % 2];
#pragma unroll
      for (int row = 0; row < T::kRows; ++row)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[row].set(half, even.of[2 * row + half]);
          a[row].set(half + 2, odd.of[2 * row + half]);
        }
      ptx::wgmma_fence();
      const ptx::LaidMatrix high = ptx::skip<false>({turned.low + b, turned.high}, step * 16);
#pragma unroll
      for (int row = 0; row < T::kRows; ++row) {
        if constexpr (kPromotes) {
          // The small products first: after them little is cut off.
          const ptx::LaidMatrix low{high.low + kOutBytes / 16, high.high};
          ptx::wgmma_tf32(sums[row], a[row].part[0], low, step > 0);
          ptx::wgmma_tf32(sums[row], a[row].part[1], high, 1);
        }
        ptx::wgmma_tf32(sums[row], a[row].part[0], high, 1);
      }
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
    if (lane == 0) ptx::barrier_arrive(&header.empty[stage.index]);
    if constexpr (kPromotes) {
      // Tensor cores truncate every addition (ptx/truncation.h), of which there are few by now.
#pragma unroll
      for (int j = 0; j < T::kRows * T::kSums; ++j)
        totals[j / T::kSums][j % T::kSums] += sums[j / T::kSums][j % T::kSums];
    }
  }
  const int additions = T::kProducts * kSteps * (kPromotes ? 1 : end - begin);
  store_sums<T>(g, header.share, to, kPromotes ? totals : sums, unscale(additions));
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, 1)
    sum_float_kernel(const __grid_constant__ WeightPixels g,
                     const __grid_constant__ WeightPixelsOperands operands) {
  extern __shared__ __align__(1024) uint8_t shared[];
  run_block<T>(
      g, operands, shared,
      [&](Header& header, uint8_t* ring) { run_consumers<T>(g, operands.sums, header, ring); },
      [](Header& header, uint8_t* ring) { turn<T>(header, ring); });
}

template <int kProducts>
void sum_pixels(const WeightPixels& g, const PixelTile& tile, const WeightPixelsOperands& operands,
                void* stream) {
  with_tile<kFloatTiles>(tile, [&]<int i>() {
    if constexpr (float_tile_serves(kFloatTiles[i], kProducts)) {
      using T = FloatTraits<kFloatTiles[i], kProducts>;
      launch<T>(sum_float_kernel<T>, g, operands, stream);
    }
  });
}

// An element of the gradient: a block's threads have neighbouring channels.
struct Element {
  int out, kh, kw, channel;

  __device__ Element(const ConvProblem& p, int number) {
    const int channels = int(p.group_in_channels()), width = int(p.kernel().w);
    const int line = number / channels, height = int(p.kernel().h);
    channel = number - line * channels;
    kw = line % width;
    kh = line / width % height;
    out = line / width / height;
  }
  __device__ int64_t place(const ConvProblem& p) const {
    const auto& stride = p.weight.stride;
    return out * stride[0] + channel * stride[1] + kh * stride[2] + kw * stride[3];
  }
};

constexpr int kAgainThreads = 256, kAgainElements = 4;  // of a thread

// A thread's share of an element's products. Zeros outside of the input are multiplied.
__device__ double sum_share(const ConvProblem& p, const float* input, const float* grad,
                            const Element& element) {
  input += (element.channel + element.out / p.group_out_channels() * p.group_in_channels()) *
           p.input.stride[1];
  grad += element.out * p.output.stride[1];
  const int pixels = int(p.batch() * p.output_pixels()), width = int(p.output_size().w);
  const int height = int(p.output_size().h);
  double sum = 0;
  for (int pixel = int(threadIdx.x); pixel < pixels && !isnan(sum); pixel += kAgainThreads) {
    const int row = pixel / width, image = row / height;
    const int64_t ow = pixel - row * width, oh = row - image * height;
    const int64_t ih = oh * p.stride.h - p.padding.h + element.kh * p.dilation.h;
    const int64_t iw = ow * p.stride.w - p.padding.w + element.kw * p.dilation.w;
    const bool inside = ih >= 0 && ih < p.input_size().h && iw >= 0 && iw < p.input_size().w;
    const float* const value =
        input + image * p.input.stride[0] + ih * p.input.stride[2] + iw * p.input.stride[3];
    const float* const factor =
        grad + image * p.output.stride[0] + oh * p.output.stride[2] + ow * p.output.stride[3];
    sum += (inside ? double(*value) : 0) * double(*factor);
  }
  return sum;
}

// Finds the elements that are not finite, and sums each by all threads.
__global__ void __launch_bounds__(kAgainThreads)
    sum_again_kernel(const __grid_constant__ ConvProblem p, const float* input, const float* grad,
                     float* weight) {
  __shared__ double sums[kAgainThreads];
  __shared__ uint8_t wrong[kAgainThreads];  // a bit for each of a thread's elements
  const int thread = int(threadIdx.x), count = int(p.weight.numel());
  const int first = int(blockIdx.x) * kAgainThreads * kAgainElements;
  const int mine = first + thread * kAgainElements;
  ptx::wait_for_prerequisites();
  unsigned mask = 0;
  if (mine < count) {
    const float* const from = weight + Element(p, mine).place(p);
#pragma unroll
    for (int i = 0; i < kAgainElements; ++i)
      mask |= unsigned(!isfinite(from[i * p.weight.stride[1]])) << i;
  }
  if (!__syncthreads_or(mask != 0)) return;
  wrong[thread] = uint8_t(mask);
  for (int i = 0; i < kAgainThreads * kAgainElements; ++i) {
    __syncthreads();
    if ((wrong[i / kAgainElements] >> i % kAgainElements & 1) == 0) continue;
    const Element element(p, first + i);
    sums[thread] = sum_share(p, input, grad, element);
    for (int others = kAgainThreads / 2; others > 0; others /= 2) {
      __syncthreads();
      if (thread < others) sums[thread] += sums[thread + others];
    }
    if (thread == 0) weight[element.place(p)] = float(sums[0]);
  }
}

}  // namespace

void sum_pixels_tf32(const WeightPixels& g, const PixelTile& tile,
                     const WeightPixelsOperands& operands, void* stream) {
  sum_pixels<1>(g, tile, operands, stream);
}
void sum_pixels_ieee(const WeightPixels& g, const PixelTile& tile,
                     const WeightPixelsOperands& operands, void* stream) {
  sum_pixels<3>(g, tile, operands, stream);
}

void sum_again(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  launch_early(sum_again_kernel, ceil_divide(p.weight.numel(), kAgainThreads * kAgainElements),
               kAgainThreads, 0, execution, p, static_cast<const float*>(operands.input),
               static_cast<const float*>(operands.output), static_cast<float*>(operands.weight));
}

}  // namespace convops::cuda
