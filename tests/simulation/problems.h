// Random problems that an algorithm is for.
#pragma once

#include <string>

#include "problem.h"
#include "random.h"

namespace simulation {

// By the algorithm's name; it may refuse some.
convops::ConvProblem random_problem(Random& random, const std::string& algorithm);

// Elements between a tensor's first and its last, both counted.
int64_t extent(const convops::Tensor4& tensor);

}  // namespace simulation
