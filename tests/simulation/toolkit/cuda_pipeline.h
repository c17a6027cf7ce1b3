// Stands for the toolkit's header of asynchronous copies.
#pragma once

#include <cuda_runtime.h>

#include "async_copies.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  simulation::copy_async(uint32_t(__cvta_generic_to_shared(to)), from, int(bytes),
                         int(bytes - zeros));
}
inline void __pipeline_commit() { simulation::commit_copies(); }
inline void __pipeline_wait_prior(size_t pending) { simulation::wait_copies(int(pending)); }
