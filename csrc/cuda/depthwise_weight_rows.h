// Backward-weight of depthwise_weight by rows that go straight to registers.
#pragma once

#include "algorithm.h"

namespace convops::cuda::depthwise_weight {

// Whether rows are for the problem; tiles take it where the operands are not aligned.
bool takes_rows(const ConvProblem& problem, const Device& device);
// Bytes of workspace that help.
int64_t rows_workspace(const ConvProblem& problem, const Device& device);
// False where they are, or the operands are not aligned; then nothing has been launched.
bool run_rows(const ConvProblem& problem, const Operands& operands, const Execution& execution);

// Adds the parts of every weight's sum, [weight][part] in the workspace, in an order that depends
// on their number only.
void add_parts(const ConvProblem& problem, int64_t parts, const Operands& operands,
               const Execution& execution);

}  // namespace convops::cuda::depthwise_weight
