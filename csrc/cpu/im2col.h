// im2col and col2im on the CPU.
#pragma once

#include "columns.h"

namespace convops::cpu {

// Writes the columns of the chunk's output pixels; padding gives zeros.
// `columns_dtype` is the problem's dtype or the dtype of its sums.
void im2col(const ConvProblem& problem, const void* input, const Columns& columns,
            DType columns_dtype);

// Writes input rows [input_rows.row, + rows): each element the sum of the columns it took part in,
// in tap order, rounded once. `columns` must hold every output row of output_rows_of(input_rows).
void col2im(const ConvProblem& problem, const Columns& columns, DType columns_dtype,
            const Chunk& input_rows, void* input);

}  // namespace convops::cpu
