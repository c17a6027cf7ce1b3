// What the plan needs of a type of device: its description, memory, clock and algorithms. The CPU's
// is always there; libconvops_cuda adds its own when it is loaded.
#pragma once

#include <functional>
#include <memory>

#include "algorithm.h"
#include "columns.h"

namespace convops {

class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void* data() = 0;
};

struct BuildInfo {
  std::string toolkit;                     // CUDA's version
  std::vector<std::string> architectures;  // as in TORCH_CUDA_ARCH_LIST
};

class Runtime {
 public:
  virtual ~Runtime() = default;

  virtual BuildInfo build_info() const { return {}; }
  virtual const AlgorithmList& algorithms() const = 0;
  virtual const Device& device(int index) = 0;
  // The stream work of the calling thread goes to.
  virtual void* current_stream(int index) = 0;
  // Makes the device current for the calling thread until the guard goes.
  virtual std::shared_ptr<void> make_current(int index) = 0;
  // Memory from torch's allocator; nullptr when there is not enough.
  std::unique_ptr<Buffer> allocate(int64_t bytes, int index);
  // Whether timing is forbidden now (CUDA graph capture).
  virtual bool is_capturing(void* stream) = 0;
  // Seconds the work takes on the stream, which is empty before and after.
  virtual double seconds(void* stream, const std::function<void()>& work) = 0;

  // The public im2col and col2im: all rows, columns in the problem's dtype.
  virtual void im2col(const ConvProblem& problem, const void* input, const Columns& columns,
                      void* stream) = 0;
  virtual void col2im(const ConvProblem& problem, const Columns& columns, void* input,
                      void* stream) = 0;

 private:
  virtual DeviceType type() const = 0;
};

// Throws where there is none.
Runtime& runtime(DeviceType type);
bool has_runtime(DeviceType type);
void register_cuda_runtime(Runtime* runtime);
Runtime& cpu_runtime();  // cpu/runtime.cpp

}  // namespace convops
