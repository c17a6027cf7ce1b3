// Runs implicit_gemm's kernels by a plan and holds what they do to what they should.
#pragma once

#include "convolution.h"
#include "cuda/implicit_gemm.h"

namespace simulation {

// Ends the program where
// - a result is not exactly what the definition says,
// - anything is written outside of the result, or a result by two blocks, by two copies or by none,
// - a job is marked bad, or what the last kernel makes of a job's marks is not all its results,
// - a rule of the copy engine is broken, or threads wait forever.
// Addresses of source and result are moved by so many elements.
void check_plan(Random& random, const Convolution& convolution, const convops::cuda::GemmPlan& plan,
                int processors, int source_shift, int result_shift);
// The same of results alone, where some of the source is NaN or infinite.
void check_special(Random& random, const Convolution& convolution,
                   const convops::cuda::GemmPlan& plan, int processors);

}  // namespace simulation
