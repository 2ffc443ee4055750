// SPDX-License-Identifier: BSD-3-Clause
// A recording of the loops of a call: every task with its time on one core and what it moves. `bench threads` schedules
// it for more threads (simulation.h).
//
// While a thread records, its loops run on it alone, in the order of their shares and cut for the call's number of threads. So
// the tasks are those of that number, and their times are not disturbed by other cores. Without a recording a loop tests one
// pointer.
#pragma once
#include <chrono>
#include <cstdint>
#include <vector>

namespace switchgear::cpu {

// What a task works on.
struct TaskWork {
  int64_t expert = -1;  // -1: several, or none
  int64_t rows = 0;     // of x, a or a gradient
  int64_t bytes = 0;    // of weights read from memory, or of their gradients written
};

// The name of a loop and the work of its tasks, for recordings. A loop without a name records no work.
struct NoWork {
  TaskWork operator()(int64_t) const { return {}; }
};
template <typename Work = NoWork>
struct Loop {
  const char* name = "";
  Work work = {};
};
template <typename Work>
Loop(const char*, Work) -> Loop<Work>;

class Timeline {
 public:
  struct Task {
    double seconds;
    TaskWork work;
  };
  struct Record {
    const char* name;
    bool in_shares;     // see parallel_for_shares
    int num_threads;    // at most the number of tasks
    double begin, end;  // seconds since the recording began
    std::vector<Task> tasks;
  };

  double now() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

  // Runs a loop and records it. thread_of(i): the thread that has task i in its share.
  template <typename Task, typename Work, typename ThreadOf>
  void run(const Loop<Work>& loop, bool in_shares, int num_threads, int64_t count, Task&& task, ThreadOf&& thread_of) {
    Record record{loop.name, in_shares, num_threads, now(), 0.0, {}};
    for (int64_t i = 0; i < count; ++i) {
      const double begin = now();
      task(i, thread_of(i));
      record.tasks.push_back({now() - begin, loop.work(i)});
    }
    record.end = now();
    records_.push_back(std::move(record));
  }

  const std::vector<Record>& records() const { return records_; }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::vector<Record> records_;
};

// The recording of the calling thread, or null.
Timeline* timeline();
void record_on(Timeline* recording);

}  // namespace switchgear::cpu
