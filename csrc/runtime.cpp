#include "runtime.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace convops {
namespace {

std::atomic<Runtime*> cuda_runtime{nullptr};

class TensorBuffer final : public Buffer {
 public:
  explicit TensorBuffer(Tensor tensor) : tensor_(std::move(tensor)) {}
  void* data() override { return tensor_.mutable_data_ptr(); }

 private:
  Tensor tensor_;
};

}  // namespace

std::unique_ptr<Buffer> Runtime::allocate(int64_t bytes, int index) {
  // Doubles: torch aligns every allocation further than that.
  constexpr int64_t kElement = sizeof(double);
  try {
    return std::make_unique<TensorBuffer>(
        new_tensor(Tensor4::contiguous({1, 1, 1, (bytes + kElement - 1) / kElement}),
                   DType::kFloat64, type(), index));
  } catch (const std::runtime_error&) {
    return nullptr;  // the allocator has freed its caches before it gave up
  }
}

bool has_runtime(DeviceType type) { return type == DeviceType::kCpu || cuda_runtime != nullptr; }

Runtime& runtime(DeviceType type) {
  if (type == DeviceType::kCpu) return cpu_runtime();
  if (Runtime* cuda = cuda_runtime) return *cuda;
  throw std::runtime_error(
      "conv_ops has no CUDA kernels here: libconvops_cuda is not loaded (python -m conv_ops says "
      "why)");
}

void register_cuda_runtime(Runtime* runtime) { cuda_runtime = runtime; }

}  // namespace convops
