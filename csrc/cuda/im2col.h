// im2col, col2im and strided copies on the GPU: launchers, no torch, no CUDA types.
#pragma once

#include <algorithm>

#include "columns.h"

namespace convops::cuda {

// Blocks along the channels beside so many along the pixels: a thread that walks several channels
// divides its pixels out once for all of them, but the chip must be full.
inline unsigned channel_blocks(int64_t channels, int64_t pixel_blocks) {
  constexpr int64_t kMostChannels = 8, kBlocks = 2048, kMaxGridY = 65535;
  const int64_t least = (channels + kMostChannels - 1) / kMostChannels;
  return unsigned(std::min({std::max(least, kBlocks / pixel_blocks), channels, kMaxGridY}));
}

// Writes the columns of the chunk's output pixels in the problem's dtype; padding gives zeros.
void im2col(const ConvProblem& problem, const void* input, const Columns& columns, void* stream);

// Writes input rows [input_rows.row, + rows): each element the sum of the columns it took part in,
// in tap order, rounded once. `columns` must hold every output row of output_rows_of(input_rows).
void col2im(const ConvProblem& problem, const Columns& columns, DType columns_dtype,
            const Chunk& input_rows, void* input, void* stream);

// destination[i] = source[i] for two tensors of one size, dtypes T and T, T and its sums' or back;
// stride 0 repeats.
void copy(const Tensor4& destination_shape, void* destination, DType destination_dtype,
          const Tensor4& source_shape, const void* source, DType source_dtype, void* stream);

}  // namespace convops::cuda
