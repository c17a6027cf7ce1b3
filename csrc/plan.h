// Which algorithm runs a problem: the pinned one, else the one tuning found, else the cheapest
// estimate.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "algorithm.h"
#include "runtime.h"

namespace convops::plan {

// What tuning found for a problem on a device; both in the words of the cache file.
struct TunedChoice {
  std::string device, problem, algorithm;
  std::map<std::string, double> milliseconds;  // of every algorithm that ran
};

struct Candidate {
  const Algorithm* algorithm;
  std::string reason;  // why it cannot run; empty if it can
  double predicted_seconds;
  std::optional<double> measured_seconds;
  int64_t workspace;  // bytes it will be given
  bool chosen;
};

// Runs the problem: chooses (and tunes, where that is switched on), allocates the workspace, runs
// on the current stream. `pinned` goes before the settings' algorithm. Throws std::runtime_error.
void execute(const ConvProblem& problem, const Operands& operands, DeviceType device_type,
             int device_index, const std::optional<std::string>& pinned);

// Every algorithm of the device in the list's order, with what execute would do.
std::vector<Candidate> candidates(const ConvProblem& problem, DeviceType device_type,
                                  int device_index, const std::optional<std::string>& pinned);

std::vector<TunedChoice> tuned_choices();
// Choices that name no algorithm of this build are kept but never taken.
void load_tuned_choices(const std::vector<TunedChoice>& choices);
void clear_tuned_choices();
// Called after each new measurement, outside every lock.
void set_tuned_callback(std::function<void(const TunedChoice&)> callback);

}  // namespace convops::plan
