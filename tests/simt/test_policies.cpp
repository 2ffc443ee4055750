// SPDX-License-Identifier: BSD-3-Clause
// The ops of routing policies on the CUDA kernels against those of the CPU, for what the shared Python tests do not cover: ids
// and sequences out of range, limits below 0, more experts than fit in shared memory, more rounds of rerouting than one launch
// handles, poisoned memory. Compiled with -ffp-contract=off, since bits are compared.
#include <cfloat>
#include <span>

#include "run_op.h"
#include "switchgear/backend.h"

namespace switchgear::test {
namespace {

struct Sizes {
  int64_t T, E, K, B;  // B = 0: no sequence_ids
};
constexpr Sizes kSizes[] = {{0, 4, 2, 2},   {1, 1, 1, 0},    {5, 3, 2, 2},   {64, 8, 2, 0},  {70, 33, 5, 3},
                            {40, 80, 3, 0}, {150, 20, 4, 2}, {300, 9, 2, 0}, {33, 64, 4, 40}};
constexpr Sizes kManyExperts[] = {{3, 1300, 3, 2}, {2, 4096, 2, 0}};  // cuts in global memory

// Kinds 1 to 3: few distinct values, non-finite values, any bits.
Array wild_array(Random& random, std::vector<int64_t> shape, int64_t kind, DType dtype = DType::kFloat32) {
  Array array(dtype, std::move(shape));
  const float specials[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, 0.0f, -0.0f, 1e-42f};
  array.fill([&](int64_t) {
    switch (kind) {
      case 1: return static_cast<float>(random.below(3)) - 1.0f;
      case 2: return random.below(3) == 0 ? specials[random.below(std::ssize(specials))] : random.normal();
      case 3: return std::bit_cast<float>(static_cast<uint32_t>(random.bits()));
      default: return random.normal();
    }
  });
  return array;
}

// Numbers from 0 to size - 1, and occasionally others.
Array wild_ids(Random& random, std::vector<int64_t> shape, int64_t size) {
  constexpr int32_t kExtremes[] = {INT32_MIN, INT32_MAX, -1};
  Array array(DType::kInt32, std::move(shape));
  array.fill([&](int64_t) -> int64_t {
    return random.below(12) == 0 ? kExtremes[random.below(std::ssize(kExtremes))] : random.below(size + 1);
  });
  return array;
}

Array limits_of(Random& random, int64_t num_sequences, int64_t most) {
  Array array(DType::kInt32, {num_sequences});
  array.fill([&](int64_t) { return random.below(most + 2) - 1; });
  return array;
}

Array map(const Array& array, auto&& function) {
  Array result = array;
  const auto* values = array.view().as<const int32_t>();
  result.fill([&](int64_t i) { return function(values[i]); });
  return result;
}
Array at_least_zero(const Array& limits) {
  return map(limits, [](int32_t v) { return std::max(v, 0); });
}
Array in_range(const Array& ids, int64_t size) {
  return map(ids, [&](int32_t v) { return v >= 0 && v < size ? v : -1; });
}

// Calls body(sizes, kind, random); each order of threads runs a third.
template <typename Body>
void for_each_size(Body&& body) {
  int64_t variant = 0;
  for (const auto& [sizes, kinds] : {std::pair{std::span<const Sizes>(kSizes), 4}, {kManyExperts, 2}}) {
    for (const Sizes& s : sizes) {
      for (int64_t kind = 0; kind < kinds; ++kind) {
        if (!takes_variant(variant++)) continue;
        note = join("T=", s.T, " E=", s.E, " K=", s.K, " B=", s.B, " kind ", kind);
        Random random(static_cast<uint64_t>(s.T * 7 + kind));
        body(s, kind, random);
      }
    }
  }
  note.clear();
}

// The tokens with a valid sequence id, as input for the CPU, which refuses others.
struct Real {
  Real(const Array& sequence_ids, int64_t T, int64_t B) {
    for (int64_t t = 0; t < T; ++t) {
      if (!sequence_ids.defined() || (sequence_ids.id(t) >= 0 && sequence_ids.id(t) < B)) tokens.push_back(t);
    }
    ids = sequence_ids.defined() ? Array(DType::kInt32, {std::ssize(tokens)}) : Array();
    if (ids.defined()) ids.fill([&](int64_t i) { return sequence_ids.id(tokens[static_cast<size_t>(i)]); });
  }
  Array rows(const Array& values) const {
    Array result(values.view().dtype, {std::ssize(tokens), values.size(1)});
    result.fill([&](int64_t i) { return values(tokens[static_cast<size_t>(i / values.size(1))], i % values.size(1)); });
    return result;
  }

