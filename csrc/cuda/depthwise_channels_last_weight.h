// Backward-weight of depthwise_channels_last; the rest of the algorithm decides when.
#pragma once

#include "algorithm.h"

namespace convops::cuda::depthwise_channels_last {

WorkspaceRange weight_workspace(const ConvProblem& problem, const Device& device);
void run_weight(const ConvProblem& problem, const Operands& operands, const Execution& execution);

}  // namespace convops::cuda::depthwise_channels_last
