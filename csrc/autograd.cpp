// What the stable ABI cannot express: derivatives of every order, forward-mode AD, autocast, and
// PyTorch's own precision setting. No kernels, no CUDA, no Python. Ordinary torch C++, so it is
// built once for every minor version of torch; conv_ops/autograd.py says the same in Python for the
// others. The fake kernels (conv_ops/meta.py) and the vmap rules (conv_ops/vmap.py) serve both.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "settings.h"

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymIntArrayRef;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using OptionalString = std::optional<std::string_view>;

// ---- Nodes -----------------------------------------------------------------------------------

// torch holds nodes by shared_ptr at first, by intrusive_ptr from 2.13; Edge tells which.
template <typename T, typename... Args>
auto make_node(const Args&... args) {
  using Held = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Held, std::shared_ptr<Node>>) {
    return std::shared_ptr<T>(new T(args...), [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(args...);
  }
}

// A node of any of our ops. Remembers the settings the forward saw: the engine may run the backward
// on another thread.
class OpNode : public Node {
 public:
  variable_list apply(variable_list&& grads) final {
    variable_list result(num_outputs());
    if (!grads[0].defined()) return result;
    const std::lock_guard lock(mutex_);
    const convops::settings::Scope scope(overrides_);
    for (size_t i = 0; i < result.size(); ++i)
      if (task_should_compute_output(i)) result[i] = gradient(i, grads[0]);
    return result;
  }

 protected:
  // The gradient of the op's i-th tensor argument.
  virtual Tensor gradient(size_t i, const Tensor& grad) const = 0;

 private:
  convops::settings::Overrides overrides_ = convops::settings::thread_overrides();
};

// Makes `node`, of an op with one tensor argument, the history of its result.
template <typename Held>
void record(const Tensor& result, const Held& node, const Tensor& input) {
  node->set_next_edges(torch::autograd::collect_next_edges(input));
  torch::autograd::set_history(result, node);
}

// Undefined for an undefined tensor and for one without a tangent.
Tensor tangent_of(const Tensor& tensor) {
  return tensor.defined() ? tensor._fw_grad(/*level=*/0) : Tensor();
}

Tensor primal_of(const Tensor& tensor) { return tensor._fw_primal(/*level=*/0); }

Tensor plus(const Tensor& a, const Tensor& b) { return a.defined() ? a + b : b; }

void set_tangent(const Tensor& result, const Tensor& tangent) {
  if (tangent.defined()) result._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The dispatch keys left to the kernels below autograd; none: an ordinary call of the op.
using KeysBelow = std::optional<c10::DispatchKeySet>;

template <typename Op, typename... Args>
Tensor invoke(const Op& op, const KeysBelow& below, const Args&... args) {
  if (!below) return op.call(args...);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return op.redispatch(*below & c10::after_autograd_keyset, args...);
}

// ---- The convolution ops ---------------------------------------------------------------------

// A convolution is linear in its input and in its weight, so <grad_output, conv2d(input, weight)>
// is linear in three tensors. Each of the three ops is the derivative of that form by one of them
// and takes the other two. So one formula gives every derivative of every order: the gradient of
// the op of role R for its operand of role A is the op of role A, with the incoming gradient as R.
enum Role : size_t { kInput, kWeight, kOutput };

// The roles of an op's two operands in order, by the role of its result.
constexpr std::array<std::array<Role, 2>, 3> kOperands{
    {{kOutput, kWeight}, {kOutput, kInput}, {kInput, kWeight}}};

// Sizes and strides of a result: empty sizes for the forward op, which finds its own; empty strides
// where the op chooses them.
struct Layout {
  c10::SymDimVector sizes, strides;
};

// A gradient looks like its tensor, unless that one's elements overlap or have gaps between them.
Layout gradient_layout(const Tensor& tensor) {
  const bool dense = tensor.is_non_overlapping_and_dense();
  return {c10::SymDimVector(tensor.sym_sizes()),
          dense ? c10::SymDimVector(tensor.sym_strides()) : c10::SymDimVector()};
}

// The other arguments. Owned, because nodes keep them; small vectors, so nothing is allocated.
struct Arguments {
  at::DimVector stride, padding, dilation;
  int64_t groups;
  std::optional<std::string> precision, algorithm;

  Arguments(IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups,
            OptionalString precision, OptionalString algorithm)
      : stride(stride),
        padding(padding),
        dilation(dilation),
        groups(groups),
        precision(precision),
        algorithm(algorithm) {}
};

const auto& forward_op() {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, IntArrayRef, IntArrayRef,
                     IntArrayRef, int64_t, OptionalString, OptionalString)>(
          "convops::conv2d_forward");
  return op;
}

const auto& backward_input_op() {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, SymIntArrayRef, IntArrayRef, IntArrayRef,
                     IntArrayRef, int64_t, OptionalString, OptionalString)>(
          "convops::conv2d_backward_input");
  return op;
}

