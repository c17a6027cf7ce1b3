// Backward-weight of 3×3, and of what is small: a thread keeps one sum of every tap in registers,
// and of grad_output the kOpen rows of kColumns positions that the row of input at hand meets. Rows
// come from global memory straight to registers, a step before they are used: threads share nothing
// but the columns at their edges, which come out of L1. 5×5 and 7×7 come here where a place of a
// thread would have so little to do that rings took longer to fill.
//
// All images lie below each other, kLag lines apart, and are cut into ranges of as many lines as
// give every multiprocessor the same work. A walker is such a range, kColumns wide; a block has
// some vectors of neighbouring channels, and some walkers of each. At its end it adds its walkers'
// sums, and where it is the only one of its channels, that is the result.
#include "cuda/check.h"
#include "cuda/depthwise_channels_last.cuh"
#include "cuda/depthwise_channels_last_weight.h"
#include "cuda/ptx/launch.cuh"
#include "cuda/vector.cuh"

namespace convops::cuda::depthwise_channels_last {
namespace {

// Lines of a range: no sum of a thread has more products than this times kColumns.
constexpr int64_t kMostLines = 64;
// Lines for every place of a thread up to which 5×5 and 7×7 are small.
constexpr int64_t kSmallLines = 4;
constexpr int kMostThreads = 192;   // of a block, whose sums take 48 KiB at most
constexpr int kResidentBlocks = 2;  // a multiprocessor
// As kBlocks.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr int kLeastBlocks = 1;
#else
constexpr int kLeastBlocks = kResidentBlocks;
#endif

using Windows = WindowList<Window<3, 3, 1, 1>, Window<3, 3, 1, 2, 2>, Window<5, 5, 1, 1>,
                           Window<5, 5, 1, 2>, Window<7, 7, 1, 1, 7>>;
// Channels of a thread, where they are vectors: as many as its registers hold the sums of. Few
// channels of few pixels are done soonest by many threads.
template <typename W>
constexpr int kWeightVector = W::kTaps == 9 ? 4 : 1;
// Steps of the loop's body, so that gradients need not move. float32 would spill: its rows on the
// way take twice the registers.
template <typename W, typename T, int kV>
constexpr int kPhases = sizeof(T) == 2 && kV > 1 ? W::kOpen : 1;

// How a problem is cut.
struct Walkers {
  int vectors, walkers;  // of a block: kVector channels each; at a time
  int lines, all_lines;  // of a range; of all images
  int count;             // of all walkers of a channel
  int chunks;            // of walkers
  Divisor by_tiles, by_vectors, by_groups, by_height;
};

struct Taps {
  Walkers cut;
  Image input, grad;
  int channels;
  int pad_h, pad_w;
  int64_t weight_channel, weight_row, weight_column;

  __device__ int64_t weight_place(int channel, int kh, int kw) const {
    return channel * weight_channel + kh * weight_row + kw * weight_column;
  }
};

// Where a thread walks: the first of its lines, positions and channels.
struct Walk {
  int line, column, channel;
};

// What a step reads: kDown rows of the input, and one of grad_output.
template <typename W, typename T, int kV>
struct Rows {
  Vector<T, kV> input[W::kDown][W::kReads], grad[W::kColumns];
};

// Reads one line's rows after the other: zeros where the tensors end, and of grad_output beyond the
// range.
template <typename W, typename T, int kV>
class Reader {
 public:
  __device__ Reader(const Taps& p, const Walk& at, const T* input, const T* grad)
      : p_(p),
        height_(int(p.cut.by_height.value)),
        steps_(min(p.cut.lines + W::kLag, p.cut.all_lines - at.line)),
        lines_(min(p.cut.lines, steps_)),
        next_input_(p.input.image_stride - height_ * W::kDown * p.input.row_stride),
        next_grad_(p.grad.image_stride - height_ * p.grad.row_stride) {
    const int image = p.cut.by_height.quotient(at.line);
    row_ = at.line - image * height_;
    const int column = at.column * W::kDown - p.pad_w;
#pragma unroll
    for (int i = 0; i < W::kReads; ++i)
      columns_ |= unsigned(unsigned(column + i) < unsigned(p.input.width)) << i;
#pragma unroll
    for (int j = 0; j < W::kColumns; ++j)
      gradient_columns_ |= unsigned(at.column + j < p.grad.width) << j;
    input_ = input + image * p.input.image_stride +
             (row_ * W::kDown - p.pad_h) * p.input.row_stride +
             int64_t(column) * p.input.column_stride + at.channel;
    grad_ = grad + image * p.grad.image_stride + row_ * p.grad.row_stride +
            int64_t(at.column) * p.grad.column_stride + at.channel;
  }

