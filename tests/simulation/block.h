// A block of threads on the host: each has a stack of its own, and they take turns, giving way only
// where they wait. Warps nap now and then, so that some are far ahead of others. But every run is
// the same, and a wait without an end is found.
#pragma once

#include <array>
#include <cstdint>
#include <functional>

namespace simulation {

constexpr int kWarp = 32;
constexpr int kSharedBytes = 227 * 1024;  // a block of sm_90

alignas(1024) extern uint8_t shared_memory[];
// Of the launch that runs.
extern int shared_bytes;

// Says why and for which tile, and ends the program.
[[noreturn]] void fail(const char* why);
// What is being simulated, for that message.
void describe(const char* what);

// Runs `body` in every thread of a block. `enter` is told which thread goes on, each time.
void run_block(int threads, int shared_bytes, const std::function<void(int thread)>& enter,
               const std::function<void()>& body);
// Called after every block.
void after_block(std::function<void()> function);

int thread_index();
// Lets the others run until one of them has changed the word.
void wait_for_change(const uint64_t& word);

// Threads that wait for each other, `threads` in all.
struct Meeting {
  int arrived = 0;
  uint64_t round = 0;
  int counts[2] = {};  // of this round and the last, or the next
};
void meet(Meeting& meeting, int threads);
// Meeting number `name` of the block; 0 is that of all threads.
Meeting& named_meeting(int name);

// All lanes of the warp meet; what each of them brought.
const std::array<uint32_t, kWarp>& exchange(uint32_t value);
// The threads meet, or all of the block; how many of them brought true.
int count_threads(Meeting& meeting, int threads, bool predicate);
int count_threads(bool predicate);

}  // namespace simulation
