// The last step of algorithms whose blocks sum a part of a weight's gradient each.
#pragma once

#include "problem.h"

namespace convops::cuda {

// Adds `parts` parts, [part][element] in the order of `weight`'s sizes, in order; the result is of
// `dtype`, rounded once.
void add_weight_parts(const Tensor4& weight, const float* partial, int64_t parts, DType dtype,
                      void* result, void* stream);

}  // namespace convops::cuda
