// Forward and backward-input of depthwise_channels_last at stride 1, for the algorithm's other
// file.
#pragma once

#include "algorithm.h"

namespace convops::cuda::depthwise_channels_last {

void run_pixels_by_warps(const ConvProblem& problem, const Operands& operands,
                         const Execution& execution);

}  // namespace convops::cuda::depthwise_channels_last
