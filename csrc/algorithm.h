// The interface of an algorithm. Whether it can run, what it would cost and how it runs are apart,
// so that the plan chooses without knowing any kernel.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "problem.h"

namespace convops {

// What choosing needs to know of a machine; rates are of the kernels a problem can hope for.
struct Device {
  DeviceType type;
  int index;
  std::string name;        // part of the key of tuned choices
  int compute_capability;  // 90 for sm_90; 0 on the CPU
  int processors;          // multiprocessors, or threads of the CPU
  double bandwidth;        // bytes a second
  double fp32_flops;       // fused multiply-adds counted as two, a second
};

// The three tensors of a problem; the one `problem.direction` computes is written, the others read.
struct Operands {
  void* input;
  void* weight;
  void* output;
  const void* bias;  // nullptr without
};

// Where a run happens.
struct Execution {
  const Device* device;
  void* stream;  // cudaStream_t; nullptr on the CPU
  void* workspace;
  int64_t workspace_bytes;
};

struct WorkspaceRange {
  int64_t minimum;  // below it the algorithm cannot run
  int64_t wanted;   // above it more does not help
};

class Algorithm {
 public:
  virtual ~Algorithm() = default;

  virtual std::string name() const = 0;
  virtual DeviceType device_type() const = 0;
  // Why it cannot run the problem; empty if it can.
  virtual std::string can_run(const ConvProblem& problem, const Device& device) const = 0;
  // Estimated seconds. Only asked when it can run.
  virtual double cost(const ConvProblem& problem, const Device& device) const = 0;
  virtual WorkspaceRange workspace(const ConvProblem& problem, const Device& device) const = 0;
  virtual void run(const ConvProblem& problem, const Operands& operands,
                   const Execution& execution) const = 0;
};

using AlgorithmList = std::vector<std::unique_ptr<Algorithm>>;

// The one ordered list of all algorithms of the CPU (algorithms.cpp) and of CUDA
// (cuda/algorithms.cpp, there once libconvops_cuda is loaded).
AlgorithmList make_cpu_algorithms();
AlgorithmList make_cuda_algorithms();

}  // namespace convops
