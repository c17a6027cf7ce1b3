// Convolution by its definition on FMA units: an implicit GEMM that reads every tensor where it
// lies. No workspace (backward-weight takes some to fill the chip), any strides, sizes, groups, all
// three directions; the algorithm that can always run. float32 is IEEE whatever the precision asked
// for.
//
//                    rows m        columns n        sum k            A            B
//   forward          out channel   output pixel     tap (c, kh, kw)  weight       input
//   backward-input   in channel    input pixel      tap (o, kh, kw)  weight       grad_output
//   backward-weight  out channel   tap (c, kh, kw)  output pixel     grad_output  input
//
// A block computes one tile of one group. B is gathered: a pixel gives a base and coordinates, a
// tap gives offsets, and what falls outside is zero. Pixels are the fastest index of a warp's loads
// in every direction, so loads along W are coalesced. Backward-weight's sum runs over rows of
// output pixels; blocks share it (split-K) and a second kernel adds their parts in order.
#include <algorithm>

#include "cuda/algorithms.h"
#include "cuda/check.h"
#include "cuda/definition.cuh"
#include "cuda/types.cuh"
#include "integers.h"

namespace convops::cuda {
namespace {

template <int kM_, int kN_, int kK_, int kThreadM_, int kThreadN_>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kK = kK_;                // of a block, per step along k
  static constexpr int kThreadM = kThreadM_, kThreadN = kThreadN_;  // of a thread
  static constexpr int kThreads = kM / kThreadM * (kN / kThreadN);
  static_assert(kThreads == 256, "loads below are spread over 256 threads");
};
// 4×4 accumulators a thread: 16 FMA for two 16-byte reads of shared memory.
using DenseTile = Tile<64, 64, 16, 4, 4>;
// Few rows (depthwise, small groups): as many columns as threads, so little of the tile is wasted.
using ThinTile = Tile<4, 256, 8, 4, 1>;
// The same for backward-weight, whose columns are taps and whose sum is long.
using ThinWeightTile = Tile<4, 64, 32, 1, 1>;

constexpr int64_t kMaxGridYZ = 65535;
constexpr int64_t kMaxSide = int64_t{1} << 30;  // coordinates are int, sizes and offsets 64-bit

// A position of B: where it is read from in the tensor, and the coordinates that may fall outside.
struct Pixel {
  int64_t base;  // of the image and group
  int64_t h, w;  // of tap (0, 0); the tap's offset is added (backward-input: subtracted)
};
struct Tap {
  int64_t b_offset;  // channel's place in B
  int64_t a_offset;  // the tap's place in the weight
  int h, w;          // kh · dilation, kw · dilation
};

template <Direction kDirection>
__device__ __forceinline__ Pixel decode_pixel(const ConvProblem& p, int64_t index, int64_t group) {
  constexpr bool kInput = kDirection == Direction::kBackwardInput;
  const Tensor4& space = kInput ? p.input : p.output;
  const int64_t width = space.size[3], height = space.size[2];
  const int64_t line = index / width, w = index % width;
  const int64_t image = line / height, h = line % height;
  if constexpr (kInput)
    return {image * p.output.stride[0] + group * p.group_out_channels() * p.output.stride[1],
            h + p.padding.h, w + p.padding.w};
  else
    return {image * p.input.stride[0] + group * p.group_in_channels() * p.input.stride[1],
            h * p.stride.h - p.padding.h, w * p.stride.w - p.padding.w};
}

template <Direction kDirection>
__device__ __forceinline__ Tap decode_tap(const ConvProblem& p, int index) {
  const int kernel_w = int(p.weight.size[3]), kernel_h = int(p.weight.size[2]);
  const int kw = index % kernel_w, rest = index / kernel_w;
  const int kh = rest % kernel_h, channel = rest / kernel_h;
  const bool input = kDirection == Direction::kBackwardInput;
  return {
      channel * (input ? p.output.stride[1] : p.input.stride[1]),
      channel * p.weight.stride[input ? 0 : 1] + kh * p.weight.stride[2] + kw * p.weight.stride[3],
      kh * int(p.dilation.h), kw * int(p.dilation.w)};
}

// B's element, zero outside.
template <Direction kDirection, typename T>
__device__ __forceinline__ AccumulateType<T> gather(const ConvProblem& p, const T* tensor,
                                                    const Pixel& pixel, const Tap& tap) {
  int64_t h, w;
  bool inside;
  if constexpr (kDirection == Direction::kBackwardInput) {
    // Output coordinates; exact only where the stride divides.
    const int above = int(pixel.h - tap.h), left = int(pixel.w - tap.w);
    const int stride_h = int(p.stride.h), stride_w = int(p.stride.w);
    h = above / stride_h;
    w = left / stride_w;
    inside = above >= 0 && left >= 0 && h * stride_h == above && w * stride_w == left &&
             h < p.output.size[2] && w < p.output.size[3];
    if (!inside) return 0;
    return convert<AccumulateType<T>>(
        tensor[pixel.base + tap.b_offset + h * p.output.stride[2] + w * p.output.stride[3]]);
  } else {
    h = pixel.h + tap.h;
    w = pixel.w + tap.w;
    inside = h >= 0 && w >= 0 && h < p.input.size[2] && w < p.input.size[3];
    if (!inside) return 0;
    return convert<AccumulateType<T>>(
        tensor[pixel.base + tap.b_offset + h * p.input.stride[2] + w * p.input.stride[3]]);
  }
}

template <typename Tile, typename Sum>
struct Shared {
  // One element of padding: the stores of backward-weight walk down columns.
  Sum a[Tile::kK][Tile::kM + 1];
  Sum b[Tile::kK][Tile::kN + 1];
  // Where the taps of a step lie, of this one and the next: divided out once for the block.
  Tap taps[2][Tile::kK];
};

// accumulators += a · b over one step of the shared tiles. Row i of a thread is m = i · (kM /
// kThreadM)
// + its row, so that a warp reads neighbours.
template <typename Tile, typename Sum>
__device__ __forceinline__ void multiply(const Shared<Tile, Sum>& shared, int row, int column,
                                         Sum (&sums)[Tile::kThreadM][Tile::kThreadN]) {
#pragma unroll
  for (int k = 0; k < Tile::kK; ++k) {
    Sum a[Tile::kThreadM], b[Tile::kThreadN];
#pragma unroll
    for (int i = 0; i < Tile::kThreadM; ++i)
      a[i] = shared.a[k][row + i * (Tile::kM / Tile::kThreadM)];
#pragma unroll
    for (int j = 0; j < Tile::kThreadN; ++j)
      b[j] = shared.b[k][column + j * (Tile::kN / Tile::kThreadN)];
#pragma unroll
    for (int i = 0; i < Tile::kThreadM; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kThreadN; ++j) sums[i][j] += a[i] * b[j];
  }
}

// Forward and backward-input: columns are pixels, the sum is over taps. One block a multiprocessor
// is what the registers must allow at least: without the 1 ptxas aims at two and spills. Grid: x
// pixel tiles, y row tiles, z groups.
template <Direction kDirection, typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    pixels_kernel(const __grid_constant__ ConvProblem p, const T* __restrict__ tensor,
                  const T* __restrict__ weight, const T* __restrict__ bias,
                  T* __restrict__ result) {
  using Sum = AccumulateType<T>;
  constexpr bool kInput = kDirection == Direction::kBackwardInput;
  __shared__ Shared<Tile, Sum> shared;

  const int64_t group = blockIdx.z;
  const Tensor4& out = kInput ? p.input : p.output;
  const int64_t rows = kInput ? p.group_in_channels() : p.group_out_channels();
  const int64_t pixels = out.size[0] * out.size[2] * out.size[3];
  const int taps = int((kInput ? p.group_out_channels() : p.group_in_channels()) *
                       p.weight.size[2] * p.weight.size[3]);
  const int64_t m0 = int64_t(blockIdx.y) * Tile::kM, n0 = int64_t(blockIdx.x) * Tile::kN;
  const T* group_weight = weight + group * p.group_out_channels() * p.weight.stride[0];
  const int64_t weight_row_stride = p.weight.stride[kInput ? 1 : 0];

  // This thread loads one column of B throughout.
  constexpr int kLoadRows = Tile::kThreads / Tile::kN;
  const int load_n = threadIdx.x % Tile::kN, load_k = threadIdx.x / Tile::kN;
  const bool load_inside = n0 + load_n < pixels;
  const Pixel pixel = decode_pixel<kDirection>(p, load_inside ? n0 + load_n : 0, group);

  constexpr int kColumns = Tile::kN / Tile::kThreadN;
  const int row = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  Sum sums[Tile::kThreadM][Tile::kThreadN] = {};

  const auto decode_step = [&](int k0, int buffer) {
    if (threadIdx.x < Tile::kK && k0 + int(threadIdx.x) < taps)
      shared.taps[buffer][threadIdx.x] = decode_tap<kDirection>(p, k0 + threadIdx.x);
  };
  decode_step(0, 0);
  __syncthreads();

  for (int k0 = 0; k0 < taps; k0 += Tile::kK) {
    const int buffer = k0 / Tile::kK % 2;
    decode_step(k0 + Tile::kK, 1 - buffer);
#pragma unroll
    for (int k = load_k; k < Tile::kK; k += kLoadRows) {
      Sum value = 0;
      if (load_inside && k0 + k < taps)
        value = gather<kDirection>(p, tensor, pixel, shared.taps[buffer][k]);
      shared.b[k][load_n] = value;
    }
    for (int i = threadIdx.x; i < Tile::kM * Tile::kK; i += Tile::kThreads) {
      const int k = i % Tile::kK, m = i / Tile::kK;
      Sum value = 0;
      if (k0 + k < taps && m0 + m < rows)
        value = convert<Sum>(
            group_weight[shared.taps[buffer][k].a_offset + (m0 + m) * weight_row_stride]);
      shared.a[k][m] = value;
    }
    __syncthreads();
    multiply<Tile>(shared, row, column, sums);
    __syncthreads();
  }

  struct Place {
    int64_t image, h, w;
    T* first;  // channel
  };
  const auto find = [&](int64_t n) {
    const int64_t w = n % out.size[3], line = n / out.size[3];
    const int64_t h = line % out.size[2], image = line / out.size[2];
    return Place{image, h, w,
                 result + image * out.stride[0] + h * out.stride[2] + w * out.stride[3]};
  };
  constexpr int kRows = Tile::kM / Tile::kThreadM;
  bool nan = false;
#pragma unroll
  for (int j = 0; j < Tile::kThreadN; ++j) {
    const int64_t n = n0 + column + j * kColumns;
    if (n >= pixels) continue;
    const Place place = find(n);
#pragma unroll
    for (int i = 0; i < Tile::kThreadM; ++i) {
      const int64_t m = m0 + row + i * kRows;
      if (m >= rows) continue;
      const int64_t channel = group * rows + m;
      Sum value = sums[i][j];
      if (bias) value += convert<Sum>(bias[channel * p.bias_stride]);
      nan |= value != value;
      place.first[channel * out.stride[1]] = convert<T>(value);
    }
  }
  if constexpr (kInput) {
    // NaN may come of zeros outside of grad_output.
    const int64_t row_end = min(m0 + Tile::kM, rows);
    const int64_t end = nan ? min(n0 + Tile::kN, pixels) : 0;
#pragma unroll 1
    for (int64_t n = n0 + column; n < end; n += kColumns) {
      const Place place = find(n);
#pragma unroll 1
      for (int64_t m = m0 + row; m < row_end; m += kRows) {
        const int64_t channel = group * rows + m;
        T& value = place.first[channel * out.stride[1]];
        if (convert<Sum>(value) != convert<Sum>(value))
          value = convert<T>(
              backward_input_element(p, tensor, weight, place.image, channel, place.h, place.w));
      }
    }
  }
}

// Backward-weight: columns are taps, the sum is over output rows [split · rows / splits, ...).
// Grid: x tap tiles, y row tiles, z groups · splits. Without splits the result itself is written.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    taps_kernel(const __grid_constant__ ConvProblem p, const T* __restrict__ input,
                const T* __restrict__ grad_output, int splits,
                AccumulateType<T>* __restrict__ partial, T* __restrict__ result) {
  using Sum = AccumulateType<T>;
  constexpr Direction kDirection = Direction::kBackwardWeight;
  __shared__ Shared<Tile, Sum> shared;

  const int64_t group = blockIdx.z / splits, split = blockIdx.z % splits;
  const int64_t rows = p.group_out_channels();
  const int taps = int(p.taps());
  const int64_t m0 = int64_t(blockIdx.y) * Tile::kM, n0 = int64_t(blockIdx.x) * Tile::kN;

  // This thread loads one pixel of each step, for several taps of B and several rows of A.
  constexpr int kLoadColumns = Tile::kThreads / Tile::kK;
  constexpr int kTapsPerThread = Tile::kN / kLoadColumns;
  static_assert(kTapsPerThread * kLoadColumns == Tile::kN);
  const int load_k = threadIdx.x % Tile::kK, load_n = threadIdx.x / Tile::kK;
  Tap load_taps[kTapsPerThread];
#pragma unroll
  for (int i = 0; i < kTapsPerThread; ++i) {
    const int64_t n = n0 + load_n + i * kLoadColumns;
    load_taps[i] = decode_tap<kDirection>(p, n < taps ? int(n) : 0);
  }

  constexpr int kColumns = Tile::kN / Tile::kThreadN;
  const int row = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  // Each row's sum is added to the total apart: the error grows with sqrt(rows), not sqrt(pixels).
  Sum totals[Tile::kThreadM][Tile::kThreadN] = {};

  const int64_t width = p.output.size[3], height = p.output.size[2];
  const int64_t lines = p.output.size[0] * height;
  for (int64_t line = lines * split / splits; line < lines * (split + 1) / splits; ++line) {
    const Pixel line_start = decode_pixel<kDirection>(p, line * width, group);
    const T* grad_line = grad_output + line / height * p.output.stride[0] +
                         line % height * p.output.stride[2] + group * rows * p.output.stride[1];
    Sum sums[Tile::kThreadM][Tile::kThreadN] = {};
    for (int64_t w0 = 0; w0 < width; w0 += Tile::kK) {
      const int64_t w = w0 + load_k;
      const Pixel pixel{line_start.base, line_start.h, line_start.w + w * p.stride.w};
#pragma unroll
      for (int i = 0; i < kTapsPerThread; ++i)
        shared.b[load_k][load_n + i * kLoadColumns] =
            w < width ? gather<kDirection>(p, input, pixel, load_taps[i]) : Sum(0);
      for (int m = load_n; m < Tile::kM; m += kLoadColumns)
        shared.a[load_k][m] =
            w < width && m0 + m < rows
                ? convert<Sum>(grad_line[w * p.output.stride[3] + (m0 + m) * p.output.stride[1]])
                : Sum(0);
      __syncthreads();
      multiply<Tile>(shared, row, column, sums);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < Tile::kThreadM; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kThreadN; ++j) totals[i][j] += sums[i][j];
  }

#pragma unroll
  for (int i = 0; i < Tile::kThreadM; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kThreadN; ++j) {
      const int64_t m = m0 + row + i * (Tile::kM / Tile::kThreadM), n = n0 + column + j * kColumns;
      if (m >= rows || n >= taps) continue;
      const int64_t o = group * rows + m;
      if (partial)
        partial[(split * p.out_channels() + o) * taps + n] = totals[i][j];
      else
        result[o * p.weight.stride[0] + decode_tap<kDirection>(p, int(n)).a_offset] =
            convert<T>(totals[i][j]);
    }
}

