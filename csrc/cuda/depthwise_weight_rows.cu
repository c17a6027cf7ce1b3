// Backward-weight of 3×3, 5×5 and 7×7 where rows are vectors: they go from global memory straight
// to registers, some steps before they are used, and what neighbours share goes from lane to lane.
// Neither shared memory nor barriers until a block ends: registers alone bound the bytes on the
// way.
//
//   lane    a strip: kColumns columns of grad_output and the input's columns under them. It walks
//           down, kStride rows of the input and one of grad_output a step, and keeps one sum a tap
//           and the kOpen rows of grad_output that the rows at hand meet.
//   range   all images of a channel lie below each other, kOpen - 1 lines apart, and are cut into
//           ranges of so many lines that blocks come in few, even waves. Lanes that walk down one
//           range lie side by side; a warp has several ranges where rows are short, part of one
//           where they are long: then with a lane more at each side that reads for its neighbour.
//   block   ranges of one channel. Its sums are a partial sum of every tap, or the result.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "cuda/check.h"
#include "cuda/depthwise_weight_rows.h"
#include "cuda/depthwise_weight_sums.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/vector.cuh"
#include "integers.h"

namespace convops::cuda::depthwise_weight {
namespace {

// Padding of half the kernel. kAhead: steps from a row's load to its use, kOpen or 1; kBlocks: that
// registers leave a multiprocessor.
template <int kSize_, int kStride_, int kColumns_, int kAhead_, int kBlocks_>
struct RowWindow {
  static constexpr int kSize = kSize_, kStride = kStride_, kTaps = kSize * kSize;
  static constexpr int kColumns = kColumns_, kReads = kColumns * kStride;
  static constexpr int kOpen = 1 + (kSize - 1) / kStride, kAhead = kAhead_;
  static_assert(kOpen % kAhead == 0);
  // Of a row, from the lanes beside.
  static constexpr int kLeft = kSize / 2, kRight = kSize - kStride - kLeft;
  static_assert(kLeft <= kReads && kRight <= kReads);
  // Large problems of float32 are faster by tiles: where there is hardly anything but products, and
  // where lanes read little.
  static constexpr bool kSmallOnly = kSize == 7 || (kSize == 5 && kStride == 2 && kColumns == 1);
  static constexpr int kBlocks =
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
      1;  // ptxas fits registers for 9.0 and may spill for others
#else
      kBlocks_;
#endif
};

// How a problem is cut.
struct Cut {
  int strips, segment;  // of a row; of the part of it that a warp has
  int lanes, ranges;    // of a range; of a warp, where it has whole rows
  int lines, all_lines;
  int count;   // of ranges, or parts of them
  int chunks;  // blocks of a channel
  Divisor by_channels, by_lanes, by_segments, by_height;

  __host__ __device__ bool whole_rows() const { return segment == strips; }
};

struct RowGradient {
  Cut cut;
  Planes input, grad;
  Tensor4 weight;
  int pad_h, multiplier;
};

// Where a lane walks: its first line, and its strip. Some only read, or do nothing.
struct Lane {
  int line, strip;
  bool reads, sums;

