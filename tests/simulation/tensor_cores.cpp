#include "tensor_cores.h"

#include <cstring>
#include <vector>

#include "block.h"

namespace simulation {
namespace {

constexpr int kThreads = 128, kRows = 64, kOctet = 8, kDepth = 2 * kOctet;
constexpr int kMostColumns = 256;

struct Warpgroup {
  Meeting meeting;
  float* d[kThreads];
  uint32_t a, b;
};

// Of all halves: to convert them one by one would take most of the time.
const std::vector<float>& halves() {
  static const std::vector<float> values = [] {
    std::vector<float> values(1 << 16);
    for (size_t bits = 0; bits < values.size(); ++bits) {
      const auto low = uint16_t(bits);
      _Float16 half;
      std::memcpy(&half, &low, 2);
      values[bits] = float(half);
    }
    return values;
  }();
  return values;
}

// The operand's element k of all rows, which follow each other in octets of 16 bytes.
void read_operand(uint32_t descriptor, int rows, float (*values)[kMostColumns]) {
  const uint32_t begin = (descriptor & 0x3fff) * 16, plane = (descriptor >> 16 & 0x3fff) * 16;
  if (begin + plane + rows * 16 > uint32_t(shared_bytes)) fail("an operand ends behind the memory");
  const float* const value = halves().data();
  for (int k = 0; k < kDepth; ++k) {
    const uint8_t* from = shared_memory + begin + k / kOctet * plane + k % kOctet * 2;
    for (int row = 0; row < rows; ++row, from += 16) {
      uint16_t bits;
      std::memcpy(&bits, from, 2);
      values[k][row] = value[bits];
    }
  }
}

}  // namespace

void multiply(float* d, int columns, uint32_t a, uint32_t b, bool accumulate) {
  static Warpgroup warpgroups[8];
  static float left[kDepth][kMostColumns], right[kDepth][kMostColumns];
  Warpgroup& group = warpgroups[thread_index() / kThreads];
  const int thread = thread_index() % kThreads;
  if (group.meeting.arrived == 0) {
    group.a = a;
    group.b = b;
  }
  if (group.a != a || group.b != b) fail("threads of a warpgroup multiply different operands");
  group.d[thread] = d;
  if (group.meeting.arrived == kThreads - 1) {
    read_operand(a, kRows, left);
    read_operand(b, columns, right);
    for (int row = 0; row < kRows; ++row) {
      float sums[kMostColumns] = {};
      for (int k = 0; k < kDepth; ++k)
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

}  // namespace simulation
