// Neighbouring elements as they are in memory.
#pragma once

#include <cstring>

#include "cuda/types.cuh"

namespace convops::cuda {

// Element i of a word.
template <typename T, typename Word>
__device__ __forceinline__ float unpack_element(Word word, int i) {
  constexpr int kElements = sizeof(Word) / sizeof(T);
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kElements == 2) {
    // Each is a float's upper half; convert() would first make a register of it.
    return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000);
  } else {
    T elements[kElements];
    memcpy(elements, &word, sizeof(Word));
    return convert<float>(elements[i]);
  }
}

template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  // Not elements: 16 bits at a time would be packed and unpacked on the way.
  using Word = std::conditional_t<kCount * sizeof(T) == 2, uint16_t, uint32_t>;
  static constexpr int kElements = sizeof(Word) / sizeof(T), kWords = kCount / kElements;
  Word words[kWords];

  static __device__ __forceinline__ Vector load_or_zeros(const T* from, bool inside) {
    Vector vector{};
    if (inside) vector = *reinterpret_cast<const Vector*>(from);
    return vector;
  }
  __device__ __forceinline__ void unpack(float (&to)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = unpack_element<T>(words[i / kElements], i % kElements);
  }
};

}  // namespace convops::cuda
