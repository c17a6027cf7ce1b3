// Hopper's warpgroup matrix multiplication, one instruction a function: D (64×N, float32 in
// registers) = A (64×16) · B (16×N) + D, fp16 or bfloat16 (TF32 of half as many k's), B in shared
// memory and A there or in registers.
#pragma once

#include <cstdint>

namespace convops::cuda::ptx {

// An operand in shared memory, K-major without swizzle: rows of 8 halves (16 bytes), 16 bytes
// apart; a row's second 8 lie `plane` bytes after its first. Of the descriptor's two words only the
// lower depends on it; adding i to that moves the operand by i rows, adding j << 16 the second 8 by
// j rows more.
struct Matrix {
  uint32_t low;

  __device__ Matrix operator+(int rows) const { return {low + rows}; }
  __device__ uint64_t descriptor() const {
    constexpr uint64_t kEightRows = 8 * 16;  // bytes between groups of eight rows
    return (kEightRows >> 4) << 32 | low;
  }
};
__device__ __forceinline__ Matrix matrix(uint32_t address, uint32_t plane) {
  // Addresses have 18 bits; in a cluster the ones above are the block's rank.
  return {(address & 0x3ffff) >> 4 | plane >> 4 << 16};
}

// The same with another upper word: where eight rows are further apart, and swizzled.
struct LaidMatrix {
  uint32_t low, high;

  __device__ uint64_t descriptor() const { return uint64_t(high) << 32 | low; }
};

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Registers are named one by one in PTX: eight a line, H: and half a line.
#define CONVOPS_D(i)                                                                              \
  "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]), "+f"(d[8 * i + 4]), \
      "+f"(d[8 * i + 5]), "+f"(d[8 * i + 6]), "+f"(d[8 * i + 7])
#define CONVOPS_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CONVOPS_R1 CONVOPS_R0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CONVOPS_R2 CONVOPS_R1 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define CONVOPS_R3 CONVOPS_R2 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define CONVOPS_R4 CONVOPS_R3 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define CONVOPS_R5 CONVOPS_R4 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define CONVOPS_R6 CONVOPS_R5 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define CONVOPS_R7 CONVOPS_R6 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define CONVOPS_R8 CONVOPS_R7 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define CONVOPS_R9 CONVOPS_R8 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define CONVOPS_R10 CONVOPS_R9 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define CONVOPS_R11 CONVOPS_R10 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define CONVOPS_R12 CONVOPS_R11 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define CONVOPS_R13 CONVOPS_R12 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define CONVOPS_R14 CONVOPS_R13 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define CONVOPS_R15 CONVOPS_R14 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define CONVOPS_R8H CONVOPS_R8 ", %72, %73, %74, %75"
#define CONVOPS_R2H CONVOPS_R1 ", %16, %17, %18, %19"
#define CONVOPS_D1 CONVOPS_D(0), CONVOPS_D(1)
#define CONVOPS_D1H CONVOPS_D1, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define CONVOPS_D2 CONVOPS_D1, CONVOPS_D(2)
#define CONVOPS_D3 CONVOPS_D(0), CONVOPS_D(1), CONVOPS_D(2), CONVOPS_D(3)
#define CONVOPS_D4 CONVOPS_D3, CONVOPS_D(4)
#define CONVOPS_D5 CONVOPS_D3, CONVOPS_D(4), CONVOPS_D(5)
#define CONVOPS_D7 CONVOPS_D5, CONVOPS_D(6), CONVOPS_D(7)
#define CONVOPS_D9 CONVOPS_D7, CONVOPS_D(8), CONVOPS_D(9)
#define CONVOPS_D11 CONVOPS_D9, CONVOPS_D(10), CONVOPS_D(11)
#define CONVOPS_D13 CONVOPS_D11, CONVOPS_D(12), CONVOPS_D(13)
#define CONVOPS_D15 CONVOPS_D13, CONVOPS_D(14), CONVOPS_D(15)
#define CONVOPS_D8H CONVOPS_D7, CONVOPS_D(8), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])

// `accumulate` 0 starts a sum: D = A · B. Operand numbers follow the N / 2 registers.
#define CONVOPS_WGMMA(name, type, n, registers, outputs, a_number, b_number, accumulate_number) \
  template <typename B>                                                                         \
  __device__ __forceinline__ void name(float (&d)[n / 2], Matrix a, B b, int accumulate) {      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_number                          \
                 ", 0;\n"                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers \
                 "}, " a_number ", " b_number ", p, 1, 1, 0, 0;\n}\n"                           \
                 : outputs                                                                      \
                 : "l"(a.descriptor()), "l"(b.descriptor()), "r"(accumulate));                  \
  }
