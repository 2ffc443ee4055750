// SPDX-License-Identifier: BSD-3-Clause
// Ops called from several threads at once, and from forked children.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <optional>
#include <thread>

#include "cases.h"
#include "cpu/float_mode.h"
#include "cpu/threads.h"
#include "cpu/worker_pool.h"
#include "switchgear/panels.h"

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

TEST(number_of_threads) {
  CHECK(cpu::resolve_threads(0) >= 1);
  for (const int count : {1, 2, 7}) CHECK(cpu::resolve_threads(count) == count);
  for (const int threads : {1, 2, 5}) {
    std::atomic<int> most{0}, started{0};
    const auto task = [&](int64_t, int thread) {
      if (thread + 1 > most) most = thread + 1;
      ++started;
    };
    for (const int64_t count : {0, 1, 3, 100}) {
      started = 0;
      cpu::parallel_for(threads, count, task);
      CHECK(started == count && most <= threads, threads, " threads ran ", started.load(), " of ", count);
      started = 0;
      cpu::parallel_for_shares(threads, count, task);
      CHECK(started == count && most <= threads, threads, " threads shared ", started.load(), " of ", count);
    }
  }
}

// Each loop's first tasks wait for each other, so they end only if that many threads run them.
TEST(workers_of_a_pool_join_loops) {
  struct Tasks {
    int count, together;
    std::atomic<int> next{0}, waiting{0}, done{0}, highest{0};
  };
  cpu::WorkerPool pool;
  for (const int threads : {1, 2, 5, 3, 2}) {
    for (const int count : {0, threads, 100}) {
      Tasks tasks{.count = count, .together = std::min(threads, count)};
      const auto body = [](void* context, int thread) {
        auto& t = *static_cast<Tasks*>(context);
        for (int i; (i = t.next++) < t.count; ++t.done) {
          if (thread > t.highest) t.highest = thread;
          if (i >= t.together) continue;
          for (++t.waiting; t.waiting < t.together;) std::this_thread::yield();
        }
      };
      pool.run(threads, body, &tasks);
      CHECK(tasks.done == count && tasks.highest < threads, threads, " threads did ", tasks.done.load(), " of ", count);
    }
  }
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

// Callers may release temporary memory, or choose the same ISA again, while ops run elsewhere.
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

// int8 weights of random bytes
struct Int8 {
  Int8(Random& random, int64_t E, int64_t rows, int64_t cols, int64_t parts)
      : rows(rows),
        cols(cols),
        parts(parts),
        values(bytes(random, DType::kUInt8, {E, rows / 16, cols / 4, 64})),
        scales(bytes(random, DType::kInt8, {E, rows / 16, 1, 16})),
        row_scales(random_array(random, DType::kFloat32, {E, rows / 16, 16}, 1e-4)) {}

  static Array bytes(Random& random, DType dtype, std::vector<int64_t> shape) {
    Array array(dtype, std::move(shape), 0, 0);
    for (int64_t i = 0; i < array.numel(); ++i) array.view().as<uint8_t>()[i] = static_cast<uint8_t>(random.bits());
    return array;
  }
  Weight weight() const {
    return {.format = Format::kInt8,
            .data = values,
            .scales = scales,
            .row_scales = row_scales,
            .rows = rows,
            .cols = cols,
            .parts = parts};
  }

  int64_t rows, cols, parts;
  Array values, scales, row_scales;
};

// The ops that need kernels more than once, on one layer.
struct IsaProblem {
  explicit IsaProblem(DType dtype) : dtype(dtype) {
    for (int64_t i = 0; i < T * K; ++i) ids.set_id(static_cast<int32_t>(i % E), i / K, i % K);
    plan({.topk_ids = ids, .plan = p.plan()});
  }

  void forward(const ExpertWeights& weights, const Array& y, const Array& h) const {
    moe_forward({.x = x, .weights = weights, .topk_ids = ids, .topk_weights = topk_weights, .y = y, .h = h}, {2});
  }
  void backward(const Array& grad_x, const Array& grad_gate_up_bias) const {
    moe_backward({.grad_y = x,
                  .x = x,
                  .h = saved_h,
                  .weights = plain(),
                  .topk_ids = ids,
                  .topk_weights = topk_weights,
                  .grad_x = grad_x,
                  .grad_gate_up_bias = grad_gate_up_bias},
                 {2});
  }
  void multiply_transposed(const Array& out) const {
    grouped_gemm({.x = saved_h,
                  .weight = gate_up_int8.weight(),
                  .expert_offsets = p.expert_offsets,
                  .out = out,
                  .transposed = true},
                 {2});
  }
  ExpertWeights plain() const { return {{.data = gate_up_proj}, {.data = down_proj}, gate_up_bias, {}}; }
  ExpertWeights integers() const { return {gate_up_int8.weight(), down_int8.weight(), gate_up_bias, {}}; }
  // Zeros: their panels are the same bytes in any order.
  ExpertWeights panels(PanelLayout layout, Array& gate_up, Array& down) const {
    const auto make = [&](Array& array, int64_t rows, int64_t cols) {
      array =
          Array(DType::kUInt8,
                {E, rows / layout.rows, layout.rows * cols * size_of(dtype) / layout.vector_bytes, layout.vector_bytes},
                0, 0);
      array.poison(0);
      return Weight{.format = Format::kPanels, .data = array, .rows = rows, .cols = cols};
    };
    return {make(gate_up, N, H), make(down, H, I), gate_up_bias, {}};
  }

  static constexpr int64_t T = 12, H = 64, I = 64, N = 2 * I, E = 4, K = 2;
  DType dtype;
  Random random{5};
  Array ids{DType::kInt32, {T, K}};
  PlanArrays p{T, K, E};
  Array topk_weights = random_array(random, DType::kFloat32, {T, K});
  Array x = random_array(random, dtype, {T, H}), saved_h = random_array(random, dtype, {T * K, N});
  Array gate_up_proj = random_array(random, dtype, {E, N, H}), down_proj = random_array(random, dtype, {E, H, I});
  Array gate_up_bias = random_array(random, dtype, {E, N});
  Int8 gate_up_int8{random, E, N, H, 2}, down_int8{random, E, H, I, 1};
};

// Callers may choose another ISA while ops run elsewhere: each op has the bits of one ISA from its checks to its end, however
// often it uses kernels.
TEST(an_op_keeps_its_isa) {
  const std::string before = cpu_isa();
  const std::vector<std::string> isas = available_cpu_isas();
  constexpr int64_t kCalls = 100, kChanges = 400;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    const IsaProblem problem(dtype);
    Array y(dtype, {problem.T, problem.H}), h(dtype, {problem.T * problem.K, problem.N}),
        grad_bias(dtype, {problem.E, problem.N}), product(dtype, {problem.T * problem.K, problem.H});
    Array gate_up, down;
    const PanelLayout layout = panel_layout(dtype);
    const ExpertWeights in_panels = problem.panels(layout, gate_up, down);
    struct Op {
      const char* name;
      std::function<void()> run;
      std::vector<const Array*> outputs;
    };
    const Op ops[] = {
        {"moe_forward", [&] { problem.forward(problem.plain(), y, h); }, {&y, &h}},
        {"moe_backward", [&] { problem.backward(y, grad_bias); }, {&y, &grad_bias}},
        {"moe_forward, int8", [&] { problem.forward(problem.integers(), y, h); }, {&y, &h}},
        {"grouped_gemm, transposed int8", [&] { problem.multiply_transposed(product); }, {&product}},
        {"moe_forward, panels",
         [&] {
           try {
             problem.forward(in_panels, y, h);
           } catch (const ValueError&) {  // another ISA has panels of another shape: nothing is written
             y.poison();
             h.poison();
           }
         },
         {&y, &h}},
    };
    for (const Op& op : ops) {
      note = std::string(op.name) + ", " + name_of(dtype);
      const auto run = [&] {
        op.run();
        std::vector<uint8_t> bytes;
        for (const Array* output : op.outputs)
          bytes.insert(bytes.end(), output->bytes().begin(), output->bytes().end());
        return bytes;
      };
      std::vector<std::vector<uint8_t>> wanted;
      for (const std::string& isa : isas) {
        set_cpu_isa(isa);
        wanted.push_back(run());
      }
      std::atomic<bool> stop{false};
      std::atomic<int64_t> changes{0};
      std::thread chooser([&] {
        for (; !stop; ++changes) set_cpu_isa(isas[static_cast<size_t>(changes) % isas.size()]);
      });
      int64_t mixed = 0;
      for (int64_t i = 0; i < kCalls || changes < kChanges; ++i) {
        mixed += std::count(wanted.begin(), wanted.end(), run()) == 0;
      }
      stop = true;
      chooser.join();
      set_cpu_isa(before);
      CHECK(mixed == 0, mixed, " results of several ISAs");
    }
  }
  note.clear();
}