const auto& backward_weight_op() {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, SymIntArrayRef, SymIntArrayRef, IntArrayRef,
                     IntArrayRef, IntArrayRef, int64_t, OptionalString, OptionalString)>(
          "convops::conv2d_backward_weight");
  return op;
}

// The op whose result has that role. Only the forward op has a bias.
Tensor call_op(Role role, const Tensor& a, const Tensor& b, const OptionalTensor& bias,
               const Layout& layout, const Arguments& args, const KeysBelow& below = {}) {
  switch (role) {
    case kInput:
      return invoke(backward_input_op(), below, a, b, layout.sizes, args.stride, args.padding,
                    args.dilation, args.groups, args.precision, args.algorithm);
    case kWeight:
      return invoke(backward_weight_op(), below, a, b, layout.sizes, layout.strides, args.stride,
                    args.padding, args.dilation, args.groups, args.precision, args.algorithm);
    default:
      return invoke(forward_op(), below, a, b, bias, args.stride, args.padding, args.dilation,
                    args.groups, args.precision, args.algorithm);
  }
}

class ConvNode final : public OpNode {
 public:
  ConvNode(Role role, const Arguments& args) : role_(role), args_(args) {}

  // Keeps of the operands what their gradients need: for each one the other. Call it once the edges
  // are set.
  void save(const std::array<const Tensor*, 2>& operands) {
    for (size_t i : {0, 1}) {
      if (!should_compute_output(i)) continue;
      others_[i] = SavedVariable(*operands[1 - i], /*is_output=*/false);
      layouts_[i] = gradient_layout(*operands[i]);
    }
  }

  std::string name() const override {
    constexpr std::array kNames{"ConvopsConv2dBackwardInputBackward",
                                "ConvopsConv2dBackwardWeightBackward",
                                "ConvopsConv2dForwardBackward"};
    return kNames[role_];
  }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    for (SavedVariable& other : others_) other.reset_data();
  }

 private:
  Tensor gradient(size_t i, const Tensor& grad) const override {
    if (i == 2) return grad.sum({0, 2, 3});  // the bias
    const Tensor other = others_[i].unpack();
    const Role wanted = kOperands[role_][i];
    const bool grad_first = kOperands[wanted][0] == role_;
    return call_op(wanted, grad_first ? grad : other, grad_first ? other : grad, std::nullopt,
                   layouts_[i], args_);
  }

  Role role_;
  Arguments args_;
  std::array<SavedVariable, 2> others_;  // [i]: the operand that is not the i-th
  std::array<Layout, 2> layouts_;        // [i]: of the i-th operand's gradient
};

Tensor differentiable(c10::DispatchKeySet keys, Role role, const Tensor& a, const Tensor& b,
                      const OptionalTensor& optional_bias, const Layout& layout,
                      const Arguments& args) {
  const Tensor bias = optional_bias.value_or(Tensor());
  decltype(make_node<ConvNode>(role, args)) node;
  if (torch::autograd::compute_requires_grad(a, b, bias)) {
    node = make_node<ConvNode>(role, args);
    node->set_next_edges(role == kOutput ? torch::autograd::collect_next_edges(a, b, bias)
                                         : torch::autograd::collect_next_edges(a, b));
    node->save({&a, &b});
  }
  const Tensor result = call_op(role, a, b, optional_bias, layout, args, keys);
  if (node) torch::autograd::set_history(result, node);

  Tensor tangent;
  if (const Tensor t = tangent_of(a); t.defined())
    tangent = call_op(role, t, primal_of(b), std::nullopt, layout, args);
  if (const Tensor t = tangent_of(b); t.defined())
    tangent = plus(tangent, call_op(role, primal_of(a), t, std::nullopt, layout, args));
  if (const Tensor t = tangent_of(bias); t.defined())
    tangent = plus(tangent, t.view({1, -1, 1, 1}).expand_as(result));
  set_tangent(result, tangent);
  return result;
}

