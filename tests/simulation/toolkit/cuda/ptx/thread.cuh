// Stands for csrc/cuda/ptx/thread.cuh.
#pragma once

#include "block.h"

namespace convops::cuda::ptx {

inline int thread_index() { return simulation::thread_index(); }

inline void keep(int&) {}

}  // namespace convops::cuda::ptx
