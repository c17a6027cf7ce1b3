// Stands for csrc/cuda/ptx/thread.cuh.
#pragma once

#include "block.h"

namespace convops::cuda::ptx {

inline int thread_index() { return simulation::thread_index(); }

}  // namespace convops::cuda::ptx
