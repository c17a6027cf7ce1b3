// Simulates implicit_gemm on random convolutions and plans:
//
//   simulate THEME SEED PLANS    prints how many plans of each kind there were
//
// The first thing that is wrong ends it, with the convolution and the plan.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>

#include "block.h"
#include "check.h"
#include "convolution.h"
#include "plans.h"

namespace simulation {
namespace {

using namespace convops::cuda;

using Coverage = std::map<std::string, int>;

void count_kinds(Coverage& coverage, const Convolution& c, const GemmPlan& plan, bool source_moved,
                 bool result_moved) {
  const GemmProblem& g = plan.problem;
  const GemmTile& t = plan.tile;
  const bool bulk = t.bulk && !source_moved, boxed = t.boxed && !result_moved;
  const bool snug_source = g.h.source_origin + g.w.source_origin > 0;
  const bool snug_result = g.h.result_origin + g.w.result_origin > 0;
  const auto count = [&](const std::string& kind, bool is) { coverage[kind] += is; };
  count("plans", true);
  count("jobs", false);
  coverage["jobs"] += t.jobs;
  count("forward", c.problem.direction == convops::Direction::kForward);
  count("backward", c.problem.direction == convops::Direction::kBackwardInput);
  count("three_products", g.products == 3);
  count("float16", g.dtype == convops::DType::kFloat16);
  count("bfloat16", g.dtype == convops::DType::kBFloat16);
  count("halves_bulk", g.is_half() && bulk);
  count("halves_by_cells", g.is_half() && !bulk);
  count("halves_octets_apart", g.is_half() && bulk && t.octets_apart);
  count("halves_boxed", g.is_half() && boxed);
  count("halves_by_octets", t.by_octets && !source_moved);
  count("halves_direct", t.direct && !source_moved);
  count("halves_across", t.across && !result_moved);
  count("groups", g.groups > 1);
  count("row_classes", g.row_classes > 1);
  count("sum_classes", g.sum_classes > 1);
  count("two_taps", g.octets == 1);
  count("deep", t.depth > 1);
  count("resident", t.resident_bytes > 0);
  count("rows_128", t.row_tile == 128);
  count((g.is_half() ? "halves_" : "columns_") + std::to_string(t.columns), true);
  count("four_consumers", t.consumers == 4);
  count("snug", snug_source || snug_result);
  count("by_cells", !bulk);
  for (const int run : {0, 1, 2, 4}) count("bulk_run_" + std::to_string(run), bulk && t.run == run);
  count("bulk_snug", bulk && snug_source);
  count("source_kinds", bulk && t.source_kinds_log > 0);
  count("source_moved", source_moved && t.bulk);
  count("straddling", t.straddles);
  count("cut_rows", t.tiles_w > 1);
  count("overlap", t.tiles_w > 1 && t.width > t.step);
  count("boxed", boxed);
  count("boxed_gaps", boxed && t.has_gaps());
  count("boxed_edges", boxed && t.has_edges);
  count("boxed_kinds", boxed && t.row_kinds_log + g.channel_kinds_log > 0);
  count("boxed_snug", boxed && snug_result);
  count("boxed_snug_cut", boxed && g.w.result_origin > 0 && t.tiles_w > 1);
  count("lines", t.neighbours && !boxed);
  count("lines_joined", !boxed && t.joined);
  count("lines_joined_straddling", !boxed && t.joined && t.straddles);
  count("lines_snug", t.neighbours && !boxed && snug_result);
  count("lines_snug_cut", t.neighbours && !boxed && g.w.result_origin > 0 && t.tiles_w > 1);
  count("apart", !t.neighbours);
  count("result_moved", result_moved && t.boxed);
  count("woven", t.woven_log > 0);
  count("paired", t.paired && !result_moved);
}

void simulate(const std::string& theme, unsigned seed, int plans) {
  constexpr int kTries = 40, kPlans = 3;  // for a convolution
  Random random(seed);
  Coverage coverage;
  while (coverage["plans"] < plans) {
    const Convolution convolution = random_convolution(random, theme);
    ++coverage["convolutions"];
    for (int tries = 0, done = 0; tries < kTries && done < kPlans; ++tries) {
      const int processors = random.one_in(3) ? random.between(1, 4) : 1000;
      const auto plan = random_plan(random, convolution, processors);
      if (!plan) continue;
      const int source_shift = random.one_in(8) ? random.between(1, 3) : 0;
      const int result_shift = random.one_in(8) ? random.between(1, 3) : 0;
      describe((convolution.text + "\n  " + to_text(*plan) + ", processors " +
                std::to_string(processors) + ", moved by " + std::to_string(source_shift) + " " +
                std::to_string(result_shift))
                   .c_str());
      try {
        check_plan(random, convolution, *plan, processors, source_shift, result_shift);
        const bool special = plan->problem.is_half() && random.one_in(4);
        coverage["special"] += special;
        if (special) check_special(random, convolution, *plan, processors);
      } catch (const std::exception& error) {
        fail(error.what());
      }
      count_kinds(coverage, convolution, *plan, source_shift > 0, result_shift > 0);
      ++done;
    }
  }
  for (const auto& [kind, count] : coverage) std::printf("%s %d\n", kind.c_str(), count);
}

}  // namespace
}  // namespace simulation

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s THEME SEED PLANS\n", arguments[0]);
    return 2;
  }
  simulation::simulate(arguments[1], unsigned(std::atoi(arguments[2])), std::atoi(arguments[3]));
}
