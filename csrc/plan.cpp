#include "plan.h"

#include <algorithm>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <unordered_map>

#include "settings.h"

namespace convops::plan {
namespace {

// A choice takes a microsecond, a look-up a tenth of it. The cache is emptied when full: programs
// with so many shapes gain nothing from it.
constexpr size_t kMaximumCachedChoices = 4096;
// A candidate this much slower than the best so far is not timed again.
constexpr double kHopeless = 3.0;
constexpr int kTimedRuns = 3;

struct Choice {
  const Algorithm* algorithm;
  WorkspaceRange workspace;
};

struct Key {
  ConvProblem problem;
  DeviceType device_type;
  int device_index;
  int64_t limit;

  bool operator==(const Key& other) const {
    return device_type == other.device_type && device_index == other.device_index &&
           limit == other.limit && problem == other.problem;
  }
};

struct KeyHash {
  size_t operator()(const Key& key) const {
    return ConvProblemHash()(key.problem) ^ size_t(key.device_index) ^ size_t(key.limit) << 1;
  }
};

std::shared_mutex mutex;  // guards all below
std::unordered_map<Key, Choice, KeyHash> cached_choices;
std::map<std::pair<std::string, std::string>, TunedChoice> tuned;  // by device and problem
std::function<void(const TunedChoice&)> tuned_callback;

std::string refusal(const Algorithm& algorithm, const ConvProblem& problem, const Device& device,
                    int64_t limit) {
  std::string reason = algorithm.can_run(problem, device);
  if (reason.empty()) {
    const int64_t minimum = algorithm.workspace(problem, device).minimum;
    if (minimum > limit)
      reason = "needs " + std::to_string(minimum) + " bytes of workspace, the limit is " +
               std::to_string(limit);
  }
  return reason;
}

const Algorithm* find(const AlgorithmList& list, const std::string& name) {
  const auto found = std::find_if(list.begin(), list.end(),
                                  [&](const auto& algorithm) { return algorithm->name() == name; });
  return found == list.end() ? nullptr : found->get();
}

const Algorithm& pinned_algorithm(const AlgorithmList& list, const std::string& name,
                                  const ConvProblem& problem, const Device& device, int64_t limit) {
  const Algorithm* algorithm = find(list, name);
  if (!algorithm) {
    std::string names;
    for (const auto& known : list) names += (names.empty() ? "'" : ", '") + known->name() + "'";
    throw std::runtime_error("conv_ops has no algorithm '" + name + "' for " +
                             to_string(device.type) + ", expected one of " + names);
  }
  const std::string reason = refusal(*algorithm, problem, device, limit);
  if (!reason.empty())
    throw std::runtime_error("conv_ops algorithm '" + name + "' cannot run " + to_string(problem) +
                             ": " + reason);
  return *algorithm;
}

std::optional<TunedChoice> tuned_choice(const ConvProblem& problem, const Device& device) {
  std::shared_lock lock(mutex);
  if (tuned.empty()) return std::nullopt;
  const auto found = tuned.find({device.name, to_string(problem)});
  if (found == tuned.end()) return std::nullopt;
  return found->second;
}

// The tuned choice if it can run here, else the cheapest by estimate.
const Algorithm& unpinned_algorithm(const AlgorithmList& list, const ConvProblem& problem,
                                    const Device& device, int64_t limit) {
  if (const auto known = tuned_choice(problem, device)) {
    const Algorithm* algorithm = find(list, known->algorithm);
    if (algorithm && refusal(*algorithm, problem, device, limit).empty()) return *algorithm;
  }
  const Algorithm* best = nullptr;
  double best_cost = 0;
  std::string reasons;
  for (const auto& algorithm : list) {
    const std::string reason = refusal(*algorithm, problem, device, limit);
    if (!reason.empty()) {
      reasons += "; " + algorithm->name() + ": " + reason;
      continue;
    }
    const double cost = algorithm->cost(problem, device);
    if (!best || cost < best_cost) {
      best = algorithm.get();
      best_cost = cost;
    }
  }
  if (!best)
    throw std::runtime_error("conv_ops has no algorithm that can run " + to_string(problem) +
                             reasons);
  return *best;
}

Choice choose(const AlgorithmList& list, const ConvProblem& problem, const Device& device,
              int64_t limit, const std::optional<std::string>& pinned) {
  if (pinned) {
    const Algorithm& algorithm = pinned_algorithm(list, *pinned, problem, device, limit);
    return {&algorithm, algorithm.workspace(problem, device)};
  }
  const Key key{problem, device.type, device.index, limit};
  {
    std::shared_lock lock(mutex);
    const auto found = cached_choices.find(key);
    if (found != cached_choices.end()) return found->second;
  }
  const Algorithm& algorithm = unpinned_algorithm(list, problem, device, limit);
  const Choice choice{&algorithm, algorithm.workspace(problem, device)};
  std::unique_lock lock(mutex);
  if (cached_choices.size() >= kMaximumCachedChoices) cached_choices.clear();
  return cached_choices.emplace(key, choice).first->second;
}

// Allocates and runs. Where memory is short the workspace is halved down to what the algorithm
// needs at least; false when even that is not to be had.
bool run(const Choice& choice, const ConvProblem& problem, const Operands& operands,
         Runtime& runtime, const Device& device, void* stream, int64_t limit) {
  int64_t bytes = std::min(choice.workspace.wanted, limit);
  std::unique_ptr<Buffer> buffer;
  while (bytes > 0 && !(buffer = runtime.allocate(bytes, device.index))) {
    if (bytes == choice.workspace.minimum) return false;
    bytes = std::max(choice.workspace.minimum, bytes / 2);
  }
  choice.algorithm->run(problem, operands,
                        {&device, stream, buffer ? buffer->data() : nullptr, bytes});
  return true;
}

// Times every algorithm that can run; the result tensor is overwritten by each.
void tune(const AlgorithmList& list, const ConvProblem& problem, const Operands& operands,
          Runtime& runtime, const Device& device, void* stream, int64_t limit) {
  TunedChoice choice{device.name, to_string(problem), "", {}};
  double best = 0;
  for (const auto& algorithm : list) {
    if (!refusal(*algorithm, problem, device, limit).empty()) continue;
    bool ran = true;
    const Choice candidate{algorithm.get(), algorithm->workspace(problem, device)};
    const auto once = [&] {
      ran = run(candidate, problem, operands, runtime, device, stream, limit);
    };
    double fastest = runtime.seconds(stream, once);  // warm-up
    if (!ran) continue;
    if (choice.algorithm.empty() || fastest < kHopeless * best)
      for (int i = 0; i < kTimedRuns; ++i)
        fastest = std::min(fastest, runtime.seconds(stream, once));
    choice.milliseconds[algorithm->name()] = fastest * 1e3;
    if (choice.algorithm.empty() || fastest < best) {
      choice.algorithm = algorithm->name();
      best = fastest;
    }
  }
  if (choice.algorithm.empty()) return;
  std::function<void(const TunedChoice&)> callback;
  {
    std::unique_lock lock(mutex);
    tuned[{choice.device, choice.problem}] = choice;
    cached_choices.clear();
    callback = tuned_callback;
  }
  if (callback) callback(choice);
}

}  // namespace

void execute(const ConvProblem& problem, const Operands& operands, DeviceType device_type,
             int device_index, const std::optional<std::string>& pinned) {
  Runtime& runtime = convops::runtime(device_type);
  const Device& device = runtime.device(device_index);
  const AlgorithmList& list = runtime.algorithms();
  const settings::Values values = settings::effective();
  const auto guard = runtime.make_current(device_index);
  void* stream = runtime.current_stream(device_index);
  const std::optional<std::string>& name = pinned ? pinned : values.algorithm;
  const int64_t limit = values.workspace_limit;

  if (values.autotune && !name && !runtime.is_capturing(stream) && !tuned_choice(problem, device))
    tune(list, problem, operands, runtime, device, stream, limit);

  Choice choice = choose(list, problem, device, limit, name);
  if (run(choice, problem, operands, runtime, device, stream, limit)) return;
  if (!name) {  // out of memory: whatever needs least
    for (const auto& algorithm : list) {
      if (!refusal(*algorithm, problem, device, limit).empty()) continue;
      const WorkspaceRange workspace = algorithm->workspace(problem, device);
      if (workspace.minimum < choice.workspace.minimum)
        choice = {algorithm.get(), {workspace.minimum, workspace.minimum}};
    }
    if (run(choice, problem, operands, runtime, device, stream, limit)) return;
  }
  throw std::runtime_error(std::string(device_type == DeviceType::kCuda ? "CUDA" : "CPU") +
                           " out of memory. Tried to allocate " +
                           std::to_string(choice.workspace.minimum) + " bytes of workspace for " +
                           choice.algorithm->name() + " on " + to_string(problem));
}

std::vector<Candidate> candidates(const ConvProblem& problem, DeviceType device_type,
                                  int device_index, const std::optional<std::string>& pinned) {
  Runtime& runtime = convops::runtime(device_type);
  const Device& device = runtime.device(device_index);
  const settings::Values values = settings::effective();
  const int64_t limit = values.workspace_limit;
  const std::optional<std::string>& name = pinned ? pinned : values.algorithm;
  const auto known = tuned_choice(problem, device);

  std::vector<Candidate> result;
  for (const auto& algorithm : runtime.algorithms()) {
    Candidate candidate{
        algorithm.get(), refusal(*algorithm, problem, device, limit), 0, {}, 0, false};
    if (candidate.reason.empty()) {
      candidate.predicted_seconds = algorithm->cost(problem, device);
      candidate.workspace = std::min(algorithm->workspace(problem, device).wanted, limit);
    }
    if (known)
      if (const auto time = known->milliseconds.find(algorithm->name());
          time != known->milliseconds.end())
        candidate.measured_seconds = time->second * 1e-3;
    result.push_back(std::move(candidate));
  }
  for (Candidate& candidate : result) {
    if (!candidate.reason.empty()) continue;
    // A pinned algorithm that cannot run leaves none chosen: its reason is in its row.
    candidate.chosen =
        name ? candidate.algorithm->name() == *name
             : candidate.algorithm ==
                   choose(runtime.algorithms(), problem, device, limit, name).algorithm;
  }
  return result;
}

std::vector<TunedChoice> tuned_choices() {
  std::shared_lock lock(mutex);
  std::vector<TunedChoice> result;
  for (const auto& [key, choice] : tuned) result.push_back(choice);
  return result;
}

void load_tuned_choices(const std::vector<TunedChoice>& choices) {
  std::unique_lock lock(mutex);
  for (const TunedChoice& choice : choices) tuned[{choice.device, choice.problem}] = choice;
  cached_choices.clear();
}

void clear_tuned_choices() {
  std::unique_lock lock(mutex);
  tuned.clear();
  cached_choices.clear();
}

void set_tuned_callback(std::function<void(const TunedChoice&)> callback) {
  std::unique_lock lock(mutex);
  tuned_callback = std::move(callback);
}

}  // namespace convops::plan
