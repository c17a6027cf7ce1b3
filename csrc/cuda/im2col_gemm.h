// What im2col_gemm packs, cuts and stages for a problem, and the workspace and time that takes:
// what its plan, its estimate and its run agree on. im2col_gemm.cpp tells what is computed.
#pragma once

#include <optional>

#include "algorithm.h"

namespace convops::cuda::im2col_gemm {

// The columns of a chunk of output pixels take this much, about. Large: chunks that stay in L2
// (32 MB) are products too small to fill an H200 and took up to twice as long
// (docs/im2col_gemm.md).
constexpr int64_t kChunkBytes = int64_t{1024} << 20;
// Pixels that backward-weight sums in one product. cuBLAS adds them up in float32 whatever their
// number; longer sums had up to three times cuDNN's error, several short ones have less than it.
// More pixels are a batch of slices, none shorter than kShortestSlice; their sums are added in
// order.
constexpr int64_t kLongestSum = int64_t{1} << 15, kShortestSlice = 256;

inline DType sum_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}
inline DType columns_dtype(const ConvProblem& p) {
  return p.direction == Direction::kBackwardInput ? sum_dtype(p.dtype) : p.dtype;
}

// Whether the pixels of small images are packed side by side, one product for all of them.
bool packs_pixels(const ConvProblem& p);
// The input is its own column matrix and is read (backward-input: written) in place.
bool skips_im2col(const ConvProblem& p);
// Whether the gradient of the output must be copied into the chunk.
bool packs_output(const ConvProblem& p);
// Whether the weights are copied to the workspace, or the sums of their gradient from there.
bool packs_weight(const ConvProblem& p);
// The dtype in which the output is made in the workspace before it is copied out; std::nullopt
// where it is made in place.
std::optional<DType> staged_dtype(const ConvProblem& p);
// Slices of backward-weight's sum, at most.
int64_t slice_count(const ConvProblem& p, const Device& device);

// Workspace: of the packed weights or sums, of each slice if there are several; of that and of the
// padding of a chunk's rows; of a row of output pixels, 0 where everything is multiplied in place.
int64_t weight_bytes(const ConvProblem& p, int64_t slices);
int64_t fixed_bytes(const ConvProblem& p, int64_t slices);
int64_t row_bytes(const ConvProblem& p);
// Output rows that a chunk must have room for.
int64_t minimum_rows(const ConvProblem& p);
WorkspaceRange workspace(const ConvProblem& p, const Device& device);

// Seconds.
double cost(const ConvProblem& p, const Device& device);

}  // namespace convops::cuda::im2col_gemm