  __device__ int steps() const { return steps_; }

  __device__ __forceinline__ void read(Rows<W, T, kV>& to, int step) {
#pragma unroll
    for (int row = 0; row < W::kDown; ++row) {
      const bool row_inside =
          step < steps_ && unsigned(row_ * W::kDown - p_.pad_h + row) < unsigned(p_.input.height);
      read_row(to.input[row], input_ + row * p_.input.row_stride, p_.input.column_stride,
               row_inside ? columns_ : 0);
    }
    read_row(to.grad, grad_, p_.grad.column_stride,
             step < lines_ && row_ < p_.grad.height ? gradient_columns_ : 0);
    input_ += W::kDown * p_.input.row_stride;
    grad_ += p_.grad.row_stride;
    if (++row_ == height_) {  // the next image
      row_ = 0;
      input_ += next_input_;
      grad_ += next_grad_;
    }
  }

 private:
  template <int kCount>
  static __device__ __forceinline__ void read_row(Vector<T, kV> (&to)[kCount], const T* from,
                                                  int stride, unsigned inside) {
#pragma unroll
    for (int i = 0; i < kCount; ++i, from += stride)
      to[i] = Vector<T, kV>::load_or_zeros(from, inside >> i & 1);
  }

  const Taps& p_;
  const int height_, steps_, lines_;
  const int64_t next_input_, next_grad_;  // from an image's end to the next one
  const T *input_, *grad_;
  int row_;
  unsigned columns_ = 0, gradient_columns_ = 0;  // a bit each: whether it exists
};

template <typename W, int kV>
using Sums = float[W::kH][W::kW][kV];

// Calls f(slot, sum) for all sums of a thread.
template <typename W, int kV, typename F>
__device__ __forceinline__ void for_sums(Sums<W, kV>& sums, F&& f) {
#pragma unroll
  for (int slot = 0; slot < W::kTaps * kV; ++slot)
    f(slot, sums[slot / kV / W::kW][slot / kV % W::kW][slot % kV]);
}

// The sums of a walk.
template <typename W, typename T, int kV>
__device__ __forceinline__ void walk(const Taps& p, const Walk& at, const T* input, const T* grad,
                                     Sums<W, kV>& sums) {
  for_sums<W, kV>(sums, [](int, float& sum) { sum = 0; });
  Reader<W, T, kV> reader(p, at, input, grad);
  Rows<W, T, kV> next;
  reader.read(next, 0);
  constexpr int kPhase = kPhases<W, T, kV>, kNewest = W::kOpen - 1;
  float gradients[W::kOpen][W::kColumns][kV] = {};
#pragma unroll 1
  for (int step = 0; step < reader.steps();) {
#pragma unroll
    for (int phase = 0; phase < kPhase && step < reader.steps(); ++phase, ++step) {
      // Where the gradients of an open row are.
      const auto slot = [&](int open) {
        return kPhase == 1 ? open : (phase + 1 + open) % W::kOpen;
      };
      float values[W::kDown][W::kReads][kV];
#pragma unroll
      for (int row = 0; row < W::kDown; ++row)
#pragma unroll
        for (int i = 0; i < W::kReads; ++i) next.input[row][i].unpack(values[row][i]);
#pragma unroll
      for (int j = 0; j < W::kColumns; ++j) {
#pragma unroll
        for (int open = 0; kPhase == 1 && open < kNewest; ++open)
#pragma unroll
          for (int v = 0; v < kV; ++v) gradients[open][j][v] = gradients[open + 1][j][v];
        next.grad[j].unpack(gradients[slot(kNewest)][j]);
      }
      reader.read(next, step + 1);
#pragma unroll
      for (int row = 0; row < W::kDown; ++row)
        for_products<W>(row, [&](int open, int kh, int j, int kw, int read) {
#pragma unroll
          for (int v = 0; v < kV; ++v)
            sums[kh][kw][v] += gradients[slot(open)][j][v] * values[row][read][v];
        });
    }
  }
}

// A walk's sum of one tap by the definition: for inputs that are not finite, whose infinities the
// walk multiplies by the zeros around grad_output.
template <typename W, typename T>
__device__ __noinline__ float sum_by_definition(const Taps& p, const Walk& at, int kh, int kw,
                                                int v, const T* input, const T* grad) {
  float sum = 0;
#pragma unroll 1
  for (int line = at.line; line < min(at.line + p.cut.lines, p.cut.all_lines); ++line) {
    const int image = p.cut.by_height.quotient(line), h = p.cut.by_height.remainder(line);
    if (h >= p.grad.height) continue;
    const T* const from = input + image * p.input.image_stride + at.channel + v;
    const T* const gradient = grad + image * p.grad.image_stride + at.channel + v;
    const int row = h * W::kDown + W::kH - 1 - kh - p.pad_h;
#pragma unroll 1
    for (int w = at.column; w < min(at.column + W::kColumns, p.grad.width); ++w) {
      const int column = w * W::kDown + W::kW - 1 - kw - p.pad_w;
      const bool inside =
          unsigned(row) < unsigned(p.input.height) && unsigned(column) < unsigned(p.input.width);
      const float factor =
          inside ? convert<float>(
                       from[row * p.input.row_stride + int64_t(column) * p.input.column_stride])
                 : 0.0f;
      sum += factor *
             convert<float>(gradient[h * p.grad.row_stride + int64_t(w) * p.grad.column_stride]);
    }
  }
  return sum;
}

// Grid: x chunks of walkers, those of different channels next to each other. Partial sums lie
// [chunk][tap][channel].
template <typename W, typename T, int kV>
__global__ void __launch_bounds__(kMostThreads, kLeastBlocks)
    taps_kernel(const __grid_constant__ Taps p, const T* __restrict__ input,
                const T* __restrict__ grad, float* __restrict__ partial, T* __restrict__ result) {
  extern __shared__ float shared[];
  ptx::launch_dependents();
  const Walkers& cut = p.cut;
  const int threads = blockDim.x, vectors = cut.vectors;
  const int walker = cut.by_vectors.quotient(threadIdx.x);
  const int chunk = cut.by_tiles.quotient(blockIdx.x);
  const int tile_channel = cut.by_tiles.remainder(blockIdx.x) * vectors * kV;
  const int channel = tile_channel + (int(threadIdx.x) - walker * vectors) * kV;

  float* const place = shared + threadIdx.x;  // of the thread's first sum; [slot][thread]
  Sums<W, kV> sums;
  for_sums<W, kV>(sums, [&](int slot, float&) { place[slot * threads] = 0; });
  for (int index = channel < p.channels ? chunk * cut.walkers + walker : cut.count;
       index < cut.count; index += cut.chunks * cut.walkers) {
    const int range = cut.by_groups.quotient(index);
    const Walk at{range * cut.lines, cut.by_groups.remainder(index) * W::kColumns, channel};
    walk<W, T, kV>(p, at, input, grad, sums);
    bool defined = true;
    for_sums<W, kV>(sums, [&](int, float& sum) { defined &= !isnan(sum); });
    if (defined) {
      for_sums<W, kV>(sums, [&](int slot, float& sum) { place[slot * threads] += sum; });
    } else {
#pragma unroll 1
      for (int slot = 0; slot < W::kTaps * kV; ++slot)
        place[slot * threads] += sum_by_definition<W>(p, at, slot / kV / W::kW, slot / kV % W::kW,
                                                      slot % kV, input, grad);
    }
  }
  __syncthreads();

  // Adds the walkers, several threads a sum where there are enough.
  const int count = W::kTaps * kV * vectors, parts = max(1, threads / count);
  float* const part_sums = shared + W::kTaps * kV * threads;
  for (int i = threadIdx.x; i < count * parts; i += threads) {
    const int part = i / count, slot = cut.by_vectors.quotient(i - part * count);
    const int vector = cut.by_vectors.remainder(i);
    float sum = 0;
#pragma unroll 8
    for (int w = part; w < cut.walkers; w += parts)
      sum += shared[slot * threads + w * vectors + vector];
    part_sums[i] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += threads) {
    float sum = part_sums[i];
    for (int part = 1; part < parts; ++part) sum += part_sums[part * count + i];
    const int slot = cut.by_vectors.quotient(i);
    const int of = tile_channel + cut.by_vectors.remainder(i) * kV + slot % kV;
    const int tap = W::kTaps - 1 - slot / kV;  // the walk's taps are turned
    if (of >= p.channels) continue;
    if (cut.chunks == 1)
      result[p.weight_place(of, tap / W::kW, tap % W::kW)] = convert<T>(sum);
    else
      partial[(int64_t(chunk) * W::kTaps + tap) * p.channels + of] = sum;
  }
}

int64_t thread_places(const Device& device) {
  return int64_t{device.processors} * kResidentBlocks * kMostThreads;
}

template <typename W>
int64_t groups_of(const ConvProblem& p) {
  return ceil_divide(p.output.size[3], W::kColumns);
}
template <typename W>
int64_t lines_of(const ConvProblem& p) {
  return p.batch() * (p.output.size[2] + W::kLag);
}

// Lines of a range that give every place of a thread one, or as many as kMostLines allows.
template <typename W>
int64_t lines_each(const ConvProblem& p, const Device& device, int64_t vectors) {
  const int64_t work = lines_of<W>(p) * groups_of<W>(p) * vectors;
  const int64_t rounds =
      std::max<int64_t>(1, ceil_divide(work, thread_places(device) * kMostLines));
  return std::max<int64_t>(1, ceil_divide(work, thread_places(device) * rounds));
}

template <typename W, int kV>
Walkers cut_problem(const ConvProblem& p, const Device& device, int64_t most_chunks) {
  // Of a block: for memory's sake 64 bytes of a pixel, or 128 of float32; up to half as many more
  // where fewer threads are idle then.
  constexpr int64_t kRun = kV > 1 ? 8 : 32, kMostVectors = kRun * 3 / 2, kLeastVectors = 2;
  static_assert(W::kTaps * kV * (kMostThreads + kMostVectors) * sizeof(float) <= kSharedBytes);
  // A range is all beginning and end that has fewer lines; it may have so many more where they are
  // few, and that spares the second kernel.
  constexpr int64_t kLeastLines = 2, kReduction = 2;
  const int64_t all_vectors = ceil_divide(p.in_channels(), kV), groups = groups_of<W>(p);
  const int64_t all_lines = lines_of<W>(p);
  int64_t lines = std::max(kLeastLines, lines_each<W>(p, device, all_vectors));
  int64_t vectors = std::min(all_vectors, kRun);
  for (int64_t more = kRun; more <= kMostVectors; ++more)
    if (round_up(all_vectors, more) < round_up(all_vectors, vectors)) vectors = more;
  for (int64_t more = 0; lines == kLeastLines && more <= kReduction; ++more) {
    const int64_t walkers = groups * ceil_divide(all_lines, lines + more);
    if (walkers * kLeastVectors > kMostThreads || walkers == 0) continue;
    lines += more;
    const int64_t spread = ceil_divide(all_vectors, device.processors);
    vectors = std::min({vectors, kMostThreads / walkers, std::max(kLeastVectors, spread)});
    break;
  }
  const int64_t channel_tiles = ceil_divide(all_vectors, vectors);
  const int64_t count = groups * ceil_divide(all_lines, lines);
  const int64_t walkers = std::max<int64_t>(1, std::min(count, kMostThreads / vectors));
  const int64_t blocks = std::max<int64_t>(1, ceil_divide(count, walkers));
  const int64_t resident = kMostThreads / (walkers * vectors) * kResidentBlocks;
  const int64_t chunks = std::clamp<int64_t>(device.processors * resident / channel_tiles, 1,
                                             std::min(blocks, most_chunks));
  return {.vectors = int(vectors),
          .walkers = int(walkers),
          .lines = int(lines),
          .all_lines = int(all_lines),
          .count = int(count),
          .chunks = int(ceil_divide(blocks, ceil_divide(blocks, chunks))),
          .by_tiles = Divisor(channel_tiles),
          .by_vectors = Divisor(vectors),
          .by_groups = Divisor(groups),
          .by_height = Divisor(p.output.size[2] + W::kLag)};
}

template <typename W, typename T, int kV>
void launch(const ConvProblem& p, const Operands& operands, const Execution& execution) {
  const Walkers cut = cut_problem<W, kV>(
      p, *execution.device, std::max<int64_t>(1, execution.workspace_bytes / chunk_bytes(p)));
  const Taps taps{.cut = cut,
                  .input = Source(p.input, operands.input, p.dtype).image,
                  .grad = Source(p.output, operands.output, p.dtype).image,
                  .channels = int(p.in_channels()),
                  .pad_h = int(p.padding.h),
                  .pad_w = int(p.padding.w),
                  .weight_channel = p.weight.stride[0],
                  .weight_row = p.weight.stride[2],
                  .weight_column = p.weight.stride[3]};
  const int threads = cut.walkers * cut.vectors, sums = W::kTaps * kV;
  const int shared_bytes =
      (sums * threads + std::max(threads, sums * cut.vectors)) * int(sizeof(float));
  taps_kernel<W, T, kV><<<unsigned(cut.chunks) * cut.by_tiles.value, threads, shared_bytes,
                          static_cast<cudaStream_t>(execution.stream)>>>(
      taps, static_cast<const T*>(operands.input), static_cast<const T*>(operands.output),
      static_cast<float*>(execution.workspace), static_cast<T*>(operands.weight));
  CONVOPS_LAUNCH_CHECK("depthwise_channels_last backward-weight by registers");
  if (cut.chunks > 1) add_chunks(p, cut.chunks, operands, execution);
}

// Whether kVector channels of a thread are one vector in every pixel; without data: may be.
template <int kVector>
bool has_vectors(const ConvProblem& p, const void* input, const void* grad) {
  uint64_t bits = reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(grad);
  for (const Tensor4* t : {&p.input, &p.output}) {
    bits |= uint64_t(t->size[1] * element_size(p.dtype));
    for (const int dimension : {0, 2, 3})
      if (t->size[dimension] > 1) bits |= uint64_t(t->stride[dimension] * element_size(p.dtype));
  }
  return bits % uint64_t(kVector * element_size(p.dtype)) == 0;
}

// Calls f(window, tag, vector) with the kernel's constants; false if rings are for the problem.
template <typename F>
bool with_kernel(const ConvProblem& p, const Operands& operands, const Device& device, F&& f) {
  bool found = false;
  const auto typed = [&](auto window, auto tag) {
    using W = decltype(window);
    found = W::kTaps == 9 || lines_each<W>(p, device, p.in_channels()) <= kSmallLines;
    if (!found) return;
    constexpr int kV = kWeightVector<W>;
    if constexpr (kV > 1)
      if (has_vectors<kV>(p, operands.input, operands.output))
        return f(window, tag, std::integral_constant<int, kV>{});
    f(window, tag, std::integral_constant<int, 1>{});
  };
  with_type(p.dtype,
            [&](auto tag) { with_window(p, [&](auto window) { typed(window, tag); }, Windows{}); });
  return found;
}

}  // namespace

bool find_workspace_by_registers(const ConvProblem& p, const Device& device,
                                 WorkspaceRange& range) {
  return with_kernel(p, Operands{}, device, [&](auto window, auto, auto vector) {
    const Walkers cut = cut_problem<decltype(window), vector>(p, device, INT64_MAX);
    range = {0, cut.chunks > 1 ? cut.chunks * chunk_bytes(p) : 0};
  });
}

bool run_weight_by_registers(const ConvProblem& p, const Operands& operands,
                             const Execution& execution) {
  return with_kernel(p, operands, *execution.device, [&](auto window, auto tag, auto vector) {
    launch<decltype(window), decltype(tag), vector>(p, operands, execution);
  });
}

}  // namespace convops::cuda::depthwise_channels_last
