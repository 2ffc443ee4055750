// SPDX-License-Identifier: BSD-3-Clause
#include "bounded.h"

namespace switchgear::test {
namespace {

struct Sizes {
  int64_t T, E, H;
};

// One token, a single tile of rows, pieces of rows (48 and 144) and of columns; panels, and chunks of 1024 words of depth.
// Then products for 5 threads, which share the rows (T = 301) or the columns (E = 301), and more depth than is widened
// to float32 at once (8192).
constexpr Sizes kSizes[] = {{0, 3, 8},     {1, 1, 1},    {1, 70, 33},   {6, 9, 2100},  {7, 64, 130}, {49, 5, 300},
                            {150, 67, 16}, {290, 8, 40}, {301, 67, 33}, {5, 301, 450}, {3, 2, 8300}};

struct Problem {
  Problem(const Sizes& s, DType dtype, DType weight_dtype, DType logits_dtype)
      : x(random_array(random, dtype, {s.T, s.H}, 1.0, 3)),
        weight(random_array(random, weight_dtype, {s.E, s.H}, 1.0, 1)),
        bias(random_array(random, weight_dtype, {s.E})),
        logits(logits_dtype, {s.T, s.E}, 2) {}

  GateArgs args() { return {.x = x, .weight = weight, .bias = bias, .router_logits = logits}; }

  Random random{5};
  Array x, weight, bias, logits;
};

TEST(gate_matches_reference) {
  for (const Sizes& s : kSizes) {
    for (const DType dtype : kFloatTypes) {
      for (const bool wide_weight : {false, true}) {
        note = join("T=", s.T, " E=", s.E, " H=", s.H, " ", name_of(dtype), wide_weight ? ", float32 weight" : "");
        const DType weight_dtype = wide_weight ? DType::kFloat32 : dtype;
        Problem p(s, dtype, weight_dtype, s.E % 2 == 0 ? DType::kFloat32 : weight_dtype);
        for_each_isa(
            {&p.logits}, [&](Execution exec) { gate(p.args(), exec); },
            [&] {
              for (int64_t t = 0; t < s.T; ++t) {
                for (int64_t e = 0; e < s.E; ++e) {
                  Sum sum;
                  for (int64_t k = 0; k < s.H; ++k) sum.add({p.x(t, k)}, {p.weight(e, k)});
                  sum.add({p.bias(e)});
                  CHECK_CLOSE(p.logits(t, e), rounded(sum.result(), p.logits.view().dtype), "token ", t, " expert ", e);
                }
              }
            });
      }
    }
  }
}

TEST(gate_route_is_gate_and_route) {
  for (const DType dtype : kFloatTypes) {
    note = name_of(dtype);
    Problem p({37, 12, 50}, dtype, dtype, dtype);
    const RouteOptions options{
        .top_k = 3, .score_function = ScoreFunction::kSigmoid, .normalize = true, .num_groups = 3, .topk_groups = 2};
    Array bias = random_array(p.random, DType::kFloat32, {12}), logits(dtype, {37, 12});
    Array ids(DType::kInt32, {37, 3}), weights(DType::kFloat32, {37, 3}), want_ids = ids, want_weights = weights;
    GateArgs separate = p.args();
    separate.router_logits = logits;
    for_each_isa(
        {&p.logits, &ids, &weights},
        [&](Execution exec) {
          gate_route(
              {.gate = p.args(), .selection_bias = bias, .options = options, .topk_ids = ids, .topk_weights = weights},
              exec);
        },
        [&] {
          gate(separate, {1});
          route({.router_logits = logits,
                 .selection_bias = bias,
                 .options = options,
                 .topk_ids = want_ids,
                 .topk_weights = want_weights},
                {1});
          for (int64_t i = 0; i < logits.numel(); ++i) CHECK(logits(i / 12, i % 12) == p.logits(i / 12, i % 12));
          CHECK(same_bits(ids, want_ids));
          CHECK(same_bits(weights, want_weights));
        });
  }
}

}  // namespace
}  // namespace switchgear::test