  std::vector<int64_t> tokens;
  Array ids;
};

// Checks that got[tokens] are the rows of want, and all other rows -1.
void check_rows(const Array& got, const Array& want, const Real& real) {
  const int64_t width = got.view().ndim > 1 ? got.size(1) : 1;
  std::vector<int32_t> expected(static_cast<size_t>(got.numel()), -1);
  for (size_t i = 0; i < real.tokens.size(); ++i) {
    std::copy_n(want.view().as<const int32_t>() + static_cast<int64_t>(i) * width, width,
                expected.begin() + real.tokens[i] * width);
  }
  for (int64_t i = 0; i < got.numel(); ++i) {
    const int32_t value = got.view().as<const int32_t>()[i];
    CHECK(value == expected[static_cast<size_t>(i)], "element ", i, " got ", value);
  }
}

Array maybe_sequences(Random& random, const Sizes& s) { return s.B > 0 ? wild_ids(random, {s.T}, s.B) : Array(); }

TEST(column_topk_has_the_choices_of_the_cpu) {
  for_each_size([](const Sizes& s, int64_t kind, Random& random) {
    const int64_t B = std::max<int64_t>(s.B, 1);
    const Array values = wild_array(random, {s.T, s.E}, kind, kFloatTypes[kind % 3]);
    const Array sequence_ids = maybe_sequences(random, s), limits = limits_of(random, B, s.T / B + 1);
    const Real real(sequence_ids, s.T, B);
    const Array real_values = real.rows(values), real_limits = at_least_zero(limits);
    Array want(DType::kInt32, {std::ssize(real.tokens), s.E}), got(DType::kInt32, {s.T, s.E});
    cpu_backend().column_topk(
        {.values = real_values, .sequence_ids = real.ids, .limits = real_limits, .topk_ids = want}, {1});
    run_op({&got}, [&](Execution exec) {
      cuda::column_topk({.values = values, .sequence_ids = sequence_ids, .limits = limits, .topk_ids = got}, exec);
    });
    check_rows(got, want, real);
  });
}

TEST(route_dynamic_has_the_bits_of_the_cpu) {
  const auto check = [](const Array& logits, const Array& bias, const RouteDynamicOptions& o, int64_t most) {
    Array want(DType::kInt32, {logits.size(0), most}), want_weights(DType::kFloat32, {logits.size(0), most});
    Array got = want, got_weights = want_weights;
    const auto args = [&](Array& ids, Array& weights) {
      return RouteDynamicArgs{
          .router_logits = logits, .selection_bias = bias, .options = o, .topk_ids = ids, .topk_weights = weights};
    };
    cpu_backend().route_dynamic(args(want, want_weights), {1});
    run_op({&got, &got_weights}, [&](Execution exec) { cuda::route_dynamic(args(got, got_weights), exec); });
    CHECK(same_bits(got, want));
    CHECK(same_bits(got_weights, want_weights));
  };
  for_each_size([&](const Sizes& s, int64_t kind, Random& random) {
    const Array logits = wild_array(random, {s.T, s.E}, kind, kFloatTypes[kind % 3]);
    const Array bias = random.below(2) == 0 ? wild_array(random, {s.E}, kind) : Array();
    const int64_t most = 1 + random.below(s.E);
    check(logits, bias,
          {.score_function = random.below(2) == 0 ? ScoreFunction::kSoftmax : ScoreFunction::kSigmoid,
           .min_experts = random.below(most + 1),
           .top_p = random.unit(),
           .threshold = static_cast<float>(random.unit() / 4),
           .normalize = random.below(2) == 0,
           .scale = 1.5f},
          most);
  });
  if (!takes_variant(0)) return;
  Random random(9);  // keys in global memory
  check(random_array(random, DType::kBFloat16, {2, 25'000}, 2.0), {}, {.top_p = 0.02, .normalize = true}, 25'000);
}

TEST(fit_capacity_has_the_choices_of_the_cpu) {
  for_each_size([](const Sizes& s, int64_t kind, Random& random) {
    const int64_t B = std::max<int64_t>(s.B, 1);
    const Array ids = wild_ids(random, {s.T, s.K}, s.E), sequence_ids = maybe_sequences(random, s);
    const Array priorities = wild_array(random, {s.T, s.K}, kind), scores = wild_array(random, {s.T, s.E}, kind);
    const Array limits = limits_of(random, B, 2 * s.T * s.K / (s.E * B) + 1);
    const Real real(sequence_ids, s.T, B);
    Array real_ids(DType::kInt32, {std::ssize(real.tokens), s.K});
    real_ids.fill([&](int64_t i) { return ids.id(real.tokens[static_cast<size_t>(i / s.K)], i % s.K); });
    const Array valid = in_range(real_ids, s.E), real_limits = at_least_zero(limits);
    const Array real_priorities = real.rows(priorities), real_scores = real.rows(scores);
    for (const Drop drop : {Drop::kOrder, Drop::kReverse, Drop::kChoice, Drop::kPriority}) {
      if (s.E > 1000 && drop != Drop::kPriority) continue;
      const FitCapacityOptions options{.num_experts = s.E,
                                       .drop = drop,
                                       .candidates = std::min(s.E + 1 - random.below(3), s.K + (s.E > 1000 ? 2 : 70))};
      const bool reroutes = (static_cast<int64_t>(drop) + kind) % 4 != 0;
      Array want(DType::kInt32, {std::ssize(real.tokens), s.K}), got(DType::kInt32, {s.T, s.K});
      cpu_backend().fit_capacity({.topk_ids = valid,
                                  .priorities = real_priorities,
                                  .scores = reroutes ? real_scores.view() : TensorView{},
                                  .sequence_ids = real.ids,
                                  .limits = real_limits,
                                  .options = options,
                                  .kept_ids = want},
                                 {1});
      run_op({&got}, [&](Execution exec) {
        cuda::fit_capacity({.topk_ids = ids,
                            .priorities = priorities,
                            .scores = reroutes ? scores.view() : TensorView{},
                            .sequence_ids = sequence_ids,
                            .limits = limits,
                            .options = options,
                            .kept_ids = got},
                           exec);
      });
      check_rows(got, want, real);
    }
  });
}

TEST(assign_balanced_has_the_choices_of_the_cpu) {
  for_each_size([](const Sizes& s, int64_t kind, Random& random) {
    const int64_t B = std::max<int64_t>(s.B, 1);
    const Array values = wild_array(random, {s.T, s.E}, kind), sequence_ids = maybe_sequences(random, s);
    const Real real(sequence_ids, s.T, B);
    const Array real_values = real.rows(values);
    const double eps = kind % 2 == 0 ? -1.0 : 1e-2;
    const int64_t iterations = s.E > 1000 ? 2 : 8;
    Array want(DType::kInt32, {std::ssize(real.tokens)}), got(DType::kInt32, {s.T});
    const auto args = [&](const Array& given, const Array& ids, Array& out) {
      return AssignBalancedArgs{.values = given,
                                .sequence_ids = ids,
                                .num_sequences = B,
                                .eps = eps,
                                .max_iterations = iterations,
                                .expert_ids = out};
    };
    cpu_backend().assign_balanced(args(real_values, real.ids, want), {1});
    run_op({&got}, [&](Execution exec) { cuda::assign_balanced(args(values, sequence_ids, got), exec); });
    check_rows(got, want, real);
  });
}

// Sums of several chunks, and of more than a block has groups of lanes.
TEST(assign_capped_of_long_rows) {
  for (const auto& [num_tokens, E] : {std::pair<int64_t, int64_t>{700, 2}, {1100, 3}, {8300, 2}, {3, 700}}) {
    note = join("T=", num_tokens, " E=", E);
    Random random(5);
    const Array values = wild_array(random, {num_tokens, E}, 0);
    Array limits(DType::kInt32, {1}), want(DType::kFloat32, {num_tokens, E}), got(DType::kFloat32, {num_tokens, E});
    limits.fill([&](int64_t) { return num_tokens / 3; });
    const auto args = [&](Array& out) {
      return AssignCappedArgs{.values = values,
                              .limits = limits,
                              .entropy = 0.5,
                              .iterations = num_tokens > 1000 ? 0 : 1,
                              .assignment = out};
    };
    cpu_backend().assign_capped(args(want), {1});
    run_op({&got}, [&](Execution exec) { cuda::assign_capped(args(got), exec); });
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t e = 0; e < E; ++e) CHECK(got(t, e) == want(t, e), "token ", t, " expert ", e);
    }
  }
}

TEST(assign_capped_has_the_bits_of_the_cpu) {
  for_each_size([](const Sizes& s, int64_t kind, Random& random) {
    const int64_t B = std::max<int64_t>(s.B, 1);
    const Array values = wild_array(random, {s.T, s.E}, kind), sequence_ids = maybe_sequences(random, s);
    const Array limits = limits_of(random, B, s.T);
    const Real real(sequence_ids, s.T, B);
    if (s.E > 100) return;  // assign_capped_of_long_rows has more
    const Array real_values = real.rows(values), real_limits = at_least_zero(limits);
    const int64_t cap = kind % 2 == 0 ? 1 : 3;
    Array want(DType::kFloat32, {std::ssize(real.tokens), s.E}), got(DType::kFloat32, {s.T, s.E});
    const auto args = [&](const Array& given, const Array& ids, const Array& most, Array& out) {
      return AssignCappedArgs{.values = given,
                              .sequence_ids = ids,
                              .limits = most,
                              .cap = cap,
                              .entropy = kind % 2 == 0 ? 0.05 : 1.0,
                              .iterations = 3,
                              .tolerance = cap == 1 ? 0.0 : 0.02,
                              .assignment = out};
    };
    cpu_backend().assign_capped(args(real_values, real.ids, real_limits, want), {1});
    run_op({&got}, [&](Execution exec) { cuda::assign_capped(args(values, sequence_ids, limits, got), exec); });
    for (int64_t t = 0; t < s.T; ++t) {
      if (std::find(real.tokens.begin(), real.tokens.end(), t) == real.tokens.end()) {
        CHECK(got(t, 0) == -static_cast<float>(std::sqrt(double{FLT_MAX})) &&
                  got(t, s.E - 1) == -static_cast<float>(std::sqrt(double{FLT_MAX})),
              "token ", t, " has no sequence");
      }
    }
    for (int64_t i = 0; i < std::ssize(real.tokens); ++i) {
      for (int64_t e = 0; e < s.E; ++e) {
        CHECK(
            std::bit_cast<uint32_t>(got(real.tokens[static_cast<size_t>(i)], e)) == std::bit_cast<uint32_t>(want(i, e)),
            "token ", real.tokens[static_cast<size_t>(i)], " expert ", e, ": ", want(i, e), " on the CPU, got ",
            got(real.tokens[static_cast<size_t>(i)], e));
      }
    }
  });
}

}  // namespace
}  // namespace switchgear::test