// Adds the splits in order and rounds once.
template <typename T>
__global__ void __launch_bounds__(256) reduce_kernel(const __grid_constant__ ConvProblem p,
                                                     const AccumulateType<T>* __restrict__ partial,
                                                     int splits, T* __restrict__ result) {
  const int64_t taps = p.taps(), elements = p.out_channels() * taps;
  const int64_t element = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (element >= elements) return;
  AccumulateType<T> sum = 0;
  for (int split = 0; split < splits; ++split) sum += partial[split * elements + element];
  const Tap tap = decode_tap<Direction::kBackwardWeight>(p, int(element % taps));
  result[element / taps * p.weight.stride[0] + tap.a_offset] = convert<T>(sum);
}

// Rows of the GEMM: channels of a group on the result's side.
int64_t gemm_rows(const ConvProblem& p) {
  return p.direction == Direction::kBackwardInput ? p.group_in_channels() : p.group_out_channels();
}
bool is_thin(const ConvProblem& p) { return gemm_rows(p) <= ThinTile::kM * 2; }

// Blocks of backward-weight without splits.
int64_t weight_tiles(const ConvProblem& p) {
  const int64_t tile_m = is_thin(p) ? ThinWeightTile::kM : DenseTile::kM;
  const int64_t tile_n = is_thin(p) ? ThinWeightTile::kN : DenseTile::kN;
  return ceil_divide(gemm_rows(p), tile_m) * ceil_divide(p.taps(), tile_n) * p.groups;
}

