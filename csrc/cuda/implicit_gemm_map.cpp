// The copy engine's description (tensor map) of implicit_gemm's source.
#include <cudaTypedefs.h>

#include <algorithm>
#include <stdexcept>

#include "cuda/check.h"
#include "cuda/implicit_gemm.h"

namespace convops::cuda {
namespace {

// The driver's function, found at run time: the package does not link libcuda.
PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
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

}  // namespace

// A cell must be an element, rows dense, and every stride a multiple of 16 bytes.
bool can_copy_bulk(const GemmProblem& g) {
  constexpr int64_t kVector = 4, kMaxStride = int64_t{1} << 38;
  const auto& stride = g.source.stride;
  const auto fits = [&](int i) {
    return stride[i] % kVector == 0 && stride[i] > 0 && stride[i] < kMaxStride;
  };
  return g.h.phases == 1 && g.w.phases == 1 && stride[3] == 1 && fits(0) && fits(1) && fits(2);
}

CUtensorMap make_source_map(const GemmProblem& g, const GemmTile& t, const void* source) {
  const Tensor4& tensor = g.source;
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = cuuint64_t(tensor.size[3 - i]);
  for (int i = 0; i < 3; ++i) strides[i] = cuuint64_t(tensor.stride[2 - i]) * sizeof(float);
  const cuuint32_t box[4] = {cuuint32_t(t.raw_pitch), cuuint32_t(t.raw_cells / t.raw_pitch),
                             cuuint32_t(t.depth * kSumBlock), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = encode_function()(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, const_cast<void*>(source), sizes, strides, box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("CUDA error " + std::to_string(int(result)) +
                             " (cuTensorMapEncodeTiled)");
  return map;
}

}  // namespace convops::cuda
