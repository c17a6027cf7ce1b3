// The last step of algorithms whose blocks sum a part of a weight's gradient each.
#pragma once

#include "algorithm.h"

namespace convops::cuda {

// Adds `parts` parts, [part][element] in the order of `weight`'s sizes, in order; the result is of
// `dtype`, rounded once. The kernel before it may let it come early (ptx::launch_dependents()).
void add_weight_parts(const Tensor4& weight, const float* partial, int64_t parts, DType dtype,
                      void* result, const Execution& execution);

}  // namespace convops::cuda