int64_t partial_bytes(const ConvProblem& p) {
  return p.weight.numel() * (p.dtype == DType::kFloat64 ? 8 : 4);
}

// As many splits as give every multiprocessor several blocks.
int64_t wanted_splits(const ConvProblem& p, const Device& device) {
  constexpr int64_t kBlocksPerProcessor = 6;
  const int64_t lines = p.batch() * p.output_size().h;
  const int64_t splits = kBlocksPerProcessor * device.processors / weight_tiles(p);
  return std::max<int64_t>(1, std::min({splits, lines, kMaxGridYZ / p.groups}));
}

// Blocks, and how many steps along k each takes one after the other.
struct Steps {
  double blocks, of_a_block;
};

Steps steps_of(const ConvProblem& p, const Device& device) {
  const bool thin = is_thin(p);
  if (p.direction == Direction::kBackwardWeight) {
    const int64_t splits = wanted_splits(p, device);
    const int64_t lines = ceil_divide(p.batch() * p.output_size().h, splits);
    const int64_t k = thin ? ThinWeightTile::kK : DenseTile::kK;
    return {double(weight_tiles(p) * splits), double(lines * ceil_divide(p.output_size().w, k))};
  }
  const Tensor4& result = p.result();
  const int64_t channels =
      p.direction == Direction::kForward ? p.group_in_channels() : p.group_out_channels();
  const int64_t pixels = result.size[0] * result.size[2] * result.size[3];
  const int64_t tile_m = thin ? ThinTile::kM : DenseTile::kM;
  const int64_t tile_n = thin ? ThinTile::kN : DenseTile::kN;
  return {double(ceil_divide(pixels, tile_n) * ceil_divide(gemm_rows(p), tile_m) * p.groups),
          double(ceil_divide(channels * p.kernel().h * p.kernel().w,
                             thin ? ThinTile::kK : DenseTile::kK))};
}

