// From a convolution to the problem on cells.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "cuda/implicit_gemm.h"
#include "integers.h"

namespace convops::cuda {
namespace {

int floor_divide(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Snug cells begin where taps reach the fewest of them.
GemmAxis make_axis(const ConvProblem& p, bool vertical, int block, bool snug) {
  const auto side = [&](const Pair& pair) { return int(vertical ? pair.h : pair.w); };
  GemmAxis axis{};
  axis.stride = side(p.stride);
  axis.padding = side(p.padding);
  axis.dilation = side(p.dilation);
  axis.by_dilation = Divisor(axis.dilation);
  axis.kernel = side(p.kernel());
  axis.transposed = p.direction == Direction::kBackwardInput;
  axis.block = axis.transposed ? block * axis.stride : block;
  axis.phases = axis.transposed ? block : block * axis.stride;
  axis.shifts = std::numeric_limits<int>::max();
  const int last = axis.block - 1, reach = (axis.kernel - 1) * axis.dilation;
  for (int origin = 0; origin < (snug ? std::max(axis.block, axis.phases) : 1); ++origin) {
    // From the first source of cell 0 to the last.
    const int begin = origin - axis.padding;
    const int least = axis.transposed ? -floor_divide(begin + reach, axis.stride) : begin;
    const int most = axis.transposed ? floor_divide(last - begin, axis.stride)
                                     : begin + last * axis.stride + reach;
    const int first = floor_divide(least, axis.phases), end = floor_divide(most, axis.phases) + 1;
    if (end - first >= axis.shifts) continue;
    axis.first = first;
    axis.shifts = end - first;
    (axis.transposed ? axis.result_origin : axis.source_origin) = origin;
  }
  return axis;
}

// Whether any of the phases q and p are connected at the shift.
bool connected(const GemmAxis& axis, int q_begin, int q_end, int p_begin, int p_end, int shift) {
  for (int q = q_begin; q < q_end; ++q)
    for (int p = p_begin; p < p_end; ++p)
      if (axis.tap(q, p, shift + axis.first) >= 0) return true;
  return false;
}

// Fills the lists of steps and their taps; false where they are too long.
bool list_steps(GemmProblem& g) {
  int count = 0;  // of taps
  for (int r = 0; r < g.row_classes; ++r) {
    const int q_begin = g.row_classes > 1 ? r : 0;
    const int q_end = g.row_classes > 1 ? r + 1 : g.h.block;
    for (int s = 0; s < g.sum_classes; ++s) {
      const bool one = g.sum_classes > 1;
      const int ph = s / g.w.phases, pw = s % g.w.phases;
      g.step_begin[r][s] = int16_t(count / g.step_taps());
      for (int h = 0; h < g.h.shifts; ++h) {
        if (!connected(g.h, q_begin, q_end, one ? ph : 0, one ? ph + 1 : g.h.phases, h)) continue;
        for (int w = 0; w < g.w.shifts; ++w) {
          if (!connected(g.w, 0, g.w.block, one ? pw : 0, one ? pw + 1 : g.w.phases, w)) continue;
          if (count == kMaxTaps) return false;
          g.taps[count++] = {int16_t(h), int16_t(w)};
        }
      }
      static_assert(kMaxTaps % kStepOctets == 0, "there is room for the last");
      if (count % g.step_taps() != 0) g.taps[count++] = kNoTap;
    }
    g.step_begin[r][g.sum_classes] = int16_t(count / g.step_taps());
  }
  return true;
}

// 1×1, stride 1, no padding, rows that follow each other: an image may be one long row, and in 16
// bits all of them one image, so that boxes have several. (float32 gains nothing by that.)
bool join_rows(GemmProblem& g) {
  const auto joins = [](const Tensor4& t) { return t.stride[2] == t.size[3] * t.stride[3]; };
  const bool same = g.source.size[2] == g.result.size[2] && g.source.size[3] == g.result.size[3];
  const auto plain = [](const GemmAxis& a) {
    return a.kernel == 1 && a.stride == 1 && a.padding == 0 && a.block == 1;
  };
  if (!same || !plain(g.h) || !plain(g.w) || !joins(g.source) || !joins(g.result) ||
      g.source.size[2] * g.source.size[3] >= kMaxExtent)
    return false;
  const bool all = g.is_half();
  for (Tensor4* t : {&g.source, &g.result}) {
    t->size[3] *= t->size[2];
    t->size[2] = all ? t->size[0] : 1;
    t->stride[2] = all ? t->stride[0] : t->size[3] * t->stride[3];
    if (all) t->size[0] = 1;
  }
  g.cells_w *= g.cells_h;
  g.cells_h = all ? g.images : 1;
  if (all) g.images = 1;
  return true;
}

// Puts channels of a kind into eight rows of the weight, where they fill them, and into an octet of
// the sum, where rows of the source are read by bulk copies.
void sort_channels(GemmProblem& g) {
  g.channel_kinds_log = g.channels_log = g.sum_kinds_log = 0;
  if (g.is_half() && g.phases() == 1 && g.source.stride[3] == 1) {
    const int kinds = kinds_log(g.source.stride[1], g.vector());
    if (g.sums % (kOctet << kinds) == 0) g.sum_kinds_log = kinds;
  }
  if (!are_neighbours(g)) return;
  const int kinds = kinds_log(g.result.stride[1], g.sector()), channels = 8 / g.w.block;
  if (g.rows % (channels << kinds) != 0 || kinds > kMostChannelKindsLog) return;
  g.channel_kinds_log = kinds;
  g.channels_log = std::countr_zero(unsigned(channels));
}

}  // namespace

bool has_octets(int element_bytes, const Tensor4& t) {
  const auto whole = [&](int i) { return t.stride[i] % kOctet == 0; };
  return element_bytes == 2 && t.stride[1] == 1 && whole(0) && whole(2) && whole(3);
}

float smallest_element(int products, int64_t channels, int64_t taps) {
  constexpr double kMany = 64;
  const double unit = products == 3 ? 0x1p-24 : 0x1p-11;
  const double room = products == 3 ? std::max(1.0, kMany / double(channels)) : 1024;
  return float(0x1p-25 * room / (1.5 * unit * std::sqrt(double(channels * taps))));
}

int kinds_log(int64_t stride, int elements) {
  return std::countr_zero(unsigned(elements / std::gcd(stride, int64_t{elements})));
}
bool are_neighbours(const GemmProblem& g) {
  const int block = g.w.block;
  return g.result.stride[3] == 1 && (block == 1 || block == 2 || block == 4);
}

bool describe_cells(const ConvProblem& p, const CellChoice& choice, GemmProblem& g) {
  const auto [block_h, block_w, octets, snug, row_classes, sum_classes, join] = choice;
  const bool forward = p.direction == Direction::kForward;
  g.h = make_axis(p, true, block_h, snug);
  g.w = make_axis(p, false, block_w, false);
  if (row_classes && g.h.block == 1) return false;
  if (sum_classes && g.phases() == 1) return false;
  g.source = forward ? p.input : p.output;
  g.result = forward ? p.output : p.input;
  // Results that leave one by one do not begin within a cell.
  if (snug && (forward || are_neighbours(g))) g.w = make_axis(p, false, block_w, true);
  const auto origin = [](const GemmAxis& a) { return a.source_origin + a.result_origin; };
  if (snug && origin(g.h) + origin(g.w) == 0) return false;
  g.groups = int(p.groups);
  g.rows = int(forward ? p.group_out_channels() : p.group_in_channels());
  g.sums = int(forward ? p.group_in_channels() : p.group_out_channels());
  g.weight_group_stride = p.group_out_channels() * p.weight.stride[0];
  g.weight_row_stride = p.weight.stride[forward ? 0 : 1];
  g.weight_sum_stride = p.weight.stride[forward ? 1 : 0];
  g.weight_h_stride = p.weight.stride[2];
  g.weight_w_stride = p.weight.stride[3];
  g.bias_stride = p.bias_stride;
  g.images = int(p.batch());
  g.cells_h = int(ceil_divide(g.result.size[2] + g.h.result_origin, g.h.block));
  g.cells_w = int(ceil_divide(g.result.size[3] + g.w.result_origin, g.w.block));
  g.dtype = p.dtype;
  g.element_bytes = int(element_size(p.dtype));
  g.products = !g.is_half() && p.precision == Precision::kIeee ? 3 : 1;
  g.smallest = smallest_element(g.products, g.sums, p.kernel().h * p.kernel().w);
  const int phases = g.phases();
  if (row_classes && g.h.block > kMaxClasses) return false;
  if (sum_classes && phases > kMaxClasses) return false;
  if (std::max(g.h.block, g.w.block) > std::numeric_limits<int16_t>::max() ||
      int64_t{g.rows} * g.h.block * g.w.block >= kMaxExtent ||
      int64_t{g.sums} * g.h.phases * g.w.phases >= kMaxExtent)
    return false;
  g.row_classes = row_classes ? g.h.block : 1;
  g.sum_classes = sum_classes ? phases : 1;
  g.class_rows = g.rows * g.w.block * (row_classes ? 1 : g.h.block);
  g.class_sums = g.sums * (sum_classes ? 1 : phases);
  g.octets = octets;
  g.block_sums = octets * kOctet;
  g.sum_blocks = int(ceil_divide(g.class_sums, g.block_sums));
  g.by_rows = Divisor(g.rows);
  g.by_block_w = Divisor(g.w.block);
  g.by_phases = Divisor(phases);
  g.by_phases_w = Divisor(g.w.phases);
  g.by_window = Divisor(g.h.kernel * g.w.kernel);
  g.by_kernel_w = Divisor(g.w.kernel);
  if (!list_steps(g)) return false;
  if (join && !join_rows(g)) return false;
  sort_channels(g);
  return true;
}

}  // namespace convops::cuda
