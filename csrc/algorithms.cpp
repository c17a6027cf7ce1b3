#include "cpu/algorithms.h"

namespace convops {

AlgorithmList make_cpu_algorithms() {
  AlgorithmList list;
  list.push_back(cpu::make_im2col_gemm());
  list.push_back(cpu::make_direct());
  return list;
}

}  // namespace convops