template <Direction kDirection, typename T, typename Tile>
void launch_pixels(const ConvProblem& p, const Operands& operands, cudaStream_t stream) {
  constexpr bool kInput = kDirection == Direction::kBackwardInput;
  const Tensor4& out = kInput ? p.input : p.output;
  const int64_t pixels = out.size[0] * out.size[2] * out.size[3];
  const dim3 grid(unsigned(ceil_divide(pixels, Tile::kN)),
                  unsigned(ceil_divide(gemm_rows(p), Tile::kM)), unsigned(p.groups));
  pixels_kernel<kDirection, T, Tile><<<grid, Tile::kThreads, 0, stream>>>(
      p, static_cast<const T*>(kInput ? operands.output : operands.input),
      static_cast<const T*>(operands.weight), static_cast<const T*>(operands.bias),
      static_cast<T*>(kInput ? operands.input : operands.output));
  CONVOPS_LAUNCH_CHECK("direct");
}

template <typename T, typename Tile>
void launch_taps(const ConvProblem& p, const Operands& operands, int splits, void* partial,
                 cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_divide(p.taps(), Tile::kN)),
                  unsigned(ceil_divide(gemm_rows(p), Tile::kM)), unsigned(p.groups * splits));
  taps_kernel<T, Tile><<<grid, Tile::kThreads, 0, stream>>>(
      p, static_cast<const T*>(operands.input), static_cast<const T*>(operands.output), splits,
      static_cast<AccumulateType<T>*>(partial), static_cast<T*>(operands.weight));
  CONVOPS_LAUNCH_CHECK("direct backward-weight");
}

