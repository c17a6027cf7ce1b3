// What the caller has chosen: precision, algorithm, workspace limit, autotune. Each has a value for
// the process and an override for the calling thread.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "problem.h"

namespace convops::settings {

// An empty field means: not overridden in this thread.
struct Overrides {
  std::optional<Precision> precision;
  std::optional<std::string> algorithm;
  std::optional<int64_t> workspace_limit;  // bytes
  std::optional<bool> autotune;
};

// The process-wide values; an empty precision follows PyTorch, an empty algorithm lets the plan
// choose.
struct Values {
  std::optional<Precision> precision;
  std::optional<std::string> algorithm;
  int64_t workspace_limit;
  bool autotune;
};

Overrides& thread_overrides();
Values process_values();
void set_process_values(const Values& values);
// The thread's overrides over the process's values.
Values effective();

// Installs overrides in the calling thread for a scope. Backward uses it: autograd runs it on other
// threads than the one whose settings the forward saw.
class Scope {
 public:
  explicit Scope(Overrides overrides);
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  Overrides saved_;
};

// What PyTorch's own convolution setting says for float32 on CUDA. The stable ABI cannot read it,
// so the autograd library (or Python, in the fall-back) provides the reader; without one: kTf32,
// which is PyTorch's default.
void set_torch_precision_reader(Precision (*reader)());
Precision torch_precision();

}  // namespace convops::settings
