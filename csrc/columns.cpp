#include "columns.h"

#include <cstring>

#include "check.h"

namespace convops {
namespace {

Pair pair(const std::vector<int64_t>& values, const char* name) {
  check(values.size() == 1 || values.size() == 2, "It is expected ", name,
        " equals to 2, but got size ", values.size());
  return {values.front(), values.back()};
}

int64_t blocks(int64_t size, int64_t kernel, int64_t dilation, int64_t padding, int64_t stride) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  return (room >= 0 ? room / stride : -((-room + stride - 1) / stride)) + 1;
}

struct Window {
  Pair kernel, dilation, padding, stride;

  Window(const std::vector<int64_t>& kernel_size, const ConvArguments& arguments)
      : kernel(pair(kernel_size, "kernel_size")),
        dilation(pair(arguments.dilation, "dilation")),
        padding(pair(arguments.padding, "padding")),
        stride(pair(arguments.stride, "stride")) {
    check(kernel.h > 0 && kernel.w > 0,
          "kernel size should be greater than zero, but got kernel_height: ", kernel.h,
          " kernel_width: ", kernel.w);
    check(stride.h > 0 && stride.w > 0,
          "stride should be greater than zero, but got stride_height: ", stride.h,
          " stride_width: ", stride.w);
    check(padding.h >= 0 && padding.w >= 0,
          "padding should be non-negative, but got pad_height: ", padding.h,
          " pad_width: ", padding.w);
    check(dilation.h > 0 && dilation.w > 0,
          "dilation should be greater than zero, but got dilation_height: ", dilation.h,
          " dilation_width: ", dilation.w);
  }

  Pair blocks_of(const Pair& size) const {
    return {blocks(size.h, kernel.h, dilation.h, padding.h, stride.h),
            blocks(size.w, kernel.w, dilation.w, padding.w, stride.w)};
  }
};

ConvProblem make_problem(DType dtype, const Tensor4& input, const Window& window,
                         const Pair& output) {
  ConvProblem problem;
  std::memset(&problem, 0, sizeof problem);
  problem.direction = Direction::kForward;
  problem.dtype = dtype;
  problem.input = input;
  problem.weight = Tensor4::contiguous({1, input.size[1], window.kernel.h, window.kernel.w});
  problem.output = Tensor4::contiguous({input.size[0], 1, output.h, output.w});
  problem.stride = window.stride;
  problem.dilation = window.dilation;
  problem.padding = window.padding;
  problem.groups = 1;
  return problem;
}

}  // namespace

ConvProblem im2col_problem(const TensorInfo& input, const std::vector<int64_t>& kernel_size,
                           const ConvArguments& arguments) {
  const Window window(kernel_size, arguments);
  const auto& size = input.sizes;
  check(size.size() == 4 && size[1] > 0 && size[2] > 0 && size[3] > 0,
        "Expected 3D or 4D (batch mode) tensor with possibly 0 batch size and other non-zero "
        "dimensions for input, but got: ",
        size);
  const Pair output = window.blocks_of({size[2], size[3]});
  check(output.h >= 1 && output.w >= 1, "Given input with spatial size (", size[2], ", ", size[3],
        "), kernel_size=", window.kernel, ", dilation=", window.dilation,
        ", padding=", window.padding, ", calculated shape of the array of sliding blocks as ",
        output, ", but its components must be at least one.");
  Tensor4 tensor;
  for (int i = 0; i < 4; ++i) {
    tensor.size[i] = size[i];
    tensor.stride[i] = input.strides[i];
  }
  return make_problem(input.dtype, tensor, window, output);
}

ConvProblem col2im_problem(const TensorInfo& columns, const std::vector<int64_t>& output_size,
                           const std::vector<int64_t>& kernel_size,
                           const ConvArguments& arguments) {
  const Pair image = pair(output_size, "output_size");
  const Window window(kernel_size, arguments);
  const auto& size = columns.sizes;
  check(size.size() == 3 && size[1] > 0 && size[2] > 0,
        "Expected 2D or 3D (batch mode) tensor for input with possibly 0 batch size and non-zero "
        "dimensions for input, but got: ",
        size);
  const int64_t kernel = window.kernel.h * window.kernel.w;
  check(size[1] % kernel == 0,
        "Expected size of input's dimension 1 to be divisible by the product of kernel_size, but "
        "got input.size(1)=",
        size[1], " and kernel_size=", window.kernel, '.');
  const Pair output = window.blocks_of(image);
  check(output.h >= 1 && output.w >= 1 && output.h * output.w == size[2],
        "Given output_size=", image, ", kernel_size=", window.kernel,
        ", dilation=", window.dilation, ", padding=", window.padding, ", stride=", window.stride,
        ", expected size of input's dimension 2 to match the calculated number of sliding blocks ",
        output.h, " * ", output.w, " = ", output.h * output.w, ", but got input.size(2)=", size[2],
        '.');
  return make_problem(columns.dtype,
                      Tensor4::contiguous({size[0], size[1] / kernel, image.h, image.w}), window,
                      output);
}

}  // namespace convops
