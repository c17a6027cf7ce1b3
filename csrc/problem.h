// ConvProblem: the one description of a convolution. Plain data, no torch: it goes by value or
// const reference from the op to the plan, the algorithms and the kernels.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#ifdef __CUDACC__
#define CONVOPS_HOST_DEVICE __host__ __device__
#else
#define CONVOPS_HOST_DEVICE
#endif

namespace convops {

enum class Direction : uint8_t { kForward, kBackwardInput, kBackwardWeight };
enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };
// What arithmetic float32 tensors get; the other dtypes have only kIeee.
enum class Precision : uint8_t { kIeee, kTf32 };
enum class DeviceType : uint8_t { kCpu, kCuda };

const char* to_string(Direction direction);
const char* to_string(DType dtype);
const char* to_string(Precision precision);
const char* to_string(DeviceType type);
// The enum value of that name; std::nullopt for any other text.
std::optional<Direction> parse_direction(const std::string& name);
std::optional<DType> parse_dtype(const std::string& name);
std::optional<Precision> parse_precision(const std::string& name);
std::optional<DeviceType> parse_device_type(const std::string& name);

int64_t element_size(DType dtype);

struct Pair {
  int64_t h, w;
};

// Sizes and strides (in elements) of a four-dimensional tensor in the order N, C, H, W whatever its
// memory layout; for a weight: out channels, in channels of a group, kernel height, kernel width.
struct Tensor4 {
  int64_t size[4];
  int64_t stride[4];

  CONVOPS_HOST_DEVICE int64_t numel() const { return size[0] * size[1] * size[2] * size[3]; }
  // Whether neighbours of a row are neighbours in memory.
  bool has_dense_columns() const { return stride[3] == 1 || size[3] == 1; }
  bool is_contiguous() const;
  bool is_channels_last() const;
  // torch's Tensor::suggest_memory_format() == ChannelsLast (c10/core/MemoryFormat.h), whose rule
  // for size-1 dimensions decides what users see as output strides.
  bool suggests_channels_last() const;

  static Tensor4 contiguous(const int64_t (&size)[4]);
  static Tensor4 channels_last(const int64_t (&size)[4]);
};

struct ConvProblem {
  Direction direction;
  DType dtype;
  Precision precision;
  bool has_bias;   // only ever true for kForward
  Tensor4 input;   // batch, in channels, height, width
  Tensor4 weight;  // out channels, in channels / groups, kernel height, kernel width
  Tensor4 output;  // batch, out channels, height, width
  int64_t bias_stride;
  Pair stride, dilation;
  Pair padding;  // top and left; bottom and right are implied by the output's size
  int64_t groups;

  CONVOPS_HOST_DEVICE int64_t batch() const { return input.size[0]; }
  CONVOPS_HOST_DEVICE int64_t in_channels() const { return input.size[1]; }
  CONVOPS_HOST_DEVICE int64_t out_channels() const { return output.size[1]; }
  CONVOPS_HOST_DEVICE int64_t group_in_channels() const { return weight.size[1]; }
  CONVOPS_HOST_DEVICE int64_t group_out_channels() const { return weight.size[0] / groups; }
  CONVOPS_HOST_DEVICE Pair input_size() const { return {input.size[2], input.size[3]}; }
  CONVOPS_HOST_DEVICE Pair kernel() const { return {weight.size[2], weight.size[3]}; }
  CONVOPS_HOST_DEVICE Pair output_size() const { return {output.size[2], output.size[3]}; }
  CONVOPS_HOST_DEVICE int64_t output_pixels() const { return output.size[2] * output.size[3]; }
  // Length of the dot product behind one output element of the forward direction.
  CONVOPS_HOST_DEVICE int64_t taps() const {
    return weight.size[1] * weight.size[2] * weight.size[3];
  }

  // 1×1, stride 1, unpadded: the input is its own column matrix.
  bool is_pointwise() const;
  bool is_depthwise() const { return groups == in_channels() && group_in_channels() == 1; }
  // Whether there are taps that a dilation moves apart.
  bool is_dilated() const {
    return (dilation.h > 1 && weight.size[2] > 1) || (dilation.w > 1 && weight.size[3] > 1);
  }
  // Multiply-adds count two, padding included: the same in all three directions.
  double flops() const;
  // Each of the three tensors moved once.
  double bytes() const;
  const Tensor4& result() const;
};

// Kernel and stride for people: "3x3, stride 1x1".
std::string window_text(const ConvProblem& problem);
// One line that tells two problems apart; the key of tuned choices.
std::string to_string(const ConvProblem& problem);
bool operator==(const ConvProblem& a, const ConvProblem& b);
struct ConvProblemHash {
  size_t operator()(const ConvProblem& problem) const;
};

// The arguments of a call as they come, before anything is known to be legal.
struct ConvArguments {
  std::vector<int64_t> stride, padding, dilation;  // padding: 1, 2 or 4 (top, bottom, left, right)
  int64_t groups;
};

// What the checks below need to know of a tensor.
struct TensorInfo {
  std::vector<int64_t> sizes, strides;
  DType dtype;
  DeviceType device;
  int device_index;
};

// Make the problem of a direction or throw std::runtime_error in PyTorch's words. The result's
// layout follows PyTorch: channels_last if either operand is (never for float64 on CUDA).
ConvProblem forward_problem(const TensorInfo& input, const TensorInfo& weight,
                            const TensorInfo* bias, const ConvArguments& arguments);
ConvProblem backward_input_problem(const TensorInfo& grad_output, const TensorInfo& weight,
                                   const std::vector<int64_t>& input_size,
                                   const ConvArguments& arguments);
// `weight_stride` empty: contiguous.
ConvProblem backward_weight_problem(const TensorInfo& grad_output, const TensorInfo& input,
                                    const std::vector<int64_t>& weight_size,
                                    const std::vector<int64_t>& weight_stride,
                                    const ConvArguments& arguments);

}  // namespace convops
