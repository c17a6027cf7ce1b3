#include "cuda/launch.h"
#include "cuda/ptx/launch.cuh"
#include "cuda/types.cuh"
#include "cuda/weight_parts.h"
#include "integers.h"

namespace convops::cuda {
namespace {

constexpr int kReduceThreads = 256;
// Threads of an element, and how many parts are enough for another of them.
constexpr int kMaxShares = 32, kPartsOfShare = 4;
constexpr int kVector = 4;  // elements of a thread, where all are in memory as in the parts

// Where an element of a part is in memory.
__device__ int64_t place_of(const Tensor4& weight, int64_t element) {
  const int64_t kw = element % weight.size[3], line = element / weight.size[3];
  const int64_t kh = line % weight.size[2], rest = line / weight.size[2];
  const int64_t channel = rest % weight.size[1], out = rest / weight.size[1];
  return out * weight.stride[0] + channel * weight.stride[1] + kh * weight.stride[2] +
         kw * weight.stride[3];
}

// Adds the parts in order. Block: x elements, kCount a thread, y threads of each that take every
// y-th part.
template <typename T, int kCount>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ Tensor4 weight, const float* partial, int64_t parts,
                  T* __restrict__ result) {
  struct alignas(kCount * sizeof(float)) Sums {
    float of[kCount];

    __device__ void operator+=(const Sums& other) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) of[i] += other.of[i];
    }
  };
  __shared__ Sums shared[kReduceThreads];
  const int lane = int(threadIdx.x), lanes = int(blockDim.x), share = int(threadIdx.y);
  const int64_t count = weight.numel();
  const int64_t element = (int64_t{blockIdx.x} * lanes + lane) * kCount;
  ptx::wait_for_prerequisites();
  Sums sums{};
  if (element < count)
#pragma unroll 4
    for (int64_t part = share; part < parts; part += blockDim.y)
      sums += *reinterpret_cast<const Sums*>(partial + part * count + element);
  shared[share * lanes + lane] = sums;
  __syncthreads();
  if (share != 0 || element >= count) return;
  for (int other = 1; other < int(blockDim.y); ++other) sums += shared[other * lanes + lane];
  if constexpr (kCount == 1) {
    result[place_of(weight, element)] = convert<T>(sums.of[0]);
  } else {
    struct alignas(kCount * sizeof(T)) Results {
      T of[kCount];
    } results;
#pragma unroll
    for (int i = 0; i < kCount; ++i) results.of[i] = convert<T>(sums.of[i]);
    *reinterpret_cast<Results*>(result + element) = results;
  }
}

}  // namespace

void add_weight_parts(const Tensor4& weight, const float* partial, int64_t parts, DType dtype,
                      void* result, const Execution& execution) {
  const int64_t bytes = kVector * element_size(dtype);
  const bool vectors = weight.is_contiguous() && weight.numel() % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(result) % bytes == 0 &&
                       reinterpret_cast<uintptr_t>(partial) % (kVector * sizeof(float)) == 0;
  unsigned shares = 1;
  while (shares < kMaxShares && shares * kPartsOfShare < parts) shares *= 2;
  const dim3 threads(kReduceThreads / shares, shares);
  dispatch(dtype, [&]<typename T>(T) {
    const auto kernel = vectors ? reduce_kernel<T, kVector> : reduce_kernel<T, 1>;
    const int64_t blocks = ceil_divide(weight.numel(), (vectors ? kVector : 1) * threads.x);
    launch_early(kernel, blocks, threads, 0, execution, weight, partial, parts,
                 static_cast<T*>(result));
  });
}

}  // namespace convops::cuda
