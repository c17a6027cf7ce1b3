// torch.ops.convops: schemas and kernels. Everything of torch that an op needs happens here; what
// is below works on ConvProblem and pointers. CPU and CUDA share the kernels: plan::execute goes to
// the device's runtime. Autograd, fake tensors and autocast are in autograd.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "columns.h"
#include "plan.h"
#include "settings.h"
#include "tensor.h"

namespace convops {
namespace {

using Ints = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;
using OptionalString = std::optional<std::string>;

// The caller's argument, else the settings', else PyTorch's; TF32 exists for float32 on CUDA only.
Precision resolve_precision(const OptionalString& argument, const TensorInfo& info) {
  std::optional<Precision> precision;
  if (argument) {
    precision = parse_precision(*argument);
    check(precision.has_value(), "expected precision to be 'ieee' or 'tf32', but got precision='",
          *argument, "'");
  }
  if (info.dtype != DType::kFloat32 || info.device != DeviceType::kCuda) return Precision::kIeee;
  if (!precision) precision = settings::effective().precision;
  return precision ? *precision : settings::torch_precision();
}

// Allocates the result and computes it.
Tensor execute(const ConvProblem& problem, Operands operands, const TensorInfo& info,
               const OptionalString& algorithm) {
  Tensor result = new_tensor(problem.result(), problem.dtype, info.device, info.device_index);
  if (problem.result().numel() == 0) return result;
  switch (problem.direction) {
    case Direction::kForward:
      operands.output = result.mutable_data_ptr();
      break;
    case Direction::kBackwardInput:
      operands.input = result.mutable_data_ptr();
      break;
    case Direction::kBackwardWeight:
      operands.weight = result.mutable_data_ptr();
      break;
  }
  plan::execute(problem, operands, info.device, info.device_index, algorithm);
  return result;
}

// Operands are read through the same pointers as results are written.
void* data(const Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

Tensor conv2d_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                      const Ints stride, const Ints padding, const Ints dilation, int64_t groups,
                      const OptionalString precision, const OptionalString algorithm) {
  const TensorInfo info = describe(input, "conv2d");
  std::optional<TensorInfo> bias_info;
  if (bias) bias_info = describe(*bias, "conv2d");
  ConvProblem problem =
      forward_problem(info, describe(weight, "conv2d"), bias_info ? &*bias_info : nullptr,
                      {stride, padding, dilation, groups});
  problem.precision = resolve_precision(precision, info);
  return execute(problem,
                 {data(input), data(weight), nullptr, bias ? bias->const_data_ptr() : nullptr},
                 info, algorithm);
}

Tensor conv2d_backward_input(const Tensor& grad_output, const Tensor& weight, const Ints input_size,
                             const Ints stride, const Ints padding, const Ints dilation,
                             int64_t groups, const OptionalString precision,
                             const OptionalString algorithm) {
  const TensorInfo info = describe(grad_output, "conv2d_backward_input");
  ConvProblem problem = backward_input_problem(info, describe(weight, "conv2d_backward_input"),
                                               input_size, {stride, padding, dilation, groups});
  problem.precision = resolve_precision(precision, info);
  return execute(problem, {nullptr, data(weight), data(grad_output), nullptr}, info, algorithm);
}

Tensor conv2d_backward_weight(const Tensor& grad_output, const Tensor& input,
                              const Ints weight_size, const Ints weight_stride, const Ints stride,
                              const Ints padding, const Ints dilation, int64_t groups,
                              const OptionalString precision, const OptionalString algorithm) {
  const TensorInfo info = describe(grad_output, "conv2d_backward_weight");
  ConvProblem problem =
      backward_weight_problem(info, describe(input, "conv2d_backward_weight"), weight_size,
                              weight_stride, {stride, padding, dilation, groups});
  problem.precision = resolve_precision(precision, info);
  return execute(problem, {data(input), nullptr, data(grad_output), nullptr}, info, algorithm);
}

// Unbatched input gets a batch of one for the call.
Tensor conv2d_any_batch(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                        const Ints& stride, const Ints& padding, const Ints& dilation,
                        int64_t groups) {
  check(input.dim() == 3 || input.dim() == 4,
        "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ",
        Ints(input.sizes().begin(), input.sizes().end()));
  if (input.dim() == 4)
    return conv2d_forward(input, weight, bias, stride, padding, dilation, groups, {}, {});
  return torch::stable::squeeze(conv2d_forward(torch::stable::unsqueeze(input, 0), weight, bias,
                                               stride, padding, dilation, groups, {}, {}),
                                0);
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
              const Ints stride, const Ints padding, const Ints dilation, int64_t groups) {
  // Four numbers are the core ops' form; PyTorch's signature has one or two.
  check(padding.size() <= 2,
        "expected padding to be a single integer value or a list of 2 values to match the "
        "convolution dimensions, but got padding=",
        padding);
  return conv2d_any_batch(input, weight, bias, stride, padding, dilation, groups);
}

Tensor conv2d_padding(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                      const Ints stride, const std::string padding, const Ints dilation,
                      int64_t groups) {
  if (padding == "valid")
    return conv2d_any_batch(input, weight, bias, stride, {0}, dilation, groups);
  check(padding == "same", "Invalid padding string: '", padding, "'");
  for (int64_t step : stride)
    check(step == 1,
          "padding='same' is not supported for strided convolutions, but got stride=", stride);
  check(weight.dim() == 4, "Expected 4-dimensional weight for conv2d, but got weight of size: ",
        Ints(weight.sizes().begin(), weight.sizes().end()));
  check(dilation.size() == 1 || dilation.size() == 2,
        "expected dilation to be a single integer value or a list of 2 values to match the "
        "convolution dimensions, but got dilation=",
        dilation);
  // The odd one of an uneven total goes to the bottom and the right.
  const int64_t total_h = dilation.front() * (weight.size(2) - 1);
  const int64_t total_w = dilation.back() * (weight.size(3) - 1);
  const Ints sides{total_h / 2, total_h - total_h / 2, total_w / 2, total_w - total_w / 2};
  return conv2d_any_batch(input, weight, bias, stride, sides, dilation, groups);
}

Tensor im2col(const Tensor& input, const Ints kernel_size, const Ints dilation, const Ints padding,
              const Ints stride) {
  if (input.dim() == 3)
    return torch::stable::squeeze(
        im2col(torch::stable::unsqueeze(input, 0), kernel_size, dilation, padding, stride), 0);
  const TensorInfo info = describe(input, "im2col");
  const ConvProblem problem = im2col_problem(info, kernel_size, {stride, padding, dilation, 1});
  const int64_t taps = problem.taps(), pixels = problem.output_pixels();
  Tensor result = new_tensor(Tensor4::contiguous({1, problem.batch(), taps, pixels}), info.dtype,
                             info.device, info.device_index);
  if (problem.batch() > 0) {
    Runtime& device = runtime(info.device);
    const auto guard = device.make_current(info.device_index);
    device.im2col(problem, input.const_data_ptr(),
                  {result.mutable_data_ptr(), pixels, taps * pixels, 1, whole(problem)},
                  device.current_stream(info.device_index));
  }
  return torch::stable::squeeze(result, 0);
}

Tensor col2im(const Tensor& input, const Ints output_size, const Ints kernel_size,
              const Ints dilation, const Ints padding, const Ints stride) {
  if (input.dim() == 2)
    return torch::stable::squeeze(col2im(torch::stable::unsqueeze(input, 0), output_size,
                                         kernel_size, dilation, padding, stride),
                                  0);
  const TensorInfo info = describe(input, "col2im");
  const ConvProblem problem =
      col2im_problem(info, output_size, kernel_size, {stride, padding, dilation, 1});
  Tensor result = new_tensor(problem.input, info.dtype, info.device, info.device_index);
  if (problem.batch() > 0) {
    Runtime& device = runtime(info.device);
    const auto guard = device.make_current(info.device_index);
    device.col2im(problem,
                  {data(input), info.strides[1], info.strides[0], info.strides[2], whole(problem)},
                  result.mutable_data_ptr(), device.current_stream(info.device_index));
  }
  return result;
}

}  // namespace
}  // namespace convops

