// Integer arithmetic of sizes.
#pragma once

#include <cstdint>

namespace convops {

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_divide(value, multiple) * multiple;
}

}  // namespace convops
