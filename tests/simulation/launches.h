// What is asked of a launch.
#pragma once

#include <cstdint>

namespace simulation {

// As cudaFuncSetAttribute: the most dynamic shared memory a kernel may be launched with.
void allow_shared(const void* kernel, int bytes);
// Called by every launch: fails where a device would refuse it.
void check_launch(const void* kernel, const unsigned (&grid)[3], unsigned threads,
                  int shared_bytes);

// So far: different kernels that were launched, and all blocks.
int launched_kernels();
int64_t launched_blocks();

}  // namespace simulation
