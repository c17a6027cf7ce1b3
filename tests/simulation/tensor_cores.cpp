#include "tensor_cores.h"

#include <bit>
#include <cstring>
#include <vector>

#include "block.h"
#include "copy_engine.h"

namespace simulation {
namespace {

constexpr int kThreads = 128, kRows = 64, kOctet = 8, kDepth = 2 * kOctet;
constexpr int kTf32Depth = 8;
constexpr int kMostColumns = 256;

struct Warpgroup {
  Meeting meeting;
  float* d[kThreads];
  uint32_t operands[2];         // descriptors, or their words
  uint32_t pairs[kThreads][4];  // of A in registers, or floats
};
Warpgroup warpgroups[8];
float left[kDepth][kMostColumns], right[kDepth][kMostColumns];

// Of all halves: to convert them one by one would take most of the time.
const std::vector<float>& halves() {
  static const std::vector<float> values = [] {
    std::vector<float> values(1 << 16);
    for (size_t bits = 0; bits < values.size(); ++bits)
      values[bits] = float(std::bit_cast<_Float16>(uint16_t(bits)));
    return values;
  }();
  return values;
}
const std::vector<float>& bfloats() {
  static const std::vector<float> values = [] {
    std::vector<float> values(1 << 16);
    for (size_t bits = 0; bits < values.size(); ++bits)
      values[bits] = std::bit_cast<float>(uint32_t(bits) << 16);
    return values;
  }();
  return values;
}

// The operand's element k of all rows: octets of 16 bytes which follow each other, or, swizzled,
// rows of 32, 64 or 128 bytes, where their octets have changed places.
void read_operand(uint32_t descriptor, uint32_t layout, int rows, bool bfloat16,
                  float (*values)[kMostColumns]) {
  const uint32_t begin = (descriptor & 0x3fff) * 16, eight_rows = (layout & 0x3fff) * 16;
  const uint32_t swizzle = layout >> 30;
  const uint32_t plane = swizzle ? 16 : (descriptor >> 16 & 0x3fff) * 16;
  const int swizzled_bytes = swizzle ? 256 >> swizzle : 0;
  if (begin + (rows - 1) * (eight_rows / 8) + plane + kOctet * 2 > uint32_t(shared_bytes))
    fail("an operand ends behind the memory");
  const float* const value = (bfloat16 ? bfloats() : halves()).data();
  for (int k = 0; k < kDepth; ++k)
    for (int row = 0; row < rows; ++row) {
      const uint32_t at = begin + row / 8 * eight_rows + row % 8 * (eight_rows / 8) +
                          k / kOctet * plane + k % kOctet * 2;
      uint16_t bits;
      std::memcpy(&bits, shared_memory + swizzle_place(at, swizzled_bytes), 2);
      values[k][row] = value[bits];
    }
}

// Rows of 64 halves, 64 of the operand's rows at a k; the next 64 rows lie a box further.
void read_turned(uint32_t descriptor, uint32_t layout, int rows, bool bfloat16,
                 float (*values)[kMostColumns]) {
  constexpr int kBoxRows = 64, kRowBytes = 128;
  const uint32_t begin = (descriptor & 0x3fff) * 16, box = (descriptor >> 16 & 0x3fff) * 16;
  const uint32_t eight_rows = (layout & 0x3fff) * 16;
  if (layout >> 30 != 1) fail("a turned operand that is not swizzled");
  if (begin + (rows - 1) / kBoxRows * box + kDepth / kOctet * eight_rows > uint32_t(shared_bytes))
    fail("an operand ends behind the memory");
  const float* const value = (bfloat16 ? bfloats() : halves()).data();
  for (int k = 0; k < kDepth; ++k)
    for (int row = 0; row < rows; ++row) {
      const uint32_t at = begin + row / kBoxRows * box + k / kOctet * eight_rows +
                          k % kOctet * kRowBytes + row % kBoxRows * 2;
      uint16_t bits;
      std::memcpy(&bits, shared_memory + swizzle_place(at, kRowBytes), 2);
      values[k][row] = value[bits];
    }
}

// Element k of all columns: eight columns are a cell's, k's follow each other in eights.
void read_cells(uint32_t low, uint32_t high, int columns, bool bfloat16) {
  const uint32_t begin = (low & 0x3fff) * 16, eights = (low >> 16 & 0x3fff) * 16;
  const uint32_t plane = (high & 0x3fff) * 16;
  if (begin + eights + (columns / kOctet - 1) * plane + kOctet * 16 > uint32_t(shared_bytes))
    fail("an operand ends behind the memory");
  const float* const value = (bfloat16 ? bfloats() : halves()).data();
  for (int k = 0; k < kDepth; ++k)
    for (int i = 0; i < columns; ++i) {
      uint16_t bits;
      std::memcpy(&bits,
                  shared_memory + begin + k / kOctet * eights + k % kOctet * 16 +
                      i / kOctet * plane + i % kOctet * 2,
                  2);
      right[k][i] = value[bits];
    }
}

// Of a lane four pairs of k's: two rows, then 8 k's further.
void read_pairs(const Warpgroup& group, bool bfloat16) {
  const float* const value = (bfloat16 ? bfloats() : halves()).data();
  for (int thread = 0; thread < kThreads; ++thread)
    for (int i = 0; i < 8; ++i) {
      const int pair = i / 2, lane = thread % kWarp;
      const int row = thread / kWarp * 16 + lane / 4 + pair % 2 * 8;
      const int k = lane % 4 * 2 + i % 2 + pair / 2 * 8;
      left[k][row] = value[uint16_t(group.pairs[thread][pair] >> i % 2 * 16)];
    }
}

// TF32 does not have a float's last bits.
float tf32(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

// Of a lane two k's, four apart, of two rows.
void read_floats(const Warpgroup& group) {
  for (int thread = 0; thread < kThreads; ++thread)
    for (int i = 0; i < 4; ++i) {
      const int lane = thread % kWarp, row = thread / kWarp * 16 + lane / 4 + i % 2 * 8;
      left[lane % 4 + i / 2 * 4][row] = tf32(group.pairs[thread][i]);
    }
}
// Rows of 32 floats, swizzled.
void read_float_boxes(uint32_t descriptor, uint32_t layout, int rows) {
  constexpr int kRowBytes = 128;
  const uint32_t begin = (descriptor & 0x3fff) * 16;
  if (layout >> 30 != 1 || (layout & 0x3fff) * 16 != 8 * kRowBytes) fail("no swizzled rows");
  if (begin + (rows - 1) * kRowBytes + kTf32Depth * 4 > uint32_t(shared_bytes))
    fail("an operand ends behind the memory");
  for (int k = 0; k < kTf32Depth; ++k)
    for (int row = 0; row < rows; ++row) {
      uint32_t bits;
      std::memcpy(&bits, shared_memory + swizzle_place(begin + row * kRowBytes + k * 4, kRowBytes),
                  4);
      right[k][row] = tf32(bits);
    }
}

// What all threads do together when the last one comes; `read` fills both operands.
template <typename Read>
void multiply_together(float* d, int columns, uint32_t a, uint32_t b, bool accumulate, Read read,
                       int depth = kDepth) {
  Warpgroup& group = warpgroups[thread_index() / kThreads];
  if (group.meeting.arrived == 0) {
    group.operands[0] = a;
    group.operands[1] = b;
  }
  if (group.operands[0] != a || group.operands[1] != b)
    fail("threads of a warpgroup multiply different operands");
  group.d[thread_index() % kThreads] = d;
  if (group.meeting.arrived == kThreads - 1) {
    read(group);
    for (int row = 0; row < kRows; ++row) {
      float sums[kMostColumns] = {};
      for (int k = 0; k < depth; ++k)
        for (int i = 0; i < columns; ++i) sums[i] += left[k][row] * right[k][i];
      // Four lanes have the pairs of a row by turns; of 16 rows a lane has two.
      for (int i = 0; i < columns; ++i) {
        const int lane = row % 8 * 4 + i % 8 / 2;
        float& to = group.d[row / 16 * kWarp + lane][i / 8 * 4 + row % 16 / 8 * 2 + i % 2];
        to = (accumulate ? to : 0) + sums[i];
      }
    }
  }
  meet(group.meeting, kThreads);
}

}  // namespace

void multiply(float* d, int columns, uint32_t a, uint32_t b, bool accumulate, bool bfloat16,
              uint32_t b_layout) {
  multiply_together(d, columns, a, b, accumulate, [&](const Warpgroup&) {
    read_operand(a, kPlainLayout, kRows, bfloat16, left);
    read_operand(b, b_layout, columns, bfloat16, right);
  });
}

void multiply_boxes(float* d, int columns, const Boxes& a, const Boxes& b, bool accumulate,
                    bool bfloat16) {
  multiply_together(d, columns, a.low, b.low, accumulate, [&](const Warpgroup&) {
    (a.turned ? read_turned : read_operand)(a.low, a.high, kRows, bfloat16, left);
    (b.turned ? read_turned : read_operand)(b.low, b.high, columns, bfloat16, right);
  });
}

void multiply_cells(float* d, int columns, const uint32_t (&a)[4], uint32_t low, uint32_t high,
                    bool accumulate, bool bfloat16) {
  std::memcpy(warpgroups[thread_index() / kThreads].pairs[thread_index() % kThreads], a, sizeof a);
  multiply_together(d, columns, low, high, accumulate, [&](const Warpgroup& group) {
    read_pairs(group, bfloat16);
    read_cells(low, high, columns, bfloat16);
  });
}

void multiply_tf32(float* d, int columns, const uint32_t (&a)[4], uint32_t low, uint32_t high,
                   bool accumulate) {
  std::memcpy(warpgroups[thread_index() / kThreads].pairs[thread_index() % kThreads], a, sizeof a);
  multiply_together(
      d, columns, low, high, accumulate,
      [&](const Warpgroup& group) {
        read_floats(group);
        read_float_boxes(low, high, columns);
      },
      kTf32Depth);
}

}  // namespace simulation
