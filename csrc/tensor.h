// The few things wanted of torch tensors, over LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>

#include "problem.h"

namespace convops {

using torch::stable::Tensor;

// The description the checks need; throws for a dtype or device that conv_ops does not have.
TensorInfo describe(const Tensor& tensor, const char* op);
torch::headeronly::ScalarType scalar_type(DType dtype);

// Uninitialised memory from torch's allocator.
Tensor new_tensor(const Tensor4& shape, DType dtype, DeviceType device, int device_index);

}  // namespace convops
