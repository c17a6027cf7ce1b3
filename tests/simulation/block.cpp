#include "block.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace simulation {
namespace {

constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = 96 * 1024;

struct Thread {
  ucontext_t begin;
  jmp_buf place;  // where it gave way
  bool started = false, done = false;
  const uint64_t* awaited = nullptr;  // the word whose change it waits for
  uint64_t seen = 0;                  // what it was
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
};

struct Warp {
  Meeting meeting;
  std::array<uint32_t, kWarp> values[2];  // of this round and the next
};

struct Block {
  int threads = 0;
  Warp warps[kMostThreads / kWarp];
  Meeting meetings[16];
};

std::vector<Thread> pool(kMostThreads);
Block block;
int current;
jmp_buf scheduler;
const std::function<void()>* current_body;
std::function<void()> block_hook = [] {};
std::string description;
std::mt19937 naps;  // for which warps do not go on for a while

void begin_thread() {
  (*current_body)();
  pool[current].done = true;
  _longjmp(scheduler, 1);
}

// By jumps between the stacks: swapcontext would make system calls, 30 times as slow.
void go_on() {
  Thread& thread = pool[current];
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  setcontext(&thread.begin);
}

}  // namespace

alignas(1024) uint8_t shared_memory[kSharedBytes];
int shared_bytes;

void fail(const char* why) {
  std::printf("FAILED: %s\n  %s\n", why, description.c_str());
  std::fflush(stdout);
  std::_Exit(1);
}
void describe(const char* what) { description = what; }

void run_block(int threads, int shared_bytes, const std::function<void(int thread)>& enter,
               const std::function<void()>& body) {
  if (threads > kMostThreads || shared_bytes > kSharedBytes) fail("a block too large");
  block = {};
  block.threads = threads;
  simulation::shared_bytes = shared_bytes;
  // As floats and as halves this is NaN.
  std::fill_n(shared_memory, kSharedBytes, uint8_t{0xff});
  current_body = &body;
  for (int i = 0; i < threads; ++i) {
    Thread& thread = pool[i];
    thread.started = thread.done = false;
    thread.awaited = nullptr;
    getcontext(&thread.begin);
    thread.begin.uc_stack.ss_sp = thread.stack.get();
    thread.begin.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.begin, begin_thread, 0);
  }
  constexpr int kNap = 16;  // turns
  uint32_t asleep = 0;      // warps
  for (int left = threads, turn = 0; left > 0; ++turn) {
    if (turn % kNap == 0) asleep = naps();
    bool all_wait = true;
    for (int i = 0; i < threads; ++i) {
      const Thread& thread = pool[i];
      if (thread.done || (thread.awaited && *thread.awaited == thread.seen)) continue;
      all_wait = false;
      if (asleep >> i / kWarp & 1) continue;
      current = i;
      enter(i);
      go_on();
      left -= thread.done;
    }
    if (all_wait) fail("all threads wait");
  }
  if (std::any_of(shared_memory + shared_bytes, shared_memory + kSharedBytes,
                  [](uint8_t byte) { return byte != 0xff; }))
    fail("written behind a block's shared memory");
  block_hook();
}

void after_block(std::function<void()> function) { block_hook = std::move(function); }

int thread_index() { return current; }
void wait_for_change(const uint64_t& word) {
  Thread& thread = pool[current];
  thread.awaited = &word;
  thread.seen = word;
  if (_setjmp(thread.place) == 0) _longjmp(scheduler, 1);
}

void meet(Meeting& meeting, int threads) {
  if (++meeting.arrived < threads) return wait_for_change(meeting.round);
  meeting.arrived = 0;
  ++meeting.round;
}
Meeting& named_meeting(int name) { return block.meetings[name]; }

// Who is ahead of the others by a round writes to the other half; none can be ahead by two.
const std::array<uint32_t, kWarp>& exchange(uint32_t value) {
  Warp& warp = block.warps[current / kWarp];
  auto& values = warp.values[warp.meeting.round % 2];
  values[current % kWarp] = value;
  meet(warp.meeting, kWarp);
  return values;
}

int count_threads(Meeting& meeting, int threads, bool predicate) {
  int& count = meeting.counts[meeting.round % 2];
  count += predicate;
  if (meeting.arrived == threads - 1) meeting.counts[(meeting.round + 1) % 2] = 0;  // all read it
  meet(meeting, threads);
  return count;
}
int count_threads(bool predicate) {
  return count_threads(named_meeting(0), block.threads, predicate);
}

}  // namespace simulation
