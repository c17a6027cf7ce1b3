#include "cuda/algorithms.h"

namespace convops {

AlgorithmList make_cuda_algorithms() {
  AlgorithmList list;
  list.push_back(cuda::make_implicit_gemm());
  list.push_back(cuda::make_implicit_gemm_weight());
  list.push_back(cuda::make_tma_im2col());
  list.push_back(cuda::make_tma_im2col_weight());
  list.push_back(cuda::make_im2col_gemm());
  list.push_back(cuda::make_depthwise());
  list.push_back(cuda::make_depthwise_planes());
  list.push_back(cuda::make_depthwise_strips());
  list.push_back(cuda::make_depthwise_channels_last());
  list.push_back(cuda::make_depthwise_large());
  list.push_back(cuda::make_depthwise_weight());
  list.push_back(cuda::make_grouped());
  list.push_back(cuda::make_grouped_weight());
  list.push_back(cuda::make_direct());
  return list;
}

}  // namespace convops