CONVOPS_WGMMA(wgmma, "f16", 96, CONVOPS_R5, CONVOPS_D5, "%48", "%49", "%50")
CONVOPS_WGMMA(wgmma, "f16", 152, CONVOPS_R8H, CONVOPS_D8H, "%76", "%77", "%78")
CONVOPS_WGMMA(wgmma, "f16", 160, CONVOPS_R9, CONVOPS_D9, "%80", "%81", "%82")
#define CONVOPS_WGMMA_HALVES(name, type)                                           \
  CONVOPS_WGMMA(name, type, 128, CONVOPS_R7, CONVOPS_D7, "%64", "%65", "%66")      \
  CONVOPS_WGMMA(name, type, 192, CONVOPS_R11, CONVOPS_D11, "%96", "%97", "%98")    \
  CONVOPS_WGMMA(name, type, 224, CONVOPS_R13, CONVOPS_D13, "%112", "%113", "%114") \
  CONVOPS_WGMMA(name, type, 256, CONVOPS_R15, CONVOPS_D15, "%128", "%129", "%130")
CONVOPS_WGMMA_HALVES(wgmma, "f16")
CONVOPS_WGMMA_HALVES(wgmma_bf16, "bf16")

// Both operands in boxes that the copy engine swizzled: rows of 64 halves, 128 bytes, begin at
// multiples of 1024 bytes. A row is the operand's, 64 k's of it (the next 16 k's are 32 bytes
// further), or, turned, a k, with 64 of the operand's rows (the next 16 k's are 16 rows further;
// the next 64 rows are in a box of their own, `box` bytes after the first).
inline constexpr int kBoxRowBytes = 128;
__device__ __forceinline__ LaidMatrix boxes(uint32_t address, uint32_t box) {
  constexpr uint32_t kEightRows = 8 * kBoxRowBytes, kSwizzle128 = 1;
  return {(address & 0x3ffff) >> 4 | box >> 4 << 16, kSwizzle128 << 30 | kEightRows >> 4};
}
// So many k's further.
template <bool kTurned>
__device__ __forceinline__ LaidMatrix skip(LaidMatrix matrix, int k) {
  return {matrix.low + k * (kTurned ? kBoxRowBytes : 2) / 16, matrix.high};
}
#define CONVOPS_WGMMA_BOXES(name, type, n, registers, outputs, a_number, b_number,              \
                            accumulate_number, turned_a, turned_b)                              \
  template <bool kTurnedA, bool kTurnedB>                                                       \
  __device__ __forceinline__ void name(float (&d)[n / 2], LaidMatrix a, LaidMatrix b,           \
                                       int accumulate) {                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_number                          \
                 ", 0;\n"                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers \
                 "}, " a_number ", " b_number ", p, 1, 1, " turned_a ", " turned_b ";\n}\n"     \
                 : outputs                                                                      \
                 : "l"(a.descriptor()), "l"(b.descriptor()), "r"(accumulate), "n"(kTurnedA),    \
                   "n"(kTurnedB));                                                              \
  }
#define CONVOPS_WGMMA_ALL_BOXES(name, type)                                                       \
  CONVOPS_WGMMA_BOXES(name, type, 64, CONVOPS_R3, CONVOPS_D3, "%32", "%33", "%34", "%35", "%36")  \
  CONVOPS_WGMMA_BOXES(name, type, 128, CONVOPS_R7, CONVOPS_D7, "%64", "%65", "%66", "%67", "%68") \
  CONVOPS_WGMMA_BOXES(name, type, 192, CONVOPS_R11, CONVOPS_D11, "%96", "%97", "%98", "%99", "%100")
