// Plans of implicit_gemm that are drawn, not chosen: whatever its planner may make, however slow.
#pragma once

#include <optional>
#include <string>

#include "convolution.h"
#include "cuda/implicit_gemm.h"

namespace simulation {

// None where what was drawn does not go together, or would take too long to simulate.
std::optional<convops::cuda::GemmPlan> random_plan(Random& random, const Convolution& convolution,
                                                   int processors);
// The plan that ImplicitGemm finds from then on, in place of the fastest.
void use_plan(const convops::cuda::GemmPlan& plan);
std::string to_text(const convops::cuda::GemmPlan& plan);

}  // namespace simulation
