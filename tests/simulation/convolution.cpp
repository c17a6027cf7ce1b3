#include "convolution.h"

#include <algorithm>

#include "definition.h"
#include "integers.h"

namespace simulation {
namespace {

using convops::ConvProblem;
using convops::Direction;
using convops::Pair;
using convops::round_up;
using convops::Tensor4;

constexpr int64_t kMostElements = 60'000, kMostProducts = 4'000'000;

// Sums of so small numbers are exact, whatever their order, and so are fp16's parts of them.
std::vector<float> random_values(Random& random, int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = float(random.between(1, 4) * (random.one_in(2) ? 1 : -1));
  return values;
}

// Some octets of channels are louder: stages have other scales then.
void make_louder(std::vector<float>& values, const Tensor4& shape) {
  constexpr float kLouder = 16;
  const auto& [size, stride] = shape;
  for (int64_t n = 0; n < size[0]; ++n)
    for (int64_t channel = 0; channel < size[1]; ++channel)
      for (int64_t h = 0; h < size[2]; ++h)
        for (int64_t w = 0; w < size[3]; ++w)
          if (channel / 8 % 2 == 1)
            values[n * stride[0] + channel * stride[1] + h * stride[2] + w * stride[3]] *= kLouder;
}

// Calls visit(element of the input, of the weight, of the output, output channel) for every product
// of the definition.
template <typename Visit>
void for_products(const ConvProblem& p, Visit visit) {
  const auto& in = p.input.stride;
  const auto& out = p.output.stride;
  const auto& [filters, channels, height, width] = p.weight.size;
  for (int64_t image = 0; image < p.batch(); ++image)
    for (int64_t filter = 0; filter < filters; ++filter)
      for (int64_t k = 0; k < channels; ++k)
        for (int64_t kh = 0; kh < height; ++kh)
          for (int64_t kw = 0; kw < width; ++kw) {
            const int64_t channel = filter / p.group_out_channels() * channels + k;
            const int64_t weight = ((filter * channels + k) * height + kh) * width + kw;
            for (int64_t y = 0; y < p.output.size[2]; ++y)
              for (int64_t x = 0; x < p.output.size[3]; ++x) {
                const int64_t h = y * p.stride.h + kh * p.dilation.h - p.padding.h;
                const int64_t w = x * p.stride.w + kw * p.dilation.w - p.padding.w;
                if (h < 0 || h >= p.input.size[2] || w < 0 || w >= p.input.size[3]) continue;
                visit(image * in[0] + channel * in[1] + h * in[2] + w * in[3], weight,
                      image * out[0] + filter * out[1] + y * out[2] + x * out[3], filter);
              }
          }
}

// Sizes that are drawn; small, or else too much of the time goes by.
struct Window {
  Pair size, kernel, stride, padding, dilation;

