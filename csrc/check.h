// Refusals with the offending values in the message.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

namespace convops {

template <typename Part>
void write(std::ostringstream& out, const Part& part) {
  out << part;
}

inline void write(std::ostringstream& out, const std::vector<int64_t>& values) {
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
}

inline void write(std::ostringstream& out, const Pair& pair) {
  out << '(' << pair.h << ", " << pair.w << ')';
}

// Throws std::runtime_error, which users see as RuntimeError, made of `parts`. The parts become
// text only then: checks are on the path of every call.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  (write(message, parts), ...);
  throw std::runtime_error(message.str());
}

}  // namespace convops
