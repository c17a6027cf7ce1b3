// Stands for csrc/cuda/ptx/barrier.cuh.
#pragma once

#include "barrier.h"
#include "block.h"
#include "libcudacxx.h"

namespace convops::cuda::ptx {

inline bool barrier_passed(uint64_t* barrier, uint32_t parity) {
  return simulation::has_passed(barrier, parity);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!barrier_passed(barrier, parity)) simulation::wait_for_change(*barrier);
}
inline void barrier_arrive(uint64_t* barrier) { simulation::arrive(barrier); }

inline void sync_threads(int name, int threads) {
  simulation::meet(simulation::named_meeting(name), threads);
}
template <int kThreads>
void sync_threads(int name) {
  sync_threads(name, kThreads);
}
template <int kThreads>
bool sync_threads_and(int name, bool value) {
  return simulation::count_threads(simulation::named_meeting(name), kThreads, value) == kThreads;
}
template <int kRegisters>
void raise_registers() {}
template <int kRegisters>
void lower_registers() {}

}  // namespace convops::cuda::ptx
