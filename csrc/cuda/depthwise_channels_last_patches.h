// Forward and backward-input of depthwise_channels_last without a walk, for the algorithm's other
// files.
#pragma once

#include "algorithm.h"

namespace convops::cuda::depthwise_channels_last {

// Those that are faster than a walk.
enum class Patches { kNone, kSmall, kLarge };
Patches which_patches(const ConvProblem& problem, const Device& device);

// False where a walk is faster, or the operands are not aligned; then nothing has been launched.
bool run_patches(const ConvProblem& problem, const Operands& operands, const Execution& execution);

}  // namespace convops::cuda::depthwise_channels_last