Tensor conv2d_forward(c10::DispatchKeySet keys, const Tensor& input, const Tensor& weight,
                      const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                      IntArrayRef dilation, int64_t groups, OptionalString precision,
                      OptionalString algorithm) {
  return differentiable(keys, kOutput, input, weight, bias, {},
                        {stride, padding, dilation, groups, precision, algorithm});
}

Tensor conv2d_backward_input(c10::DispatchKeySet keys, const Tensor& grad_output,
                             const Tensor& weight, SymIntArrayRef input_size, IntArrayRef stride,
                             IntArrayRef padding, IntArrayRef dilation, int64_t groups,
                             OptionalString precision, OptionalString algorithm) {
  return differentiable(keys, kInput, grad_output, weight, std::nullopt,
                        {c10::SymDimVector(input_size), {}},
                        {stride, padding, dilation, groups, precision, algorithm});
}

Tensor conv2d_backward_weight(c10::DispatchKeySet keys, const Tensor& grad_output,
                              const Tensor& input, SymIntArrayRef weight_size,
                              SymIntArrayRef weight_stride, IntArrayRef stride, IntArrayRef padding,
                              IntArrayRef dilation, int64_t groups, OptionalString precision,
                              OptionalString algorithm) {
  return differentiable(keys, kWeight, grad_output, input, std::nullopt,
                        {c10::SymDimVector(weight_size), c10::SymDimVector(weight_stride)},
                        {stride, padding, dilation, groups, precision, algorithm});
}

// ---- im2col and col2im: each the other's gradient --------------------------------------------

struct Window {
  at::DimVector kernel_size, dilation, padding, stride;

  Window(IntArrayRef kernel_size, IntArrayRef dilation, IntArrayRef padding, IntArrayRef stride)
      : kernel_size(kernel_size), dilation(dilation), padding(padding), stride(stride) {}
};

Tensor call_im2col(const Tensor& input, const Window& window, const KeysBelow& below = {}) {
  static const auto op =
      find_op<Tensor(const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef, IntArrayRef)>(
          "convops::im2col");
  return invoke(op, below, input, window.kernel_size, window.dilation, window.padding,
                window.stride);
}

Tensor call_col2im(const Tensor& input, SymIntArrayRef output_size, const Window& window,
                   const KeysBelow& below = {}) {
  static const auto op = find_op<Tensor(const Tensor&, SymIntArrayRef, IntArrayRef, IntArrayRef,
                                        IntArrayRef, IntArrayRef)>("convops::col2im");
  return invoke(op, below, input, output_size, window.kernel_size, window.dilation, window.padding,
                window.stride);
}

class Im2colNode final : public OpNode {
 public:
  Im2colNode(const Tensor& input, const Window& window)
      : image_size_(input.sym_sizes().slice(input.dim() - 2)), window_(window) {}
  std::string name() const override { return "ConvopsIm2colBackward"; }

 private:
  Tensor gradient(size_t, const Tensor& grad) const override {
    return call_col2im(grad, image_size_, window_);
  }
  c10::SymDimVector image_size_;
  Window window_;
};

class Col2imNode final : public OpNode {
 public:
  explicit Col2imNode(const Window& window) : window_(window) {}
  std::string name() const override { return "ConvopsCol2imBackward"; }

 private:
  Tensor gradient(size_t, const Tensor& grad) const override { return call_im2col(grad, window_); }
  Window window_;
};

Tensor im2col(c10::DispatchKeySet keys, const Tensor& input, IntArrayRef kernel_size,
              IntArrayRef dilation, IntArrayRef padding, IntArrayRef stride) {
  const Window window(kernel_size, dilation, padding, stride);
  const Tensor result = call_im2col(input, window, keys);
  if (torch::autograd::compute_requires_grad(input))
    record(result, make_node<Im2colNode>(input, window), input);
  if (const Tensor t = tangent_of(input); t.defined()) set_tangent(result, call_im2col(t, window));
  return result;
}

Tensor col2im(c10::DispatchKeySet keys, const Tensor& input, SymIntArrayRef output_size,
              IntArrayRef kernel_size, IntArrayRef dilation, IntArrayRef padding,
              IntArrayRef stride) {
  const Window window(kernel_size, dilation, padding, stride);
  const Tensor result = call_col2im(input, output_size, window, keys);
  if (torch::autograd::compute_requires_grad(input))
    record(result, make_node<Col2imNode>(window), input);
  if (const Tensor t = tangent_of(input); t.defined())
    set_tangent(result, call_col2im(t, output_size, window));
  return result;
}

