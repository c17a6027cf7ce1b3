// Stands for the toolkit's header: halves, by the compiler's own type, which rounds to nearest even
// as well.
#pragma once

#include <cuda_runtime.h>

struct __half {
  _Float16 value;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {{_Float16(x)}, {_Float16(y)}}; }
inline float2 __half22float2(__half2 halves) {
  return {float(halves.x.value), float(halves.y.value)};
}
