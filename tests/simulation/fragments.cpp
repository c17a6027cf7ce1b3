#include "fragments.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "block.h"

namespace simulation {
namespace {

constexpr int kRows = 16, kColumns = 8, kMostDepth = 16;

// What a lane brings.
struct Fragments {
  float* d;
  uint32_t a[4], b[2];
};
struct Warp {
  Meeting meeting;
  Fragments lanes[kWarp];
  Elements elements;
};

double to_double(uint32_t bits, Elements elements) {
  if (elements == Elements::kTf32) return std::bit_cast<float>(bits & ~0x1fffu);
  if (elements == Elements::kBFloat16) return std::bit_cast<float>(bits << 16);
  return double(float(std::bit_cast<_Float16>(uint16_t(bits))));
}

// Calls visit(k, value) for the elements of a register whose first 32 / width elements are at k.
template <typename Visit>
void for_elements(uint32_t bits, int lane, int half, Elements elements, Visit visit) {
  if (elements == Elements::kTf32) return visit(lane % 4 + 4 * half, to_double(bits, elements));
  for (int i = 0; i < 2; ++i)
    visit(lane % 4 * 2 + i + 8 * half, to_double(bits >> 16 * i & 0xffff, elements));
}

void multiply(const Warp& warp) {
  double a[kRows][kMostDepth] = {}, b[kMostDepth][kColumns] = {};
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments& f = warp.lanes[lane];
    for (int i = 0; i < 4; ++i)
      for_elements(f.a[i], lane, i / 2, warp.elements,
                   [&](int k, double value) { a[lane / 4 + i % 2 * 8][k] = value; });
    for (int i = 0; i < 2; ++i)
      for_elements(f.b[i], lane, i, warp.elements,
                   [&](int k, double value) { b[k][lane / 4] = value; });
  }
  const int depth = warp.elements == Elements::kTf32 ? 8 : 16;
  for (int row = 0; row < kRows; ++row) {
    double sums[kColumns] = {};
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < kColumns; ++column) sums[column] += a[row][k] * b[k][column];
    for (int column = 0; column < kColumns; ++column) {
      float& d = warp.lanes[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2];
      d = float(double(d) + sums[column]);
    }
  }
}

}  // namespace

void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Elements elements) {
  static Warp warps[32];
  Warp& warp = warps[thread_index() / kWarp];
  Fragments& mine = warp.lanes[thread_index() % kWarp];
  mine.d = d;
  std::ranges::copy(a, mine.a);
  std::ranges::copy(b, mine.b);
  warp.elements = elements;
  if (warp.meeting.arrived == kWarp - 1) multiply(warp);
  meet(warp.meeting, kWarp);
}

namespace {

// Of all lanes.
const std::array<uint32_t, kWarp>& matrix_rows(uint32_t row) {
  if (row % 16 != 0 || int64_t{row} + 16 > shared_bytes)
    fail("a matrix's row at an odd address or beyond shared memory");
  return exchange(row);
}

}  // namespace

void load_matrices(uint32_t (&d)[4], uint32_t row) {
  const int lane = thread_index() % kWarp;
  const auto& rows = matrix_rows(row);
  for (int i = 0; i < 4; ++i)
    std::memcpy(&d[i], shared_memory + rows[size_t(i * 8 + lane / 4)] + lane % 4 * 4, 4);
}

void load_transposed(uint32_t (&d)[4], uint32_t row) {
  const int lane = thread_index() % kWarp;
  const auto& rows = matrix_rows(row);
  for (int i = 0; i < 8; ++i)
    std::memcpy(reinterpret_cast<uint8_t*>(d) + i * 2,
                shared_memory + rows[size_t(i / 2 * 8 + lane % 4 * 2 + i % 2)] + lane / 4 * 2, 2);
}

void store_transposed(uint32_t column, const uint32_t (&d)[4]) {
  const int lane = thread_index() % kWarp;
  const auto& columns = matrix_rows(column);
  for (int i = 0; i < 8; ++i)
    std::memcpy(shared_memory + columns[size_t(i / 2 * 8 + lane % 4 * 2 + i % 2)] + lane / 4 * 2,
                reinterpret_cast<const uint8_t*>(d) + i * 2, 2);
}

void store_matrices(uint32_t row, const uint32_t (&d)[4]) {
  const int lane = thread_index() % kWarp;
  const auto& rows = matrix_rows(row);
  for (int i = 0; i < 4; ++i)
    std::memcpy(shared_memory + rows[size_t(i * 8 + lane / 4)] + lane % 4 * 4, &d[i], 4);
}

}  // namespace simulation
