// SPDX-License-Identifier: BSD-3-Clause
// Loops in simulated time, against schedules worked out by hand, and recordings of real ones.
#include <cmath>
#include <numeric>
#include <set>

#include "check.h"
#include "cpu/simulation.h"
#include "cpu/threads.h"
#include "switchgear/ops.h"

namespace switchgear::test {
namespace {

using cpu::Machine, cpu::Placement, cpu::SimulatedLoop, cpu::SimulatedTask;

constexpr double kEndless = 1e30;

// Cores that read 10 bytes/s: a task of 10 bytes and 1 s only reads.
Machine machine(int threads, double bandwidth = kEndless) {
  return {threads, 1, 1, 10, bandwidth, kEndless, Placement::kFirstNode};
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

TEST(memory_is_shared_among_those_that_read) {
  // 10, 10 and 0 bytes: of 12 bytes/s the first two get 6 each, and of 20 all that they ask for.
  const std::vector<SimulatedTask> tasks = {{1, 10}, {1, 10}, {1, 0}};
  const SimulatedLoop loop = cpu::simulate(tasks, false, machine(3, 12));
  CHECK(is_near(loop.seconds, 10.0 / 6), loop.seconds, " s");
  CHECK(is_near(loop.bytes[0], 20) && is_near(loop.remote_bytes, 0));
  CHECK(is_near(cpu::simulate(tasks, false, machine(3, 20)).seconds, 1));
}

TEST(computing_is_not_slowed_by_memory) {
  // A task that reads for half a second and computes for half. Memory with a third of the speed: it reads for 1.5 s.
  CHECK(is_near(cpu::simulate({{1, 5}}, false, machine(1, 10.0 / 3)).seconds, 2));
}

TEST(two_that_read_half_their_time_meet_sometimes) {
  // Cores read 10 bytes/s each, and 15 together. Two tasks read a part u of their time at a rate r: memory delivers
  // 2 u (1 - u) 10 + u² 15 = 2 u r, so r = 10 - 2.5 u. On one core they read half of their second, so u = 5/r / (1/2 + 5/r).
  // Hence u²/4 - 2 u + 1 = 0: u = 4 - 2 √3 and r = 5 √3.
  const SimulatedLoop loop = cpu::simulate({{1, 5}, {1, 5}}, false, machine(2, 15));
  const double want = 0.5 + 1 / std::sqrt(3.0);
  CHECK(std::abs(loop.seconds - want) < 1e-5, loop.seconds, " s instead of ", want);
}

TEST(many_readers_get_all_that_a_memory_has_and_few_are_not_slowed) {
  // 128 threads that read nine tenths of their time ask for more than there is; a tenth, for less.
  const std::vector<SimulatedTask> greedy(128, {1, 9}), modest(128, {1, 1});
  const double seconds = cpu::simulate(greedy, false, machine(128, 100)).seconds;
  CHECK(seconds > 0.999 * 128 * 9 / 100.0 && seconds < 1.01 * 128 * 9 / 100.0, seconds, " s");
  const double fast = cpu::simulate(modest, false, machine(128, 300)).seconds;
  CHECK(fast >= 1 && fast < 1.001, fast, " s");
}

TEST(placement_decides_which_memory_and_which_links_are_used) {
  // Four threads on two sockets read 10 bytes each, at 10 bytes/s alone; a memory delivers 20 and a link 5.
  const std::vector<SimulatedTask> tasks(4, {1, 10});
  Machine two{4, 2, 2, 10, 20, 5, Placement::kLocal};
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
  CHECK(records[2].tasks.size() == 3 && records[2].tasks[0].work.bytes == 0 && records[2].tasks[0].work.expert == -1);
  CHECK(in_shares == std::vector<int>({0, 0, 1, 1, 1, 2, 2, 3, 3, 3}));
  for (size_t i = 0; i < 10; ++i) {
    const cpu::TaskWork& seen = records[0].tasks[i].work;
    CHECK(seen.expert == static_cast<int64_t>(i) && seen.rows == 2 * seen.expert && seen.bytes == 3 * seen.expert);
  }
  for (size_t i = 1; i < 3; ++i) CHECK(records[i].begin >= records[i - 1].end && records[i].end >= records[i].begin);
}

TEST(a_recording_names_experts_of_a_list_by_their_ids) {
  std::vector<float> grad_out(3 * 2, 1.0f), x(3 * 4, 1.0f), grad_weight(2 * 2 * 4);
  std::vector<int32_t> offsets{0, 1, 2, 3, 3}, experts{1, 3};
  cpu::Timeline timeline;
  cpu::record_on(&timeline);
  grouped_gemm_wgrad({.grad_out = view(grad_out.data(), DType::kFloat32, 3, 2),
                      .x = view(x.data(), DType::kFloat32, 3, 4),
                      .expert_offsets = view(offsets.data(), DType::kInt32, 5),
                      .experts = view(experts.data(), DType::kInt32, 2),
                      .grad_weight = view(grad_weight.data(), DType::kFloat32, 2, 2, 4)});
  cpu::record_on(nullptr);
  const auto& tasks = timeline.records().back().tasks;
  CHECK(tasks.size() == 2 && tasks[0].work.expert == 1 && tasks[1].work.expert == 3);
}

}  // namespace
}  // namespace switchgear::test
