// Backward-weight of depthwise_channels_last; the rest of the algorithm decides when.
#pragma once

#include "algorithm.h"

namespace convops::cuda::depthwise_channels_last {

WorkspaceRange weight_workspace(const ConvProblem& problem, const Device& device);
void run_weight(const ConvProblem& problem, const Operands& operands, const Execution& execution);

// The same by rows that go straight to registers; false if rings are for the problem.
bool find_workspace_by_registers(const ConvProblem& problem, const Device& device,
                                 WorkspaceRange& range);
bool run_weight_by_registers(const ConvProblem& problem, const Operands& operands,
                             const Execution& execution);

// A chunk's partial sums in the workspace, [tap][channel]; adds those of all chunks.
inline int64_t chunk_bytes(const ConvProblem& problem) {
  return problem.weight.numel() * int64_t(sizeof(float));
}
void add_chunks(const ConvProblem& problem, int64_t chunks, const Operands& operands,
                const Execution& execution);

}  // namespace convops::cuda::depthwise_channels_last
