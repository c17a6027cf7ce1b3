// implicit_gemm: dense convolution of float32, float16 and bfloat16 tensors on Hopper's tensor
// cores, forward and backward-input, straight from and to NCHW (or any strides): no columns, no
// layout copies. Three kernels: implicit_gemm_pack_sm90.cu packs the weights, implicit_gemm_sm90.cu
// multiplies, implicit_gemm_exact_sm90.cu computes again what fp16 could not hold.
// docs/implicit_gemm.md tells how and how fast.
#include "cuda/implicit_gemm.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "cuda/algorithms.h"

namespace convops::cuda {
namespace {

// Planning takes a millisecond or two, so plans are kept; emptied when full.
constexpr size_t kMaximumCachedPlans = 4096;

constexpr uintptr_t kBulkAlignment = 16;

class ImplicitGemm final : public Algorithm {
 public:
  std::string name() const override { return "implicit_gemm"; }
  DeviceType device_type() const override { return DeviceType::kCuda; }

  std::string can_run(const ConvProblem& p, const Device& device) const override {
    if (device.compute_capability != 90) return "made for compute capability 9.0 (Hopper)";
    if (p.dtype == DType::kFloat64) return "no float64";
    if (p.direction == Direction::kBackwardWeight) return "no backward-weight";
    if (p.batch() == 0 || p.taps() == 0) return "nothing to sum";
    if (p.is_depthwise()) return "depthwise: no sum over channels";
    return plan(p, device)->reason;
  }

  double cost(const ConvProblem& p, const Device& device) const override {
    return plan(p, device)->seconds;
  }

  WorkspaceRange workspace(const ConvProblem& p, const Device& device) const override {
    const int64_t bytes = plan(p, device)->workspace.bytes;
    return {bytes, bytes};
  }

  void run(const ConvProblem& p, const Operands& operands,
           const Execution& execution) const override {
    const std::shared_ptr<const GemmPlan> plan = this->plan(p, *execution.device);
    const bool forward = p.direction == Direction::kForward;
    auto* const workspace = static_cast<uint8_t*>(execution.workspace);
    GemmOperands gemm{
        forward ? operands.input : operands.output,
        operands.weight,
        operands.bias,
        forward ? operands.output : operands.input,
        workspace + plan->workspace.packed_weights,
        reinterpret_cast<float*>(workspace + plan->workspace.row_scales),
        workspace + plan->workspace.bad_jobs,
        {},
        {},
    };
    GemmProblem problem = plan->problem;
    GemmTile tile = plan->tile;
    if (reinterpret_cast<uintptr_t>(gemm.source) % kBulkAlignment != 0)
      copy_by_elements(problem, tile);
    const auto result_address = reinterpret_cast<uintptr_t>(gemm.result);
    tile.across &= result_address % kBulkAlignment == 0;
    tile.paired &= result_address % (2 * problem.element_bytes) == 0;
    if (tile.boxed && result_address % kBulkAlignment != 0) store_lines(tile);
    if (tile.bulk) make_source_maps(problem, tile, gemm.source, gemm.source_maps);
    if (tile.direct) make_cell_maps(problem, tile, gemm.source, gemm.source_maps);
    if (tile.across) gemm.result_maps[0] = make_result_cells_map(problem, tile, gemm.result);
    if (tile.boxed) make_result_maps(problem, tile, gemm.result, gemm.result_maps);
    const int processors = execution.device->processors;
    pack_weights(problem, tile, gemm, execution.stream);
    const auto multiply = p.dtype == DType::kFloat32   ? multiply_float
                          : p.dtype == DType::kFloat16 ? multiply_half
                                                       : multiply_bfloat16;
    multiply(problem, tile, gemm, processors, execution.stream);
    recompute_bad_jobs(problem, tile, gemm, processors, execution.stream);
  }

 private:
  std::shared_ptr<const GemmPlan> plan(const ConvProblem& p, const Device& device) const {
    std::lock_guard lock(mutex_);
    const auto found = plans_.find(p);
    if (found != plans_.end() && found->second.first == device.processors)
      return found->second.second;
    if (plans_.size() >= kMaximumCachedPlans) plans_.clear();
    auto made = std::make_shared<const GemmPlan>(plan_gemm(p, device));
    plans_[p] = {device.processors, made};
    return made;
  }

  mutable std::mutex mutex_;
  mutable std::unordered_map<ConvProblem, std::pair<int, std::shared_ptr<const GemmPlan>>,
                             ConvProblemHash>
      plans_;
};

}  // namespace

std::unique_ptr<Algorithm> make_implicit_gemm() { return std::make_unique<ImplicitGemm>(); }

}  // namespace convops::cuda
