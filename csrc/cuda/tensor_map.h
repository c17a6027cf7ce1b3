// The copy engine's descriptions of tensors (tensor maps).
#pragma once

#include <cudaTypedefs.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "problem.h"

namespace convops::cuda {

// A function of the driver, found at run time: the package does not link libcuda.
template <typename Function>
Function driver_function(const char* name) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result;
  CONVOPS_CUDA_CHECK(
      cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &result));
  if (!entry) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  return reinterpret_cast<Function>(entry);
}
inline PFN_cuTensorMapEncodeTiled_v12000 encode_tiled() {
  static const auto function =
      driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
  return function;
}
inline PFN_cuTensorMapEncodeIm2col_v12000 encode_im2col() {
  static const auto function =
      driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
  return function;
}
inline void check_map(CUresult result, const char* function) {
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("CUDA error " + std::to_string(int(result)) + " (" + function + ")");
}

// Of a map, in elements, for which those of four bytes are the limit.
inline constexpr int64_t kMaxMapStride = int64_t{1} << 36;

inline CUtensorMapDataType map_type(int element_bytes) {
  return element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

// Of elements of four bytes, or of two. Sizes and strides (in elements, the innermost is 1)
// innermost dimension first. Swizzled: a box's rows are 32, 64 or 128 bytes, whose 16 bytes change
// places in shared memory.
template <int kSides>
CUtensorMap make_map(const void* tensor, const int64_t (&sizes)[kSides],
                     const int64_t (&strides)[kSides - 1], const int (&box)[kSides],
                     int element_bytes = sizeof(float), int swizzled_bytes = 0) {
  cuuint64_t map_sizes[kSides], map_strides[kSides - 1];
  cuuint32_t map_box[kSides], steps[kSides];
  for (int i = 0; i < kSides; ++i) {
    map_sizes[i] = cuuint64_t(sizes[i]);
    map_box[i] = cuuint32_t(box[i]);
    steps[i] = 1;
  }
  for (int i = 0; i < kSides - 1; ++i) map_strides[i] = cuuint64_t(strides[i] * element_bytes);
  CUtensorMap map;
  const auto swizzle = swizzled_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : swizzled_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                       : swizzled_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                              : CU_TENSOR_MAP_SWIZZLE_NONE;
  check_map(
      encode_tiled()(&map, map_type(element_bytes), kSides, const_cast<void*>(tensor), map_sizes,
                     map_strides, map_box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
      "cuTensorMapEncodeTiled");
  return map;
}

// The pixels of a tensor in channels_last that windows of a convolution meet: the first of all
// windows lie `step` apart, from `begin` (which may be outside) on, `count` in a row of the image
// and in a column. Copied are so many channels of `pixels` of them as are 128 bytes, row by row,
// image by image, swizzled; zeros outside of the tensor.
struct Windows {
  int begin, count, step;
};
inline constexpr int kMapRowBytes = 128;
constexpr int map_channels(int element_bytes) { return kMapRowBytes / element_bytes; }
// What an im2col map of four dimensions has bits for: where windows begin and end beside the
// tensor, how far a pixel may be from its window's first, and steps.
inline constexpr int kLeastCorner = -128, kMostCorner = 127, kMostShift = 255, kMostStep = 8;
// How far behind the tensor's side the last window's first pixel is (less than zero: before it).
constexpr int64_t last_corner(const Windows& windows, int64_t side) {
  return windows.begin + int64_t{windows.count - 1} * windows.step + 1 - side;
}
inline CUtensorMap make_im2col_map(const void* tensor, const Tensor4& t, const Windows& h,
                                   const Windows& w, int pixels, int element_bytes) {
  const cuuint64_t sizes[] = {cuuint64_t(t.size[1]), cuuint64_t(t.size[3]), cuuint64_t(t.size[2]),
                              cuuint64_t(t.size[0])};
  const cuuint64_t strides[] = {cuuint64_t(t.stride[3] * element_bytes),
                                cuuint64_t(t.stride[2] * element_bytes),
                                cuuint64_t(t.stride[0] * element_bytes)};
  const int first[] = {w.begin, h.begin};
  const int last[] = {int(last_corner(w, t.size[3])), int(last_corner(h, t.size[2]))};
  const cuuint32_t steps[] = {1, cuuint32_t(w.step), cuuint32_t(h.step), 1};
  CUtensorMap map;
  check_map(
      encode_im2col()(&map, map_type(element_bytes), 4, const_cast<void*>(tensor), sizes, strides,
                      first, last, cuuint32_t(map_channels(element_bytes)), cuuint32_t(pixels),
                      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
      "cuTensorMapEncodeIm2col");
  return map;
}

}  // namespace convops::cuda
