// The copy engine's descriptions of tensors (tensor maps).
#pragma once

#include <cudaTypedefs.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/check.h"

namespace convops::cuda {

// The driver's function, found at run time: the package does not link libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  static const auto function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    CONVOPS_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                        cudaEnableDefault, &result));
    if (!entry) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return function;
}

// Of a map, in elements, for which those of four bytes are the limit.
inline constexpr int64_t kMaxMapStride = int64_t{1} << 36;

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
  const auto type =
      element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const auto swizzle = swizzled_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : swizzled_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                       : swizzled_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                              : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult result =
      encode_function()(&map, type, kSides, const_cast<void*>(tensor), map_sizes, map_strides,
                        map_box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("CUDA error " + std::to_string(int(result)) +
                             " (cuTensorMapEncodeTiled)");
  return map;
}

}  // namespace convops::cuda
