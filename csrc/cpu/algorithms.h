// The algorithms of the CPU, each made by its own file.
#pragma once

#include "algorithm.h"

namespace convops::cpu {

std::unique_ptr<Algorithm> make_im2col_gemm();
std::unique_ptr<Algorithm> make_direct();

}  // namespace convops::cpu
