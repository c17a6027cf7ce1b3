#include "memory.h"

#include <signal.h>
#include <sys/mman.h>

#include <algorithm>

#include "block.h"

namespace simulation {
namespace {

constexpr size_t kPage = 4096;

void say(int signal) {
  fail(signal == SIGFPE ? "an integer is divided by zero"
                        : "memory around a tensor is touched, or a source written");
}

}  // namespace

Memory::Memory(Random& random, int64_t bytes, int alignment)
    : size_((size_t(bytes) + kPage - 1) / kPage * kPage + kPage) {
  void* const all =
      mmap(nullptr, size_ + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) fail("no memory");
  pages_ = static_cast<uint8_t*>(all) + kPage;
  mprotect(pages_ - kPage, kPage, PROT_NONE);
  mprotect(pages_ + size_, kPage, PROT_NONE);
  switch (random.between(0, 3)) {
    case 0:
      data_ = pages_;
      break;
    case 1:
      data_ = pages_ + alignment * random.between(1, 7);
      break;
    default:
      data_ = pages_ + (size_ - size_t(bytes)) / size_t(alignment) * size_t(alignment);
  }
  poison();
}

Memory::~Memory() { munmap(pages_ - kPage, size_ + 2 * kPage); }

void Memory::poison() { std::fill_n(pages_, size_, uint8_t{0xff}); }
void Memory::forbid_writes() { mprotect(pages_, size_, PROT_READ); }

void watch_pages() {
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE}) ::signal(signal, say);
}

}  // namespace simulation
