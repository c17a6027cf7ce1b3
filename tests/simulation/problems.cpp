#include "problems.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace simulation {
namespace {

using namespace convops;

struct Window {
  int kh, kw, stride_h, stride_w, dilation_h = 1, dilation_w = 1;
};

Window square(int size, int stride) { return {size, size, stride, stride}; }

template <typename T>
T one_of(Random& random, const std::vector<T>& values) {
  return values[size_t(random.between(0, int(values.size()) - 1))];
}

// Sizes that no kernel of the algorithm may be compiled for.
Window any_window(Random& random, int most_side, int most_stride, int most_dilation) {
  const auto any = [&](int most) { return random.between(1, most); };
  return {any(most_side),   any(most_side),     any(most_stride),
          any(most_stride), any(most_dilation), any(most_dilation)};
}

Window random_window(Random& random, const std::string& algorithm) {
  if (algorithm == "depthwise_large") {
    const auto side = [&] { return random.between(1, one_of<int>(random, {7, 15, 33, 57})); };
    return {side(), side(), 1, 1};
  }
  if (algorithm == "depthwise_channels_last" || algorithm == "depthwise_planes")
    return square(one_of<int>(random, {3, 5, 7}), random.between(1, 2));
  if (algorithm.starts_with("grouped"))
    return one_of<Window>(random, {square(3, 1), square(3, 2), square(1, 1)});
  if (algorithm == "implicit_gemm_weight" || algorithm == "tma_im2col_weight")
    return random.one_in(4) ? square(1, 1)
                            : Window{random.between(1, 7),
                                     random.between(1, 9),
                                     one_of<int>(random, {1, 1, 2, 4}),
                                     one_of<int>(random, {1, 1, 2, 3}),
                                     random.between(1, 3),
                                     random.between(1, 3)};
  if (algorithm == "tma_im2col") {
    const auto side = [&] { return one_of<int>(random, {1, 1, 2, 3, 3, 5}); };
    const auto stride = [&] { return one_of<int>(random, {1, 1, 2, 2, 3}); };
    return {side(), side(), stride(), stride(), random.between(1, 2), random.between(1, 2)};
  }
  if (algorithm != "depthwise_strips" && random.one_in(3)) return any_window(random, 7, 4, 4);
  return one_of<Window>(
      random, {square(3, 1), square(5, 1), square(7, 1), square(3, 2), square(5, 2), square(7, 2),
               Window{3, 1, 1, 1}, Window{1, 3, 1, 1}, Window{3, 7, 1, 1}, Window{7, 3, 1, 1}});
}

struct Channels {
  int groups, in, out;  // of a group
};

Channels random_channels(Random& random, const std::string& algorithm) {
  if (algorithm.starts_with("grouped")) {
    const int most = one_of<int>(random, {4, 8, 20, 64});
    const int least = algorithm == "grouped" ? 2 : 1;
    Channels c{random.between(2, most > 20 ? 3 : 7), random.between(least, most),
               random.between(least, most)};
    if (random.one_in(3)) c.out = c.in;
    if (c.in == 1 && c.out == 1) c.out = 2;
    return c;
  }
  // Short of and beyond a block's 4 or 64.
  if (algorithm == "direct")
    return {random.between(1, 3), one_of<int>(random, {1, 2, 5, 20}),
            one_of<int>(random, {1, 3, 9, 70})};
  // Octets short of and beyond a block's 64 to 256.
  if (algorithm.starts_with("tma_im2col") && random.one_in(3)) {
    const int channels = one_of<int>(random, {2, 4, 8, 16, 32, 64});
    return {random.between(1, 3) * std::max(1, 8 / channels) * 2, channels, channels};
  }
  if (algorithm == "tma_im2col_weight")
    return {random.one_in(3) ? 2 : 1, one_of<int>(random, {8, 16, 64, 72, 132, 136, 264}),
            one_of<int>(random, {8, 24, 44, 64, 72, 136})};
  // Short of and beyond a block's 8 or 16, and 64 or 128.
  if (algorithm == "implicit_gemm_weight")
    return {random.one_in(3) ? 2 : 1, one_of<int>(random, {2, 5, 8, 16, 19, 70}),
            one_of<int>(random, {3, 16, 64, 70, 130})};
  // Octets short of and beyond a stage's 64, and a block's 64 or 128.
  if (algorithm == "tma_im2col") {
    const auto channels = [&] { return one_of<int>(random, {8, 16, 40, 64, 72, 128, 136, 264}); };
    const int half = random.one_in(3) ? 2 : 1;  // float32 has quartets
    return {1, channels() / half, channels() / half};
  }
  // Channels short of and beyond a block's 32 or 64.
  if (algorithm == "depthwise_channels_last")
    return {one_of<int>(random, {1, 2, 3, 8, 31, 32, 33, 40, 64, 66, 96, 130}), 1, 1};
  const bool multiplied =
      (algorithm == "depthwise" || algorithm == "depthwise_weight") && random.one_in(4);
  return {random.between(1, 5), 1, multiplied ? random.between(2, 3) : 1};
}

// Dimensions from the innermost on, as they lie in memory, sometimes with gaps between them.
Tensor4 random_layout(Random& random, const int64_t (&size)[4], std::vector<int> order, bool source,
                      bool dense, bool octets) {
  Tensor4 t{};
  std::ranges::copy(size, t.size);
  // What strides are multiples of.
  const int vector = octets ? 8 : one_of<int>(random, {1, 1, 2, 4, 8});
  int64_t stride = 1;
  for (const int dimension : order) {
    t.stride[dimension] = stride;
    stride *= t.size[dimension];
    if (!dense && random.one_in(2)) stride += random.between(0, 6);
    if (!dense) stride = (stride + vector - 1) / vector * vector;
  }
  if (dense) return t;
  for (int i = 0; i < 4; ++i)  // a stride that is never used may be anything
    if (t.size[i] == 1 && random.one_in(3)) t.stride[i] = random.between(0, 1000);
  if (source && random.one_in(12)) t.stride[0] = 0;  // expanded tensors
  if (source && random.one_in(12)) t.stride[2] = 0;
  return t;
}

std::vector<int> random_order(Random& random, const std::string& algorithm) {
  if (algorithm == "depthwise_channels_last" || algorithm.starts_with("tma_im2col"))
    return {1, 3, 2, 0};
  if (algorithm == "depthwise_large" || algorithm == "depthwise_strips")
    return one_of<std::vector<int>>(random,
                                    {{3, 2, 1, 0}, {3, 2, 1, 0}, {1, 3, 2, 0}, {2, 3, 0, 1}});
  return one_of<std::vector<int>>(random, {{3, 2, 1, 0}, {3, 2, 1, 0}, {3, 1, 2, 0}, {3, 2, 0, 1}});
}

// The input's and the output's extent in one dimension, and the padding before the first.
struct Side {
  int64_t input, output, padding;
};

Side random_side(Random& random, int kernel, int stride, int dilation, int most) {
  const int reach = (kernel - 1) * dilation + 1;
  Side side{};
  switch (random.between(0, 5)) {
    case 0:
      break;
    case 1:
      side.padding = random.between(0, reach + 2);
      break;
    default:
      side.padding = reach / 2;
  }
  side.input = random.between(1, most);
  if (random.one_in(3)) side.input = (side.input + 7) / 8 * 8;  // rows that may be aligned
  int64_t end = side.padding;                                   // padding behind the last
  if (random.one_in(3)) end = random.between(0, reach);
  side.input = std::max(side.input, reach - side.padding - end);
  side.output = (side.input + side.padding + end - reach) / stride + 1;
  return side;
}

}  // namespace