  Pair output() const {
    const auto side = [](int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                         int64_t dilation) {
      const int64_t left = size + 2 * padding - dilation * (kernel - 1) - 1;
      return left < 0 ? 0 : left / stride + 1;
    };
    return {side(size.h, kernel.h, stride.h, padding.h, dilation.h),
            side(size.w, kernel.w, stride.w, padding.w, dilation.w)};
  }
};

Window random_window(Random& random, const std::string& theme) {
  const bool plain = theme == "any";
  const auto pair = [&](auto side) {
    const int64_t h = side();
    return Pair{h, side()};
  };
  Window window;
  window.kernel = pair([&] { return random.between(1, random.one_in(4) ? 11 : 5); });
  window.padding = {random.between(0, int(window.kernel.h)),
                    random.between(0, int(window.kernel.w))};
  window.dilation = pair([&] { return random.one_in(4) ? random.between(2, 3) : 1; });
  window.stride = pair([&] {
    if (theme == "rows") return random.between(1, 2);
    return plain && random.one_in(2) ? random.between(1, 5) : 1 << random.between(0, 2);
  });
  if (random.one_in(8)) {
    window.kernel = window.stride = window.dilation = {1, 1};
    window.padding = {};
  }
  if (theme == "kinds" || theme == "images" || (theme == "rows" && random.one_in(2))) {
    // Results as many as sources.
    const int64_t h = random.between(0, 2), w = random.between(0, 2);
    window = {{}, {2 * h + 1, 2 * w + 1}, {1, 1}, {h, w}, {1, 1}};
    if (theme == "kinds")
      window.size = {4 * random.between(1, 3),
                     random.one_in(3) ? random.between(8, 20) : random.between(64, 150)};
    if (theme == "kinds" && random.one_in(2))  // channels of 16 bits of two kinds, too
      window.size = {4 * random.between(0, 2) + 2, 4 * random.between(4, 30) + 2};
    if (theme == "images") window.size = {random.between(2, 9), random.between(3, 11)};
    if (theme == "rows") window.size = {random.between(1, 3), 64 * random.between(1, 6)};
    return window;
  }
  if (theme == "joined") {  // images as rows, which begin anywhere
    window = {{}, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
    window.size = {random.between(2, 9), random.between(2, 19)};
    return window;
  }
  window.size = {random.between(4, 20), random.between(4, 60)};
  if (theme == "patches") window.size = {4 * random.between(1, 4), random.between(6, 100)};
  if (theme == "boxes") window.size = {2 * random.between(1, 4), random.between(64, 400)};
  if (theme == "rows") window.size = {random.between(1, 4), random.between(100, 500)};
  for (const int multiple : {4, 8, 64})
    if (random.one_in(3)) window.size.w = round_up(window.size.w, multiple);
  if (random.one_in(3)) window.size.h = round_up(window.size.h, 4);
  if (theme == "rows" && random.one_in(6)) window.padding.w += 40;  // tiles of nothing else
  return window;
}

}  // namespace

const Tensor4& Convolution::source_shape() const {
  return problem.direction == Direction::kForward ? problem.input : problem.output;
}
const Tensor4& Convolution::result_shape() const { return problem.result(); }

std::vector<float> by_definition(const Convolution& c) {
  std::vector<float> result(c.result_shape().numel());
  if (c.problem.direction == Direction::kForward) {
    for_products(c.problem, [&](int64_t input, int64_t weight, int64_t output, int64_t) {
      result[output] += c.source[input] * c.weight[weight];
    });
    const auto& [size, stride] = c.problem.output;
    for (int64_t n = 0; !c.bias.empty() && n < size[0]; ++n)
      for (int64_t filter = 0; filter < size[1]; ++filter)
        for (int64_t y = 0; y < size[2]; ++y)
          for (int64_t x = 0; x < size[3]; ++x)
            result[n * stride[0] + filter * stride[1] + y * stride[2] + x * stride[3]] +=
                c.bias[filter];
  } else {
    for_products(c.problem, [&](int64_t input, int64_t weight, int64_t output, int64_t) {
      result[input] += c.source[output] * c.weight[weight];
    });
  }
  std::vector<double> rounded(result.size());  // room for elements of any dtype
  for (size_t i = 0; i < result.size(); ++i) {
    write_element(c.problem.dtype, rounded.data(), int64_t(i), double(result[i]));
    result[i] = float(read_element(c.problem.dtype, rounded.data(), int64_t(i)));
  }
  return result;
}

Convolution random_convolution(Random& random, const std::string& theme) {
  for (;;) {
    const Window window = random_window(random, theme);
    const Pair output = window.output();
    if (output.h == 0 || output.w == 0) continue;
    const int groups = random.one_in(6) ? 2 : 1;
    const bool last = theme == "last" || (theme == "any" && random.one_in(6));
    const auto channels = [&] {
      if (theme == "kinds" && !random.one_in(4)) return groups * 16 * random.between(1, 2);
      if (theme == "joined") return groups * (16 << random.between(0, 2));
      return groups * (last || random.one_in(2) ? 8 * random.between(1, 4) : random.between(1, 20));
    };
    const int64_t images = random.between(1, theme == "images" || theme == "joined" ? 20 : 3),
                  in_channels = channels();
    // Rows of the weight enough for two blocks of them, sometimes.
    const int64_t out_channels = random.one_in(6) ? groups * random.between(65, 150) : channels();
    const auto tensor = [&](int64_t channels, const Pair& size) {
      const int64_t sizes[4] = {images, channels, size.h, size.w};
      return last ? Tensor4::channels_last(sizes) : Tensor4::contiguous(sizes);
    };
    Convolution c{};
    ConvProblem& p = c.problem;
    const int backward_in = theme == "boxes" ? 1 : theme == "patches" ? 5 : 2;
    p.direction = random.one_in(backward_in) ? Direction::kBackwardInput : Direction::kForward;
    using convops::DType;
    p.dtype = theme != "last" && random.one_in(2) ? DType::kFloat32
              : random.one_in(2)                  ? DType::kFloat16
                                                  : DType::kBFloat16;
    p.precision = p.dtype != DType::kFloat32 || random.one_in(2) ? convops::Precision::kIeee
                                                                 : convops::Precision::kTf32;
    p.input = tensor(in_channels, window.size);
    p.output = tensor(out_channels, output);
    p.weight =
        Tensor4::contiguous({out_channels, in_channels / groups, window.kernel.h, window.kernel.w});
    p.stride = window.stride;
    p.dilation = window.dilation;
    p.padding = window.padding;
    p.groups = groups;
    p.has_bias = p.direction == Direction::kForward && random.one_in(2);
    p.bias_stride = 1;
    if (std::max(p.input.numel(), p.output.numel()) > kMostElements ||
        p.output.numel() * p.taps() > kMostProducts || p.taps() < 16 || p.is_depthwise())
      continue;
    c.source = random_values(random, c.source_shape().numel());
    if (random.one_in(2)) make_louder(c.source, c.source_shape());
    c.weight = random_values(random, p.weight.numel());
    if (p.has_bias) c.bias = random_values(random, out_channels);
    c.result = by_definition(c);
    c.text = to_string(p);
    return c;
  }
}

}  // namespace simulation
