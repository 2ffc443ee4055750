// SPDX-License-Identifier: BSD-3-Clause
#include "worker_pool.h"

#include <system_error>

namespace switchgear::cpu {

WorkerPool::~WorkerPool() {
  stopped_.store(true);
  loops_.fetch_add(1);
  loops_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void WorkerPool::run(int num_threads, void (*body)(void*, int), void* context) {
  try {
    while (std::ssize(workers_) < num_threads - 1) {
      workers_.emplace_back(&WorkerPool::work, this, static_cast<int>(workers_.size()) + 1);
    }
  } catch (const std::system_error&) {  // no more threads: those that run take all tasks
  }
  num_threads_ = num_threads, body_ = body, context_ = context;
  state_.store(kOpen, std::memory_order_release);
  loops_.fetch_add(1, std::memory_order_release);
  loops_.notify_all();
  body(context, 0);
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (uint32_t inside; (inside = state_.load(std::memory_order_acquire)) != 0;) state_.wait(inside);
}

void WorkerPool::work(int thread) {
  for (uint32_t seen = 0;;) {
    loops_.wait(seen);
    seen = loops_.load(std::memory_order_acquire);
    if (stopped_.load()) return;
    if (!enter()) continue;
    if (thread < num_threads_) body_(context_, thread);
    leave();
  }
}

bool WorkerPool::enter() {
  uint32_t state = state_.load(std::memory_order_relaxed);
  while ((state & kOpen) != 0) {
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire, std::memory_order_relaxed))
      return true;
  }
  return false;
}

void WorkerPool::leave() {
  if (state_.fetch_sub(1, std::memory_order_release) == 1) state_.notify_one();
}

}  // namespace switchgear::cpu
