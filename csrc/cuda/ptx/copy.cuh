// Asynchronous copies between global and shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cuda/ptx>

namespace convops::cuda::ptx {

// Four bytes, or zeros where `inside` is false (then nothing is read).
__device__ __forceinline__ void copy_float(uint32_t destination, const float* source, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source),
               "r"(inside ? 4 : 0)
               : "memory");
}
// 4, 8 or 16 bytes; both addresses are multiples of it. 16 bypass L1.
template <int kBytes>
__device__ __forceinline__ void copy_bytes(uint32_t destination, const void* source) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(destination), "l"(source),
                 "n"(kBytes)
                 : "memory");
}
// The same where `inside`, else zeros.
template <int kBytes>
__device__ __forceinline__ void copy_bytes(uint32_t destination, const void* source, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source),
               "n"(kBytes), "r"(inside ? kBytes : 0)
               : "memory");
}
// The same by a predicate, not 0, instead of a number of bytes; 16 bypass L1.
template <int kBytes>
__device__ __forceinline__ void copy_bytes_or_zeros(uint32_t destination, const void* source,
                                                    uint32_t inside) {
  if constexpr (kBytes == 16)
    asm volatile(
        "{ .reg .pred outside; setp.eq.s32 outside, %2, 0;\n"
        "  cp.async.cg.shared.global [%0], [%1], 16, outside; }" ::"r"(destination),
        "l"(source), "r"(inside)
        : "memory");
  else
    asm volatile(
        "{ .reg .pred outside; setp.eq.s32 outside, %2, 0;\n"
        "  cp.async.ca.shared.global [%0], [%1], %3, outside; }" ::"r"(destination),
        "l"(source), "r"(inside), "n"(kBytes)
        : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The barrier's phase completes when so many bytes have been copied, too.
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  ::cuda::ptx::mbarrier_expect_tx(::cuda::ptx::sem_relaxed, ::cuda::ptx::scope_cta,
                                  ::cuda::ptx::space_shared, barrier, bytes);
}

// Multiples of 16 bytes by one thread; the barrier's phase completes when they have arrived.
__device__ __forceinline__ void copy_bulk(void* destination, const void* source, uint32_t bytes,
                                          uint64_t* barrier) {
  ::cuda::ptx::mbarrier_arrive_expect_tx(::cuda::ptx::sem_release, ::cuda::ptx::scope_cta,
                                         ::cuda::ptx::space_shared, barrier, bytes);
  ::cuda::ptx::cp_async_bulk(::cuda::ptx::space_cluster, ::cuda::ptx::space_global, destination,
                             source, bytes, barrier);
}

// A box of a four-dimensional tensor, zeros outside of it; place: its first element, innermost
// dimension first (a multiple of 16 bytes). The barrier expects its bytes.
__device__ __forceinline__ void copy_box(void* destination, const CUtensorMap* map,
                                         const int32_t (&place)[4], uint64_t* barrier) {
  ::cuda::ptx::cp_async_bulk_tensor(::cuda::ptx::space_cluster, ::cuda::ptx::space_global,
                                    destination, map, place, barrier);
}

// Pixels of a tensor in channels_last, as an im2col map walks them (make_im2col_map): from `place`
// on (channel, column, row and image of the first pixel of a window), each shifted by (column, row)
// of the window. The barrier expects their bytes.
__device__ __forceinline__ void copy_pixels(void* destination, const CUtensorMap* map,
                                            const int32_t (&place)[4], const uint16_t (&shift)[2],
                                            uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(
          uint32_t(__cvta_generic_to_shared(destination))),
      "l"(map), "r"(uint32_t(__cvta_generic_to_shared(barrier))), "r"(place[0]), "r"(place[1]),
      "r"(place[2]), "r"(place[3]), "h"(shift[0]), "h"(shift[1])
      : "memory");
}

// Multiples of 16 bytes, or a box, from shared to global memory, by one thread; it commits its
// copies in groups and waits until all but kPending groups have been read, or all are written.
__device__ __forceinline__ void store_bulk(void* destination, const void* source, uint32_t bytes) {
  ::cuda::ptx::cp_async_bulk(::cuda::ptx::space_global, ::cuda::ptx::space_shared, destination,
                             source, bytes);
}
__device__ __forceinline__ void store_box(const CUtensorMap* map, const int32_t (&place)[5],
                                          const void* source) {
  ::cuda::ptx::cp_async_bulk_tensor(::cuda::ptx::space_global, ::cuda::ptx::space_shared, map,
                                    place, source);
}
__device__ __forceinline__ void store_commit() { ::cuda::ptx::cp_async_bulk_commit_group(); }
template <int kPending>
__device__ __forceinline__ void store_wait_read() {
  ::cuda::ptx::cp_async_bulk_wait_group_read(::cuda::ptx::n32_t<kPending>{});
}
__device__ __forceinline__ void store_wait() {
  ::cuda::ptx::cp_async_bulk_wait_group(::cuda::ptx::n32_t<0>{});
}

}  // namespace convops::cuda::ptx
