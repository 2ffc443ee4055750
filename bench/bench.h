// SPDX-License-Identifier: BSD-3-Clause
// What the benchmarks share. A benchmark is a struct:
//
//   struct Plan {
//     static constexpr const char* kName = "plan";
//     explicit Plan(const Case& c);   // makes the data and calls run() once
//     void run();                     // the timed part
//     bool verify() const;            // whether the result is right
//     Work work() const;              // flop and bytes of one run()
//   };
//
// bench_main<Plan, …>() registers each for all shapes of shapes.json, numbers of tokens, dtypes, and one or all threads. It
// reports flop/s, bytes/s and the fraction of this machine's ceilings, which it measures at the start.
#pragma once
#include <benchmark/benchmark.h>

#include <algorithm>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "bounded.h"
#include "switchgear/backend.h"
#include "switchgear/ops.h"

namespace switchgear::bench {

// ---- cases -------------------------------------------------------------------------------------------------------------

struct Shape {
  const char* name;
  std::vector<int64_t> T;
  int64_t H, I, E, K;
};

inline const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {
#include "shapes.inc"
  };
  return all;
}

struct Case {
  int64_t T, H, I, E, K;
  DType dtype;
  Execution exec;

  int64_t S() const { return T * K; }
  int64_t N() const { return 2 * I; }
};

struct Work {
  double flop, bytes;
};

// ---- data --------------------------------------------------------------------------------------------------------------

// A contiguous tensor that owns its memory.
class Tensor {
 public:
  template <typename... Sizes>
  explicit Tensor(DType dtype, Sizes... sizes) : view_(switchgear::view(nullptr, dtype, sizes...)) {
    data_.reset(static_cast<char*>(::operator new(bytes(), std::align_val_t{64})));
    view_.data = data_.get();
  }

  operator const TensorView&() const { return view_; }
  int64_t numel() const { return view_.numel(); }
  size_t bytes() const { return static_cast<size_t>(numel() * size_of(view_.dtype)); }
  template <typename T>
  T* as() const {
    return view_.as<T>();
  }
  float operator[](int64_t i) const { return test::decode(view_.as<char>() + i * size_of(view_.dtype), view_.dtype); }

  // Random values, repeated with a prime number of elements as period, so that filling gigabytes does not take minutes.
  Tensor&& random(double scale, uint64_t seed) && {
    constexpr int64_t kPeriod = 999'983;
    test::Random random(seed);
    const int64_t item = size_of(view_.dtype), distinct = std::min(numel(), kPeriod);
    for (int64_t i = 0; i < distinct; ++i) {
      const double uniform = 2 * random.unit() - 1;  // variance 1/3
      test::encode(view_.as<char>() + i * item, view_.dtype, static_cast<float>(uniform * scale * std::sqrt(3.0)));
    }
    for (int64_t i = distinct; i < numel(); i += kPeriod) {
      std::memcpy(view_.as<char>() + i * item, view_.data, static_cast<size_t>(std::min(numel() - i, kPeriod) * item));
    }
    return std::move(*this);
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  TensorView view_;
  std::unique_ptr<char, Free> data_;
};

// The plan of random choices, as from an untrained router: all experts get about equally many.
struct Routed {
  explicit Routed(const Case& c)
      : topk_ids(DType::kInt32, c.T, c.K),
        topk_weights(DType::kFloat32, c.T, c.K),
        expert_offsets(DType::kInt32, c.E + 1),
        token_indices(DType::kInt32, c.S()),
        slot_indices(DType::kInt32, c.T, c.K) {
    const Tensor logits = Tensor(DType::kFloat32, c.T, c.E).random(1.0, 1);
    route({.router_logits = logits,
           .options = {.top_k = c.K, .normalize = true},
           .topk_ids = topk_ids,
           .topk_weights = topk_weights});
    switchgear::plan({.topk_ids = topk_ids, .plan = plan()});
  }

