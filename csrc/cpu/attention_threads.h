// How a call's heads are shared among torch's threads.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.h"
#include "threads.h"

namespace sparse_attn {

constexpr int64_t TASKS_PER_THREAD = 4;

struct Free {
  void operator()(float* memory) const {
    std::free(memory);
  }
};

// Tasks 0 to `count` for threads to take: at first many that follow each other, whose rows share pages that the
// processor then knows, in the end one at a time, since lists differ in length.
class TaskCounter {
 public:
  TaskCounter(int64_t count, int64_t threads) : count_(count), threads_(threads) {
  }
  // Takes the next tasks, [first, end). Returns whether there were any.
  bool take(int64_t& first, int64_t& end) {
    first = next_;
    do {
      const int64_t left = count_ - first;
      end = first + std::min(left, std::max<int64_t>(1, left / (2 * threads_)));
    } while (!next_.compare_exchange_weak(first, end));
    return first < end;
  }

 private:
  const int64_t count_, threads_;
  std::atomic<int64_t> next_{0};
};

// A kernel and the groups [first, end) of every head that it is to run on.
template <class SomeCall>
struct Pass {
  void (*kernel)(const SomeCall&, const Task&, float*);
  int64_t first, end;
};

// Runs passes, one after the other, on parts of heads: every head of every sequence has `parts`.
template <class SomeCall>
void run_parts(const SomeCall& call, const Kernels& kernels, const std::vector<Pass<SomeCall>>& passes, int64_t parts) {
  const int64_t tasks = call.batch * call.heads * parts;
  const int64_t threads = usable_threads();
  TaskCounter counter(tasks, threads);
  std::atomic<bool> out_of_memory{false};
  const auto run_task = [&](int64_t head, int64_t part, float* workspace) {
    for (const auto& [kernel, first, end] : passes) {
      const int64_t groups = end - first;
      const Task task{
          head / call.heads, head % call.heads, first + groups * part / parts, first + groups * (part + 1) / parts};
      if (task.first < task.end) {
        kernel(call, task, workspace);
      }
    }
  };
  in_threads(std::min(threads, tasks), 1, [&](int64_t, int64_t) {
    const size_t bytes = (kernels.workspace_floats(call) * sizeof(float) + 63) / 64 * 64;
    const std::unique_ptr<float, Free> workspace(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!workspace) {
      out_of_memory = true;
      return;
    }
    for (int64_t index, last; counter.take(index, last);) {
      for (; index < last; ++index) {
        run_task(index / parts, index % parts, workspace.get());
      }
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "not enough memory for the workspace of an attention call");
}

// Runs passes of which each needs what the one before has computed for the same head. With enough heads for all threads
// a head has all its passes at once and finds its rows in the cache.
template <class SomeCall>
void run(const SomeCall& call, const Kernels& kernels, const std::vector<Pass<SomeCall>>& passes) {
  const int64_t heads = call.batch * call.heads, tasks = TASKS_PER_THREAD * usable_threads();
  if (heads >= tasks) {
    run_parts(call, kernels, passes, 1);
  } else if (heads > 0) {
    for (const Pass<SomeCall>& pass : passes) {
      const int64_t groups = std::max<int64_t>(1, pass.end - pass.first);
      run_parts(call, kernels, {pass}, std::min(groups, (tasks + heads - 1) / heads));
    }
  }
}

}  // namespace sparse_attn