// ---- The public ops --------------------------------------------------------------------------

// Both overloads of conv2d become conv2d_forward, which alone has derivatives, autocast and vmap.
// The thread's choices become arguments here, so that graphs and backward threads keep them.
Tensor conv2d_of_sides(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                       int64_t groups) {
  const convops::settings::Overrides& overrides = convops::settings::thread_overrides();
  OptionalString precision;
  if (overrides.precision) precision = to_string(*overrides.precision);
  const auto forward = [&](const Tensor& batched) {
    return forward_op().call(batched, weight, bias, stride, padding, dilation, groups, precision,
                             overrides.algorithm);
  };
  return input.dim() == 3 ? forward(input.unsqueeze(0)).squeeze(0) : forward(input);
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
              IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  // conv2d_forward also takes the four sides, which F.conv2d does not.
  TORCH_CHECK(padding.size() <= 2,
              "expected padding to be a single integer value or a list of 2 values to match the "
              "convolution dimensions, but got padding=",
              padding);
  return conv2d_of_sides(input, weight, bias, stride, padding, dilation, groups);
}

Tensor conv2d_padding(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                      IntArrayRef stride, std::string_view padding, IntArrayRef dilation,
                      int64_t groups) {
  TORCH_CHECK(padding == "same" || padding == "valid", "Invalid padding string: '", padding, "'");
  std::array<int64_t, 4> sides{};
  if (padding == "same") {
    for (int64_t step : stride)
      TORCH_CHECK(step == 1, "padding='same' is not supported for strided convolutions");
    // Malformed arguments are left for conv2d_forward to refuse.
    if (weight.dim() == 4 && !dilation.empty()) {
      const int64_t rows = dilation.front() * (weight.size(2) - 1);
      const int64_t columns = dilation.back() * (weight.size(3) - 1);
      sides = {rows / 2, rows - rows / 2, columns / 2, columns - columns / 2};
    }
  }
  return conv2d_of_sides(input, weight, bias, stride, sides, dilation, groups);
}

// ---- Autocast --------------------------------------------------------------------------------

template <c10::DeviceType device>
Tensor conv2d_forward_autocast(const Tensor& input, const Tensor& weight,
                               const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                               IntArrayRef dilation, int64_t groups, OptionalString precision,
                               OptionalString algorithm) {
  const c10::impl::ExcludeDispatchKeyGuard guard(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto cast = [dtype = at::autocast::get_autocast_dtype(device)](const auto& tensor) {
    return at::autocast::cached_cast(dtype, tensor, device);
  };
  return forward_op().call(cast(input), cast(weight), cast(bias), stride, padding, dilation, groups,
                           precision, algorithm);
}

// ---- PyTorch's precision setting -------------------------------------------------------------

// The very question cuDNN's convolution asks.
convops::Precision torch_precision() {
  return at::globalContext().allowTF32CuDNN(at::Float32Op::CONV) ? convops::Precision::kTf32
                                                                 : convops::Precision::kIeee;
}

const bool kReaderInstalled = [] {
  convops::settings::set_torch_precision_reader(torch_precision);
  return true;
}();

// ---- Registration ----------------------------------------------------------------------------

void register_conv2d(torch::Library& m) {
  m.impl("conv2d", conv2d);
  m.impl("conv2d.padding", conv2d_padding);
}

}  // namespace

TORCH_LIBRARY_IMPL(convops, Autograd, m) {
  register_conv2d(m);
  m.impl("conv2d_forward", conv2d_forward);
  m.impl("conv2d_backward_input", conv2d_backward_input);
  m.impl("conv2d_backward_weight", conv2d_backward_weight);
  m.impl("im2col", im2col);
  m.impl("col2im", col2im);
}

TORCH_LIBRARY_IMPL(convops, AutocastCPU, m) {
  register_conv2d(m);  // in inference mode nothing else would lead to conv2d_forward
  m.impl("conv2d_forward", conv2d_forward_autocast<c10::DeviceType::CPU>);
}

TORCH_LIBRARY_IMPL(convops, AutocastCUDA, m) {
  register_conv2d(m);
  m.impl("conv2d_forward", conv2d_forward_autocast<c10::DeviceType::CUDA>);
}

TORCH_LIBRARY_IMPL(convops, FuncTorchBatched, m) { register_conv2d(m); }
