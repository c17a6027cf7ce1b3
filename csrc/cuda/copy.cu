// Strided copy of a four-dimensional tensor with conversion: packs weights and gradients for a
// GEMM, unpacks a weight gradient, and spreads a bias over the output (source strides 0).
//
// One thread an element, in the order of the destination's memory, so stores are coalesced.
#include <algorithm>
#include <utility>

#include "cuda/check.h"
#include "cuda/im2col.h"
#include "cuda/types.cuh"
#include "integers.h"

namespace convops::cuda {
namespace {

constexpr int kThreads = 256;

struct Divisors {
  Divisor size[4];

  Divisors() = default;
  explicit Divisors(const Tensor4& t) {
    for (int i = 0; i < 4; ++i) size[i] = Divisor(t.size[i]);
  }
};

// Index: 32 bits where they suffice; only they have fast divisions.
template <typename To, typename From, typename Index>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(const __grid_constant__ Tensor4 to, To* __restrict__ destination,
                const __grid_constant__ Tensor4 from, const From* __restrict__ source,
                const __grid_constant__ Divisors by, Index elements) {
  const Index element = Index(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= elements) return;
  Index rest = element;
  int64_t to_offset = 0, from_offset = 0;
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    if (to.size[i] == 1) continue;  // the same for all threads
    Index quotient = 0;
    if (i > 0) quotient = sizeof(Index) == 4 ? by.size[i].quotient(rest) : rest / to.size[i];
    const Index index = i > 0 ? rest - quotient * Index(to.size[i]) : rest;
    rest = quotient;
    to_offset += index * to.stride[i];
    from_offset += index * from.stride[i];
  }
  destination[to_offset] = convert<To>(source[from_offset]);
}

template <typename To, typename From>
void launch(const Tensor4& to, void* destination, const Tensor4& from, const void* source,
            cudaStream_t stream) {
  const int64_t elements = to.numel();
  const unsigned grid = unsigned((elements + kThreads - 1) / kThreads);
  To* out = static_cast<To*>(destination);
  const From* in = static_cast<const From*>(source);
  if (elements + kThreads <= INT32_MAX)
    copy_kernel<To, From, int32_t>
        <<<grid, kThreads, 0, stream>>>(to, out, from, in, Divisors(to), elements);
  else
    copy_kernel<To, From, int64_t>
        <<<grid, kThreads, 0, stream>>>(to, out, from, in, Divisors(), elements);
  CONVOPS_LAUNCH_CHECK("copy");
}

// The dimensions of both in the order of the destination's strides, largest first.
void sort_by_stride(Tensor4& to, Tensor4& from) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j + 1 < 4 - i; ++j)
      if (to.stride[j] < to.stride[j + 1]) {
        std::swap(to.size[j], to.size[j + 1]);
        std::swap(to.stride[j], to.stride[j + 1]);
        std::swap(from.size[j], from.size[j + 1]);
        std::swap(from.stride[j], from.stride[j + 1]);
      }
}

// Makes one dimension of two where the elements of both tensors go on, such as height and width.
void merge_dimensions(Tensor4& to, Tensor4& from) {
  const auto goes_on = [](const Tensor4& t, int i) {
    return t.stride[i] == t.size[i + 1] * t.stride[i + 1];
  };
  for (int i = 2; i >= 0; --i)
    if (goes_on(to, i) && goes_on(from, i))
      for (Tensor4* t : {&to, &from}) {
        t->size[i] *= std::exchange(t->size[i + 1], 1);
        t->stride[i] = t->stride[i + 1];
      }
}

}  // namespace

void copy(const Tensor4& destination_shape, void* destination, DType destination_dtype,
          const Tensor4& source_shape, const void* source, DType source_dtype, void* stream) {
  if (destination_shape.numel() == 0) return;
  Tensor4 to = destination_shape, from = source_shape;
  sort_by_stride(to, from);
  merge_dimensions(to, from);
  const auto s = static_cast<cudaStream_t>(stream);
  // One of the two is the problem's dtype; where they differ the other is that of its sums.
  const bool widening = destination_dtype == DType::kFloat32;
  dispatch(widening ? source_dtype : destination_dtype, [&](auto tag) {
    using T = decltype(tag);
    using Sum = AccumulateType<T>;
    if (destination_dtype == source_dtype)
      launch<T, T>(to, destination, from, source, s);
    else if (widening)
      launch<Sum, T>(to, destination, from, source, s);
    else
      launch<T, Sum>(to, destination, from, source, s);
  });
}

}  // namespace convops::cuda
