#include "definition.h"

#include <algorithm>
#include <cmath>

#include "cuda/types.cuh"

namespace simulation {

using namespace convops;

namespace {

// Whether elements are the same ones: then errors of rounding them are, and add up.
bool repeats(const ConvProblem& p) {
  for (const Tensor4* t : {&p.input, &p.output})
    for (int i = 0; i < 4; ++i)
      if (t->stride[i] == 0 && t->size[i] > 1) return true;
  return false;
}

}  // namespace

double read_element(DType dtype, const void* data, int64_t index) {
  double value = 0;
  cuda::dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    value = cuda::convert<cuda::AccumulateType<T>>(static_cast<const T*>(data)[index]);
  });
  return value;
}

void write_element(DType dtype, void* data, int64_t index, double value) {
  cuda::dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    static_cast<T*>(data)[index] = cuda::convert<T>(cuda::AccumulateType<T>(value));
  });
}

Dense read_tensor(const Tensor4& shape, DType dtype, const void* data) {
  const auto& [n, c, h, w] = shape.size;
  const int64_t* const stride = shape.stride;
  Dense dense{{n, c, h, w}, {}};
  for (int64_t a = 0; a < n; ++a)
    for (int64_t b = 0; b < c; ++b)
      for (int64_t i = 0; i < h; ++i)
        for (int64_t j = 0; j < w; ++j)
          dense.values.push_back(read_element(
              dtype, data, a * stride[0] + b * stride[1] + i * stride[2] + j * stride[3]));
  return dense;
}

void Expected::add(double a, double b) {
  value += a * b;
  magnitude += std::abs(a * b);
  squares += a * b * a * b;
  ++terms;
}

bool Expected::accepts(double result, const ConvProblem& p) const {
  if (std::isnan(value)) return std::isnan(result);
  if (std::isinf(value)) return result == value;
  const double epsilon = p.dtype == DType::kFloat16    ? 0x1p-11
                         : p.dtype == DType::kBFloat16 ? 0x1p-8
                         : p.dtype == DType::kFloat64  ? 0x1p-53
                                                       : 0x1p-24;
  const double sums = p.dtype == DType::kFloat64 ? 0x1p-53 : 0x1p-24;
  const double least = p.dtype == DType::kFloat16 ? 0x1p-25 : 0x1p-149;
  double bound = 4 * sums * std::sqrt(double(terms + 1)) * magnitude;
  // Operands rounded to TF32, or split in two such: what a product may lose, most of it and as
  // that adds up by chance.
  if (p.dtype == DType::kFloat32 && (p.precision == Precision::kTf32 || !p.is_depthwise())) {
    const double most = p.precision == Precision::kTf32 ? 0x1p-10 : 0x1p-21;
    const double by_chance = repeats(p) ? magnitude : 2 * std::sqrt(squares);
    bound += most * std::min(magnitude, by_chance);
  }
  bound += epsilon * (std::abs(value) + bound) + double(terms + 1) * least;
  return std::abs(result - value) <= bound;
}

std::vector<Expected> define(const ConvProblem& p, Dense& input, Dense& weight, Dense& output,
                             const std::vector<double>& bias) {
  const bool forward = p.direction == Direction::kForward;
  const bool backward_input = p.direction == Direction::kBackwardInput;
  const Tensor4& result = p.result();
  std::vector<Expected> all(size_t(result.numel()));
  const auto place = [&](int64_t a, int64_t b, int64_t c, int64_t d) -> Expected& {
    return all[size_t(((a * result.size[1] + b) * result.size[2] + c) * result.size[3] + d)];
  };
  const int64_t channels = p.group_in_channels(), outputs = p.group_out_channels();
  for (int64_t n = 0; n < p.batch(); ++n)
    for (int64_t o = 0; o < p.out_channels(); ++o)
      for (int64_t oh = 0; oh < p.output_size().h; ++oh)
        for (int64_t ow = 0; ow < p.output_size().w; ++ow)
          for (int64_t kh = 0; kh < p.kernel().h; ++kh)
            for (int64_t kw = 0; kw < p.kernel().w; ++kw) {
              const int64_t h = oh * p.stride.h - p.padding.h + kh * p.dilation.h;
              const int64_t w = ow * p.stride.w - p.padding.w + kw * p.dilation.w;
              const bool inside = h >= 0 && w >= 0 && h < p.input_size().h && w < p.input_size().w;
              for (int64_t c = 0; c < channels; ++c) {
                const int64_t channel = o / outputs * channels + c;
                const double x = inside && !backward_input ? input.at(n, channel, h, w) : 0;
                if (forward)
                  place(n, o, oh, ow).add(x, weight.at(o, c, kh, kw));
                else if (backward_input && inside)
                  place(n, channel, h, w).add(output.at(n, o, oh, ow), weight.at(o, c, kh, kw));
                else if (!backward_input)
                  place(o, c, kh, kw).add(x, output.at(n, o, oh, ow));
              }
            }
  if (!bias.empty())
    for (size_t i = 0; i < all.size(); ++i)
      all[i].add(1, bias[i / size_t(p.output_pixels()) % bias.size()]);
  return all;
}

}  // namespace simulation