STABLE_TORCH_LIBRARY(convops, m) {
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1) -> Tensor");
  m.def(
      "conv2d.padding(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
      "str padding=\"valid\", int[2] dilation=1, int groups=1) -> Tensor");
  m.def(
      "conv2d_forward(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups, str? precision=None, str? algorithm=None) -> Tensor");
  m.def(
      "conv2d_backward_input(Tensor grad_output, Tensor weight, SymInt[] input_size, "
      "int[] stride, int[] padding, int[] dilation, int groups, str? precision=None, "
      "str? algorithm=None) -> Tensor");
  m.def(
      "conv2d_backward_weight(Tensor grad_output, Tensor input, SymInt[] weight_size, "
      "SymInt[] weight_stride, int[] stride, int[] padding, int[] dilation, int groups, "
      "str? precision=None, str? algorithm=None) -> Tensor");
  m.def(
      "im2col(Tensor input, int[2] kernel_size, int[2] dilation=1, int[2] padding=0, "
      "int[2] stride=1) -> Tensor");
  m.def(
      "col2im(Tensor input, SymInt[2] output_size, int[2] kernel_size, int[2] dilation=1, "
      "int[2] padding=0, int[2] stride=1) -> Tensor");
}

#define CONVOPS_REGISTER(key)                                                      \
  STABLE_TORCH_LIBRARY_IMPL(convops, key, m) {                                     \
    m.impl("conv2d", TORCH_BOX(&convops::conv2d));                                 \
    m.impl("conv2d.padding", TORCH_BOX(&convops::conv2d_padding));                 \
    m.impl("conv2d_forward", TORCH_BOX(&convops::conv2d_forward));                 \
    m.impl("conv2d_backward_input", TORCH_BOX(&convops::conv2d_backward_input));   \
    m.impl("conv2d_backward_weight", TORCH_BOX(&convops::conv2d_backward_weight)); \
    m.impl("im2col", TORCH_BOX(&convops::im2col));                                 \
    m.impl("col2im", TORCH_BOX(&convops::col2im));                                 \
  }

CONVOPS_REGISTER(CPU)
CONVOPS_REGISTER(CUDA)
