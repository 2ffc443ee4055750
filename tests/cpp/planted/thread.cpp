// SPDX-License-Identifier: BSD-3-Clause
#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/threads.h"
#include "planted.h"
#include "switchgear/ops.h"

namespace switchgear::planted {
namespace {

// A counting sort whose chunks share their counters, on the library's own threads. Each chunk waits until the other has
// started, with relaxed atomics that order nothing, so that one thread cannot take both.
void race_on_a_histogram() {
  std::vector<int> counts(4);
  std::atomic<int> begun{0};
  cpu::parallel_for(2, 2, [&](int64_t, int) {
    begun.fetch_add(1, std::memory_order_relaxed);
    while (begun.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
    for (size_t i = 0; i < 1000; ++i) ++counts[i % 4];
  });
  std::printf("%d\n", counts[0]);
}

// Two callers combine into the same rows: combine itself makes the report.
void race_on_a_result_row() {
  std::vector<float> permuted(64), y(64);
  std::vector<int32_t> offsets = {0, 4}, tokens = {0, 1, 2, 3}, slots = {0, 1, 2, 3};
  const auto call = [&] {
    for (int i = 0; i < 100; ++i) {
      combine({.permuted_y = view(permuted.data(), DType::kFloat32, 4, 16),
               .plan = {.expert_offsets = view(offsets.data(), DType::kInt32, 2),
                        .token_indices = view(tokens.data(), DType::kInt32, 4),
                        .slot_indices = view(slots.data(), DType::kInt32, 4, 1)},
               .y = view(y.data(), DType::kFloat32, 4, 16)},
              {.num_threads = 1});
    }
  };
  std::thread other(call);
  call();
  other.join();
}

// A ready flag that is not atomic.
void unsynchronised_flag() {
  int value = 0;
  volatile bool ready = false;
  std::thread writer([&] {
    value = 1;
    ready = true;
  });
  while (!ready) std::this_thread::yield();
  std::printf("%d\n", value);
  writer.join();
}

void lock_order_inversion() {
  std::mutex a, b;
  const auto lock = [](std::mutex& first, std::mutex& second) {
    const std::lock_guard outer(first);
    const std::lock_guard inner(second);
  };
  std::thread(lock, std::ref(a), std::ref(b)).join();
  std::thread(lock, std::ref(b), std::ref(a)).join();
}

constexpr Bug kBugs[] = {
    {"race_on_a_histogram", race_on_a_histogram},
    {"race_on_a_result_row", race_on_a_result_row},
    {"unsynchronised_flag", unsynchronised_flag},
    {"lock_order_inversion", lock_order_inversion},
};

}  // namespace
}  // namespace switchgear::planted

int main(int argc, char** argv) { return switchgear::planted::run_named(switchgear::planted::kBugs, argc, argv); }