template <typename T>
void run_typed(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  const auto stream = static_cast<cudaStream_t>(execution.stream);
  const bool thin = is_thin(p);
  switch (p.direction) {
    case Direction::kForward:
      return thin ? launch_pixels<Direction::kForward, T, ThinTile>(p, operands, stream)
                  : launch_pixels<Direction::kForward, T, DenseTile>(p, operands, stream);
    case Direction::kBackwardInput:
      return thin ? launch_pixels<Direction::kBackwardInput, T, ThinTile>(p, operands, stream)
                  : launch_pixels<Direction::kBackwardInput, T, DenseTile>(p, operands, stream);
    case Direction::kBackwardWeight:
      break;
  }
  // Fewer splits where the workspace is short; one needs none.
  const int64_t affordable = execution.workspace_bytes / partial_bytes(p);
  const int splits =
      int(std::max<int64_t>(1, std::min(wanted_splits(p, *execution.device), affordable)));
  void* partial = splits > 1 ? execution.workspace : nullptr;
  if (thin)
    launch_taps<T, ThinWeightTile>(p, operands, splits, partial, stream);
  else
    launch_taps<T, DenseTile>(p, operands, splits, partial, stream);
  if (!partial) return;
  reduce_kernel<T><<<unsigned(ceil_divide(p.weight.numel(), 256)), 256, 0, stream>>>(
      p, static_cast<const AccumulateType<T>*>(partial), splits, static_cast<T*>(operands.weight));
  CONVOPS_LAUNCH_CHECK("direct backward-weight reduction");
}

