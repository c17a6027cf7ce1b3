// Simulates an algorithm's kernels on random problems:
//
//   algorithms NAME SEED CASES    prints how many cases of each kind there were
//
// The first result that is wrong ends it, with the problem.
#include "cuda/algorithms.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>

#include "async_copies.h"
#include "block.h"
#include "definition.h"
#include "launches.h"
#include "memory.h"
#include "problems.h"

namespace simulation {
namespace {

using namespace convops;

using Make = std::unique_ptr<Algorithm> (*)();
const std::map<std::string, Make> kAlgorithms{
    {"direct", cuda::make_direct},
    {"depthwise", cuda::make_depthwise},
    {"depthwise_strips", cuda::make_depthwise_strips},
    {"depthwise_planes", cuda::make_depthwise_planes},
    {"depthwise_weight", cuda::make_depthwise_weight},
    {"depthwise_large", cuda::make_depthwise_large},
    {"depthwise_channels_last", cuda::make_depthwise_channels_last},
    {"grouped", cuda::make_grouped},
    {"grouped_weight", cuda::make_grouped_weight},
    {"implicit_gemm_weight", cuda::make_implicit_gemm_weight},
    {"tma_im2col", cuda::make_tma_im2col},
    {"tma_im2col_weight", cuda::make_tma_im2col_weight},
};

// What a case has besides its problem.
enum class Values { kFinite, kSpecial, kScaled };

// A tensor's memory with numbers in its elements and poison in its gaps.
class Tensor {
 public:
  Tensor(Random& random, const Tensor4& shape, DType dtype)
      : shape_(shape),
        dtype_(dtype),
        memory_(random, extent(shape) * element_size(dtype), int(element_size(dtype))) {}

  void* data() const { return memory_.data(); }
  Memory& memory() { return memory_; }
  template <typename F>
  void for_elements(F&& f) {
    const auto& [size, stride] = shape_;
    for (int64_t a = 0; a < size[0]; ++a)
      for (int64_t b = 0; b < size[1]; ++b)
        for (int64_t c = 0; c < size[2]; ++c)
          for (int64_t d = 0; d < size[3]; ++d)
            f(a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]);
  }
  void fill(Random& random, Values values, int exponent) {
    for_elements([&](int64_t index) {
      write_element(dtype_, data(), index,
                    std::ldexp(random.between(-(1 << 24), 1 << 24), exponent - 24));
    });
    for (int i = random.between(0, 2); values == Values::kSpecial && i > 0; --i) {
      if (shape_.numel() == 0) break;
      int64_t index = 0;
      for (int d = 0; d < 4; ++d)
        index += random.between(0, int(shape_.size[d]) - 1) * shape_.stride[d];
      constexpr double kSpecial[] = {INFINITY, -INFINITY, NAN};
      write_element(dtype_, data(), index, kSpecial[random.between(0, 2)]);
    }
  }
  Dense read() const { return read_tensor(shape_, dtype_, data()); }

 private:
  Tensor4 shape_;
  DType dtype_;
  Memory memory_;
};

Device random_device(Random& random) {
  const int processors = random.one_in(3) ? 132 : random.between(1, random.one_in(2) ? 4 : 132);
  return {DeviceType::kCuda, 0, "simulated", 90, processors, 4.8e12, 67e12};
}

// Whether the gaps between the elements and what lies around them are as they were.
bool is_untouched_between(Tensor& tensor, int64_t size) {
  std::vector<uint8_t> bytes = tensor.memory().bytes();
  tensor.for_elements([&](int64_t index) {
    std::fill_n(bytes.begin() + int64_t(tensor.memory().first_byte()) + index * size, size,
                uint8_t{0xff});
  });
  return std::ranges::all_of(bytes, [](uint8_t byte) { return byte == 0xff; });
}

class Simulation {
 public:
  Simulation(const std::string& name, unsigned seed)
      : random_(seed), name_(name), algorithm_(kAlgorithms.at(name)()) {}

  void run(int cases) {
    after_block(end_copies);
    for (int done = 0; done < cases;) {
      const ConvProblem problem = random_problem(random_, name_);
      const Device device = random_device(random_);
      const std::string reason = algorithm_->can_run(problem, device);
      count("refused", !reason.empty());
      if (!reason.empty()) continue;
      run_case(problem, device);
      ++done;
    }
    coverage_["kernels"] = launched_kernels();
    for (const auto& [kind, cases_of_it] : coverage_)
      std::printf("%s %d\n", kind.c_str(), cases_of_it);
  }

 private:
  void count(const std::string& kind, bool is) { coverage_[kind] += is; }

