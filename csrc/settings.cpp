#include "settings.h"

#include <atomic>
#include <mutex>
#include <utility>

namespace convops::settings {
namespace {

constexpr int64_t kDefaultWorkspaceLimit = int64_t{1} << 30;

std::mutex mutex;
Values values{std::nullopt, std::nullopt, kDefaultWorkspaceLimit, false};
std::atomic<Precision (*)()> precision_reader{nullptr};

}  // namespace

Overrides& thread_overrides() {
  thread_local Overrides overrides;
  return overrides;
}

Values process_values() {
  std::lock_guard lock(mutex);
  return values;
}

void set_process_values(const Values& new_values) {
  std::lock_guard lock(mutex);
  values = new_values;
}

Values effective() {
  Values result = process_values();
  const Overrides& thread = thread_overrides();
  if (thread.precision) result.precision = thread.precision;
  if (thread.algorithm) result.algorithm = thread.algorithm;
  if (thread.workspace_limit) result.workspace_limit = *thread.workspace_limit;
  if (thread.autotune) result.autotune = *thread.autotune;
  return result;
}

Scope::Scope(Overrides overrides)
    : saved_(std::exchange(thread_overrides(), std::move(overrides))) {}

Scope::~Scope() { thread_overrides() = std::move(saved_); }

void set_torch_precision_reader(Precision (*reader)()) { precision_reader = reader; }

Precision torch_precision() {
  Precision (*reader)() = precision_reader;
  return reader ? reader() : Precision::kTf32;
}

}  // namespace convops::settings
