#include "async_copies.h"

#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "block.h"

namespace simulation {
namespace {

struct Copy {
  uint8_t* to;
  const void* from;
  int bytes, bytes_read;

  void run() const {
    std::memset(to, 0, size_t(bytes));
    std::memcpy(to, from, size_t(bytes_read));
  }
};
using Group = std::vector<Copy>;

struct Pending {
  Group asked;
  std::deque<Group> committed;
};
std::vector<Pending> pending_of(1024);  // threads
std::mt19937 luck;                      // whose copies are fast

}  // namespace

void copy_async(uint32_t destination, const void* source, int bytes, int bytes_read) {
  if (int64_t{destination} + bytes > shared_bytes) fail("a copy beyond shared memory");
  if (destination % uint32_t(bytes) != 0 || uintptr_t(source) % uintptr_t(bytes) != 0)
    fail("a copy from or to an address that is no multiple of its bytes");
  const Copy copy{shared_memory + destination, source, bytes, bytes_read};
  constexpr int kFast = 4;  // one in so many
  if (luck() % kFast == 0) return copy.run();
  pending_of[size_t(thread_index())].asked.push_back(copy);
}

void commit_copies() {
  Pending& pending = pending_of[size_t(thread_index())];
  pending.committed.push_back(std::move(pending.asked));
  pending.asked.clear();
}

void wait_copies(int count) {
  auto& groups = pending_of[size_t(thread_index())].committed;
  for (; groups.size() > size_t(count); groups.pop_front())
    for (const Copy& copy : groups.front()) copy.run();
}

void end_copies() {
  for (Pending& pending : pending_of) {
    bool open = !pending.asked.empty();
    for (const Group& group : pending.committed) open |= !group.empty();
    if (open) fail("a block ends before its copies have arrived");
    pending.committed.clear();
  }
}

}  // namespace simulation
