// wgmma, as csrc/cuda/ptx/wgmma.cuh describes it: the four warps of a warpgroup multiply together.
#pragma once

#include <cstdint>

namespace simulation {

// D (64 × columns) = A (64 × 16) · B (16 × columns) + D; d: the thread's elements, columns / 2. a
// and b: of each operand's descriptor the lower word, b_layout: of B's the upper; of fp16 or
// bfloat16. All threads meet, then everything is done.
constexpr uint32_t kPlainLayout = 8;  // eight rows of 16 bytes follow each other
void multiply(float* d, int columns, uint32_t a, uint32_t b, bool accumulate, bool bfloat16,
              uint32_t b_layout = kPlainLayout);

// The same of swizzled boxes, whose rows are the operand's or, turned, k's.
struct Boxes {
  uint32_t low, high;  // of the descriptor
  bool turned;
};
void multiply_boxes(float* d, int columns, const Boxes& a, const Boxes& b, bool accumulate,
                    bool bfloat16);

// The same with the thread's pairs of A, and B in cells, of which these are the descriptor's words.
void multiply_cells(float* d, int columns, const uint32_t (&a)[4], uint32_t low, uint32_t high,
                    bool accumulate, bool bfloat16);

// The same of TF32 (64 × 8 and 8 × columns): the thread's numbers of A, B in a swizzled box.
void multiply_tf32(float* d, int columns, const uint32_t (&a)[4], uint32_t low, uint32_t high,
                   bool accumulate);

}  // namespace simulation
