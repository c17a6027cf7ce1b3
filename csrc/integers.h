// Integer arithmetic of sizes.
#pragma once

#include <cstdint>

#include "problem.h"

namespace convops {

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_divide(value, multiple) * multiple;
}

// Division by a number the host knows: a multiplication (Granlund & Montgomery 1994). Dividends are
// below 2^31. By 1 it has no such multiplication, and a branch for that would cost a predicate, of
// which the kernels have few: then `whole` lets all bits of the dividend pass.
struct Divisor {
  unsigned value = 1, magic = 0, shift = 0, whole = ~0u;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : value(unsigned(divisor)) {
    if (value == 1) return;
    whole = 0;
    while ((int64_t{1} << (shift + 1)) < divisor) ++shift;  // floor of log2(divisor - 1)
    magic = unsigned(((int64_t{1} << (32 + shift)) + value - 1) / value);
  }
  CONVOPS_HOST_DEVICE int quotient(int dividend) const {
#ifdef __CUDA_ARCH__
    return int(__umulhi(unsigned(dividend), magic) >> shift | (unsigned(dividend) & whole));
#else
    return dividend / int(value);
#endif
  }
  CONVOPS_HOST_DEVICE int remainder(int dividend) const {
    return dividend - quotient(dividend) * int(value);
  }
};

}  // namespace convops
