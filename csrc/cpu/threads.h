// SPDX-License-Identifier: BSD-3-Clause
// Parallel loops of the CPU backend.
//
// With OpenMP the loops run on the process's OpenMP pool, which is torch's own if torch is loaded: a second pool would spin
// against it. While other processes use the cores, and without OpenMP (SWITCHGEAR_OPENMP=OFF, the thread-sanitizer build),
// loops run on a WorkerPool, whose threads sleep. A forked child has neither, and OpenMP would wait for it forever, so there
// every loop runs on the calling thread.
#pragma once
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "timeline.h"

namespace switchgear::cpu {

int resolve_threads(int num_threads);  // 0 -> the default; 1 in a forked child

// Calls body(thread) on `num_threads` threads and waits. All have the caller's mode of float arithmetic (float_mode.h), so
// results do not depend on their number. Rethrows an exception of any thread.
void run_threads(int num_threads, void (*body)(void* context, int thread), void* context);

// Which task a thread takes next. Threads take indices from a shared counter, lowest first.
class Counter {
 public:
  Counter(int64_t count, int) : count_(count) {}

  // passed: the shares that the thread has gone through. Returns -1 at the end.
  int64_t take(int, int& /*passed*/) {
    const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
    return i < count_ ? i : -1;
  }

 private:
  std::atomic<int64_t> next_{0};
  int64_t count_;
};

// The same where each thread has a contiguous share of the indices, and takes from the shares after it once its own is done.
class Shares {
 public:
  Shares(int64_t count, int num_threads) : shares_(static_cast<size_t>(num_threads)) {
    for (int i = 0; i < num_threads; ++i) {
      shares_[static_cast<size_t>(i)].next.store(begin(i, count, num_threads), std::memory_order_relaxed);
      shares_[static_cast<size_t>(i)].end = begin(i + 1, count, num_threads);
    }
  }

  static int64_t begin(int thread, int64_t count, int num_threads) { return count * thread / num_threads; }
  static int owner(int64_t index, int64_t count, int num_threads) {
    return static_cast<int>(((index + 1) * num_threads - 1) / count);
  }

  int64_t take(int thread, int& passed) {
    const auto num_threads = static_cast<int>(shares_.size());
    for (; passed < num_threads; ++passed) {
      Share& share = shares_[static_cast<size_t>((thread + passed) % num_threads)];
      const int64_t at = share.next.fetch_add(1, std::memory_order_relaxed);
      if (at < share.end) return at;
    }
    return -1;
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares_;
};

template <typename Source, typename Task>
void run_loop(int num_threads, int64_t count, Task& task) {
  struct Context {
    Source source;
    Task& task;
  } context{.source = Source(count, num_threads), .task = task};
  run_threads(
      num_threads,
      [](void* opaque, int thread) {
        auto& c = *static_cast<Context*>(opaque);
        int passed = 0;
        for (int64_t i; (i = c.source.take(thread, passed)) >= 0;) c.task(i, thread);
      },
      &context);
}

// Calls task(index, thread) for each index in [0, count). Threads take indices from a shared counter, lowest first, so tasks
// may differ in size; put the largest first. A task's result must not depend on its thread.
template <typename Task, typename Work = NoWork>
void parallel_for(int num_threads, int64_t count, Task&& task, const Loop<Work>& loop = {}) {
  num_threads = static_cast<int>(count < num_threads ? count : num_threads);
  if (Timeline* const recording = timeline()) {
    return recording->run(loop, false, num_threads, count, task, [](int64_t) { return 0; });
  }
  if (num_threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  run_loop<Counter>(num_threads, count, task);
}

// The same for tasks that continue reading where the previous one ends: each thread has a contiguous share of the indices, in
// order, and takes from other shares once its own is done. Thread i has share i, so equal loops read equal memory on a thread.
template <typename Task, typename Work = NoWork>
void parallel_for_shares(int num_threads, int64_t count, Task&& task, const Loop<Work>& loop = {}) {
  num_threads = static_cast<int>(count < num_threads ? count : num_threads);
  if (Timeline* const recording = timeline()) {
    const auto owner = [&](int64_t i) { return Shares::owner(i, count, num_threads); };
    return recording->run(loop, true, num_threads, count, task, owner);
  }
  if (num_threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  run_loop<Shares>(num_threads, count, task);
}

// The same for ranges: task(begin, end, thread), `grain` items at a time.
template <typename Task, typename Work = NoWork>
void parallel_for_ranges(int num_threads, int64_t count, int64_t grain, Task&& task, const Loop<Work>& loop = {}) {
  const int64_t chunks = (count + grain - 1) / grain;
  const auto range = [&](int64_t chunk, int thread) {
    const int64_t begin = chunk * grain;
    const int64_t end = begin + grain < count ? begin + grain : count;
    task(begin, end, thread);
  };
  parallel_for(num_threads, chunks, range, loop);
}

// A grain of rows of scores: about 50 µs of work. Less is not worth waking a thread.
inline int64_t grain_rows(int64_t num_experts) { return num_experts < 16384 ? 16384 / num_experts : 1; }

}  // namespace switchgear::cpu
