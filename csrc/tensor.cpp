#include "tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

namespace convops {

using torch::headeronly::ScalarType;

TensorInfo describe(const Tensor& tensor, const char* op) {
  TensorInfo info;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  info.sizes.assign(sizes.begin(), sizes.end());
  info.strides.assign(strides.begin(), strides.end());
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      info.dtype = DType::kFloat32;
      break;
    case ScalarType::Double:
      info.dtype = DType::kFloat64;
      break;
    case ScalarType::Half:
      info.dtype = DType::kFloat16;
      break;
    case ScalarType::BFloat16:
      info.dtype = DType::kBFloat16;
      break;
    default:
      throw std::runtime_error(std::string("\"") + op + "\" not implemented for '" +
                               torch::headeronly::toString(tensor.scalar_type()) +
                               "', expected Float, Double, Half or BFloat16");
  }
  info.device = tensor.is_cuda() ? DeviceType::kCuda : DeviceType::kCpu;
  info.device_index = tensor.is_cuda() ? tensor.get_device_index() : 0;
  return info;
}

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    default:
      return ScalarType::Float;
  }
}

Tensor new_tensor(const Tensor4& shape, DType dtype, DeviceType device, int device_index) {
  const bool cuda = device == DeviceType::kCuda;
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(4, shape.size, shape.stride, int32_t(scalar_type(dtype)),
                               cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(),
                               cuda ? device_index : -1, &handle))
    throw std::runtime_error(std::string(cuda ? "CUDA" : "CPU") +
                             " out of memory. Tried to allocate " +
                             std::to_string(shape.numel() * element_size(dtype)) + " bytes");
  return Tensor(handle);
}

}  // namespace convops
