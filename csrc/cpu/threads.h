// SPDX-License-Identifier: BSD-3-Clause
// Parallel loops of the CPU backend.
//
// With OpenMP the loops run on the process's OpenMP pool, which is torch's own if torch is loaded: a second pool would spin
// against it. Without OpenMP (SWITCHGEAR_OPENMP=OFF, the thread-sanitizer build) each loop starts std::threads. A forked
// child has no pool, and OpenMP would wait for it forever, so there every loop runs on the calling thread.
#pragma once
#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

namespace switchgear::cpu {

int resolve_threads(int num_threads);  // 0 -> the default; 1 in a forked child

// Calls body(thread) on `num_threads` threads and waits. All have the caller's mode of float arithmetic (float_mode.h), so
// results do not depend on their number. Rethrows an exception of any thread.
void run_threads(int num_threads, void (*body)(void* context, int thread), void* context);

// Calls task(index, thread) for each index in [0, count). Threads take indices from a shared counter, lowest first, so tasks
// may differ in size; put the largest first. A task's result must not depend on its thread.
template <typename Task>
void parallel_for(int num_threads, int64_t count, Task&& task) {
  num_threads = static_cast<int>(count < num_threads ? count : num_threads);
  if (num_threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i, 0);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t count;
    Task& task;
  } context{.count = count, .task = task};
  run_threads(
      num_threads,
      [](void* opaque, int thread) {
        auto& c = *static_cast<Context*>(opaque);
        for (int64_t i; (i = c.next.fetch_add(1, std::memory_order_relaxed)) < c.count;) c.task(i, thread);
      },
      &context);
}

// The same for tasks that continue reading where the previous one ends: each thread has a contiguous share of the indices, in
// order, and takes from other shares once its own is done.
template <typename Task>
void parallel_for_shares(int num_threads, int64_t count, Task&& task) {
  num_threads = static_cast<int>(count < num_threads ? count : num_threads);
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(static_cast<size_t>(num_threads));
  for (int i = 0; i < num_threads; ++i) {
    shares[static_cast<size_t>(i)].next.store(count * i / num_threads, std::memory_order_relaxed);
    shares[static_cast<size_t>(i)].end = count * (i + 1) / num_threads;
  }
  parallel_for(num_threads, num_threads, [&](int64_t first, int thread) {
    for (int64_t i = 0; i < num_threads; ++i) {
      Share& share = shares[static_cast<size_t>((first + i) % num_threads)];
      for (int64_t at; (at = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) task(at, thread);
    }
  });
}

// The same for ranges: task(begin, end, thread), `grain` items at a time.
template <typename Task>
void parallel_for_ranges(int num_threads, int64_t count, int64_t grain, Task&& task) {
  const int64_t chunks = (count + grain - 1) / grain;
  parallel_for(num_threads, chunks, [&](int64_t chunk, int thread) {
    const int64_t begin = chunk * grain;
    const int64_t end = begin + grain < count ? begin + grain : count;
    task(begin, end, thread);
  });
}

}  // namespace switchgear::cpu
