// Stands for the toolkit's header: halves, by the compiler's own type, which rounds to nearest even
// as well.
#pragma once

#include <cuda_runtime.h>

struct __half {
  _Float16 value;

  __half() = default;
  __half(float value) : value(_Float16(value)) {}
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 halves) {
  return {float(halves.x.value), float(halves.y.value)};
}
inline __half __float2half_rn(float value) { return value; }
inline float __half2float(__half half) { return float(half.value); }
