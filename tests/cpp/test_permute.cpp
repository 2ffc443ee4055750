// SPDX-License-Identifier: BSD-3-Clause
#include "bounded.h"
#include "cases.h"

namespace switchgear::test {
namespace {

// A layer's tokens, choices and their plan.
struct Problem {
  Problem(const Case& c, DType dtype, uint64_t seed)
      : random(seed),
        ids(make_ids(random, c)),
        plan(reference_plan(ids, c.E)),
        weights(random_array(random, DType::kFloat32, {c.T, c.K})),
        x(random_array(random, dtype, {c.T, c.H}, 1.0, 3)),
        permuted(random_array(random, dtype, {c.T * c.K, c.H}, 1.0, 2)) {}

  Random random;
  Array ids;
  PlanArrays plan;
  Array weights;
  Array x;         // [T,H]
  Array permuted;  // [S,H]
};

template <typename Body>
void for_each_problem(Body&& body) {
  for_each_case([&](const Case& c) {
    const std::string name = note;
    for (const DType dtype : kFloatTypes) {
      note = name + " " + name_of(dtype);
      body(c, dtype, Problem(c, dtype, 7));
    }
  });
}

TEST(permute_gathers_rows) {
  for_each_problem([](const Case& c, DType dtype, const Problem& p) {
    Array got(dtype, {c.T * c.K, c.H}, 1);
    const auto run = [&](Execution exec) { permute({.x = p.x, .plan = p.plan.plan(), .permuted_x = got}, exec); };
    for_each_isa({&got}, run, [&] {
      for (int64_t s = 0; s < c.T * c.K; ++s) {
        const int32_t token = p.plan.token_indices.id(s);
        for (int64_t h = 0; h < c.H; ++h) CHECK(got(s, h) == (token < 0 ? 0.0f : p.x(token, h)), "slot ", s);
      }
    });
  });
}

TEST(permute_scales_rows) {
  for_each_problem([](const Case& c, DType dtype, const Problem& p) {
    Array got(dtype, {c.T * c.K, c.H}, 1);
    const auto run = [&](Execution exec) {
      permute({.x = p.x, .plan = p.plan.plan(), .topk_weights = p.weights, .permuted_x = got}, exec);
    };
    for_each_isa({&got}, run, [&] {
      for (int64_t s = p.plan.used(); s < c.T * c.K; ++s) {
        for (int64_t h = 0; h < c.H; ++h) CHECK(got(s, h) == 0.0f);
      }
      for (int64_t t = 0; t < c.T; ++t) {
        for (int64_t k = 0; k < c.K; ++k) {
          const int32_t slot = p.plan.slot_indices.id(t, k);
          if (slot < 0) continue;
          for (int64_t h = 0; h < c.H; ++h) {
            CHECK(got(slot, h) == round_to(p.x(t, h) * p.weights(t, k), dtype), "slot ", slot);
          }
        }
      }
    });
  });
}

TEST(combine_matches_reference) {
  for (const bool weighted : {false, true}) {
    for_each_problem([weighted](const Case& c, DType dtype, const Problem& p) {
      Array got(dtype, {c.T, c.H}, 5);
      const auto run = [&](Execution exec) {
        combine({.permuted_y = p.permuted,
                 .plan = p.plan.plan(),
                 .topk_weights = weighted ? p.weights.view() : TensorView{},
                 .y = got},
                exec);
      };
      for_each_isa({&got}, run, [&] {
        for (int64_t t = 0; t < c.T; ++t) {
          for (int64_t h = 0; h < c.H; ++h) {
            Sum sum;
            for (int64_t k = 0; k < c.K; ++k) {
              const int32_t slot = p.plan.slot_indices.id(t, k);
              if (slot >= 0) sum.add({p.permuted(slot, h)}, {weighted ? p.weights(t, k) : 1.0f});
            }
            CHECK_CLOSE(got(t, h), rounded(sum.result(), dtype), "token ", t);
          }
        }
      });
    });
  }
}

TEST(combine_weight_backward_matches_reference) {
  for_each_problem([](const Case& c, DType, const Problem& p) {
    Array got(DType::kFloat32, {c.T, c.K});
    const auto run = [&](Execution exec) {
      combine_weight_backward(
          {.grad_y = p.x, .permuted_y = p.permuted, .plan = p.plan.plan(), .grad_topk_weights = got}, exec);
    };
    for_each_isa({&got}, run, [&] {
      for (int64_t t = 0; t < c.T; ++t) {
        for (int64_t k = 0; k < c.K; ++k) {
          const int32_t slot = p.plan.slot_indices.id(t, k);
          Sum sum;
          for (int64_t h = 0; slot >= 0 && h < c.H; ++h) sum.add({p.x(t, h)}, {p.permuted(slot, h)});
          CHECK_CLOSE(got(t, k), sum.result(), "token ", t);
          if (slot < 0) CHECK(got(t, k) == 0.0f);
        }
      }
    });
  });
}

// Rows of every length up to four vectors of every ISA and around two large lengths, to cover every tail.
TEST(permute_and_combine_at_every_width) {
  std::vector<int64_t> widths;
  for (int64_t H = 1; H <= 257; ++H) widths.push_back(H);
  for (int64_t H : {2879, 2880, 2881, 7167, 7168, 7169}) widths.push_back(H);
  for (const int64_t H : widths) {
    for (const DType dtype : kFloatTypes) {
      note = join("H=", H, " ", name_of(dtype));
      const Problem p({"", 3, H, 1, 4, 2}, dtype, 8);
      Array permuted(dtype, {6, H}), y(dtype, {3, H});
      const auto run = [&](Execution exec) {
        permute({.x = p.x, .plan = p.plan.plan(), .permuted_x = permuted}, exec);
        combine({.permuted_y = permuted, .plan = p.plan.plan(), .y = y}, exec);
      };
      for_each_isa({&permuted, &y}, run, [&] {
        for (int64_t t = 0; t < 3; ++t) {  // both slots hold the token's row, and doubling is exact
          for (int64_t h = 0; h < H; ++h) CHECK(y(t, h) == 2.0f * p.x(t, h));
        }
      });
    }
  }
}

// Inconsistent plans are legal input as long as their indices are in range. Every row is still written.
TEST(permute_writes_every_row_of_an_inconsistent_plan) {
  Random random(9);
  for (int i = 0; i < 200; ++i) {
    const int64_t T = 1 + random.below(9), K = 1 + random.below(4), E = 1 + random.below(5), H = 1 + random.below(40);
    note = join("plan ", i);
    PlanArrays p(T, K, E);
    int32_t slot = 0;
    p.expert_offsets.fill(
        [&](int64_t e) { return e == 0 ? 0 : slot += static_cast<int32_t>(random.below(T * K - slot + 1)); });
    p.token_indices.fill([&](int64_t) { return random.below(T); });
    p.slot_indices.fill([&](int64_t) { return random.below(T * K + 1) - 1; });
    const Array x = random_array(random, DType::kBFloat16, {T, H});
    const Array weights = random_array(random, DType::kFloat32, {T, K});
    Array permuted(DType::kBFloat16, {T * K, H}), y(DType::kBFloat16, {T, H});
    for_each_isa(
        {&permuted, &y},
        [&](Execution exec) {
          permute({.x = x, .plan = p.plan(), .topk_weights = weights, .permuted_x = permuted}, exec);
          combine({.permuted_y = permuted, .plan = p.plan(), .topk_weights = weights, .y = y}, exec);
        },
        [&] {
          for (int64_t t = 0; t < T; ++t) {
            for (int64_t h = 0; h < H; ++h) CHECK(std::isfinite(y(t, h)));
          }
        });
  }
}

}  // namespace
}  // namespace switchgear::test
