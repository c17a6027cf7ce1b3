// Convolution as a matrix product on the CPU: the chunk's columns (im2col) times the weights.
//
//   forward          output(o, pixels)  = weight(o, taps) · columns(taps, pixels)
//   backward-input   columns(taps, pixels) = weightᵀ · grad_output, then col2im
//   backward-weight  weight(o, taps)   += grad_output(o, pixels) · columnsᵀ, chunk by chunk
//
// Groups are the batch of the product. Threads take chunks of the pixels in turn, each with a
// workspace of its own that stays in its cache, so the columns never go through memory and no
// thread waits for another; backward-weight adds the threads' sums in order. Sums are float32 for
// the 16-bit dtypes.
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/gemm.h"
#include "cpu/im2col.h"
#include "cpu/parallel.h"
#include "cpu/types.h"
#include "integers.h"

namespace convops::cpu {
namespace {

// A chunk's columns and its side of the output: what a core's caches hold.
constexpr int64_t kChunkBytes = 2 << 20;
// Share of the peak the BLAS reaches.
constexpr double kBlasFraction = 0.8;
// Seconds a chunk costs whatever its size: tensor wrappers and dispatch.
constexpr double kChunkOverhead = 10e-6;

constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return round_up(bytes, kAlignment); }

// A 1×1 convolution multiplies the input as it is, unless its dtype must be widened.
bool skips_im2col(const ConvProblem& p) {
  return p.is_pointwise() && p.dtype == accumulate_dtype(p.dtype) &&
         is_pixel_matrix(p.input, p.group_in_channels());
}

// The chunk's columns and its side of the output, per row of output pixels.
int64_t row_bytes(const ConvProblem& p) {
  return ((skips_im2col(p) ? 0 : p.taps() * p.groups) + p.out_channels()) * p.output_size().w *
         element_size(accumulate_dtype(p.dtype));
}

// The packed weight, or a thread's sums of it.
int64_t weight_bytes(const ConvProblem& p) {
  return aligned(p.weight.numel() * element_size(accumulate_dtype(p.dtype)));
}

// What the padding of a chunk's rows may take.
int64_t padding_bytes(const ConvProblem& p) {
  return aligned(padded_pixels(1) * (p.taps() * p.groups + p.out_channels()) *
                 element_size(accumulate_dtype(p.dtype)));
}

// Backward-input works on input rows; one of them needs at most this many output rows.
int64_t minimum_rows(const ConvProblem& p) {
  if (p.direction != Direction::kBackwardInput) return 1;
  return std::min(p.output_size().h, (p.kernel().h - 1) * p.dilation.h / p.stride.h + 1);
}

// Copies the chunk of a problem's output to or from packed (channel, image, pixel).
template <typename T, bool kPack>
void move_output(const ConvProblem& p, const Chunk& chunk, T* output, AccumulateType<T>* packed,
                 const T* bias) {
  const int64_t channels = p.out_channels(), width = p.output_size().w;
  const int64_t* stride = p.output.stride;
  parallel_for(channels * chunk.images, chunk.rows * width, [&](int64_t index) {
    const int64_t channel = index / chunk.images, image = index % chunk.images;
    T* plane =
        output + (chunk.image + image) * stride[0] + channel * stride[1] + chunk.row * stride[2];
    AccumulateType<T>* rows =
        packed + channel * padded_pixels(chunk.pixels(p)) + image * chunk.rows * width;
    const auto offset = bias ? AccumulateType<T>(bias[channel * p.bias_stride]) : 0;
    for (int64_t row = 0; row < chunk.rows; ++row, plane += stride[2], rows += width)
      for (int64_t w = 0; w < width; ++w) {
        if constexpr (kPack)
          rows[w] = AccumulateType<T>(plane[w * stride[3]]);
        else
          plane[w * stride[3]] = T(rows[w] + offset);
      }
  });
}

// Copies the weight to or from packed (out channel, tap).
template <typename T, bool kPack>
void move_weight(const ConvProblem& p, T* weight, AccumulateType<T>* packed) {
  const int64_t* stride = p.weight.stride;
  const Pair kernel = p.kernel();
  parallel_for(p.weight.size[0], p.taps(), [&](int64_t o) {
    AccumulateType<T>* row = packed + o * p.taps();
    for (int64_t c = 0; c < p.group_in_channels(); ++c)
      for (int64_t kh = 0; kh < kernel.h; ++kh)
        for (int64_t kw = 0; kw < kernel.w; ++kw, ++row) {
          T& element = weight[o * stride[0] + c * stride[1] + kh * stride[2] + kw * stride[3]];
          if constexpr (kPack)
            *row = AccumulateType<T>(element);
          else
            element = T(*row);
        }
  });
}

// How the workspace is cut: threads times (a chunk of so many rows, and sums for backward-weight).
struct Slots {
  int64_t count, rows, bytes;

