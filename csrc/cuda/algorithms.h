// The algorithms of CUDA, each made by its own file.
#pragma once

#include "algorithm.h"

namespace convops::cuda {

std::unique_ptr<Algorithm> make_implicit_gemm();
std::unique_ptr<Algorithm> make_implicit_gemm_weight();
std::unique_ptr<Algorithm> make_tma_im2col();
std::unique_ptr<Algorithm> make_tma_im2col_weight();
std::unique_ptr<Algorithm> make_im2col_gemm();
std::unique_ptr<Algorithm> make_depthwise();
std::unique_ptr<Algorithm> make_depthwise_strips();
std::unique_ptr<Algorithm> make_depthwise_planes();
std::unique_ptr<Algorithm> make_depthwise_channels_last();
std::unique_ptr<Algorithm> make_depthwise_large();
std::unique_ptr<Algorithm> make_depthwise_weight();
std::unique_ptr<Algorithm> make_grouped();
std::unique_ptr<Algorithm> make_grouped_weight();
std::unique_ptr<Algorithm> make_direct();

}  // namespace convops::cuda
