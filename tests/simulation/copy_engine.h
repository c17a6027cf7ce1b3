// The copy engine: boxes and pieces between global and shared memory, under its rules. Copies are
// asynchronous: what is loaded is there, and what is stored is read, only at the last moment, when
// the thread that asked for it waits. Bulk loads are there at once.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

namespace simulation {

// Where results may be stored, of so many bytes each: what else is written there must be poison
// before, which is this as floats, and half of it as 16 bits.
constexpr uint32_t kPoison = 0x7fad7fad;
void watch_result(const void* begin, const void* end, int element_bytes);

// Where a byte of shared memory is put if rows of so many bytes are swizzled; 0: they are not.
constexpr uint32_t swizzle_place(uint32_t place, int swizzled_bytes) {
  const uint32_t octets = uint32_t(swizzled_bytes) / 16;
  return octets == 0 ? place : place ^ (place >> 7 & (octets - 1)) << 4;
}

void load_bulk(void* destination, const void* source, uint32_t bytes);
// Returns the bytes of the box.
int64_t load_box(void* destination, const CUtensorMap& map, const int32_t (&place)[4]);
int64_t load_pixels(void* destination, const CUtensorMap& map, const int32_t (&place)[4],
                    const uint16_t (&shift)[2]);

void store_bulk(void* destination, const void* source, uint32_t bytes);
void store_box(const CUtensorMap& map, const int32_t (&place)[5], const void* source);
void commit_stores();
void wait_stores();

// Stores that were asked for and never waited for: none, when a block has ended.
size_t open_stores();

}  // namespace simulation