CONVOPS_WGMMA_ALL_BOXES(wgmma_boxes, "f16")
CONVOPS_WGMMA_ALL_BOXES(wgmma_boxes_bf16, "bf16")

// TF32, eight k's: A in registers, a lane's k `lane % 4` in rows `lane / 4` and 8 more, then k's 4
// further; B in boxes whose rows are 32 floats (the next eight k's are 32 bytes further). The low
// 13 bits of both are cut off.
#define CONVOPS_WGMMA_TF32(n, registers, outputs, a0, a1, a2, a3, b_number, accumulate_number)   \
  __device__ __forceinline__ void wgmma_tf32(float (&d)[n / 2], const uint32_t (&a)[4],          \
                                             LaidMatrix b, int accumulate) {                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_number                           \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32 {" registers "}, {" a0 \
                 ", " a1 ", " a2 ", " a3 "}, " b_number ", p, 1, 1;\n}\n"                        \
                 : outputs                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()),              \
                   "r"(accumulate));                                                             \
  }
CONVOPS_WGMMA_TF32(64, CONVOPS_R3, CONVOPS_D3, "%32", "%33", "%34", "%35", "%36", "%37")
CONVOPS_WGMMA_TF32(128, CONVOPS_R7, CONVOPS_D7, "%64", "%65", "%66", "%67", "%68", "%69")
CONVOPS_WGMMA_TF32(256, CONVOPS_R15, CONVOPS_D15, "%128", "%129", "%130", "%131", "%132", "%133")

// An operand B in shared memory as it lies in cells, without swizzle: rows of 8 halves (16 bytes)
// are eight columns of B at one k, those of the next k follow, the next eight columns lie `plane`
// bytes after the first. Adding i moves the operand by i k's.
struct Cells {
  uint32_t low, high;

  __device__ Cells operator+(int cells) const { return {low + cells, high}; }
  __device__ uint64_t descriptor() const { return uint64_t(high) << 32 | low; }
};
__device__ __forceinline__ Cells cells(uint32_t address, uint32_t plane) {
  constexpr uint32_t kEightCells = 8 * 16;  // bytes between groups of eight k's
  return {(address & 0x3ffff) >> 4 | kEightCells >> 4 << 16, plane >> 4};
}

// A in registers: a lane's pairs of k's in rows `lane / 4` and 8 more, then 8 k's further.
#define CONVOPS_WGMMA_CELLS(name, type, n, registers, outputs, a0, a1, a2, a3, b_number,        \
                            accumulate_number)                                                  \
  __device__ __forceinline__ void name(float (&d)[n / 2], const uint32_t (&a)[4], Cells b,      \
                                       int accumulate) {                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_number                          \
                 ", 0;\n"                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers \
                 "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b_number ", p, 1, 1, 1;\n}\n"          \
                 : outputs                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()),             \
                   "r"(accumulate));                                                            \
  }
#define CONVOPS_WGMMA_ALL_CELLS(name, type)                                                        \
  CONVOPS_WGMMA_CELLS(name, type, 40, CONVOPS_R2H, CONVOPS_D1H, "%20", "%21", "%22", "%23", "%24", \
                      "%25")                                                                       \
  CONVOPS_WGMMA_CELLS(name, type, 48, CONVOPS_R2, CONVOPS_D2, "%24", "%25", "%26", "%27", "%28",   \
                      "%29")                                                                       \
  CONVOPS_WGMMA_CELLS(name, type, 64, CONVOPS_R3, CONVOPS_D3, "%32", "%33", "%34", "%35", "%36",   \
                      "%37")                                                                       \
  CONVOPS_WGMMA_CELLS(name, type, 80, CONVOPS_R4, CONVOPS_D4, "%40", "%41", "%42", "%43", "%44",   \
                      "%45")                                                                       \
  CONVOPS_WGMMA_CELLS(name, type, 96, CONVOPS_R5, CONVOPS_D5, "%48", "%49", "%50", "%51", "%52",   \
                      "%53")
CONVOPS_WGMMA_ALL_CELLS(wgmma, "f16")
CONVOPS_WGMMA_ALL_CELLS(wgmma_bf16, "bf16")

}  // namespace convops::cuda::ptx