// The caller's mode of float arithmetic holds on all threads during an op, and only there.
TEST(threads_take_the_float_mode_of_their_caller) {
#if defined(__SSE__)
  constexpr cpu::FloatMode kFlushes = 0x8040;  // results and operands
#else
  constexpr cpu::FloatMode kFlushes = 1 << 24;
#endif
  constexpr int kThreads = 4;
  using Modes = std::vector<std::optional<cpu::FloatMode>>;  // empty where a thread came too late: the cores are busy
  const auto modes_of_threads = [] {
    Modes modes(kThreads);
    cpu::run_threads(
        kThreads,
        [](void* context, int thread) {
          (*static_cast<Modes*>(context))[static_cast<size_t>(thread)] = cpu::float_mode();
        },
        &modes);
    return modes;
  };
  Array h(DType::kFloat32, {256, 512}), serial(DType::kFloat32, {256, 256}), parallel = serial, unflushed = serial;
  h.fill([](int64_t i) { return i % 512 < 256 ? 3e-38 : 0.25; });
  const cpu::FloatMode before = cpu::float_mode();
  const auto check_modes = [&](cpu::FloatMode want) {
    for (const auto mode : modes_of_threads()) CHECK(mode.value_or(want) == want, *mode, " instead of ", want);
  };
  glu({.h = h, .a = unflushed}, {kThreads});  // starts the pool
  {
    const cpu::FloatModeScope scope(before | kFlushes);
    check_modes(before | kFlushes);
    glu({.h = h, .a = serial}, {1});
    glu({.h = h, .a = parallel}, {kThreads});
  }
  check_modes(before);
  CHECK(unflushed(0, 0) > 0.0f && serial(0, 0) == 0.0f, "subnormal results");
  CHECK(same_bits(serial, parallel));
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
