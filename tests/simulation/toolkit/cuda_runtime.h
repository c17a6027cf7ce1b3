// Stands for the toolkit's header and for what nvcc has built in: enough of CUDA to compile the
// kernels of csrc/ for the host. What threads do together is in block.h. A kernel that uses
// another built-in fails to compile here: then that one belongs here as well.
#pragma once

#include <math.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "block.h"
#include "launches.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one after the other. `extern __shared__`, which this would break, is the translation's
// in test_simulation.py.
#define __shared__ static
// Empty statements that only nvcc's choice of registers heeds, whose operands g++ would refuse.
#define asm(...)

// Vectors are aligned as on the device, so that the sanitizer sees what is not.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline int __ffs(uint32_t bits) { return __builtin_ffs(int(bits)); }
inline int __popc(uint32_t bits) { return std::popcount(bits); }
// Addresses in shared memory count from its start.
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return size_t(static_cast<const uint8_t*>(pointer) - simulation::shared_memory);
}

inline void __syncwarp() { simulation::exchange(0); }
inline void __syncthreads() { simulation::count_threads(false); }
inline int __syncthreads_or(int predicate) { return simulation::count_threads(predicate != 0) > 0; }
inline int __syncthreads_and(int predicate) {
  return simulation::count_threads(predicate == 0) == 0;
}
inline int __syncthreads_count(int predicate) { return simulation::count_threads(predicate != 0); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return std::bit_cast<T>(simulation::exchange(std::bit_cast<uint32_t>(value))[lane]);
}
inline int64_t __shfl_sync(unsigned mask, int64_t value, int lane) {
  const uint32_t low = __shfl_sync(mask, uint32_t(value), lane);
  return int64_t(uint64_t{__shfl_sync(mask, uint32_t(value >> 32), lane)} << 32 | low);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int apart) {
  return __shfl_sync(mask, value, simulation::thread_index() % simulation::kWarp ^ apart);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int apart) {
  const int lane = simulation::thread_index() % simulation::kWarp, from = lane + apart;
  return __shfl_sync(mask, value, from < simulation::kWarp ? from : lane);
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  uint32_t most = 0;
  for (const uint32_t other : simulation::exchange(value)) most = max(most, other);
  return most;
}
inline int __reduce_add_sync(unsigned, int value) {
  int sum = 0;
  for (const uint32_t other : simulation::exchange(uint32_t(value))) sum += int(other);
  return sum;
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
  return ~__reduce_max_sync(~0u, ~value);
}
inline uint32_t __ballot_sync(unsigned, bool predicate) {
  uint32_t bits = 0, bit = 1;
  for (const uint32_t other : simulation::exchange(predicate)) {
    if (other) bits |= bit;
    bit <<= 1;
  }
  return bits;
}
inline bool __any_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) == ~0u;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
constexpr int cudaEnableDefault = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  simulation::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
// The driver's functions are found by their names: copy_engine.cpp has the only one.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned version,
                                             int flags, cudaDriverEntryPointQueryResult* result);

namespace simulation {

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments...), as the translation in
// test_simulation.py writes it: launch(kernel, grid, threads, shared_bytes, stream)(arguments...).
template <typename Kernel>
auto launch(Kernel* kernel, dim3 grid, dim3 threads, int64_t shared_bytes, cudaStream_t) {
  return [=](const auto&... arguments) {
    check_launch(reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z}, threads.count(),
                 int(shared_bytes));
    gridDim = grid;
    blockDim = threads;
    const auto digits = [](unsigned index, dim3 sizes) {
      return dim3(index % sizes.x, index / sizes.x % sizes.y, index / sizes.x / sizes.y);
    };
    for (unsigned block = 0; block < grid.count(); ++block)
      run_block(
          int(threads.count()), int(shared_bytes),
          [&](int thread) {
            threadIdx = digits(unsigned(thread), threads);
            blockIdx = digits(block, grid);
          },
          [&] { kernel(arguments...); });
  };
}

}  // namespace simulation

// A launch with attributes, of which none matters where blocks run one after the other.
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  simulation::launch(kernel, config->gridDim, config->blockDim, int64_t(config->dynamicSmemBytes),
                     config->stream)(arguments...);
  return cudaSuccess;
}
