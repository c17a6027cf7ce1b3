// Stands for csrc/cuda/ptx/thread.cuh.
#pragma once

#include "block.h"

namespace convops::cuda::ptx {

inline int thread_index() { return simulation::thread_index(); }

template <typename T>
void keep(T&) {}

}  // namespace convops::cuda::ptx
