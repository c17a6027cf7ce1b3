// Which outputs along W a tap reaches from inside the input: the loops over W need no test of their
// own.
#pragma once

#include <algorithm>

#include "problem.h"

namespace convops::cpu {

struct Span {
  int64_t begin, end;  // outputs; the others see padding
  int64_t first;       // input column of output 0, negative in the padding
};

inline Span span_inside(const ConvProblem& p, int64_t kw) {
  const int64_t first = kw * p.dilation.w - p.padding.w, stride = p.stride.w;
  const int64_t width = p.output_size().w, room = p.input_size().w - 1 - first;
  const int64_t begin = first >= 0 ? 0 : std::min(width, (-first + stride - 1) / stride);
  const int64_t end = std::clamp(room < 0 ? 0 : room / stride + 1, begin, width);
  return {begin, end, first};
}

}  // namespace convops::cpu
