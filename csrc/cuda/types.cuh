// C++ types behind a DType on the device, their conversions, and the type sums are kept in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "problem.h"

namespace convops::cuda {

template <typename T>
using AccumulateType = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a value of the dtype's C++ type.
template <typename F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(__half{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
  }
}

// Between T and its AccumulateType; to 16 bits with one rounding to nearest even.
template <typename To, typename From>
__device__ __forceinline__ To convert(From value) {
  if constexpr (std::is_same_v<To, From>)
    return value;
  else if constexpr (std::is_same_v<From, __half>)
    return __half2float(value);
  else if constexpr (std::is_same_v<From, __nv_bfloat16>)
    return __bfloat162float(value);
  else if constexpr (std::is_same_v<To, __half>)
    return __float2half_rn(value);
  else if constexpr (std::is_same_v<To, __nv_bfloat16>)
    return __float2bfloat16_rn(value);
  else
    return To(value);
}

}  // namespace convops::cuda
