// SPDX-License-Identifier: BSD-3-Clause
#include "threads.h"

#include <pthread.h>

#include <exception>
#include <mutex>

#include "float_mode.h"

#ifdef _OPENMP
#include <omp.h>
#else
#include <system_error>
#include <thread>
#include <vector>
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

}  // namespace

Timeline* timeline() { return recording; }
void record_on(Timeline* other) { recording = other; }

int resolve_threads(int num_threads) {
  if (in_forked_child.load(std::memory_order_relaxed)) return 1;
  return num_threads > 0 ? num_threads : default_threads();
}

void run_threads(int num_threads, void (*body)(void*, int), void* context) {
  std::exception_ptr error;
  std::mutex error_mutex;
  const FloatMode mode = float_mode();
  const auto guarded = [&](int thread) {
    const FloatModeScope scope(mode);
    try {
      body(context, thread);
    } catch (...) {
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
#ifdef _OPENMP
#pragma omp parallel num_threads(num_threads)
  guarded(omp_get_thread_num());
#else
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < num_threads; ++i) others.emplace_back(guarded, i);
  } catch (const std::system_error&) {  // no more threads: those that run take all tasks
  }
  guarded(0);
  for (auto& thread : others) thread.join();
#endif
  if (error) std::rethrow_exception(error);
}

}  // namespace switchgear::cpu
