// Forward and backward-input of depthwise_channels_last at stride 1, for the algorithm's other
// file.
#pragma once

#include "algorithm.h"

namespace convops::cuda::depthwise_channels_last {

// Of a pixel, that a warp of 3×3 takes side by side.
int lane_bytes(const ConvProblem& problem);
// Steps of a walk of 5×5 or 7×7 for each row of its results.
double steps_of_a_row(const ConvProblem& problem, const Device& device);
void run_pixels_by_warps(const ConvProblem& problem, const Operands& operands,
                         const Execution& execution);

}  // namespace convops::cuda::depthwise_channels_last