  __device__ Lane(const Cut& cut, int warp) {
    const int lane = threadIdx.x % kWarp, range = cut.by_lanes.quotient(lane);
    const int index = warp * cut.ranges + range;
    const int segments_range = cut.by_segments.quotient(index);
    const int first = cut.by_segments.remainder(index) * cut.segment;
    strip = first + lane - range * cut.lanes - (cut.whole_rows() ? 0 : 1);
    line = segments_range * cut.lines;
    reads = range < cut.ranges && index < cut.count && unsigned(strip) < unsigned(cut.strips);
    sums = reads && strip >= first && strip < first + cut.segment;
  }
};

// What a step reads.
template <typename W, typename T>
struct Rows {
  Vector<T, W::kReads> input[W::kStride];
  Vector<T, W::kColumns> grad;
};

// Reads one line's rows after the other: zeros where the tensors end, and of grad_output beyond the
// range.
template <typename W, typename T>
class RowReader {
 public:
  __device__ RowReader(const RowGradient& p, const Lane& at, const T* input, const T* grad)
      : p_(p),
        height_(int(p.cut.by_height.value)),
        steps_(at.reads ? min(p.cut.lines + W::kOpen - 1, p.cut.all_lines - at.line) : 0),
        lines_(at.sums ? min(p.cut.lines, steps_) : 0),
        next_input_(p.input.image_stride - height_ * W::kStride * p.input.row_stride),
        next_grad_(p.grad.image_stride - height_ * p.grad.row_stride) {
    const int image = p.cut.by_height.quotient(at.line);
    row_ = at.line - image * height_;
    input_ = input + image * p.input.image_stride +
             (row_ * W::kStride - p.pad_h) * p.input.row_stride + at.strip * W::kReads;
    grad_ = grad + image * p.grad.image_stride + row_ * p.grad.row_stride + at.strip * W::kColumns;
  }

  __device__ __forceinline__ void read(Rows<W, T>& to, int step) {
#pragma unroll
    for (int i = 0; i < W::kStride; ++i)
      to.input[i] = Vector<T, W::kReads>::load_or_zeros(
          input_ + i * p_.input.row_stride,
          step < steps_ && unsigned(row_ * W::kStride - p_.pad_h + i) < unsigned(p_.input.height));
    to.grad = Vector<T, W::kColumns>::load_or_zeros(grad_, step < lines_ && row_ < p_.grad.height);
    input_ += W::kStride * p_.input.row_stride;
    grad_ += p_.grad.row_stride;
    if (++row_ == height_) {  // the next image
      row_ = 0;
      input_ += next_input_;
      grad_ += next_grad_;
    }
  }

