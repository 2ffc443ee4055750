// SPDX-License-Identifier: BSD-3-Clause
#include "cases.h"
#include "race.h"
#include "run_op.h"

namespace switchgear::test {
namespace {

template <typename Body>
void for_each_problem(Body&& body) {
  for_each_case([&](const Case& c) {
    const std::string name = note;
    for (const DType dtype : kFloatTypes) {
      for (const Rows rows : {Rows::kAnywhere, Rows::kAligned}) {
        note = join(name, " ", name_of(dtype), rows == Rows::kAligned ? " aligned" : "");
        Random random(7);
        const Array ids = make_ids(random, c);
        body(c, rows, reference_plan(ids, c.E), random_rows(rows, random, dtype, c.T, c.H),
             random_array(random, DType::kFloat32, {c.T, c.K}));
      }
    }
  });
}

Array run(const Array& x, const Plan& plan, const TensorView& weights, Rows rows, int64_t num_slots) {
  Array got = make_rows(rows, x.view().dtype, num_slots, x.size(1));
  run_op({&got}, [&](Execution exec) {
    cuda::permute({.x = x, .plan = plan, .topk_weights = weights, .permuted_x = got}, exec);
  });
  return got;
}

TEST(permute_gathers_rows) {
  for_each_problem([](const Case& c, Rows rows, const PlanArrays& plan, const Array& x, const Array&) {
    const Array got = run(x, plan.plan(), {}, rows, c.T * c.K);
    for (int64_t s = 0; s < c.T * c.K; ++s) {
      const int32_t token = plan.token_indices.id(s);
      for (int64_t h = 0; h < c.H; ++h) CHECK(got(s, h) == (token < 0 ? 0.0f : x(token, h)), "slot ", s);
    }
  });
}

TEST(permute_scales_rows) {
  for_each_problem([](const Case& c, Rows rows, const PlanArrays& plan, const Array& x, const Array& weights) {
    const Array got = run(x, plan.plan(), weights, rows, c.T * c.K);
    for (int64_t s = plan.used(); s < c.T * c.K; ++s) {
      for (int64_t h = 0; h < c.H; ++h) CHECK(got(s, h) == 0.0f);
    }
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t k = 0; k < c.K; ++k) {
        const int32_t slot = plan.slot_indices.id(t, k);
        for (int64_t h = 0; slot >= 0 && h < c.H; ++h) {
          CHECK(got(slot, h) == round_to(x(t, h) * weights(t, k), x.view().dtype), "slot ", slot);
        }
      }
    }
  });
}

// Every tail, and rows of several blocks of columns.
TEST(permute_at_every_width) {
  const Case c{"widths", 5, 0, 0, 3, 2};
  for (const int64_t H : {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 1023, 1024, 1025, 2048, 2057, 4104}) {
    for (const Rows rows : {Rows::kAnywhere, Rows::kAligned}) {
      note = join("H=", H, rows == Rows::kAligned ? " aligned" : "");
      Random random(static_cast<uint64_t>(H));
      const PlanArrays plan = reference_plan(make_ids(random, c), c.E);
      const Array x = random_rows(rows, random, DType::kBFloat16, c.T, H);
      const Array got = run(x, plan.plan(), {}, rows, c.T * c.K);
      for (int64_t s = 0; s < c.T * c.K; ++s) {
        for (int64_t h = 0; h < H; ++h) CHECK(got(s, h) == x(plan.token_indices.id(s), h), "slot ", s);
      }
    }
  }
}

// A user-supplied plan: rows that no token writes follow token_indices, and nothing is read or written out of range. If two
// tokens lead to a slot, its row is unspecified, so the test has no such slots. Under the race detector token_indices of a
// claimed slot names the same token.
TEST(permute_writes_all_rows_of_any_plan) {
  const int64_t T = 6, K = 3, H = 40, S = T * K;
  for (int64_t seed = 0; seed < 40; ++seed) {
    note = join("seed ", seed);
    Random random(static_cast<uint64_t>(seed));
    PlanArrays plan(T, K, 2);
    const auto wild = [&](int64_t n) {
      return random.below(4) == 0 ? static_cast<int32_t>(random.bits()) : static_cast<int32_t>(random.below(n + 1) - 1);
    };
    plan.token_indices.fill([&](int64_t) { return wild(T); });
    std::vector<int32_t> slots(static_cast<size_t>(S));
    for (int32_t s = 0; s < S; ++s) slots[static_cast<size_t>(s)] = s;
    for (size_t i = slots.size(); i > 1; --i) std::swap(slots[i - 1], slots[static_cast<size_t>(random.below(i))]);
    constexpr int32_t kOutside[] = {INT32_MIN, -2, -1, S, S + 1, INT32_MAX};
    plan.slot_indices.fill([&](int64_t i) {
      return random.below(3) == 0 ? kOutside[random.below(std::ssize(kOutside))] : slots[static_cast<size_t>(i)];
    });
    for (int64_t i = 0; i < S && simt::race::enabled; ++i) {
      const int32_t slot = plan.slot_indices.id(i / K, i % K);
      if (slot >= 0 && slot < S) plan.token_indices.set_id(static_cast<int32_t>(i / K), slot);
    }
    const int32_t used = wild(S);
    plan.expert_offsets.fill([&](int64_t e) { return e == 2 ? used : 0; });
    const Array x = random_rows(Rows::kAligned, random, DType::kFloat32, T, H);
    Array got = make_rows(Rows::kAligned, DType::kFloat32, S, H);
    OpMemory memory(0xff);
    cuda::permute({.x = x, .plan = plan.plan(), .permuted_x = got}, memory.execution());
    for (int64_t s = 0; s < S; ++s) {
      const int32_t token = plan.token_indices.id(s);
      bool claimed = false;
      for (int64_t i = 0; i < S; ++i) claimed |= plan.slot_indices.id(i / K, i % K) == s;
      const bool row = s < used && token >= 0 && token < T;
      for (int64_t h = 0; h < H; ++h) {
        CHECK(std::isfinite(got(s, h)));
        if (s >= used || !claimed) CHECK(got(s, h) == (row ? x(token, h) : 0.0f), "slot ", s);
      }
    }
  }
}

}  // namespace
}  // namespace switchgear::test
