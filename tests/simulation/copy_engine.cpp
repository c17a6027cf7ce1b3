#include "copy_engine.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstring>
#include <functional>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace simulation {
namespace {

constexpr int kMostSides = 5, kGranule = 16;  // bytes
constexpr uint32_t kLargestBox = 256;
constexpr int kBulkAlignment = 16, kBoxAlignment = 128;  // bytes

// What a CUtensorMap holds here: sizes, strides in bytes, the innermost dimension first.
struct Map {
  uint8_t* tensor;
  int64_t sizes[kMostSides], strides[kMostSides];
  int32_t sides, element_bytes, swizzled_bytes;
  uint16_t box[kMostSides];  // of an im2col map channels and pixels
  // Of an im2col map, columns and rows: corners beside the tensor; steps, 0 of other maps.
  int8_t first[2], last[2];
  uint8_t steps[2];
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

struct Pending {
  std::vector<std::function<void()>> asked, committed;
};
std::unordered_map<int, Pending> stores;  // of threads
const uint8_t *result_begin, *result_end;
int result_bytes = 4;  // of an element

bool is_aligned(const void* pointer, int bytes) { return uintptr_t(pointer) % bytes == 0; }

void check_shared(const void* pointer, int64_t bytes) {
  const auto* begin = static_cast<const uint8_t*>(pointer);
  if (begin < shared_memory || begin + bytes > shared_memory + shared_bytes)
    fail("a copy beyond shared memory");
}

void store_result(uint8_t* to, const uint8_t* from) {
  if (to < result_begin || to >= result_end) fail("a copy beyond the result");
  if (std::memcmp(to, &kPoison, size_t(result_bytes)) != 0) fail("a result is stored twice");
  std::memcpy(to, from, size_t(result_bytes));
}

// Calls visit(element of the tensor, nullptr outside of it; element in shared memory).
template <typename Visit>
int64_t for_box(const Map& map, const int32_t* place, uint8_t* shared, bool whole_granules,
                Visit visit) {
  const int bytes = map.element_bytes, granule = whole_granules ? kGranule / bytes : 1;
  int64_t elements = 1;
  for (int i = 0; i < map.sides; ++i) elements *= map.box[i];
  check_shared(shared, elements * bytes);
  if (!is_aligned(shared, kBoxAlignment)) fail("a box at an odd address of shared memory");
  if (place[0] * bytes % kGranule != 0) fail("a box that begins within 16 bytes");
  const uint32_t begin = uint32_t(shared - shared_memory);
  if (map.swizzled_bytes > 0 && map.box[0] * bytes != map.swizzled_bytes)
    fail("a swizzled box of other rows");
  for (int64_t element = 0; element < elements; ++element) {
    int64_t rest = element, offset = 0;
    bool inside = true;
    for (int i = 0; i < map.sides; ++i) {
      const int64_t at = place[i] + rest % map.box[i];
      rest /= map.box[i];
      const int64_t first = i == 0 ? at - (at % granule + granule) % granule : at;
      inside &= first >= 0 && first < map.sizes[i];
      offset += at * map.strides[i];
    }
    visit(inside ? map.tensor + offset : nullptr,
          shared_memory + swizzle_place(begin + uint32_t(element * bytes), map.swizzled_bytes));
  }
  return elements * bytes;
}

Map read_map(const CUtensorMap& opaque, int sides) {
  Map map;
  std::memcpy(&map, &opaque, sizeof map);
  if (map.sides != sides) fail("a map of other dimensions");
  return map;
}

// cuTensorMapEncodeTiled, which refuses what the engine cannot have.
CUresult encode(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t sides, void* tensor,
                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  Map map{};
  map.tensor = static_cast<uint8_t*>(tensor);
  map.sides = int32_t(sides);
  map.swizzled_bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16 << int(swizzle);
  map.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT16 ? 2 : 4;
  bool legal = sides <= kMostSides && is_aligned(tensor, kBulkAlignment) &&
               box[0] * map.element_bytes % kGranule == 0;
  for (cuuint32_t i = 0; legal && i < sides; ++i) {
    const cuuint64_t stride = i == 0 ? cuuint64_t(map.element_bytes) : strides[i - 1];
    legal = sizes[i] >= 1 && sizes[i] <= cuuint64_t{1} << 32 && box[i] >= 1 &&
            box[i] <= kLargestBox && steps[i] == 1 && stride < cuuint64_t{1} << 40 &&
            (i == 0 || stride % kBulkAlignment == 0);
    map.sizes[i] = int64_t(sizes[i]);
    map.strides[i] = int64_t(stride);
    map.box[i] = uint16_t(box[i]);
  }
  std::memcpy(to, &map, sizeof map);
  return legal ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// cuTensorMapEncodeIm2col, of four dimensions.
CUresult encode_im2col(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t sides, void* tensor,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const int* first,
                       const int* last, cuuint32_t channels, cuuint32_t pixels,
                       const cuuint32_t* steps, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                       CUtensorMapFloatOOBfill fill) {
  constexpr cuuint32_t kMostPixels = 1024, kMostStep = 8, kOnes[] = {1, 1, 1, 1};
  const cuuint32_t box[] = {channels, 1, 1, 1};
  if (sides != 4 || pixels == 0 || pixels > kMostPixels) return CUDA_ERROR_INVALID_VALUE;
  const CUresult result = encode(to, type, sides, tensor, sizes, strides, box, kOnes, interleave,
                                 swizzle, promotion, fill);
  Map map;
  std::memcpy(&map, to, sizeof map);
  map.box[1] = uint16_t(pixels);
  bool legal = result == CUDA_SUCCESS;
  for (int i = 0; i < 2; ++i) {
    legal &= first[i] >= -128 && first[i] < 128 && last[i] >= -128 && last[i] < 128 &&
             steps[i + 1] >= 1 && steps[i + 1] <= kMostStep &&
             map.sizes[i + 1] + last[i] > first[i];
    map.first[i] = int8_t(first[i]);
    map.last[i] = int8_t(last[i]);
    map.steps[i] = uint8_t(steps[i + 1]);
  }
  std::memcpy(to, &map, sizeof map);
  return legal ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

void finish(std::vector<std::function<void()>>& copies) {
  for (const auto& copy : copies) copy();
  copies.clear();
}

}  // namespace

void watch_result(const void* begin, const void* end, int element_bytes) {
  result_begin = static_cast<const uint8_t*>(begin);
  result_end = static_cast<const uint8_t*>(end);
  result_bytes = element_bytes;
}

void load_bulk(void* destination, const void* source, uint32_t bytes) {
  if (!is_aligned(destination, kBulkAlignment) || !is_aligned(source, kBulkAlignment) ||
      bytes % kBulkAlignment != 0)
    fail("a bulk load of what is no multiple of 16 bytes");
  check_shared(destination, bytes);
  std::memcpy(destination, source, bytes);
}

int64_t load_box(void* destination, const CUtensorMap& map, const int32_t (&place)[4]) {
  const Map plain = read_map(map, 4);
  return for_box(plain, place, static_cast<uint8_t*>(destination), false,
                 [&](const uint8_t* from, uint8_t* to) {
                   std::memset(to, 0, size_t(plain.element_bytes));
                   if (from) std::memcpy(to, from, size_t(plain.element_bytes));
                 });
}

// Windows begin from `place` on, row by row of the box of their first pixels, image by image.
int64_t load_pixels(void* destination, const CUtensorMap& opaque, const int32_t (&place)[4],
                    const uint16_t (&shift)[2]) {
  const Map map = read_map(opaque, 4);
  if (map.steps[0] == 0) fail("a tiled map for pixels");
  auto* const shared = static_cast<uint8_t*>(destination);
  const int64_t row_bytes = int64_t{map.box[0]} * map.element_bytes;
  check_shared(shared, map.box[1] * row_bytes);
  if (!is_aligned(shared, kBoxAlignment)) fail("a box at an odd address of shared memory");
  if (map.swizzled_bytes > 0 && row_bytes != map.swizzled_bytes)
    fail("a swizzled box of other rows");
  for (int i = 0; i < 2; ++i)
    if (place[i + 1] < map.first[i] || place[i + 1] >= map.sizes[i + 1] + map.last[i] ||
        shift[i] > 255)
      fail("a window that begins outside of all windows");
  int64_t at[] = {place[1], place[2], place[3]};
  for (int pixel = 0; pixel < map.box[1]; ++pixel) {
    const int64_t w = at[0] + shift[0], h = at[1] + shift[1];
    for (int i = 0; i < map.box[0]; ++i) {
      const int64_t channel = place[0] + i;
      const bool inside = channel >= 0 && channel < map.sizes[0] && w >= 0 && w < map.sizes[1] &&
                          h >= 0 && h < map.sizes[2] && at[2] >= 0 && at[2] < map.sizes[3];
      uint8_t* const to =
          shared_memory + swizzle_place(uint32_t(shared - shared_memory + pixel * row_bytes +
                                                 i * map.element_bytes),
                                        map.swizzled_bytes);
      std::memset(to, 0, size_t(map.element_bytes));
      if (inside)
        std::memcpy(to,
                    map.tensor + channel * map.strides[0] + w * map.strides[1] +
                        h * map.strides[2] + at[2] * map.strides[3],
                    size_t(map.element_bytes));
    }
    for (int i = 0; i < 2; ++i) {  // columns, then rows
      at[i] += map.steps[i];
      if (at[i] < map.sizes[i + 1] + map.last[i]) break;
      at[i] = map.first[i];
      if (i == 1) ++at[2];
    }
  }
  return map.box[1] * row_bytes;
}

void store_bulk(void* destination, const void* source, uint32_t bytes) {
  if (!is_aligned(destination, kBulkAlignment) || !is_aligned(source, kBulkAlignment) ||
      bytes % kBulkAlignment != 0)
    fail("a bulk store of what is no multiple of 16 bytes");
  check_shared(source, bytes);
  stores[thread_index()].asked.push_back([=] {
    auto* to = static_cast<uint8_t*>(destination);
    const auto* from = static_cast<const uint8_t*>(source);
    for (uint32_t i = 0; i < bytes; i += uint32_t(result_bytes)) store_result(to + i, from + i);
  });
}

// Whole granules are written, even where the tensor's row ends within one.
void store_box(const CUtensorMap& map, const int32_t (&place)[5], const void* source) {
  std::vector<int32_t> at(place, place + 5);
  auto* const from = static_cast<uint8_t*>(const_cast<void*>(source));
  stores[thread_index()].asked.push_back([=, map = read_map(map, 5)] {
    for_box(map, at.data(), from, true, [](uint8_t* to, const uint8_t* from) {
      if (to) store_result(to, from);
    });
  });
}

void commit_stores() {
  Pending& pending = stores[thread_index()];
  for (auto& store : pending.asked) pending.committed.push_back(std::move(store));
  pending.asked.clear();
}
void wait_stores() { finish(stores[thread_index()].committed); }

size_t open_stores() {
  size_t count = 0;
  for (const auto& [thread, pending] : stores)
    count += pending.asked.size() + pending.committed.size();
  return count;
}

}  // namespace simulation

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, int,
                                             cudaDriverEntryPointQueryResult* result) {
  if (name == std::string_view("cuTensorMapEncodeTiled"))
    *entry = reinterpret_cast<void*>(simulation::encode);
  if (name == std::string_view("cuTensorMapEncodeIm2col"))
    *entry = reinterpret_cast<void*>(simulation::encode_im2col);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
