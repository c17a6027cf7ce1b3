// CUDA's side of the runtime; loading this library adds it.
#include "runtime.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>
#include <sstream>
#include <string>

#include "cuda/check.h"
#include "cuda/im2col.h"

namespace convops::cuda {
namespace {

constexpr int kFp32LanesPerMultiprocessor = 128;

Device describe_device(int index) {
  cudaDeviceProp properties;
  CONVOPS_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  int clock_khz, memory_clock_khz;
  CONVOPS_CUDA_CHECK(cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, index));
  CONVOPS_CUDA_CHECK(cudaDeviceGetAttribute(&memory_clock_khz, cudaDevAttrMemoryClockRate, index));
  Device device;
  device.type = DeviceType::kCuda;
  device.index = index;
  device.name = properties.name;
  device.compute_capability = properties.major * 10 + properties.minor;
  device.processors = properties.multiProcessorCount;
  // Two transfers a memory clock.
  device.bandwidth = 2.0 * memory_clock_khz * 1e3 * properties.memoryBusWidth / 8;
  device.fp32_flops = 2.0 * kFp32LanesPerMultiprocessor * device.processors * clock_khz * 1e3;
  return device;
}

// A timing event, destroyed with its scope.
class Event {
 public:
  Event() { CONVOPS_CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_;
};

class CudaRuntime final : public Runtime {
 public:
  CudaRuntime() : algorithms_(make_cuda_algorithms()) {}

  BuildInfo build_info() const override {
    BuildInfo info{CONVOPS_CUDA_VERSION, {}};
    std::istringstream list(CONVOPS_CUDA_ARCHITECTURES);
    for (std::string name; std::getline(list, name, ';');) info.architectures.push_back(name);
    return info;
  }

  const AlgorithmList& algorithms() const override { return algorithms_; }

  const Device& device(int index) override {
    std::lock_guard lock(mutex_);
    const auto found = devices_.find(index);
    if (found != devices_.end()) return found->second;
    return devices_.emplace(index, describe_device(index)).first->second;
  }

  void* current_stream(int index) override {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return stream;
  }

  std::shared_ptr<void> make_current(int index) override {
    auto guard = std::make_shared<torch::stable::accelerator::DeviceGuard>(index);
    // The guard leaves the driver alone where the device is current already; on a fresh thread (of
    // autograd) there is no context yet then, and cuBLAS complains.
    CONVOPS_CUDA_CHECK(cudaSetDevice(index));
    return guard;
  }

  bool is_capturing(void* stream) override {
    cudaStreamCaptureStatus status;
    CONVOPS_CUDA_CHECK(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
    return status != cudaStreamCaptureStatusNone;
  }

  double seconds(void* stream, const std::function<void()>& work) override {
    const auto s = static_cast<cudaStream_t>(stream);
    const Event start, stop;
    CONVOPS_CUDA_CHECK(cudaStreamSynchronize(s));
    CONVOPS_CUDA_CHECK(cudaEventRecord(start, s));
    work();
    CONVOPS_CUDA_CHECK(cudaEventRecord(stop, s));
    CONVOPS_CUDA_CHECK(cudaEventSynchronize(stop));
    float milliseconds;
    CONVOPS_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
    return milliseconds * 1e-3;
  }

  void im2col(const ConvProblem& problem, const void* input, const Columns& columns,
              void* stream) override {
    cuda::im2col(problem, input, columns, stream);
  }

  void col2im(const ConvProblem& problem, const Columns& columns, void* input,
              void* stream) override {
    const Chunk all_rows{0, problem.batch(), 0, problem.input_size().h};
    cuda::col2im(problem, columns, problem.dtype, all_rows, input, stream);
  }

 private:
  DeviceType type() const override { return DeviceType::kCuda; }

  AlgorithmList algorithms_;
  std::mutex mutex_;
  std::map<int, Device> devices_;
};

[[maybe_unused]] const bool registered = [] {
  static CudaRuntime runtime;
  register_cuda_runtime(&runtime);
  return true;
}();

}  // namespace
}  // namespace convops::cuda