int64_t extent(const Tensor4& t) {
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int i = 0; i < 4; ++i) last += (t.size[i] - 1) * t.stride[i];
  return last + 1;
}

ConvProblem random_problem(Random& random, const std::string& algorithm) {
  const bool tma = algorithm.starts_with("tma_im2col");
  const bool pixels = algorithm == "tma_im2col";  // whose tiles are large
  const int64_t most_products = (random.one_in(8) ? 2'000'000 : 300'000) * (pixels ? 10 : 1);
  const bool segments = algorithm == "implicit_gemm_weight";  // of rows: some of many columns
  ConvProblem p;
  std::memset(&p, 0, sizeof p);
  p.direction = Direction(random.between(0, 2));
  p.dtype = one_of<DType>(random, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  if (algorithm.ends_with("weight")) p.direction = Direction::kBackwardWeight;
  if (algorithm.starts_with("grouped") || algorithm == "depthwise_planes")
    p.dtype = DType::kFloat32;
  if ((algorithm == "depthwise_strips" || algorithm == "direct") && random.one_in(4))
    p.dtype = DType::kFloat64;
  if (algorithm == "grouped" || algorithm == "depthwise" || algorithm == "depthwise_strips" ||
      algorithm == "depthwise_planes" || pixels)
    p.direction = Direction(random.between(0, 1));
  if (p.dtype == DType::kFloat32 && random.one_in(2)) p.precision = Precision::kTf32;
  p.has_bias = p.direction == Direction::kForward && random.one_in(2);
  p.bias_stride = random.between(0, 2);
  do {
    const Window window = random_window(random, algorithm);
    const Channels channels = random_channels(random, algorithm);
    // Nobody is asked for a result without elements.
    const bool none = p.direction == Direction::kBackwardWeight && random.one_in(20);
    const bool low = segments && random.one_in(6);  // outputs of few rows, each a run of its own
    const int batch = none                      ? 0
                      : low || random.one_in(5) ? random.between(9, 40)
                                                : random.between(1, 4);
    const int most = one_of<int>(random, {8, 20, 20, 40});
    const Side h = random_side(random, window.kh, window.stride_h, window.dilation_h,
                               low                 ? 1
                               : random.one_in(12) ? 160
                                                   : most);
    const Side w = random_side(random, window.kw, window.stride_w, window.dilation_w,
                               random.one_in(8 - 6 * segments) ? 400 : most);
    const bool dense = random.one_in(3);
    const std::vector<int> order = random_order(random, algorithm);
    // Of 16 bits each tensor may be channels_last.
    const bool any_order = algorithm == "implicit_gemm_weight" && p.dtype != DType::kFloat32;
    const auto layout = [&](const int64_t (&size)[4], Direction writes) {
      const bool last = any_order && random.one_in(2);
      return random_layout(random, size, last ? std::vector<int>{1, 3, 2, 0} : order,
                           p.direction != writes, dense, tma);
    };
    p.stride = {window.stride_h, window.stride_w};
    p.dilation = {window.dilation_h, window.dilation_w};
    p.padding = {h.padding, w.padding};
    p.groups = channels.groups;
    p.input =
        layout({batch, channels.groups * channels.in, h.input, w.input}, Direction::kBackwardInput);
    p.output =
        layout({batch, channels.groups * channels.out, h.output, w.output}, Direction::kForward);
    p.weight = layout({channels.groups * channels.out, channels.in, window.kh, window.kw},
                      Direction::kBackwardWeight);
    if (pixels && random.one_in(4)) p.weight = Tensor4::contiguous(p.weight.size);
  } while (p.flops() / 2 > most_products);
  return p;
}

}  // namespace simulation