  Plan plan() const { return {expert_offsets, token_indices, slot_indices}; }
  int64_t experts_hit() const {
    const auto* offsets = expert_offsets.as<int32_t>();
    int64_t count = 0;
    for (int64_t e = 0; e + 1 < expert_offsets.numel(); ++e) count += offsets[e] < offsets[e + 1];
    return count;
  }
  int64_t expert_of(int64_t slot) const {
    const auto* offsets = expert_offsets.as<int32_t>();
    return std::upper_bound(offsets, offsets + expert_offsets.numel(), slot) - offsets - 1;
  }

  float weight_of(int64_t slot) const {
    const auto* slots = slot_indices.as<int32_t>();
    return topk_weights[std::find(slots, slots + slot_indices.numel(), slot) - slots];
  }

  Tensor topk_ids, topk_weights, expert_offsets, token_indices, slot_indices;
};

// Calls correct(i) for up to `samples` indices, spread over [0, count); whether all were.
template <typename Correct>
bool sample(int64_t count, int64_t samples, Correct&& correct) {
  for (int64_t j = 0; j < std::min(count, samples); ++j) {
    if (!correct(count <= samples ? j : static_cast<int64_t>((static_cast<double>(j) + 0.5) / samples * count)))
      return false;
  }
  return true;
}

// ---- running -----------------------------------------------------------------------------------------------------------

struct Ceilings {
  double flop_rate, read_rate;
};

inline const Ceilings& ceilings(DType dtype, Execution exec) {
  static std::map<std::pair<DType, int>, Ceilings> measured;
  static std::map<int, double> read_rates;
  const auto [it, is_new] = measured.try_emplace({dtype, exec.num_threads});
  if (is_new) {
    const auto [rate, unread] = read_rates.try_emplace(exec.num_threads);
    if (unread) rate->second = read_bandwidth(exec);
    it->second = {multiply_rate(dtype, exec), rate->second};
  }
  return it->second;
}

template <typename Op>
void run(benchmark::State& state, const Case& c) {
  Op op(c);
  op.run();
  if (!op.verify()) {
    state.SkipWithError("wrong result");
    return;
  }
  for (auto _ : state) {
    op.run();
    benchmark::ClobberMemory();
  }
  const Work work = op.work();
  const Ceilings& ceiling = ceilings(c.dtype, c.exec);
  constexpr auto kRate = benchmark::Counter::kIsIterationInvariantRate;
  if (work.flop > 0) {
    state.counters["flop/s"] = {work.flop, kRate};
    state.counters["%flop"] = {100 * work.flop / ceiling.flop_rate, kRate};
  }
  state.counters["bytes/s"] = {work.bytes, kRate};
  state.counters["%read"] = {100 * work.bytes / ceiling.read_rate, kRate};
}

// Whether an op has cases of a dtype: all but the one that it names.
template <typename Op>
constexpr bool takes(DType dtype) {
  if constexpr (requires { Op::kNot; }) return dtype != Op::kNot;
  return true;
}

template <typename Op>
void register_cases(int all_threads) {
  for (const Shape& shape : shapes()) {
    for (const int64_t T : shape.T) {
      for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
        if (!takes<Op>(dtype)) continue;
        for (int threads = 1; threads <= all_threads; threads += std::max(1, all_threads - 1)) {
          const Case c{T, shape.H, shape.I, shape.E, shape.K, dtype, {threads}};
          const std::string name =
              join(Op::kName, '/', shape.name, "/T:", T, '/', name_of(dtype), "/threads:", threads);
          benchmark::RegisterBenchmark(name.c_str(), [c](benchmark::State& state) { run<Op>(state, c); })
              ->UseRealTime()
              ->Unit(benchmark::kMicrosecond);
        }
      }
    }
  }
}

template <typename... Ops>
int bench_main(int argc, char** argv) {
  const int all_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("isa", cpu_isa());
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (int threads = 1; threads <= all_threads; threads += std::max(1, all_threads - 1)) {
      const auto [flop_rate, read_rate] = ceilings(dtype, {threads});
      benchmark::AddCustomContext(join(name_of(dtype), " threads:", threads),
                                  join(flop_rate / 1e9, " Gflop/s, reads ", read_rate / 1e9, " GB/s"));
    }
  }
  (register_cases<Ops>(all_threads), ...);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}

}  // namespace switchgear::bench
