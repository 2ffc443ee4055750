// SPDX-License-Identifier: BSD-3-Clause
#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "float_mode.h"
#include "worker_pool.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace switchgear::cpu {
namespace {

std::atomic<bool> in_forked_child{false};

[[maybe_unused]] const int fork_handler =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true, std::memory_order_relaxed); });

thread_local Timeline* recording = nullptr;

int default_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  const unsigned n = std::thread::hardware_concurrency();
  return n > 0 ? static_cast<int>(n) : 1;
#endif
}

// Each calling thread has a pool of its own, as OpenMP gives it a team. A forked child has none of its threads, and leaks it.
WorkerPool& pool() {
  struct Owner {
    std::unique_ptr<WorkerPool> pool = std::make_unique<WorkerPool>();
    Owner() = default;
    Owner(const Owner&) = delete;
    Owner& operator=(const Owner&) = delete;
    ~Owner() {
      if (in_forked_child.load(std::memory_order_relaxed)) static_cast<void>(pool.release());
    }
  };
  thread_local Owner owner;
  return *owner.pool;
}

#ifdef _OPENMP
using Clock = std::chrono::steady_clock;

// OpenMP's threads spin for milliseconds after a loop, and a loop waits for all of them, which is fastest on idle cores. Where
// other processes use the cores, a loop ends when the scheduler has given the last thread its turn, a time slice later.
// Threads that begin late tell the two apart, if this process had less than its cores meanwhile: it may be its own threads,
// another team's, that spin. After two such loops within a few, the loops of the next second run on the pool.
constexpr auto kLate = std::chrono::microseconds(500);
constexpr auto kBusyFor = std::chrono::seconds(1);
constexpr int kLoopsPerLate = 16;
constexpr double kOwnShare = 0.8;  // of the cores: with less, others have them
std::atomic<Clock::time_point> cores_are_busy_until{Clock::time_point::min()};
static_assert(std::atomic<Clock::time_point>::is_always_lock_free);
std::atomic<int> lateness{0};  // of recent loops: approximate if several threads call

void run_on_openmp(int num_threads, void (*body)(void*, int), void* context) {
  const int before = lateness.load(std::memory_order_relaxed);
  const std::clock_t used_before = before > 0 ? std::clock() : 0;
  const auto start = Clock::now();
  std::atomic<bool> is_late{false};
#pragma omp parallel num_threads(num_threads)
  {
    if (Clock::now() - start > kLate) is_late.store(true, std::memory_order_relaxed);
    body(context, omp_get_thread_num());
  }
  if (is_late.load(std::memory_order_relaxed)) {
    lateness.store(kLoopsPerLate, std::memory_order_relaxed);
    if (before == 0) return;
    const auto end = Clock::now();
    const double used = static_cast<double>(std::clock() - used_before) / CLOCKS_PER_SEC;
    const double cores = std::min(num_threads, omp_get_num_procs());
    if (used < kOwnShare * cores * std::chrono::duration<double>(end - start).count()) {
      cores_are_busy_until.store(end + kBusyFor, std::memory_order_relaxed);
    }
  } else if (before > 0) {
    lateness.store(before - 1, std::memory_order_relaxed);
  }
}
#endif

}  // namespace

Timeline* timeline() { return recording; }
void record_on(Timeline* other) { recording = other; }

int resolve_threads(int num_threads) {
  if (in_forked_child.load(std::memory_order_relaxed)) return 1;
  return num_threads > 0 ? num_threads : default_threads();
}

void run_threads(int num_threads, void (*body)(void*, int), void* context) {
  struct Guarded {
    void (*body)(void*, int);
    void* context;
    const FloatMode mode = float_mode();
    std::exception_ptr error;
    std::mutex error_mutex;
  } guarded{.body = body, .context = context};
  const auto run = [](void* opaque, int thread) {
    auto& g = *static_cast<Guarded*>(opaque);
    const FloatModeScope scope(g.mode);
    try {
      g.body(g.context, thread);
    } catch (...) {
      const std::lock_guard lock(g.error_mutex);
      if (!g.error) g.error = std::current_exception();
    }
  };
#ifdef _OPENMP
  if (Clock::now() >= cores_are_busy_until.load(std::memory_order_relaxed)) {
    run_on_openmp(num_threads, run, &guarded);
  } else {
    pool().run(num_threads, run, &guarded);
  }
#else
  pool().run(num_threads, run, &guarded);
#endif
  if (guarded.error) std::rethrow_exception(guarded.error);
}

}  // namespace switchgear::cpu
