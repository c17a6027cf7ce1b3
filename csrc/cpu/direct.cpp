// Convolution by its definition on the CPU: no workspace, every legal problem. Rows along W are the
// inner loop. Made for depthwise and tiny problems, where columns and a BLAS do not pay.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/parallel.h"
#include "cpu/span.h"
#include "cpu/types.h"
#include "cpu/vector.h"

namespace convops::cpu {
namespace {

// Whether rows of T are summed as they are, without widening.
template <typename T>
constexpr bool kSumsItself = std::is_same_v<T, AccumulateType<T>>;

// One for every tap along W.
std::vector<Span> spans_of(const ConvProblem& p) {
  std::vector<Span> spans(p.kernel().w);
  for (int64_t kw = 0; kw < p.kernel().w; ++kw) spans[kw] = span_inside(p, kw);
  return spans;
}

// sums[i] += factor · x[i · step].
template <typename T>
void multiply_add_row(AccumulateType<T>* sums, const T* x, int64_t step, AccumulateType<T> factor,
                      int64_t count) {
  if constexpr (kSumsItself<T>)
    if (step == 1) return multiply_add(sums, x, factor, count);
  for (int64_t i = 0; i < count; ++i) sums[i] += factor * AccumulateType<T>(x[i * step]);
}

// Σ x[i · x_step] · y[i · y_step].
template <typename T>
AccumulateType<T> dot_row(const T* x, int64_t x_step, const T* y, int64_t y_step, int64_t count) {
  using Sum = AccumulateType<T>;
  if constexpr (kSumsItself<T>)
    if (x_step == 1 && y_step == 1) return dot(x, y, count);
  Sum sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += Sum(x[i * x_step]) * Sum(y[i * y_step]);
  return sum;
}

// What the loops below reach on rows of about a hundred elements, a second and core.
constexpr double kFlopsPerCore = 9e9;
constexpr double kCallOverhead = 1e-6;

template <typename T>
void forward(const ConvProblem& p, const T* input, const T* weight, T* output, const T* bias) {
  using Sum = AccumulateType<T>;
  const Pair kernel = p.kernel();
  const int64_t height = p.output_size().h, width = p.output_size().w;
  const int64_t channels = p.out_channels(), group_in = p.group_in_channels();
  const int64_t group_out = p.group_out_channels();
  const std::vector<Span> spans = spans_of(p);
  parallel_for(p.batch() * channels * height, width * p.taps(), [&](int64_t index) {
    const int64_t oh = index % height, o = index / height % channels;
    const int64_t n = index / (height * channels);
    thread_local std::vector<Sum> sums;
    sums.assign(width, bias ? Sum(bias[o * p.bias_stride]) : Sum(0));
    for (int64_t c = 0; c < group_in; ++c) {
      const T* plane =
          input + n * p.input.stride[0] + (o / group_out * group_in + c) * p.input.stride[1];
      for (int64_t kh = 0; kh < kernel.h; ++kh) {
        const int64_t h = oh * p.stride.h - p.padding.h + kh * p.dilation.h;
        const bool row_inside = h >= 0 && h < p.input_size().h;
        for (int64_t kw = 0; kw < kernel.w; ++kw) {
          const Sum factor = Sum(weight[o * p.weight.stride[0] + c * p.weight.stride[1] +
                                        kh * p.weight.stride[2] + kw * p.weight.stride[3]]);
          const Span span = row_inside ? spans[kw] : Span{width, width, 0};
          if (!std::isfinite(factor)) {  // padding is zeros, and 0 · Inf is NaN
            for (int64_t w = 0; w < span.begin; ++w) sums[w] += factor * Sum(0);
            for (int64_t w = span.end; w < width; ++w) sums[w] += factor * Sum(0);
          }
          if (!row_inside) continue;
          const int64_t step = p.stride.w * p.input.stride[3];
          const T* x = plane + h * p.input.stride[2] + span.first * p.input.stride[3];
          multiply_add_row(&sums[span.begin], x + span.begin * step, step, factor,
                           span.end - span.begin);
        }
      }
    }
    T* out = output + n * p.output.stride[0] + o * p.output.stride[1] + oh * p.output.stride[2];
    for (int64_t w = 0; w < width; ++w) out[w * p.output.stride[3]] = T(sums[w]);
  });
}

template <typename T>
void backward_input(const ConvProblem& p, T* input, const T* weight, const T* output) {
  using Sum = AccumulateType<T>;
  const Pair kernel = p.kernel();
  const int64_t height = p.input_size().h, width = p.input_size().w;
  const int64_t channels = p.in_channels(), group_in = p.group_in_channels();
  const int64_t group_out = p.group_out_channels();
  const int64_t work = width * group_out * kernel.h * kernel.w;
  const std::vector<Span> spans = spans_of(p);
  parallel_for(p.batch() * channels * height, work, [&](int64_t index) {
    const int64_t h = index % height, channel = index / height % channels;
    const int64_t n = index / (height * channels);
    const int64_t group = channel / group_in, c = channel % group_in;
    thread_local std::vector<Sum> sums;
    sums.assign(width, Sum(0));
    for (int64_t o = group * group_out; o < (group + 1) * group_out; ++o)
      for (int64_t kh = 0; kh < kernel.h; ++kh) {
        const int64_t above = h + p.padding.h - kh * p.dilation.h;
        if (above < 0 || above % p.stride.h != 0 || above / p.stride.h >= p.output_size().h)
          continue;
        const T* dy = output + n * p.output.stride[0] + o * p.output.stride[1] +
                      above / p.stride.h * p.output.stride[2];
        for (int64_t kw = 0; kw < kernel.w; ++kw) {
          const Sum factor = Sum(weight[o * p.weight.stride[0] + c * p.weight.stride[1] +
                                        kh * p.weight.stride[2] + kw * p.weight.stride[3]]);
          const Span span = spans[kw];
          Sum* sum = sums.data() + span.first;
          const int64_t step = p.output.stride[3];
          if (p.stride.w == 1)
            multiply_add_row(sum + span.begin, dy + span.begin * step, step, factor,
                             span.end - span.begin);
          else
            for (int64_t w = span.begin; w < span.end; ++w)
              sum[w * p.stride.w] += factor * Sum(dy[w * step]);
        }
      }
    T* dx = input + n * p.input.stride[0] + channel * p.input.stride[1] + h * p.input.stride[2];
    for (int64_t w = 0; w < width; ++w) dx[w * p.input.stride[3]] = T(sums[w]);
  });
}

template <typename T>
void backward_weight(const ConvProblem& p, const T* input, T* weight, const T* output) {
  using Sum = AccumulateType<T>;
  const Pair kernel = p.kernel();
  const int64_t group_in = p.group_in_channels(), group_out = p.group_out_channels();
  const std::vector<Span> spans = spans_of(p);
  parallel_for(p.weight.numel(), p.batch() * p.output_pixels(), [&](int64_t index) {
    const int64_t kw = index % kernel.w, kh = index / kernel.w % kernel.h;
    const int64_t c = index / (kernel.w * kernel.h) % group_in;
    const int64_t o = index / (kernel.w * kernel.h * group_in);
    const Span row_span = spans[kw];
    const int64_t width = p.output_size().w;
    const int64_t x_step = p.stride.w * p.input.stride[3], dy_step = p.output.stride[3];
    // Rows in the type of the sums, their total in double: the error does not grow with N·H.
    double total = 0;
    for (int64_t n = 0; n < p.batch(); ++n)
      for (int64_t oh = 0; oh < p.output_size().h; ++oh) {
        const T* dy =
            output + n * p.output.stride[0] + o * p.output.stride[1] + oh * p.output.stride[2];
        const int64_t h = oh * p.stride.h - p.padding.h + kh * p.dilation.h;
        const bool row_inside = h >= 0 && h < p.input_size().h;
        const Span span = row_inside ? row_span : Span{width, width, 0};
        Sum sum = 0;
        // Padding is zeros, and 0 · Inf is NaN.
        for (int64_t w = 0; w < span.begin; ++w) sum += Sum(0) * Sum(dy[w * dy_step]);
        for (int64_t w = span.end; w < width; ++w) sum += Sum(0) * Sum(dy[w * dy_step]);
        const T* x = input + n * p.input.stride[0] +
                     (o / group_out * group_in + c) * p.input.stride[1] + h * p.input.stride[2] +
                     span.first * p.input.stride[3];
        total += sum + dot_row(x + span.begin * x_step, x_step, dy + span.begin * dy_step, dy_step,
                               span.end - span.begin);
      }
    weight[o * p.weight.stride[0] + c * p.weight.stride[1] + kh * p.weight.stride[2] +
           kw * p.weight.stride[3]] = T(Sum(total));
  });
}

class Direct final : public Algorithm {
 public:
  std::string name() const override { return "direct"; }
  DeviceType device_type() const override { return DeviceType::kCpu; }
  std::string can_run(const ConvProblem&, const Device&) const override { return ""; }

  double cost(const ConvProblem& p, const Device& device) const override {
    return p.flops() / (kFlopsPerCore * device.processors) + p.bytes() / device.bandwidth +
           kCallOverhead;
  }

  WorkspaceRange workspace(const ConvProblem&, const Device&) const override { return {0, 0}; }

  void run(const ConvProblem& p, const Operands& operands, const Execution&) const override {
    dispatch(p.dtype, [&](auto tag) {
      using T = decltype(tag);
      T* input = static_cast<T*>(operands.input);
      T* weight = static_cast<T*>(operands.weight);
      T* output = static_cast<T*>(operands.output);
      switch (p.direction) {
        case Direction::kForward:
          return forward<T>(p, input, weight, output, static_cast<const T*>(operands.bias));
        case Direction::kBackwardInput:
          return backward_input<T>(p, input, weight, output);
        case Direction::kBackwardWeight:
          return backward_weight<T>(p, input, weight, output);
      }
    });
  }
};

}  // namespace

std::unique_ptr<Algorithm> make_direct() { return std::make_unique<Direct>(); }

}  // namespace convops::cpu
