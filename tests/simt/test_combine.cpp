// SPDX-License-Identifier: BSD-3-Clause
#include "bounded.h"
#include "cases.h"
#include "run_op.h"

namespace switchgear::test {
namespace {

struct Problem {
  Problem(const Case& c, DType dtype, Rows rows, uint64_t seed)
      : random(seed),
        ids(make_ids(random, c)),
        plan(reference_plan(ids, c.E)),
        weights(random_array(random, DType::kFloat32, {c.T, c.K})),
        permuted(random_rows(rows, random, dtype, c.T * c.K, c.H)),
        grad_y(random_rows(rows, random, dtype, c.T, c.H)),
        y(make_rows(rows, dtype, c.T, c.H)) {}

  Random random;
  Array ids;
  PlanArrays plan;
  Array weights;
  Array permuted;  // [S,H]
  Array grad_y;    // [T,H]
  Array y;
};

template <typename Body>
void for_each_problem(Body&& body) {
  int variant = 0;
  for_each_case([&](const Case& c) {
    const std::string name = note;
    for (const DType dtype : kFloatTypes) {
      for (const Rows rows : {Rows::kAnywhere, Rows::kAligned}) {
        note = join(name, " ", name_of(dtype), rows == Rows::kAligned ? " aligned" : "");
        if (!takes_variant(variant++)) continue;
        Problem p(c, dtype, rows, 7);
        body(c, dtype, p);
      }
    }
  });
}

void run_combine(Problem& p, bool weighted) {
  run_op({&p.y}, [&](Execution exec) {
    cuda::combine({.permuted_y = p.permuted,
                   .plan = p.plan.plan(),
                   .topk_weights = weighted ? p.weights.view() : TensorView{},
                   .y = p.y},
                  exec);
  });
}

TEST(combine_matches_reference) {
  for (const bool weighted : {false, true}) {
    for_each_problem([weighted](const Case& c, DType dtype, Problem& p) {
      run_combine(p, weighted);
      for (int64_t t = 0; t < c.T; ++t) {
        for (int64_t h = 0; h < c.H; ++h) {
          Sum sum;
          for (int64_t k = 0; k < c.K; ++k) {
            const int32_t slot = p.plan.slot_indices.id(t, k);
            if (slot >= 0) sum.add({p.permuted(slot, h)}, {weighted ? p.weights(t, k) : 1.0f});
          }
          CHECK_CLOSE(p.y(t, h), rounded(sum.result(), dtype), "token ", t);
        }
      }
    });
  }
}

Array weight_gradients(Problem& p) {
  Array got(DType::kFloat32, {p.grad_y.size(0), p.ids.size(1)});
  run_op({&got}, [&](Execution exec) {
    cuda::combine_weight_backward(
        {.grad_y = p.grad_y, .permuted_y = p.permuted, .plan = p.plan.plan(), .grad_topk_weights = got}, exec);
  });
  return got;
}

TEST(combine_weight_backward_matches_reference) {
  for_each_problem([](const Case& c, DType, Problem& p) {
    const Array got = weight_gradients(p);
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t k = 0; k < c.K; ++k) {
        const int32_t slot = p.plan.slot_indices.id(t, k);
        Sum sum;
        for (int64_t h = 0; slot >= 0 && h < c.H; ++h) sum.add({p.grad_y(t, h)}, {p.permuted(slot, h)});
        CHECK_CLOSE(got(t, k), sum.result(), "token ", t);
        if (slot < 0) CHECK(got(t, k) == 0.0f);
      }
    }
  });
}

// Every tail, K below and above the number of rows in flight, and rows of several blocks of columns. Alignment changes no
// bits.
TEST(combine_at_every_width) {
  int variant = 0;
  for (const int64_t H : {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 255, 256, 257, 2057, 4104}) {
    for (const int64_t K : {1, 4, 5, 9}) {
      if (H > 300 && K == 4) continue;
      const Case c{"widths", 3, H, 0, 10, K};
      for (const DType dtype : kFloatTypes) {
        note = join("H=", H, " K=", K, " ", name_of(dtype));
        if (!takes_variant(variant++)) continue;
        Problem aligned(c, dtype, Rows::kAligned, 5), anywhere(c, dtype, Rows::kAnywhere, 5);
        run_combine(aligned, true);
        run_combine(anywhere, true);
        for (int64_t t = 0; t < c.T; ++t) {
          for (int64_t h = 0; h < H; ++h) {
            Sum sum;
            for (int64_t k = 0; k < K; ++k) {
              sum.add({aligned.permuted(aligned.plan.slot_indices.id(t, k), h)}, {aligned.weights(t, k)});
            }
            CHECK_CLOSE(aligned.y(t, h), rounded(sum.result(), dtype), "token ", t);
          }
        }
        CHECK(same_bits(aligned.y, anywhere.y));
        CHECK(same_bits(weight_gradients(aligned), weight_gradients(anywhere)));
      }
    }
  }
}

TEST(combine_steps_over_slots_out_of_range) {
  const Case c{"wild slots", 9, 21, 0, 4, 3};
  for (const DType dtype : kFloatTypes) {
    Problem p(c, dtype, Rows::kAligned, 3), clean(c, dtype, Rows::kAligned, 3);
    for (int64_t t = 0; t < c.T; ++t) {
      const int64_t k = t % c.K;
      constexpr int32_t kWild[] = {INT32_MIN, -2, 27, 28, INT32_MAX};
      p.plan.slot_indices.set_id(kWild[t % 5], t, k);
      clean.plan.slot_indices.set_id(-1, t, k);
    }
    run_combine(p, true);
    run_combine(clean, true);
    CHECK(same_bits(p.y, clean.y));
    CHECK(same_bits(weight_gradients(p), weight_gradients(clean)));
  }
}

// A token's result depends only on its own slots.
TEST(combine_is_batch_invariant) {
  const Case c{"batch", 12, 37, 0, 5, 3};
  Problem p(c, DType::kBFloat16, Rows::kAligned, 4);
  run_combine(p, true);
  const Array weights = weight_gradients(p);
  for (int64_t t = 0; t < c.T; ++t) {
    Problem one({"one", 1, c.H, 0, c.E, c.K}, DType::kBFloat16, Rows::kAligned, 4);
    for (int64_t k = 0; k < c.K; ++k) {
      one.plan.slot_indices.set_id(static_cast<int32_t>(k), 0, k);
      one.weights.set(p.weights(t, k), 0, k);
      for (int64_t h = 0; h < c.H; ++h) one.permuted.set(p.permuted(p.plan.slot_indices.id(t, k), h), k, h);
    }
    for (int64_t h = 0; h < c.H; ++h) one.grad_y.set(p.grad_y(t, h), 0, h);
    run_combine(one, true);
    for (int64_t h = 0; h < c.H; ++h) CHECK(one.y(0, h) == p.y(t, h), "token ", t);
    const Array own = weight_gradients(one);
    for (int64_t k = 0; k < c.K; ++k) CHECK(own(0, k) == weights(t, k), "token ", t);
  }
}

}  // namespace
}  // namespace switchgear::test
