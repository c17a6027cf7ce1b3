#include "cuda/launch.h"
#include "cuda/ptx/launch.cuh"
#include "cuda/types.cuh"
#include "cuda/weight_parts.h"
#include "integers.h"

namespace convops::cuda {
namespace {

// Adds the parts in order. Block: x elements, y threads of each that take every y-th part.
constexpr int kReduceThreads = 256;
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ Tensor4 weight, const float* partial, int64_t parts,
                  T* __restrict__ result) {
  __shared__ float shared[kReduceThreads];
  const int lane = int(threadIdx.x), lanes = int(blockDim.x), share = int(threadIdx.y);
  const int64_t count = weight.numel(), element = int64_t(blockIdx.x) * lanes + lane;
  ptx::wait_for_prerequisites();
  float sum = 0;
  if (element < count)
#pragma unroll 4
    for (int64_t part = share; part < parts; part += blockDim.y)
      sum += partial[part * count + element];
  shared[share * lanes + lane] = sum;
  __syncthreads();
  if (share != 0 || element >= count) return;
  for (int other = 1; other < int(blockDim.y); ++other) sum += shared[other * lanes + lane];
  const int64_t kw = element % weight.size[3], line = element / weight.size[3];
  const int64_t kh = line % weight.size[2], rest = line / weight.size[2];
  const int64_t channel = rest % weight.size[1], out = rest / weight.size[1];
  result[out * weight.stride[0] + channel * weight.stride[1] + kh * weight.stride[2] +
         kw * weight.stride[3]] = convert<T>(sum);
}

}  // namespace

void add_weight_parts(const Tensor4& weight, const float* partial, int64_t parts, DType dtype,
                      void* result, const Execution& execution) {
  constexpr int kMaxShares = 8, kPartsOfShare = 4;
  unsigned shares = 1;
  while (shares < kMaxShares && shares * kPartsOfShare < parts) shares *= 2;
  const dim3 threads(kReduceThreads / shares, shares);
  dispatch(dtype, [&]<typename T>(T) {
    launch_early(reduce_kernel<T>, ceil_divide(weight.numel(), threads.x), threads, execution,
                 weight, partial, parts, static_cast<T*>(result));
  });
}

}  // namespace convops::cuda
