#include "problem.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <sstream>
#include <utility>

#include "check.h"

namespace convops {
namespace {

// Names in the order of the enumerators.
constexpr std::array kDirections{"forward", "backward_input", "backward_weight"};
constexpr std::array kDTypes{"float32", "float64", "float16", "bfloat16"};
// The same dtypes in the words of PyTorch's messages.
constexpr std::array kDTypeWords{"float", "double", "c10::Half", "c10::BFloat16"};
constexpr std::array kPrecisions{"ieee", "tf32"};
constexpr std::array kDeviceTypes{"cpu", "cuda"};

template <typename Enum, size_t N>
std::optional<Enum> parse(const std::array<const char*, N>& names, const std::string& name) {
  for (size_t i = 0; i < N; ++i)
    if (name == names[i]) return static_cast<Enum>(i);
  return std::nullopt;
}

std::string device_name(const TensorInfo& info) {
  std::string name = to_string(info.device);
  return info.device == DeviceType::kCuda ? name + ':' + std::to_string(info.device_index) : name;
}

void check_same_kind(const TensorInfo& a, const char* a_name, const TensorInfo& b,
                     const char* b_name) {
  if (a.device != b.device || a.device_index != b.device_index)
    check(false, "Expected all tensors to be on the same device, but found at least two devices, ",
          device_name(a), " (", a_name, ") and ", device_name(b), " (", b_name, ")!");
  check(a.dtype == b.dtype, a_name, " type (", kDTypeWords[size_t(a.dtype)], ") and ", b_name,
        " type (", kDTypeWords[size_t(b.dtype)], ") should be the same");
}

Pair pair(const std::vector<int64_t>& values, const char* name) {
  check(values.size() == 1 || values.size() == 2, "expected ", name,
        " to be a single integer value or a list of 2 values to match the convolution dimensions, "
        "but got ",
        name, '=', values);
  return {values.front(), values.back()};
}

struct Padding {
  int64_t top, bottom, left, right;
};

Padding padding_sides(const std::vector<int64_t>& values) {
  if (values.size() == 4) return {values[0], values[1], values[2], values[3]};
  const Pair both = pair(values, "padding");
  return {both.h, both.h, both.w, both.w};
}

// The window's parameters once they are known to be legal.
struct Window {
  Pair stride, dilation;
  Padding padding;
};

Window checked_window(const ConvArguments& arguments) {
  const Window window{pair(arguments.stride, "stride"), pair(arguments.dilation, "dilation"),
                      padding_sides(arguments.padding)};
  const Padding& pad = window.padding;
  check(pad.top >= 0 && pad.bottom >= 0 && pad.left >= 0 && pad.right >= 0,
        "negative padding is not supported, but got padding=", arguments.padding);
  check(window.stride.h > 0 && window.stride.w > 0,
        "non-positive stride is not supported, but got stride=", arguments.stride);
  check(window.dilation.h > 0 && window.dilation.w > 0,
        "non-positive dilation is not supported, but got dilation=", arguments.dilation);
  check(arguments.groups > 0,
        "non-positive groups is not supported, but got groups=", arguments.groups);
  return window;
}

// Sizes of the output of a convolution over an input of that size, after every check on shapes.
std::vector<int64_t> checked_output_size(const std::vector<int64_t>& input,
                                         const std::vector<int64_t>& weight, const Window& window,
                                         int64_t groups) {
  check(weight.size() == 4,
        "Expected 4-dimensional weight for conv2d, but got weight of size: ", weight);
  check(input.size() == 4,
        "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ", input);
  check(weight[0] >= groups, "Given groups=", groups, ", expected weight to be at least ", groups,
        " at dimension 0, but got weight of size ", weight, " instead");
  check(weight[0] % groups == 0, "Given groups=", groups, ", expected weight to be divisible by ",
        groups, " at dimension 0, but got weight of size ", weight, " instead");
  check(input[1] == weight[1] * groups, "Given groups=", groups, ", weight of size ", weight,
        ", expected input", input, " to have ", weight[1] * groups, " channels, but got ", input[1],
        " channels instead");
  check(weight[2] > 0 && weight[3] > 0,
        "non-positive kernel size is not supported, but got weight of size ", weight);
  const Padding& pad = window.padding;
  const int64_t padded_h = input[2] + pad.top + pad.bottom;
  const int64_t padded_w = input[3] + pad.left + pad.right;
  const int64_t extent_h = window.dilation.h * (weight[2] - 1) + 1;
  const int64_t extent_w = window.dilation.w * (weight[3] - 1) + 1;
  check(padded_h >= extent_h && padded_w >= extent_w, "Calculated padded input size per channel: (",
        padded_h, " x ", padded_w, "). Kernel size: (", extent_h, " x ", extent_w,
        "). Kernel size can't be greater than actual input size");
  check(input[2] > 0 && input[3] > 0,
        "Only zero batch or zero channel inputs are supported, but got input shape: ", input);
  return {input[0], weight[0], (padded_h - extent_h) / window.stride.h + 1,
          (padded_w - extent_w) / window.stride.w + 1};
}

Tensor4 tensor4(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  Tensor4 tensor;
  for (int i = 0; i < 4; ++i) {
    tensor.size[i] = sizes[i];
    tensor.stride[i] = strides[i];
  }
  return tensor;
}

Tensor4 tensor4(const TensorInfo& info) { return tensor4(info.sizes, info.strides); }

// A new tensor of that size in the layout PyTorch gives a result of these operands.
Tensor4 new_tensor(const std::vector<int64_t>& size, const TensorInfo& a, const TensorInfo& b) {
  const int64_t sizes[4] = {size[0], size[1], size[2], size[3]};
  const bool contiguous_only = a.dtype == DType::kFloat64 && a.device == DeviceType::kCuda;
  const bool channels_last = !contiguous_only && (tensor4(a).suggests_channels_last() ||
                                                  tensor4(b).suggests_channels_last());
  return channels_last ? Tensor4::channels_last(sizes) : Tensor4::contiguous(sizes);
}

ConvProblem make_problem(Direction direction, DType dtype, const Tensor4& input,
                         const Tensor4& weight, const Tensor4& output, const Window& window,
                         int64_t groups) {
  ConvProblem problem;
  // Hash and equality read the bytes, so the gaps between the fields must not differ.
  std::memset(&problem, 0, sizeof problem);
  problem.direction = direction;
  problem.dtype = dtype;
  problem.precision = Precision::kIeee;
  problem.input = input;
  problem.weight = weight;
  problem.output = output;
  problem.stride = window.stride;
  problem.dilation = window.dilation;
  problem.padding = {window.padding.top, window.padding.left};
  problem.groups = groups;
  return problem;
}

void check_grad_output(const TensorInfo& grad_output, const std::vector<int64_t>& expected) {
  check(grad_output.sizes == expected, "Expected grad_output of size ", expected,
        ", but got grad_output of size ", grad_output.sizes);
}

std::string layout_name(const Tensor4& tensor) {
  if (tensor.is_contiguous()) return "contiguous";
  if (tensor.is_channels_last()) return "channels_last";
  std::ostringstream out;
  write(out, std::vector<int64_t>(tensor.stride, tensor.stride + 4));
  return out.str();
}

// torch's is_non_overlapping_and_dense.
bool is_dense(const Tensor4& tensor) {
  std::array<std::pair<int64_t, int64_t>, 4> dimensions;  // stride, size
  for (int i = 0; i < 4; ++i) dimensions[i] = {tensor.stride[i], tensor.size[i]};
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (size == 0) return true;
    if (size == 1) continue;
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool strides_equal(const Tensor4& a, const Tensor4& b) {
  for (int i = 0; i < 4; ++i)
    if (a.size[i] > 1 && a.stride[i] != b.stride[i]) return false;
  return true;
}

}  // namespace

const char* to_string(Direction direction) { return kDirections[size_t(direction)]; }
const char* to_string(DType dtype) { return kDTypes[size_t(dtype)]; }
const char* to_string(Precision precision) { return kPrecisions[size_t(precision)]; }
const char* to_string(DeviceType type) { return kDeviceTypes[size_t(type)]; }

std::optional<Direction> parse_direction(const std::string& name) {
  return parse<Direction>(kDirections, name);
}
std::optional<DType> parse_dtype(const std::string& name) { return parse<DType>(kDTypes, name); }
std::optional<Precision> parse_precision(const std::string& name) {
  return parse<Precision>(kPrecisions, name);
}
std::optional<DeviceType> parse_device_type(const std::string& name) {
  return parse<DeviceType>(kDeviceTypes, name);
}

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

Tensor4 Tensor4::contiguous(const int64_t (&size)[4]) {
  Tensor4 tensor;
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    tensor.size[i] = size[i];
    tensor.stride[i] = stride;
    stride *= size[i] > 1 ? size[i] : 1;
  }
  return tensor;
}

Tensor4 Tensor4::channels_last(const int64_t (&size)[4]) {
  Tensor4 tensor;
  int64_t stride = 1;
  for (int i : {1, 3, 2, 0}) {
    tensor.size[i] = size[i];
    tensor.stride[i] = stride;
    stride *= size[i] > 1 ? size[i] : 1;
  }
  return tensor;
}

bool Tensor4::is_contiguous() const { return strides_equal(*this, contiguous(size)); }

bool Tensor4::is_channels_last() const { return strides_equal(*this, channels_last(size)); }

bool Tensor4::suggests_channels_last() const {
  if (stride[1] == 0) return false;
  int64_t smallest = 0;
  for (int i : {1, 3, 2, 0}) {
    if (size[i] == 0 || stride[i] < smallest) return false;
    // N×1×1×1 with equal strides reads as either; PyTorch says NCHW.
    if (i == 0 && smallest == stride[1]) return false;
    smallest = stride[i] * (size[i] > 1 ? size[i] : 1);
  }
  return true;
}

std::string window_text(const ConvProblem& p) {
  const auto by = [](int64_t h, int64_t w) { return std::to_string(h) + 'x' + std::to_string(w); };
  return by(p.kernel().h, p.kernel().w) + ", stride " + by(p.stride.h, p.stride.w);
}

bool ConvProblem::is_pointwise() const {
  return kernel().h == 1 && kernel().w == 1 && stride.h == 1 && stride.w == 1 && padding.h == 0 &&
         padding.w == 0 && output_size().h == input_size().h && output_size().w == input_size().w;
}

double ConvProblem::flops() const { return 2.0 * double(output.numel()) * double(taps()); }

double ConvProblem::bytes() const {
  return double(element_size(dtype)) *
         (double(input.numel()) + double(weight.numel()) + double(output.numel()));
}

const Tensor4& ConvProblem::result() const {
  switch (direction) {
    case Direction::kForward:
      return output;
    case Direction::kBackwardInput:
      return input;
    default:
      return weight;
  }
}

std::string to_string(const ConvProblem& p) {
  std::ostringstream out;
  out << to_string(p.direction) << ' ' << to_string(p.dtype);
  if (p.dtype == DType::kFloat32) out << ' ' << to_string(p.precision);
  out << " input " << p.input.size[0] << 'x' << p.input.size[1] << 'x' << p.input.size[2] << 'x'
      << p.input.size[3] << ' ' << layout_name(p.input) << " weight " << p.weight.size[0] << 'x'
      << p.weight.size[1] << 'x' << p.weight.size[2] << 'x' << p.weight.size[3] << ' '
      << layout_name(p.weight) << " output " << p.output.size[2] << 'x' << p.output.size[3] << ' '
      << layout_name(p.output) << " stride " << p.stride.h << 'x' << p.stride.w << " padding "
      << p.padding.h << 'x' << p.padding.w << " dilation " << p.dilation.h << 'x' << p.dilation.w
      << " groups " << p.groups << (p.has_bias ? " bias" : "");
  return out.str();
}

bool operator==(const ConvProblem& a, const ConvProblem& b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

size_t ConvProblemHash::operator()(const ConvProblem& problem) const {
  // FNV-1a over 8-byte words.
  static_assert(sizeof problem % sizeof(uint64_t) == 0);
  uint64_t words[sizeof problem / sizeof(uint64_t)];
  std::memcpy(words, &problem, sizeof problem);
  uint64_t hash = 0xcbf29ce484222325;
  for (uint64_t word : words) hash = (hash ^ word) * 0x100000001b3;
  return hash ^ (hash >> 32);
}

ConvProblem forward_problem(const TensorInfo& input, const TensorInfo& weight,
                            const TensorInfo* bias, const ConvArguments& arguments) {
  const Window window = checked_window(arguments);
  const auto output_size = checked_output_size(input.sizes, weight.sizes, window, arguments.groups);
  check_same_kind(input, "Input", weight, "weight");
  if (bias) {
    check(bias->sizes.size() == 1 && bias->sizes[0] == weight.sizes[0], "Given weight of size ",
          weight.sizes, ", expected bias to be 1-dimensional with ", weight.sizes[0],
          " elements, but got bias of size ", bias->sizes, " instead");
    check_same_kind(input, "Input", *bias, "bias");
  }
  ConvProblem problem =
      make_problem(Direction::kForward, input.dtype, tensor4(input), tensor4(weight),
                   new_tensor(output_size, input, weight), window, arguments.groups);
  problem.has_bias = bias != nullptr;
  problem.bias_stride = bias ? bias->strides[0] : 0;
  return problem;
}

ConvProblem backward_input_problem(const TensorInfo& grad_output, const TensorInfo& weight,
                                   const std::vector<int64_t>& input_size,
                                   const ConvArguments& arguments) {
  const Window window = checked_window(arguments);
  check_grad_output(grad_output,
                    checked_output_size(input_size, weight.sizes, window, arguments.groups));
  check_same_kind(grad_output, "grad_output", weight, "weight");
  return make_problem(Direction::kBackwardInput, grad_output.dtype,
                      new_tensor(input_size, grad_output, weight), tensor4(weight),
                      tensor4(grad_output), window, arguments.groups);
}

ConvProblem backward_weight_problem(const TensorInfo& grad_output, const TensorInfo& input,
                                    const std::vector<int64_t>& weight_size,
                                    const std::vector<int64_t>& weight_stride,
                                    const ConvArguments& arguments) {
  const Window window = checked_window(arguments);
  check_grad_output(grad_output,
                    checked_output_size(input.sizes, weight_size, window, arguments.groups));
  check_same_kind(grad_output, "grad_output", input, "input");
  check(weight_stride.empty() || weight_stride.size() == 4,
        "expected weight_stride to be empty or a list of 4 values, but got weight_stride=",
        weight_stride);
  const int64_t size[4] = {weight_size[0], weight_size[1], weight_size[2], weight_size[3]};
  const Tensor4 weight =
      weight_stride.empty() ? Tensor4::contiguous(size) : tensor4(weight_size, weight_stride);
  check(is_dense(weight), "expected weight_stride of a non-overlapping and dense tensor of size ",
        weight_size, ", but got weight_stride=", weight_stride);
  return make_problem(Direction::kBackwardWeight, grad_output.dtype, tensor4(input), weight,
                      tensor4(grad_output), window, arguments.groups);
}

}  // namespace convops
