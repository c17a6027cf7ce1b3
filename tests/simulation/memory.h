// A tensor's or a workspace's memory, with pages around it that nobody may touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "random.h"

namespace simulation {

class Memory {
 public:
  // Begins or ends with a page, or begins a little behind a page's first element; always at a
  // multiple of `alignment`. Filled with poison: all bits are set, as floats and halves NaN.
  Memory(Random& random, int64_t bytes, int alignment);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint8_t* data() const { return data_; }
  void poison();
  // From now on whoever writes fails.
  void forbid_writes();
  // All bytes between the pages that nobody may touch, those around the tensor too.
  std::vector<uint8_t> bytes() const { return {pages_, pages_ + size_}; }
  size_t first_byte() const { return size_t(data_ - pages_); }

 private:
  uint8_t *pages_, *data_;
  size_t size_;  // of the pages
};

// From now on the program says it where such a page is touched.
void watch_pages();

}  // namespace simulation
