#include "check.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "async_copies.h"
#include "block.h"
#include "copy_engine.h"
#include "cuda/algorithms.h"
#include "definition.h"
#include "plans.h"

namespace simulation {
namespace {

using namespace convops::cuda;

constexpr int kNobody = -1;

// Elements with what must not be touched around them, from a multiple of 128 bytes on, or `shift`
// elements later.
class Memory {
 public:
  Memory(convops::DType dtype, size_t size, int shift)
      : dtype_(dtype),
        bytes_(size_t(convops::element_size(dtype))),
        words_((kAround + size * bytes_ + kAround + kAlignment) / sizeof(uint32_t), kPoison),
        size_(size) {
    auto* const memory = reinterpret_cast<uint8_t*>(words_.data());
    const size_t misaligned = reinterpret_cast<uintptr_t>(memory) % kAlignment;
    first_ = kAround + kAlignment - misaligned + size_t(shift) * bytes_;
    begin_ = memory + first_;
  }
  Memory(convops::DType dtype, const std::vector<float>& values, int shift)
      : Memory(dtype, values.size(), shift) {
    for (size_t i = 0; i < values.size(); ++i)
      write_element(dtype_, begin_, int64_t(i), double(values[i]));
  }
  void* begin() { return begin_; }
  void* end() { return begin_ + size_ * bytes_; }
  float operator[](size_t i) const { return float(read_element(dtype_, begin_, int64_t(i))); }
  bool is_poison(size_t i) const { return std::memcmp(begin_ + i * bytes_, &kPoison, bytes_) == 0; }
  void poison(size_t i) { std::memcpy(begin_ + i * bytes_, &kPoison, bytes_); }
  bool is_untouched_around() const {
    const auto* const memory = reinterpret_cast<const uint8_t*>(words_.data());
    for (size_t i = 0; i < words_.size() * sizeof(uint32_t); i += bytes_)
      if ((i < first_ || i >= first_ + size_ * bytes_) &&
          std::memcmp(memory + i, &kPoison, bytes_) != 0)
        return false;
    return true;
  }

 private:
  static constexpr size_t kAround = 4096, kAlignment = 128;
  convops::DType dtype_;
  size_t bytes_;
  std::vector<uint32_t> words_;
  size_t size_, first_;
  uint8_t* begin_;
};

// All results are whole numbers, or NaN or infinite. Weights in parts are some 2^-22 larger than
// they are, by what the tensor cores' sums lose (mean_loss).
bool is_right(float result, float expected) {
  constexpr float kMost = 0.125f;
  return result == expected || std::abs(result - expected) < kMost ||
         (std::isnan(result) && std::isnan(expected));
}

// What an algorithm reads and writes.
convops::Operands operands_of(const Convolution& c, Memory& source, Memory& weight, Memory& bias,
                              Memory& result) {
  convops::Operands operands{source.begin(), weight.begin(), result.begin(),
                             c.bias.empty() ? nullptr : bias.begin()};
  if (c.problem.direction != convops::Direction::kForward)
    std::swap(operands.input, operands.output);
  return operands;
}

}  // namespace

void check_plan(Random& random, const Convolution& c, const GemmPlan& plan, int processors,
                int source_shift, int result_shift) {
  const size_t results = c.result.size();
  const convops::DType dtype = c.problem.dtype;
  Memory source(dtype, c.source, source_shift), result(dtype, results, result_shift);
  Memory weight(dtype, c.weight, 0), bias(dtype, c.bias, 0);
  // Whatever was there before, and all jobs marked.
  constexpr uint4 kLeftOver = {~0u, ~0u, ~0u, ~0u};
  std::vector<uint4> workspace(size_t(plan.workspace.bytes) / sizeof(uint4) + 1, kLeftOver);
  auto* const space = reinterpret_cast<uint8_t*>(workspace.data());

  // A block's results are looked at and taken away when it ends.
  std::vector<int> writer(results, kNobody);
  int block = 0;
  const auto take_results = [&] {
    for (size_t i = 0; i < results; ++i) {
      if (result.is_poison(i)) continue;
      if (!is_right(result[i], c.result[i])) fail("a wrong result");
      if (writer[i] != kNobody) fail("a result of two blocks");
      writer[i] = block;
      result.poison(i);
    }
    if (!result.is_untouched_around()) fail("written outside of the result");
    if (open_stores() > 0) fail("a block ends before its results have left");
    end_copies();
    ++block;
  };
  watch_result(result.begin(), result.end(), int(convops::element_size(dtype)));
  use_plan(plan);
  const convops::Device device{convops::DeviceType::kCuda, 0, "simulated", 90, processors, 1, 1};
  const convops::Operands operands = operands_of(c, source, weight, bias, result);
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
  gemm.bias = c.bias.empty() ? nullptr : bias.begin();
  gemm.result = result.begin();
  gemm.bad_jobs = space + plan.workspace.bad_jobs;
  gemm.bad_jobs[job] = 1;
  recompute_bad_jobs(plan.problem, plan.tile, gemm, random.between(1, 3), nullptr);
  for (size_t i = 0; i < results; ++i) {
    if (result.is_poison(i) ? writer[i] == first_block + job : !is_right(result[i], c.result[i]))
      fail("a wrong or missing result of the last kernel");
  }
  if (!result.is_untouched_around()) fail("the last kernel writes outside of the result");
}

void check_special(Random& random, const Convolution& plain, const GemmPlan& plan, int processors) {
  Convolution c = plain;
  constexpr float kSpecial[] = {INFINITY, -INFINITY, NAN};
  for (int i = random.between(1, 3); i > 0; --i)
    c.source[size_t(random.between(0, int(c.source.size()) - 1))] = kSpecial[random.between(0, 2)];
  c.result = by_definition(c);
  const convops::DType dtype = c.problem.dtype;
  Memory source(dtype, c.source, 0), result(dtype, c.result.size(), 0);
  Memory weight(dtype, c.weight, 0), bias(dtype, c.bias, 0);
  std::vector<uint4> workspace(size_t(plan.workspace.bytes) / sizeof(uint4) + 1);
  watch_result(result.begin(), result.end(), int(convops::element_size(dtype)));
  use_plan(plan);
  after_block(end_copies);
  const convops::Device device{convops::DeviceType::kCuda, 0, "simulated", 90, processors, 1, 1};
  make_implicit_gemm()->run(c.problem, operands_of(c, source, weight, bias, result),
                            {&device, nullptr, workspace.data(), plan.workspace.bytes});
  for (size_t i = 0; i < c.result.size(); ++i)
    if (!is_right(result[i], c.result[i])) fail("a result of Inf or NaN is wrong");
}

}  // namespace simulation