 private:
  const RowGradient& p_;
  const int height_, steps_, lines_;
  const int64_t next_input_, next_grad_;  // from an image's end to the next one
  const T *input_, *grad_;
  int row_;
};

// A row under a lane's columns, with what the lanes beside it have of it.
template <typename W, typename T>
__device__ __forceinline__ void gather_row(const Vector<T, W::kReads>& own, bool first, bool last,
                                           float (&row)[W::kLeft + W::kReads + W::kRight]) {
  using Own = Vector<T, W::kReads>;
  using Word = typename Own::Word;
  constexpr int kElements = Own::kElements;
  constexpr int kBefore = (W::kLeft + kElements - 1) / kElements,
                kBehind = (W::kRight + kElements - 1) / kElements;
  constexpr int kWords = kBefore + Own::kWords + kBehind;
  const int lane = threadIdx.x % kWarp;
  Word words[kWords];
#pragma unroll
  for (int i = 0; i < kBefore; ++i) {
    const Word word =
        __shfl_sync(~0u, own.words[Own::kWords - kBefore + i], (lane + kWarp - 1) % kWarp);
    words[i] = first ? 0 : word;
  }
#pragma unroll
  for (int i = 0; i < Own::kWords; ++i) words[kBefore + i] = own.words[i];
#pragma unroll
  for (int i = 0; i < kBehind; ++i) {
    const Word word = __shfl_sync(~0u, own.words[i], (lane + 1) % kWarp);
    words[kBefore + Own::kWords + i] = last ? 0 : word;
  }
#pragma unroll
  for (int i = 0; i < W::kLeft + W::kReads + W::kRight; ++i) {
    constexpr int kSkipped = kBefore * kElements - W::kLeft;
    row[i] = unpack_element<T>(words[(kSkipped + i) / kElements], (kSkipped + i) % kElements);
  }
}

// A walk's sum of one tap by its definition: for inputs that are not finite, whose infinities the
// walk multiplies by the zeros around grad_output.
template <typename W, typename T>
__device__ __noinline__ float sum_by_definition(const RowGradient& p, const Lane& at, int kh,
                                                int kw, const T* input, const T* grad) {
  float sum = 0;
#pragma unroll 1
  for (int line = at.line; line < min(at.line + p.cut.lines, p.cut.all_lines); ++line) {
    const int image = p.cut.by_height.quotient(line), row = p.cut.by_height.remainder(line);
    if (row >= p.grad.height) continue;
    const int h = row * W::kStride - p.pad_h + kh;
    const T* const gradients = grad + image * p.grad.image_stride + row * p.grad.row_stride;
    const T* const values = input + image * p.input.image_stride + h * p.input.row_stride;
#pragma unroll 1
    for (int column = at.strip * W::kColumns; column < (at.strip + 1) * W::kColumns; ++column) {
      const int w = column * W::kStride - W::kLeft + kw;
      const bool inside =
          unsigned(h) < unsigned(p.input.height) && unsigned(w) < unsigned(p.input.width);
      sum += (inside ? convert<float>(values[w]) : 0.0f) * convert<float>(gradients[column]);
    }
  }
  return sum;
}

// Grid: x channels within chunks of ranges. Partial sums lie [weight][chunk]; there are none where
// a block has all of its channel.
template <typename W, typename T>
__global__ void __launch_bounds__(kMaxThreads, W::kBlocks)
    rows_kernel(const __grid_constant__ RowGradient p, const T* __restrict__ input,
                const T* __restrict__ grad, float* __restrict__ partial, T* __restrict__ result) {
  ptx::launch_dependents();
  __shared__ float warp_sums[kMaxWarps][kMaxTaps];
  const int chunk = p.cut.by_channels.quotient(blockIdx.x);
  const int channel = p.cut.by_channels.remainder(blockIdx.x);
  input += channel / p.multiplier * p.input.channel_stride;
  grad += channel * p.grad.channel_stride;

  const Lane at(p.cut, chunk * kMaxWarps + int(threadIdx.x) / kWarp);
  const bool first = at.strip == 0, last = at.strip == p.cut.strips - 1;
  float sums[W::kTaps] = {}, gradients[W::kOpen][W::kColumns] = {};
  RowReader<W, T> reader(p, at, input, grad);
  Rows<W, T> ahead[W::kAhead];
#pragma unroll
  for (int i = 0; i < W::kAhead; ++i) reader.read(ahead[i], i);
  const int steps = p.cut.lines + W::kOpen - 1;
#pragma unroll 1
  for (int step = 0; step < steps; step += W::kOpen) {
#pragma unroll
    for (int phase = 0; phase < W::kOpen; ++phase) {  // beyond the last step are zeros
      Rows<W, T>& next = ahead[phase % W::kAhead];
      next.grad.unpack(gradients[phase]);
      float rows[W::kStride][W::kLeft + W::kReads + W::kRight];
#pragma unroll
      for (int i = 0; i < W::kStride; ++i) gather_row<W>(next.input[i], first, last, rows[i]);
      reader.read(next, step + phase + W::kAhead);
#pragma unroll
      for (int kh = 0; kh < W::kSize; ++kh)
#pragma unroll
        for (int kw = 0; kw < W::kSize; ++kw)
#pragma unroll
          for (int j = 0; j < W::kColumns; ++j)
            sums[kh * W::kSize + kw] +=
                gradients[(phase + W::kOpen - kh / W::kStride) % W::kOpen][j] *
                rows[kh % W::kStride][j * W::kStride + kw];
    }
  }

  float zero = 0;
#pragma unroll
  for (float sum : sums) zero += sum * 0.0f;
  if (zero != 0)
#pragma unroll
    for (int tap = 0; tap < W::kTaps; ++tap)
      sums[tap] =
          at.sums ? sum_by_definition<W>(p, at, tap / W::kSize, tap % W::kSize, input, grad) : 0;
  __syncwarp();
  add_lanes(sums, warp_sums[threadIdx.x / kWarp]);
  __syncthreads();
  for (int tap = threadIdx.x; tap < W::kTaps; tap += blockDim.x) {
    float sum = 0;
    for (int warp = 0; warp < int(blockDim.x) / kWarp; ++warp) sum += warp_sums[warp][tap];
    const int64_t element = int64_t(channel) * W::kTaps + tap;
    if (p.cut.chunks > 1)
      partial[element * p.cut.chunks + chunk] = sum;
    else
      weight_at(p.weight, result, element) = convert<T>(sum);
  }
}

// No sum of a lane has many more products, if there is workspace.
constexpr int64_t kMostProducts = 512;

// Cuts the lines such that the blocks end soonest.
template <typename W>
Cut cut_problem(const ConvProblem& p, const Device& device, int64_t most_chunks) {
  const int64_t strips = p.output.size[3] / W::kColumns;
  const int64_t segments = strips <= kWarp ? 1 : ceil_divide(strips, kWarp - 2);
  const int64_t segment = ceil_divide(strips, segments);
  const int64_t lanes = segments == 1 ? strips : kWarp, ranges = kWarp / lanes;
  const int64_t height = p.output.size[2] + W::kOpen - 1, all_lines = p.batch() * height;
  const int64_t slots = int64_t{device.processors} * W::kBlocks;
  // What a block takes to begin and end, in steps, and the kernel that adds the parts of several.
  constexpr double kBlockSteps = 12, kReductionSteps = 8;
  constexpr int64_t kMostTried = 64;
  // Of a wave's blocks, so many keep memory busy: where there are more, they wait for each other.
  const double busy_share = p.dtype == DType::kFloat32 ? 0.7 : 1;
  const int64_t most_lines = kMostProducts / W::kColumns;
  const auto lines_of = [&](int64_t chunks) {
    const int64_t ranges_of_channel = std::max<int64_t>(1, chunks * kMaxWarps * ranges / segments);
    // Steps are a multiple of kOpen.
    return round_up(ceil_divide(all_lines, ranges_of_channel) + W::kOpen - 1, W::kOpen) - W::kOpen +
           1;
  };
  const int64_t least =
      std::max<int64_t>(1, ceil_divide(all_lines * segments, kMaxWarps * ranges * most_lines));
  int64_t chunks = least;
  double fewest = INFINITY;
  for (int64_t tried = least; tried < least + kMostTried; ++tried) {
    const int64_t blocks = p.out_channels() * tried, waves = ceil_divide(blocks, slots);
    const double share = std::clamp(double(blocks) / double(slots), busy_share, 1.0);
    const double steps =
        double(waves) * share * (double(lines_of(tried) + W::kOpen - 1) + kBlockSteps) +
        (tried > 1 ? kReductionSteps : 0);
    if (steps < fewest) {
      fewest = steps;
      chunks = tried;
    }
    if (lines_of(tried) == 1) break;  // more chunks are no shorter
  }
  chunks = std::min(chunks, most_chunks);
  const int64_t lines = lines_of(chunks), count = ceil_divide(all_lines, lines) * segments;
  return {.strips = int(strips),
          .segment = int(segment),
          .lanes = int(lanes),
          .ranges = int(ranges),
          .lines = int(lines),
          .all_lines = int(all_lines),
          .count = int(count),
          .chunks = int(ceil_divide(count, kMaxWarps * ranges)),
          .by_channels = Divisor(p.out_channels()),
          .by_lanes = Divisor(lanes),
          .by_segments = Divisor(segments),
          .by_height = Divisor(height)};
}

int64_t chunk_bytes(const ConvProblem& p) { return p.weight.numel() * int64_t(sizeof(float)); }

// False where a row has more parts than the workspace has room for.
template <typename W, typename T>
bool launch(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  const int64_t most_chunks = std::max<int64_t>(1, execution.workspace_bytes / chunk_bytes(p));
  const Cut cut = cut_problem<W>(p, *execution.device, most_chunks);
  if (cut.chunks > most_chunks) return false;
  const RowGradient gradient{cut,      Planes(p.input),  Planes(p.output),
                             p.weight, int(p.padding.h), int(p.group_out_channels())};
  const int64_t warps = ceil_divide(cut.count, cut.ranges);
  const int threads = kWarp * int(std::min<int64_t>(kMaxWarps, warps));
  rows_kernel<W, T><<<unsigned(p.out_channels() * cut.chunks), threads, 0,
                      static_cast<cudaStream_t>(execution.stream)>>>(
      gradient, static_cast<const T*>(operands.input), static_cast<const T*>(operands.output),
      static_cast<float*>(execution.workspace), static_cast<T*>(operands.weight));
  CONVOPS_LAUNCH_CHECK("depthwise_weight by rows");
  if (cut.chunks > 1) add_parts(p, cut.chunks, operands, execution);
  return true;
}

// Whether all rows begin and end between vectors; without data: they may.
template <typename W>
bool has_vectors(const ConvProblem& p, const void* input, const void* grad) {
  const auto aligned = [&](const Tensor4& t, const void* data, int64_t count) {
    const int64_t size = element_size(p.dtype) * count;
    bool whole = reinterpret_cast<uintptr_t>(data) % size == 0;
    for (const int dimension : {0, 1, 2})
      whole &= t.size[dimension] <= 1 || t.stride[dimension] % count == 0;
    return whole;
  };
  return p.output.size[3] % W::kColumns == 0 && aligned(p.input, input, W::kReads) &&
         aligned(p.output, grad, W::kColumns);
}

// The most columns first.
using RowWindows =
    std::tuple<RowWindow<3, 1, 4, 3, 8>, RowWindow<3, 1, 2, 3, 8>, RowWindow<5, 1, 4, 5, 4>,
               RowWindow<5, 1, 2, 5, 4>, RowWindow<7, 1, 4, 1, 3>, RowWindow<3, 2, 2, 2, 8>,
               RowWindow<3, 2, 1, 2, 8>, RowWindow<5, 2, 2, 3, 5>, RowWindow<5, 2, 1, 3, 5>,
               RowWindow<7, 2, 2, 2, 3>>;

// Calls f(window) with the kernel's constants; false if tiles are for the problem.
template <typename F>
bool with_row_window(const ConvProblem& p, const Operands& operands, const Device& device, F&& f) {
  // Up to which tiles are never faster; of a multiprocessor.
  constexpr double kFewProducts = 225 * 1024;
  const bool few = p.dtype != DType::kFloat32 || p.flops() <= 2 * kFewProducts * device.processors;
  const auto matches = [&](auto window) {
    using W = decltype(window);
    const int64_t lines = p.batch() * (p.output.size[2] + W::kOpen - 1);
    return (few || !W::kSmallOnly) && p.kernel().h == W::kSize && p.kernel().w == W::kSize &&
           p.stride.h == W::kStride && p.stride.w == W::kStride && !p.is_dilated() &&
           p.padding.w == W::kSize / 2 && p.input.size[3] == p.output.size[3] * W::kStride &&
           lines > 0 && lines * p.output.size[3] <= INT32_MAX &&
           has_vectors<W>(p, operands.input, operands.output);
  };
  return std::apply(
      [&](auto... windows) { return ((matches(windows) && (f(windows), true)) || ...); },
      RowWindows{});
}

}  // namespace

bool takes_rows(const ConvProblem& p, const Device& device) {
  return with_row_window(p, Operands{}, device, [](auto) {});
}

int64_t rows_workspace(const ConvProblem& p, const Device& device) {
  int64_t chunks = 0;
  with_row_window(p, Operands{}, device, [&](auto window) {
    chunks = cut_problem<decltype(window)>(p, device, INT64_MAX).chunks;
  });
  return chunks > 1 ? chunks * chunk_bytes(p) : 0;
}

bool run_rows(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  bool launched = false;
  with_row_window(p, operands, *execution.device, [&](auto window) {
    dispatch(p.dtype, [&](auto tag) {
      if constexpr (sizeof(tag) < 8)
        launched = launch<decltype(window), decltype(tag)>(p, operands, execution);
    });
  });
  return launched;
}

}  // namespace convops::cuda::depthwise_weight
