// Random numbers, the same with every library.
#pragma once

#include <random>

namespace simulation {

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}

  // Any of least, ..., most. (What std::uniform_int_distribution returns is the library's choice.)
  int between(int least, int most) { return least + int(engine_() % unsigned(most - least + 1)); }
  bool one_in(int count) { return between(1, count) == 1; }

 private:
  std::mt19937 engine_;
};

}  // namespace simulation
