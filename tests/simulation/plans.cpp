// The planner's own functions make the tiles, and use_plan takes the place of its choice: so it is
// included here, its choice by another name.
#define plan_gemm plan_fastest_gemm
#include "cuda/implicit_gemm_plan.cpp"
#undef plan_gemm

#include <sstream>

#include "plans.h"

namespace simulation {
namespace {

using namespace convops::cuda;

constexpr double kMostSteps = 500;  // of all jobs
constexpr int kMostJobs = 60;

GemmPlan used;

}  // namespace

std::optional<GemmPlan> random_plan(Random& random, const Convolution& convolution,
                                    int processors) {
  GemmPlan plan{};
  GemmProblem& g = plan.problem;
  GemmTile& t = plan.tile;
  const auto coin = [&] { return random.one_in(2); };
  const auto block = [&] { return random.one_in(3) ? 1 << random.between(1, 2) : 1; };
  const CellChoice cells{block(),          block(), random.between(1, 2), !random.one_in(4), coin(),
                         random.one_in(3), coin()};
  if (!describe_cells(convolution.problem, cells, g)) return {};
  const auto all = gemm_shapes(g.element_bytes);
  const GemmShape shape = all[size_t(random.between(0, int(all.size()) - 1))];
  const std::vector<int> parts = row_parts(g, shape.columns);
  const int most =
      cells.octets == 1 ? 1 : std::min(kMaxStageSums / g.block_sums, 2 * g.sum_blocks - 1);
  int depth = 1;
  while (depth * 2 <= most && coin()) depth *= 2;
  const TileChoice choice{
      coin() && g.class_rows > 64 ? 128 : 64, shape,
      random.one_in(3) ? parts.front() : parts[random.between(0, int(parts.size()) - 1)], depth,
      coin()};
  if (!make_tile(g, choice, can_copy_bulk(g), t)) return {};
  if (!t.bulk && !t.by_octets && !random.one_in(8)) return {};  // else there were few of the others
  if (coin()) t.resident_bytes = resident_bytes(g, t, processors);
  if (!choose_stages(t)) return {};
  const double steps = double(packed_steps(g, t)) / t.units * t.jobs * g.products;
  if (steps > kMostSteps || t.jobs > kMostJobs) return {};
  finish_plan(plan);
  return plan;
}

void use_plan(const GemmPlan& plan) { used = plan; }

std::string to_text(const GemmPlan& plan) {
  const GemmProblem& g = plan.problem;
  const GemmTile& t = plan.tile;
  std::ostringstream text;
  text << "cells of " << g.h.block << "x" << g.w.block << " results, " << g.h.phases << "x"
       << g.w.phases << " sources, origins " << g.h.source_origin << " " << g.w.source_origin << " "
       << g.h.result_origin << " " << g.w.result_origin << ", classes " << g.row_classes << " "
       << g.sum_classes << ", octets " << g.octets << "; tile of " << t.row_tile << " rows, "
       << t.columns << " columns: " << t.width << " by " << t.height << ", step " << t.step
       << ", pitch " << t.pitch << ", depth " << t.depth << ", jobs " << t.jobs
       << (t.straddles ? ", straddles" : "") << (t.bulk ? ", bulk by run " : ", by cells ") << t.run
       << ", kinds " << (1 << t.source_kinds_log) << " " << (1 << t.row_kinds_log) << " "
       << (1 << g.channel_kinds_log) << (t.boxed ? ", boxed" : "")
       << (t.neighbours ? "" : ", apart") << (t.has_gaps() ? ", gaps" : "")
       << (t.paired ? ", paired" : "") << ", overlap " << t.overlap;
  return text.str();
}

}  // namespace simulation

namespace convops::cuda {

GemmPlan plan_gemm(const ConvProblem&, const Device&) { return simulation::used; }

}  // namespace convops::cuda
