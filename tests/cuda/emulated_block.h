// A block of threads on a CPU: fibers, which take turns whenever one waits for others.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sparse_attn::emulator {

constexpr uint32_t SHARED_START = 1024;  // shared memory need not start at 0
constexpr size_t STACK_BYTES = 1 << 17;
constexpr size_t SLOT_BYTES = 64;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("CUDA emulator: " + what);
}

struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  const char* operation = nullptr;
  alignas(16) unsigned char slots[2][32][SLOT_BYTES];
};

struct Copy {
  uint32_t to;
  const void* from;  // null: zeros
};

// Copies take place, and those who wait for them arrive, when somebody looks whether the phase has ended, no sooner.
struct Barrier {
  int expected, missing;
  int copying = 0;  // of the missing ones: have come, and wait for copies
  bool odd = false;
  std::vector<Copy> copies;
};

struct Thread {
  ucontext_t start;
  jmp_buf place;  // once it has started: where it goes on
  bool started = false;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK_BYTES]};     // not touched until it is needed
  std::vector<std::vector<Copy>> groups = std::vector<std::vector<Copy>>(1);  // the last one is not committed yet
  bool done = false;
};

struct Block {
  int number, count, threads, current = 0, running, at_barrier = 0;
  unsigned barrier_generation = 0;
  uint64_t progress = 0;  // changes whenever somebody has done what others may wait for
  uint64_t polled_progress = 0;
  int idle_polls = 0;
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  std::map<uint32_t, Barrier> barriers;
  std::vector<Thread> fibers;
  std::function<void()> body;
  std::string error;
  ucontext_t caller;
};

inline Block* block = nullptr;

// The first time by a context, which has a stack of its own; then by jumps, which leave the signal mask alone and so
// need no system call.
inline void go_on(Thread& thread) {
  if (thread.started) {
    _longjmp(thread.place, 1);
  }
  thread.started = true;
  setcontext(&thread.start);
}

inline void switch_to_next() {
  const int from = block->current;
  for (int step = 1; step <= block->threads; ++step) {
    const int to = (from + step) % block->threads;
    if (!block->fibers[to].done) {
      block->current = to;
      if (to != from && _setjmp(block->fibers[from].place) == 0) {
        go_on(block->fibers[to]);
      }
      return;
    }
  }
  setcontext(&block->caller);
}

template <class Reached>
void wait_until(const Reached& reached) {
  uint64_t seen = block->progress;
  for (int turns = 0; !reached(); ++turns) {
    if (!block->error.empty() || turns > 4) {
      block->error.empty() ? fail("threads wait for each other forever") : throw std::runtime_error(block->error);
    }
    switch_to_next();
    if (seen != block->progress) {
      seen = block->progress;
      turns = 0;
    }
  }
}

inline void run_fiber() {
  try {
    block->body();
    for (const std::vector<Copy>& group : block->fibers[block->current].groups) {
      if (!group.empty() && block->error.empty()) {
        fail("a thread ends before its copies are complete");
      }
    }
  } catch (const std::exception& error) {
    block->error = error.what();
  }
  block->fibers[block->current].done = true;
  ++block->progress;
  switch_to_next();
}

// Runs `body` as all threads of one block.
inline void run_block(int number, int count, int threads, int shared_bytes, const std::function<void()>& body) {
  Block own{number, count, threads};
  own.shared.assign(shared_bytes, 0xff);
  own.warps.resize((threads + 31) / 32);
  own.fibers.resize(threads);
  own.body = body;
  block = &own;
  for (Thread& fiber : own.fibers) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
  }
  own.fibers[0].started = true;
  swapcontext(&own.caller, &own.fibers[0].start);
  block = nullptr;
  for (const auto& [address, barrier] : own.barriers) {
    if (barrier.copying > 0 && own.error.empty()) {
      own.error = "CUDA emulator: a block ends although nobody has waited for copies";
    }
  }
  if (!own.error.empty()) {
    throw std::runtime_error(own.error);
  }
}

inline unsigned char* shared_at(uint32_t address, uint32_t bytes) {
  if (address < SHARED_START || address - SHARED_START + bytes > block->shared.size() || address % bytes) {
    fail("shared memory address " + std::to_string(address) + " is misaligned or outside of the block's");
  }
  return block->shared.data() + (address - SHARED_START);
}

inline void complete(const Copy& copy) {
  unsigned char* to = shared_at(copy.to, 16);
  copy.from ? std::memcpy(to, copy.from, 16) : std::memset(to, 0, 16);
}

inline void end_phase_if_complete(Barrier& barrier) {
  if (barrier.missing == 0) {
    barrier.missing = barrier.expected;
    barrier.odd = !barrier.odd;
    ++block->progress;
  }
}

inline void complete_copies(Barrier& barrier) {
  for (const Copy& copy : barrier.copies) {
    complete(copy);
  }
  barrier.copies.clear();
  barrier.missing -= std::exchange(barrier.copying, 0);
  end_phase_if_complete(barrier);
}

// A barrier that another thread arrives at.
inline Barrier& next_arrival(uint32_t address) {
  Barrier& barrier = block->barriers.at(address);
  if (barrier.missing == barrier.copying) {
    fail("a barrier is used again although nobody has waited for its copies");
  }
  return barrier;
}

template <class T>
T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

// All lanes of a warp hand something in and get that of all lanes.
template <class T>
struct Lanes {
  T of[32];
};

template <class T>
Lanes<T> exchange(const char* operation, const T& own) {
  static_assert(sizeof(T) <= SLOT_BYTES);
  Warp& warp = block->warps[block->current / 32];
  const unsigned generation = warp.generation;
  auto& slots = warp.slots[generation % 2];
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (std::string(warp.operation) != operation) {
    fail(std::string("lanes of a warp disagree: ") + warp.operation + " and " + operation);
  }
  std::memcpy(slots[block->current % 32], &own, sizeof(T));
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
    ++block->progress;
  } else {
    wait_until([&] { return warp.generation != generation; });
  }
  Lanes<T> lanes;
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(&lanes.of[lane], slots[lane], sizeof(T));
  }
  return lanes;
}

inline int lane() {
  return block->current % 32;
}

}  // namespace sparse_attn::emulator
