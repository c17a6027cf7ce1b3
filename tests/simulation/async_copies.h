// cp.async: a thread's copies of a few bytes to shared memory. Some are there at once, the others
// only when the thread waits for their group: both are legal.
#pragma once

#include <cstdint>

namespace simulation {

// 4, 8 or 16 bytes; the first `bytes_read` are read, the others become zero.
void copy_async(uint32_t destination, const void* source, int bytes, int bytes_read);
void commit_copies();
// Until all groups but the last `pending` are there.
void wait_copies(int pending);
// After a block: it may have no copies under way.
void end_copies();

}  // namespace simulation