  static int64_t bytes_for(const ConvProblem& p, int64_t rows) {
    const int64_t sums = p.direction == Direction::kBackwardWeight ? weight_bytes(p) : 0;
    return sums + padding_bytes(p) + aligned(rows * row_bytes(p));
  }

  // Enough chunks for all threads, none larger than the caches.
  static Slots wanted(const ConvProblem& p, int64_t threads) {
    const int64_t total = p.batch() * p.output_size().h, least = minimum_rows(p);
    const int64_t share = (total + threads - 1) / threads;
    // Rows that backward-input computes for two chunks should be few of its rows.
    const int64_t worthwhile = std::min(total, least + 4 * (least - 1));
    int64_t rows = std::max(worthwhile, std::min(share, kChunkBytes / row_bytes(p)));
    if (skips_im2col(p)) rows = std::min(rows, p.output_size().h);  // images lie apart
    return {std::clamp<int64_t>(total / rows, 1, threads), rows, bytes_for(p, rows)};
  }

  // Fewer rows where the workspace is short, then fewer threads.
  static Slots within(const ConvProblem& p, int64_t threads, int64_t workspace) {
    Slots slots = wanted(p, threads);
    const int64_t room = workspace - weight_bytes(p), least = minimum_rows(p);
    while (slots.count * slots.bytes > room) {
      if (slots.rows > least)
        slots.rows = std::max(least, slots.rows / 2);
      else
        --slots.count;
      slots.bytes = bytes_for(p, slots.rows);
    }
    return slots;
  }
};

template <typename T>
class Run {
 public:
  Run(const ConvProblem& p, const Operands& operands, const Execution& execution)
      : p_(p),
        slots_(Slots::within(p, execution.device->processors, execution.workspace_bytes)),
        input_(static_cast<T*>(operands.input)),
        weight_(static_cast<T*>(operands.weight)),
        output_(static_cast<T*>(operands.output)),
        bias_(static_cast<const T*>(operands.bias)),
        packed_weight_(static_cast<Sum*>(execution.workspace)),
        slot_data_(static_cast<char*>(execution.workspace) + weight_bytes(p)) {}

  void forward() {
    move_weight<T, true>(p_, weight_, packed_weight_);
    for_each_chunk_in_parallel(
        p_.output_size().h, slots_.rows, [&](const Chunk& chunk, char* slot) {
          if (!skips_im2col(p_)) im2col(p_, input_, columns(slot, chunk), kSum);
          gemm(kSum, {p_.groups, group_out(), chunk.pixels(p_), p_.taps()}, weight_matrix(),
               column_matrix(slot, chunk), output_matrix(slot, chunk), false);
          move_output<T, false>(p_, chunk, output_, chunk_output(slot, chunk), bias_);
        });
  }

  void backward_input() {
    move_weight<T, true>(p_, weight_, packed_weight_);
    // As many input rows as keep the output rows they need within the slot.
    const int64_t all = p_.output_size().h, halo = minimum_rows(p_) - 1;
    const int64_t rows = slots_.rows >= all
                             ? slots_.rows / all * p_.input_size().h
                             : std::max<int64_t>(1, (slots_.rows - halo - 1) * p_.stride.h + 1);
    for_each_chunk_in_parallel(p_.input_size().h, rows, [&](const Chunk& input_rows, char* slot) {
      const Chunk chunk = output_rows_of(p_, input_rows);
      if (chunk.rows > 0) {  // else the stride passes these rows by
        move_output<T, true>(p_, chunk, output_, chunk_output(slot, chunk), nullptr);
        gemm(kSum, {p_.groups, p_.taps(), chunk.pixels(p_), group_out()},
             weight_matrix().transposed(), output_matrix(slot, chunk), column_matrix(slot, chunk),
             false);
      }
      if (!skips_im2col(p_)) col2im(p_, columns(slot, chunk), kSum, input_rows, input_);
    });
  }