  void run_case(const ConvProblem& p, const Device& device) {
    const bool forward = p.direction == Direction::kForward;
    const bool backward_input = p.direction == Direction::kBackwardInput;
    const Values values = random_.one_in(4)                                 ? Values::kSpecial
                          : p.dtype == DType::kFloat32 && random_.one_in(8) ? Values::kScaled
                                                                            : Values::kFinite;
    Tensor input(random_, p.input, p.dtype), weight(random_, p.weight, p.dtype),
        output(random_, p.output, p.dtype);
    Tensor bias(random_, Tensor4{{1, 1, 1, p.out_channels()}, {0, 0, 0, p.bias_stride}}, p.dtype);
    Tensor& result = forward ? output : backward_input ? input : weight;
    // Numbers that are all small or large; the products are not too large.
    const int exponent = values == Values::kScaled ? random_.between(-120, 60) : 0;
    const int others = values == Values::kScaled ? random_.between(-20, 20) : 0;
    for (Tensor* tensor : {&input, &weight, &output, &bias}) {
      if (tensor == &result) continue;
      tensor->fill(random_, values,
                   tensor == &bias                                        ? exponent + others
                   : tensor == &weight || (!forward && tensor == &output) ? others
                                                                          : exponent);
      tensor->memory().forbid_writes();
    }

    const WorkspaceRange range = algorithm_->workspace(p, device);
    const int kind = random_.between(0, 2);
    const int64_t bytes = kind == 0   ? range.minimum
                          : kind == 1 ? range.wanted
                                      : range.minimum + (range.wanted - range.minimum) *
                                                            random_.between(0, 100) / 100;
    describe((name_ + ": " + to_string(p) + "\n  processors " + std::to_string(device.processors) +
              ", workspace " + std::to_string(bytes) + " of " + std::to_string(range.minimum) +
              "..." + std::to_string(range.wanted) + ", values " + std::to_string(int(values)))
                 .c_str());
    const double cost = algorithm_->cost(p, device);
    if (!(cost > 0 && cost < 1)) fail("a cost of no sense");
    Memory workspace(random_, bytes, 256);
    const Operands operands{input.data(), weight.data(), output.data(),
                            p.has_bias ? bias.data() : nullptr};
    const int64_t blocks_before = launched_blocks();
    const auto run = [&] {
      try {
        algorithm_->run(p, operands, {&device, nullptr, workspace.data(), bytes});
      } catch (const std::exception& error) {
        fail(error.what());
      }
    };
    run();
    const int64_t blocks = launched_blocks() - blocks_before;
    check(p, input, weight, output, bias);
    if (!is_untouched_between(result, element_size(p.dtype))) fail("written between the elements");
    if (random_.one_in(4)) {
      const std::vector<uint8_t> before = result.memory().bytes();
      result.memory().poison();
      workspace.poison();
      run();
      if (before != result.memory().bytes()) fail("a second run has other bits");
      count("repeated", true);
    }
    count_kinds(p, range, bytes, blocks, values);
  }

  void check(const ConvProblem& p, const Tensor& input, const Tensor& weight, const Tensor& output,
             const Tensor& bias) {
    Dense x = input.read(), w = weight.read(), y = output.read();
    const std::vector<Expected> expected =
        define(p, x, w, y, p.has_bias ? bias.read().values : std::vector<double>{});
    const Dense& results = p.direction == Direction::kForward         ? y
                           : p.direction == Direction::kBackwardInput ? x
                                                                      : w;
    for (size_t i = 0; i < expected.size(); ++i) {
      if (expected[i].accepts(results.values[i], p)) continue;
      char text[200];
      std::snprintf(text, sizeof text, "element %zu of %zu is %.9g instead of %.9g (of %.9g)", i,
                    expected.size(), results.values[i], expected[i].value, expected[i].magnitude);
      fail(text);
    }
  }

  void count_kinds(const ConvProblem& p, const WorkspaceRange& range, int64_t bytes, int64_t blocks,
                   Values values) {
    count("cases", true);
    count(to_string(p.direction), true);
    count(to_string(p.dtype), true);
    count("tf32", p.precision == Precision::kTf32);
    count("bias", p.has_bias);
    count("special", values == Values::kSpecial);
    count("scaled", values == Values::kScaled);
    count("no_images", p.batch() == 0);
    count("many_images", p.batch() > 8);
    count("multiplied", p.group_out_channels() > 1);
    count("dilated", p.dilation.h > 1 || p.dilation.w > 1);
    count("padding_beyond", p.padding.h >= p.kernel().h || p.padding.w >= p.kernel().w);
    count("strided", p.stride.h > 1 || p.stride.w > 1);
    const auto behind = [&](int64_t in, int64_t out, int64_t kernel, int64_t stride,
                            int64_t dilation) {
      return (out - 1) * stride + (kernel - 1) * dilation + 1 - in;
    };
    count("asymmetric", behind(p.input_size().w, p.output_size().w, p.kernel().w, p.stride.w,
                               p.dilation.w) != 2 * p.padding.w);
    count("gaps", extent(p.input) > p.input.numel() && extent(p.output) > p.output.numel());
    count("octets", p.input_size().w % 8 == 0 && p.output_size().w % 8 == 0);
    count("wide", p.output_size().w > 64);
    count("high", p.output_size().h > 64);
    count("least_workspace", bytes == range.minimum && range.wanted > range.minimum);
    count("full_workspace", bytes == range.wanted && range.wanted > range.minimum);
    count("several_blocks", blocks > 8);
  }

  Random random_;
  std::string name_;
  std::unique_ptr<Algorithm> algorithm_;
  std::map<std::string, int> coverage_;
};

}  // namespace
}  // namespace simulation

int main(int count, char** arguments) {
  if (count != 4 || !simulation::kAlgorithms.contains(arguments[1])) {
    std::fprintf(stderr, "usage: %s NAME SEED CASES\n", arguments[0]);
    return 2;
  }
  simulation::watch_pages();
  simulation::Simulation(arguments[1], unsigned(std::atoi(arguments[2])))
      .run(std::atoi(arguments[3]));
}
