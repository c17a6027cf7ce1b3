#include "launches.h"

#include <map>
#include <set>

#include "block.h"

namespace simulation {
namespace {

std::map<const void*, int> allowed;
std::set<const void*> launched;
int64_t blocks = 0;

}  // namespace

void allow_shared(const void* kernel, int bytes) {
  if (bytes > kSharedBytes) fail("more shared memory than a block can have");
  allowed[kernel] = bytes;
}

void check_launch(const void* kernel, const unsigned (&grid)[3], unsigned threads,
                  int shared_bytes) {
  constexpr int kSharedUnasked = 48 * 1024;
  constexpr unsigned kMostX = 0x7fffffff, kMostYZ = 0xffff, kMostThreads = 1024;
  const auto found = allowed.find(kernel);
  if (shared_bytes > (found == allowed.end() ? kSharedUnasked : found->second) &&
      shared_bytes > kSharedUnasked)
    fail("more shared memory than was asked for");
  const auto legal = [](unsigned size, unsigned most) { return size >= 1 && size <= most; };
  if (!legal(grid[0], kMostX) || !legal(grid[1], kMostYZ) || !legal(grid[2], kMostYZ))
    fail("a grid of illegal size");
  if (!legal(threads, kMostThreads)) fail("a block of illegal size");
  launched.insert(kernel);
  blocks += int64_t{grid[0]} * grid[1] * grid[2];
}

int launched_kernels() { return int(launched.size()); }
int64_t launched_blocks() { return blocks; }

}  // namespace simulation
