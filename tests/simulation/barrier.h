// mbarrier: a phase ends when all threads have arrived and all bytes that were announced are there.
#pragma once

#include <bit>
#include <cstdint>

#include "block.h"

namespace simulation {

// In the 8 bytes that a barrier has in shared memory.
struct Barrier {
  uint64_t threads : 12, missing : 12, parity : 1;
  int64_t bytes : 39;
};
static_assert(sizeof(Barrier) == 8);

// `change` returns whether something of what the phase waits for came; then it may have ended.
template <typename Change>
void change_barrier(uint64_t* place, Change change) {
  Barrier barrier = std::bit_cast<Barrier>(*place);
  if (change(barrier) && barrier.missing == 0 && barrier.bytes == 0) {
    barrier.parity ^= 1;
    barrier.missing = barrier.threads;
  }
  *place = std::bit_cast<uint64_t>(barrier);
}

inline void init_barrier(uint64_t* place, uint32_t threads) {
  *place = std::bit_cast<uint64_t>(Barrier{threads, threads, 0, 0});
}
inline void arrive(uint64_t* place) {
  change_barrier(place, [](Barrier& barrier) {
    if (barrier.missing == 0) fail("more threads arrive than a barrier has");
    --barrier.missing;
    return true;
  });
}
inline void expect_bytes(uint64_t* place, int64_t bytes) {
  change_barrier(place, [=](Barrier& barrier) {
    barrier.bytes += bytes;
    return false;
  });
}
inline void complete_bytes(uint64_t* place, int64_t bytes) {
  change_barrier(place, [=](Barrier& barrier) {
    barrier.bytes -= bytes;
    return true;
  });
}
// Whether the last phase of that parity has ended.
inline bool has_passed(const uint64_t* place, uint32_t parity) {
  return std::bit_cast<Barrier>(*place).parity != parity;
}

}  // namespace simulation