  void backward_weight() {
    std::vector<char> used(slots_.count, false);  // whether the slot's sums have begun
    for_each_chunk_in_parallel(
        p_.output_size().h, slots_.rows, [&](const Chunk& chunk, char* slot) {
          if (!skips_im2col(p_)) im2col(p_, input_, columns(slot, chunk), kSum);
          move_output<T, true>(p_, chunk, output_, chunk_output(slot, chunk), nullptr);
          char& accumulate = used[(slot - slot_data_) / slots_.bytes];
          gemm(kSum, {p_.groups, group_out(), p_.taps(), chunk.pixels(p_)},
               output_matrix(slot, chunk), column_matrix(slot, chunk).transposed(),
               {slot_sums(slot), group_out() * p_.taps(), p_.taps(), 1}, accumulate);
          accumulate = true;
        });
    parallel_for(p_.weight.numel(), slots_.count, [&](int64_t i) {
      Sum sum = 0;
      for (int64_t slot = 0; slot < slots_.count; ++slot)
        if (used[slot]) sum += slot_sums(slot_data_ + slot * slots_.bytes)[i];
      packed_weight_[i] = sum;
    });
    move_weight<T, false>(p_, weight_, packed_weight_);
  }

 private:
  using Sum = AccumulateType<T>;
  static constexpr DType kSum = std::is_same_v<Sum, double> ? DType::kFloat64 : DType::kFloat32;

  // Chunk i goes to slot i mod count, whatever thread runs it: sums do not depend on scheduling.
  template <typename F>
  void for_each_chunk_in_parallel(int64_t image_rows, int64_t budget_rows, const F& f) {
    std::vector<Chunk> chunks;
    for_each_chunk(p_.batch(), image_rows, budget_rows, 1,
                   [&](const Chunk& chunk) { chunks.push_back(chunk); });
    parallel_for(slots_.count, kGrainElements, [&](int64_t slot) {
      for (size_t i = slot; i < chunks.size(); i += slots_.count)
        f(chunks[i], slot_data_ + slot * slots_.bytes);
    });
  }

  int64_t group_out() const { return p_.group_out_channels(); }
  int64_t row_length(const Chunk& chunk) const { return padded_pixels(chunk.pixels(p_)); }

  // In a slot the columns come first, the chunk of the output next, the sums last.
  Columns columns(char* slot, const Chunk& chunk) const { return packed_columns(slot, p_, chunk); }
  Sum* chunk_output(char* slot, const Chunk& chunk) const {
    const int64_t taps = skips_im2col(p_) ? 0 : p_.groups * p_.taps();
    return reinterpret_cast<Sum*>(slot) + taps * row_length(chunk);
  }
  Sum* slot_sums(char* slot) const {
    return reinterpret_cast<Sum*>(slot + slots_.bytes - weight_bytes(p_));
  }

  Matrix weight_matrix() const { return {packed_weight_, group_out() * p_.taps(), p_.taps(), 1}; }
  Matrix column_matrix(char* slot, const Chunk& chunk) const {
    const int64_t* stride = p_.input.stride;
    if (skips_im2col(p_))
      return {input_ + chunk.image * stride[0] + chunk.row * stride[2], p_.taps() * stride[1],
              stride[1], pixel_stride(p_.input)};
    return {slot, p_.taps() * row_length(chunk), row_length(chunk), 1};
  }
  Matrix output_matrix(char* slot, const Chunk& chunk) const {
    return {chunk_output(slot, chunk), group_out() * row_length(chunk), row_length(chunk), 1};
  }

  const ConvProblem& p_;
  Slots slots_;
  T* input_;
  T* weight_;
  T* output_;
  const T* bias_;
  Sum* packed_weight_;
  char* slot_data_;
};

class Im2colGemm final : public Algorithm {
 public:
  std::string name() const override { return "im2col_gemm"; }
  DeviceType device_type() const override { return DeviceType::kCpu; }
  std::string can_run(const ConvProblem& p, const Device&) const override {
    return p.batch() == 0 || p.taps() == 0 ? "nothing to sum" : "";
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    // A group of m output channels is a product of m rows: below about 8 the BLAS starves.
    const double starved = std::max(1.0, 8.0 / double(p.group_out_channels()));
    const double column_bytes =
        2.0 * double(p.groups * p.taps()) * double(p.batch() * p.output_pixels()) * 4;
    const double chunks = std::max(1.0, column_bytes / (2 * kChunkBytes) / device.processors);
    return p.flops() * starved / (device.fp32_flops * kBlasFraction) +
           (column_bytes + p.bytes()) / device.bandwidth + chunks * kChunkOverhead;
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    const Slots wanted = Slots::wanted(p, device.processors);
    return {weight_bytes(p) + Slots::bytes_for(p, minimum_rows(p)),
            weight_bytes(p) + wanted.count * wanted.bytes};
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    dispatch(p.dtype, [&](auto tag) {
      Run<decltype(tag)> run(p, operands, execution);
      switch (p.direction) {
        case Direction::kForward:
          return run.forward();
        case Direction::kBackwardInput:
          return run.backward_input();
        case Direction::kBackwardWeight:
          return run.backward_weight();
      }
    });
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_im2col_gemm() { return std::make_unique<Im2colGemm>(); }

}  // namespace convops::cpu
