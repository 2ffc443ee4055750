// SPDX-License-Identifier: BSD-3-Clause
// Threads that sleep between loops, for a machine whose cores are busy with other work.
//
// A loop waits for the workers that have begun its tasks, never for one that has no core yet: the caller takes the tasks
// from the same counter. No thread spins for longer than std::atomic::wait does, about a
// microsecond.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace switchgear::cpu {

class WorkerPool {
 public:
  WorkerPool() = default;
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;
  ~WorkerPool();

  // Calls body(context, 0) here, and body(context, i), i < num_threads, on the workers that wake up before it returns. Waits
  // for those. `body` does not throw, and may not call run.
  void run(int num_threads, void (*body)(void* context, int thread), void* context);

 private:
  static constexpr uint32_t kOpen = 1u << 31;

  void work(int thread);
  bool enter();
  void leave();

  std::vector<std::thread> workers_;
  std::atomic<uint32_t> loops_{0};  // changes when a loop opens: workers wait for it
  std::atomic<uint32_t> state_{0};  // kOpen while workers may enter, and how many are inside
  std::atomic<bool> stopped_{false};
  int num_threads_ = 0;  // of the open loop, as are the next two
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
};

}  // namespace switchgear::cpu