class Direct final : public Algorithm {
 public:
  std::string name() const override { return "direct"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device&) const override {
    if (p.groups > kMaxGridYZ || ceil_divide(gemm_rows(p), ThinTile::kM) > kMaxGridYZ)
      return "more than 65535 groups or tiles of channels";
    if (p.weight.numel() > INT32_MAX) return "a weight of more than 2^31 elements";
    for (const Pair side : {p.input_size(), p.output_size(), p.dilation})
      if (std::max(side.h, side.w) > kMaxSide) return "a side of more than 2^30";
    return "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    // Fitted to an H200 (15% root mean square on the layers of five networks): a block's step along
    // k, waiting, and what every further block of a multiprocessor adds to it; float64 runs at half
    // rate.
    constexpr double kStepSeconds = 1.5e-6, kThinForwardStepSeconds = 1.1e-6;
    constexpr double kForwardWaitSeconds = 2.2e-6, kBackwardWaitSeconds = 3e-6;
    constexpr double kWeightWaitSeconds = 6e-6, kLaunchSeconds = 4e-6;
    const bool forward = p.direction == Direction::kForward;
    const double wait = forward                                    ? kForwardWaitSeconds
                        : p.direction == Direction::kBackwardInput ? kBackwardWaitSeconds
                                                                   : kWeightWaitSeconds;
    const Steps work = steps_of(p, device);
    double step = forward && is_thin(p) ? kThinForwardStepSeconds : kStepSeconds;
    if (p.dtype == DType::kFloat64) step *= 2;
    const double others = std::max(0.0, work.blocks / device.processors - 1);
    return work.of_a_block * (wait + others * step) + kLaunchSeconds;
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    if (p.direction != Direction::kBackwardWeight || p.batch() == 0) return {0, 0};
    const int64_t splits = wanted_splits(p, device);
    return {0, splits > 1 ? splits * partial_bytes(p) : 0};
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    dispatch(p.dtype, [&](auto tag) { run_typed<decltype(tag)>(p, operands, execution); });
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_direct() { return std::make_unique<Direct>(); }

}  // namespace convops::cuda
