// SPDX-License-Identifier: BSD-3-Clause
// Loops in simulated time, against schedules worked out by hand, and recordings of real ones.
#include <cmath>
#include <numeric>
#include <set>

#include "check.h"
#include "cpu/simulation.h"
#include "cpu/threads.h"

namespace switchgear::test {
namespace {

using cpu::Machine, cpu::Placement, cpu::SimulatedLoop, cpu::SimulatedTask;

constexpr double kEndless = 1e30;

Machine machine(int threads, double bandwidth = kEndless) {
  return {threads, 1, 1, bandwidth, kEndless, Placement::kFirstNode};
}

bool is_near(double got, double want) { return std::abs(got - want) <= 1e-9 * std::max(1.0, std::abs(want)); }

TEST(a_counter_gives_the_next_task_to_the_first_free_thread) {
  const std::vector<SimulatedTask> tasks = {{3, 0}, {1, 0}, {1, 0}, {2, 0}, {1, 0}};
  const SimulatedLoop loop = cpu::simulate(tasks, false, machine(2));
  CHECK(loop.threads == std::vector<int>({0, 1, 1, 1, 0}));  // thread 1 has 1 + 1 + 2, thread 0 has 3 + 1
  CHECK(is_near(loop.seconds, 4) && is_near(loop.busy, 8), loop.seconds, " s");
}

TEST(threads_finish_their_shares_and_take_from_the_next_ones) {
  // Shares {0, 1}, {2, 3, 4}, {5, 6, 7} of 8 tasks: thread 0 is done at 2 and takes from the share after its own.
  const std::vector<SimulatedTask> tasks = {{1, 0}, {1, 0}, {4, 0}, {1, 0}, {1, 0}, {3, 0}, {3, 0}, {3, 0}};
  const SimulatedLoop loop = cpu::simulate(tasks, true, machine(3));
  CHECK(loop.threads == std::vector<int>({0, 0, 1, 0, 0, 2, 2, 0}));
  CHECK(is_near(loop.seconds, 7) && is_near(loop.busy, 17), loop.seconds, " s");
}

TEST(one_thread_needs_the_sum_and_many_the_longest) {
  const std::vector<SimulatedTask> tasks = {{3, 30}, {1, 10}, {2, 0}};
  for (const bool in_shares : {false, true}) {
    CHECK(is_near(cpu::simulate(tasks, in_shares, machine(1)).seconds, 6));
    CHECK(is_near(cpu::simulate(tasks, in_shares, machine(64)).seconds, 3));
  }
  CHECK(is_near(cpu::simulate({}, true, machine(4)).seconds, 0));
}

TEST(memory_is_shared_and_small_demands_are_not_slowed) {
  // Demands of 10, 10 and 2 bytes/s on 12: the small one gets its 2, the others 5 each until it ends at 1, then 6.
  const std::vector<SimulatedTask> tasks = {{1, 10}, {1, 10}, {1, 2}};
  const SimulatedLoop loop = cpu::simulate(tasks, false, machine(3, 12));
  CHECK(is_near(loop.seconds, 1 + 5.0 / 6), loop.seconds, " s");
  CHECK(is_near(loop.bytes[0], 22) && is_near(loop.remote_bytes, 0));
  CHECK(is_near(cpu::simulate(tasks, false, machine(3, 22)).seconds, 1));
}

TEST(placement_decides_which_memory_and_which_links_are_used) {
  // Four threads on two sockets, 10 bytes at 10 bytes/s each; a memory delivers 20 and a link 5.
  const std::vector<SimulatedTask> tasks(4, {1, 10});
  Machine two{4, 2, 2, 20, 5, Placement::kLocal};
  const auto seconds = [&](Placement placement) {
    two.placement = placement;
    return cpu::simulate(tasks, true, two);
  };
  SimulatedLoop loop = seconds(Placement::kLocal);
  CHECK(is_near(loop.seconds, 1) && is_near(loop.remote_bytes, 0) && is_near(loop.bytes[1], 20));
  loop = seconds(Placement::kFirstNode);  // the second socket's 20 bytes come through a link of 5
  CHECK(is_near(loop.seconds, 4) && is_near(loop.remote_bytes, 20) && is_near(loop.bytes[0], 40));
  loop = seconds(Placement::kInterleaved);  // 10 bytes through each link
  CHECK(is_near(loop.seconds, 2) && is_near(loop.remote_bytes, 20) && is_near(loop.bytes[0], 20));
  two.num_sockets = 1;  // two nodes of one socket: no link, but all bytes on one memory
  CHECK(is_near(seconds(Placement::kFirstNode).seconds, 2) && is_near(seconds(Placement::kInterleaved).seconds, 1));
}

TEST(owners_are_those_of_shares) {
  for (const int64_t count : {1, 2, 7, 64, 129}) {
    for (const int threads : {1, 2, 3, 64}) {
      const int used = static_cast<int>(std::min<int64_t>(count, threads));
      for (int thread = 0; thread < used; ++thread) {
        for (int64_t i = cpu::Shares::begin(thread, count, used); i < cpu::Shares::begin(thread + 1, count, used);
             ++i) {
          CHECK(cpu::Shares::owner(i, count, used) == thread, i, " of ", count);
        }
      }
    }
  }
}

TEST(a_recording_has_every_task_of_its_thread_alone) {
  cpu::Timeline timeline;
  std::vector<int> threads(10, -1);
  const auto task = [&](int64_t i, int thread) { threads[static_cast<size_t>(i)] = thread; };
  const auto work = [](int64_t i) { return cpu::TaskWork{i, 2 * i, 3 * i}; };
  cpu::record_on(&timeline);
  cpu::parallel_for_shares(4, 10, task, cpu::Loop{"shares", work});
  const std::vector<int> in_shares = threads;
  cpu::parallel_for(4, 3, task, cpu::Loop{"counter", work});
  cpu::parallel_for_ranges(4, 10, 4,
                           [&](int64_t begin, int64_t end, int) { CHECK(end - begin == (begin < 8 ? 4 : 2)); });
  cpu::record_on(nullptr);
  cpu::parallel_for(2, 10, task);
  const auto& records = timeline.records();
  CHECK(records.size() == 3, records.size());
  CHECK(std::string(records[0].name) == "shares" && records[0].in_shares && records[0].num_threads == 4);
  CHECK(!records[1].in_shares && records[1].num_threads == 3 && records[1].tasks.size() == 3);
  CHECK(records[2].tasks.size() == 3 && records[2].tasks[0].work.bytes == 0);
  CHECK(in_shares == std::vector<int>({0, 0, 1, 1, 1, 2, 2, 3, 3, 3}));
  for (size_t i = 0; i < 10; ++i) {
    const cpu::TaskWork& seen = records[0].tasks[i].work;
    CHECK(seen.expert == static_cast<int64_t>(i) && seen.rows == 2 * seen.expert && seen.bytes == 3 * seen.expert);
  }
  for (size_t i = 1; i < 3; ++i) CHECK(records[i].begin >= records[i - 1].end && records[i].end >= records[i].begin);
}

}  // namespace
}  // namespace switchgear::test
