#include "runtime.h"

#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <fstream>
#include <string>

#include "cpu/im2col.h"

namespace convops::cpu {
namespace {

// One core's fused multiply-adds (two AVX2 units at 2.5 GHz) and one socket's memory, a second:
// only the ratio of the algorithms' costs matters.
constexpr double kFlopsPerCore = 80e9;
constexpr double kBandwidth = 20e9;

std::string processor_name() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);)
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  return "CPU";
}

class CpuRuntime final : public Runtime {
 public:
  CpuRuntime() : algorithms_(make_cpu_algorithms()) {
    const int threads = int(torch::stable::get_num_threads());
    device_ = {DeviceType::kCpu,
               0,
               processor_name() + ", " + std::to_string(threads) + " threads",
               0,
               threads,
               kBandwidth,
               kFlopsPerCore * threads};
  }

  const AlgorithmList& algorithms() const override { return algorithms_; }
  const Device& device(int) override { return device_; }
  void* current_stream(int) override { return nullptr; }
  std::shared_ptr<void> make_current(int) override { return nullptr; }
  bool is_capturing(void*) override { return false; }

  double seconds(void*, const std::function<void()>& work) override {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  void im2col(const ConvProblem& problem, const void* input, const Columns& columns,
              void*) override {
    cpu::im2col(problem, input, columns, problem.dtype);
  }
  void col2im(const ConvProblem& problem, const Columns& columns, void* input, void*) override {
    const Chunk all_rows{0, problem.batch(), 0, problem.input_size().h};
    cpu::col2im(problem, columns, problem.dtype, all_rows, input);
  }

 private:
  DeviceType type() const override { return DeviceType::kCpu; }

  AlgorithmList algorithms_;
  Device device_;
};

}  // namespace
}  // namespace convops::cpu

namespace convops {

Runtime& cpu_runtime() {
  static cpu::CpuRuntime instance;
  return instance;
}

}  // namespace convops
