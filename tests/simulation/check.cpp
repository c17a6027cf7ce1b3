#include "check.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>

#include "async_copies.h"
#include "block.h"
#include "copy_engine.h"
#include "cuda/algorithms.h"
#include "plans.h"

namespace simulation {
namespace {

using namespace convops::cuda;

constexpr int kNobody = -1;

// Floats with what must not be touched around them, from a multiple of 128 bytes on, or `shift`
// floats later.
class Memory {
 public:
  Memory(size_t size, int shift) : floats_(kAround + size + kAround + kAlignment), size_(size) {
    const size_t misaligned = reinterpret_cast<uintptr_t>(floats_.data()) / 4 % kAlignment;
    begin_ = floats_.data() + kAround + kAlignment - misaligned + shift;
    poison();
  }
  float* begin() { return begin_; }
  void poison() { std::ranges::fill(floats_, std::bit_cast<float>(kPoison)); }
  static bool is_poison(const float& value) { return std::bit_cast<uint32_t>(value) == kPoison; }
  bool is_untouched_around() const {
    const float* const end = floats_.data() + floats_.size();
    return std::all_of(floats_.data(), const_cast<const float*>(begin_), is_poison) &&
           std::all_of(const_cast<const float*>(begin_) + size_, end, is_poison);
  }

 private:
  static constexpr size_t kAround = 1024, kAlignment = 32;
  std::vector<float> floats_;
  size_t size_;
  float* begin_;
};

}  // namespace

void check_plan(Random& random, const Convolution& c, const GemmPlan& plan, int processors,
                int source_shift, int result_shift) {
  const size_t results = c.result.size();
  Memory source(c.source.size(), source_shift), result(results, result_shift);
  std::ranges::copy(c.source, source.begin());
  Memory weight(c.weight.size(), 0);
  std::ranges::copy(c.weight, weight.begin());
  // Whatever was there before, and all jobs marked.
  constexpr uint4 kLeftOver = {~0u, ~0u, ~0u, ~0u};
  std::vector<uint4> workspace(size_t(plan.workspace.bytes) / sizeof(uint4) + 1, kLeftOver);
  auto* const space = reinterpret_cast<uint8_t*>(workspace.data());

  // A block's results are looked at and taken away when it ends.
  std::vector<int> writer(results, kNobody);
  int block = 0;
  const auto take_results = [&] {
    for (size_t i = 0; i < results; ++i) {
      float& value = result.begin()[i];
      if (Memory::is_poison(value)) continue;
      if (value != c.result[i]) fail("a wrong result");
      if (writer[i] != kNobody) fail("a result of two blocks");
      writer[i] = block;
      value = std::bit_cast<float>(kPoison);
    }
    if (!result.is_untouched_around()) fail("written outside of the result");
    if (open_stores() > 0) fail("a block ends before its results have left");
    end_copies();
    ++block;
  };
  watch_result(result.begin(), result.begin() + results);
  use_plan(plan);
  const convops::Device device{convops::DeviceType::kCuda, 0, "simulated", 90, processors, 1, 1};
  const bool forward = c.problem.direction == convops::Direction::kForward;
  convops::Operands operands{source.begin(), weight.begin(), result.begin(),
                             c.bias.empty() ? nullptr : c.bias.data()};
  if (!forward) std::swap(operands.input, operands.output);
  // Blocks of all three kernels: those of the first and the last have no results.
  after_block(take_results);
  make_implicit_gemm()->run(c.problem, operands, {&device, nullptr, space, plan.workspace.bytes});
  const auto* const marks = space + plan.workspace.bad_jobs;
  if (std::any_of(marks, marks + plan.tile.jobs, [](uint8_t mark) { return mark != 0; }))
    fail("a job is marked bad");
  if (std::ranges::find(writer, kNobody) != writer.end()) fail("a result of no block");
  after_block([] {});

  // The last kernel: of a job that is marked it computes all results, and what else it computes is
  // right, too.
  if (processors < plan.tile.jobs) return;                          // blocks were no jobs
  const int first_block = plan.problem.rows * plan.problem.groups;  // after those that pack weights
  const int job = random.between(0, plan.tile.jobs - 1);
  GemmOperands gemm{};
  gemm.source = source.begin();
  gemm.weight = weight.begin();
  gemm.bias = c.bias.empty() ? nullptr : c.bias.data();
  gemm.result = result.begin();
  gemm.bad_jobs = space + plan.workspace.bad_jobs;
  gemm.bad_jobs[job] = 1;
  recompute_bad_jobs(plan.problem, plan.tile, gemm, random.between(1, 3), nullptr);
  for (size_t i = 0; i < results; ++i) {
    const float& value = result.begin()[i];
    if (Memory::is_poison(value) ? writer[i] == first_block + job : value != c.result[i])
      fail("a wrong or missing result of the last kernel");
  }
  if (!result.is_untouched_around()) fail("the last kernel writes outside of the result");
}

}  // namespace simulation
