// SPDX-License-Identifier: BSD-3-Clause
// Ops called from several threads at once, and from forked children.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "cases.h"

namespace switchgear::test {
namespace {

// One layer from logits to gradients: every op once, on shapes drawn from the seed. Returns all results in one buffer.
std::vector<uint8_t> run_all_ops(uint64_t seed, Execution exec) {
  Random random(seed);
  const DType dtype = kFloatTypes[random.below(3)];
  const int64_t T = random.below(40), H = 1 + random.below(70), I = 1 + random.below(40), E = 1 + random.below(9);
  const int64_t K = 1 + random.below(E), S = T * K, N = 2 * I;
  const Array logits = random_array(random, dtype, {T, E}), x = random_array(random, dtype, {T, H});
  const Array gate_up_proj = random_array(random, dtype, {E, N, H}), down_proj = random_array(random, dtype, {E, H, I});
  const RouteOptions options{.top_k = K, .normalize = true};

  std::vector<Array> results;
  results.reserve(16);  // references into it stay valid
  const auto output = [&](DType type, std::vector<int64_t> shape) -> const Array& {
    return results.emplace_back(type, std::move(shape));
  };
  const Array& ids = output(DType::kInt32, {T, K});
  const Array& weights = output(DType::kFloat32, {T, K});
  route({.router_logits = logits, .options = options, .topk_ids = ids, .topk_weights = weights}, exec);
  PlanArrays p(T, K, E);
  plan({.topk_ids = ids, .plan = p.plan()}, exec);
  const Array& permuted_x = output(dtype, {S, H});
  permute({.x = x, .plan = p.plan(), .topk_weights = weights, .permuted_x = permuted_x}, exec);
  const Array& h = output(dtype, {S, N});
  grouped_gemm({.x = permuted_x, .weight = {.data = gate_up_proj}, .expert_offsets = p.expert_offsets, .out = h}, exec);
  const Array& a = output(dtype, {S, I});
  glu({.h = h, .a = a}, exec);
  const Array& grad_h = output(dtype, {S, N});
  glu_backward({.grad_a = a, .h = h, .grad_h = grad_h}, exec);
  const Array& grad_weight = output(dtype, {E, N, H});
  grouped_gemm_wgrad(
      {.grad_out = grad_h, .x = permuted_x, .expert_offsets = p.expert_offsets, .grad_weight = grad_weight}, exec);
  const Array& combined = output(dtype, {T, H});
  combine({.permuted_y = permuted_x, .plan = p.plan(), .topk_weights = weights, .y = combined}, exec);
  const Array& grad_weights = output(DType::kFloat32, {T, K});
  combine_weight_backward({.grad_y = x, .permuted_y = permuted_x, .plan = p.plan(), .grad_topk_weights = grad_weights},
                          exec);
  const Array& grad_logits = output(dtype, {T, E});
  route_backward({.grad_topk_weights = grad_weights,
                  .router_logits = logits,
                  .topk_ids = ids,
                  .options = options,
                  .grad_router_logits = grad_logits},
                 exec);
  const ExpertWeights experts{.gate_up_proj = {.data = gate_up_proj}, .down_proj = {.data = down_proj}};
  const Array& y = output(dtype, {T, H});
  const Array& saved_h = output(dtype, {S, N});
  moe_forward({.x = x, .weights = experts, .topk_ids = ids, .topk_weights = weights, .y = y, .h = saved_h}, exec);
  const Array& grad_x = output(dtype, {T, H});
  const Array& grad_down_proj = output(dtype, {E, H, I});
  moe_backward({.grad_y = y,
                .x = x,
                .h = saved_h,
                .weights = experts,
                .topk_ids = ids,
                .topk_weights = weights,
                .grad_x = grad_x,
                .grad_down_proj = grad_down_proj},
               exec);

  std::vector<uint8_t> bytes;
  for (const Array* array : {&p.expert_offsets, &p.token_indices, &p.slot_indices}) {
    bytes.insert(bytes.end(), array->bytes().begin(), array->bytes().end());
  }
  for (const Array& array : results) bytes.insert(bytes.end(), array.bytes().begin(), array.bytes().end());
  return bytes;
}

TEST(concurrent_callers_get_the_serial_bits) {
  constexpr int kCallers = 8, kShapes = 24;
  const int64_t calls = count_from("SWITCHGEAR_CALLS", 40);
  std::vector<std::vector<uint8_t>> want;
  for (uint64_t seed = 0; seed < kShapes; ++seed) want.push_back(run_all_ops(seed, {1}));
  std::atomic<int64_t> different{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      Random random(static_cast<uint64_t>(1000 + caller));
      for (int64_t i = 0; i < calls; ++i) {
        const auto seed = static_cast<size_t>(random.below(kShapes));
        if (run_all_ops(seed, {static_cast<int>(1 + random.below(3))}) != want[seed]) ++different;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(different == 0, different.load(), " of ", kCallers * calls, " calls");
}

// Callers may choose another ISA or release temporary memory while ops run elsewhere.
TEST(settings_change_under_running_ops) {
  std::atomic<bool> stop{false};
  std::vector<std::vector<uint8_t>> want;
  for (uint64_t seed = 0; seed < 4; ++seed) want.push_back(run_all_ops(seed, {1}));
  std::thread releaser([&] {
    while (!stop) {
      release_workspaces();
      set_cpu_isa(cpu_isa());
      std::this_thread::yield();
    }
  });
  int different = 0;
  for (size_t i = 0; i < 40; ++i) different += run_all_ops(i % 4, {2}) != want[i % 4];
  stop = true;
  releaser.join();
  CHECK(different == 0);
}

// Waits at most 5 seconds for a child, then kills it. Returns whether it ended by itself with status 0.
bool finishes(pid_t child) {
  for (int i = 0; i < 500; ++i) {
    int status = 0;
    if (waitpid(child, &status, WNOHANG) == child) return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return false;
}

int children_that_fail(int count) {
  int failed = 0;
  const std::vector<uint8_t> want = run_all_ops(3, {2});
  for (int i = 0; i < count; ++i) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) _exit(run_all_ops(3, {2}) == want && run_all_ops(3, {0}) == want ? 0 : 1);
    failed += child < 0 || !finishes(child);
    run_all_ops(static_cast<uint64_t>(i), {2});  // the parent's pool still works
  }
  return failed;
}

TEST(forked_children_finish) {
  const auto count = static_cast<int>(count_from("SWITCHGEAR_FORKS", 20));
  CHECK(children_that_fail(count) == 0);
}

TEST(children_forked_while_another_thread_runs_ops_finish) {
  const auto count = static_cast<int>(count_from("SWITCHGEAR_FORKS", 20));
  std::atomic<bool> stop{false};
  std::thread worker([&] {
    for (uint64_t seed = 0; !stop; ++seed) run_all_ops(seed % 16, {2});
  });
  const int failed = children_that_fail(count);
  stop = true;
  worker.join();
  CHECK(failed == 0, failed, " of ", count);
}

}  // namespace
}  // namespace switchgear::test
