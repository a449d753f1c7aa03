// Torch's threads, as the operators for CPUs use them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace sparse_attn {

// Whether this process is a fork of one that had loaded the operators. It has none of that one's threads, for which
// OpenMP would wait forever.
inline std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
inline const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// How many threads a call has.
inline int64_t usable_threads() {
  return forked ? 1 : torch::stable::get_num_threads();
}

// Runs `function` on parts of [0, count) in several threads, parts of `least` at least.
template <class Function>
void in_threads(int64_t count, int64_t least, const Function& function) {
  torch::stable::parallel_for(0, count, forked ? std::max<int64_t>(1, count) : least, function);
}

}  // namespace sparse_attn
