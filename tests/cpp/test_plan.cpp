// SPDX-License-Identifier: BSD-3-Clause
#include "cases.h"

namespace switchgear::test {
namespace {

TEST(plan_matches_reference) {
  for_each_case([](const Case& c) {
    Random random(1);
    const Array ids = make_ids(random, c);
    const PlanArrays want = reference_plan(ids, c.E);
    PlanArrays got(c.T, c.K, c.E);
    for_each_isa(
        {&got.expert_offsets, &got.token_indices, &got.slot_indices},
        [&](Execution exec) { plan({.topk_ids = ids, .plan = got.plan()}, exec); },
        [&] {
          CHECK(same_bits(got.expert_offsets, want.expert_offsets));
          CHECK(same_bits(got.token_indices, want.token_indices));
          CHECK(same_bits(got.slot_indices, want.slot_indices));
        });
  });
}

// Every size around a power of two, a warp or a block at which other libraries fail, up to thousands of experts.
TEST(plan_over_the_lattice_of_sizes) {
  const bool all = count_from("SWITCHGEAR_SLOW", 0) != 0;
  int64_t cases = 0;
  for (const int64_t E : {1,   2,   3,   5,   7,   8,   13,  31,  32,   33,   60,   64,   127,  128, 129,
                          160, 255, 256, 257, 384, 511, 512, 513, 1000, 1023, 1024, 1025, 2048, 4096}) {
    for (const int64_t K : {int64_t{1}, int64_t{2}, int64_t{6}, int64_t{8}, int64_t{10}, int64_t{32}, int64_t{33}, E}) {
      for (const int64_t T : {0, 1, 31, 32, 33, 1023, 1025}) {
        if (K > E || (!all && T > 33)) continue;
        note = join("T=", T, " K=", K, " E=", E);
        Random random(static_cast<uint64_t>(E * 7919 + K * 31 + T));
        const Array ids = make_ids(random, {"", T, 1, 1, E, K});
        const PlanArrays want = reference_plan(ids, E);
        PlanArrays got(T, K, E);
        plan({.topk_ids = ids, .plan = got.plan()}, {static_cast<int>(1 + cases++ % 5)});
        CHECK(same_bits(got.expert_offsets, want.expert_offsets));
        CHECK(same_bits(got.token_indices, want.token_indices));
        CHECK(same_bits(got.slot_indices, want.slot_indices));
      }
    }
  }
}

// One large plan, so that every number of threads cuts the tokens into several chunks.
TEST(plan_in_chunks) {
  Random random(2);
  const Case c{"", 20'011, 1, 1, 67, 6, Ids::kEmptySlots};
  const Array ids = make_ids(random, c);
  const PlanArrays want = reference_plan(ids, c.E);
  PlanArrays got(c.T, c.K, c.E);
  for (const int threads : {1, 2, 3, 5, 8}) {
    for (Array* array : {&got.expert_offsets, &got.token_indices, &got.slot_indices}) array->poison();
    plan({.topk_ids = ids, .plan = got.plan()}, {threads});
    CHECK(same_bits(got.expert_offsets, want.expert_offsets), threads);
    CHECK(same_bits(got.token_indices, want.token_indices), threads);
    CHECK(same_bits(got.slot_indices, want.slot_indices), threads);
  }
}

// ---- fuzzing -----------------------------------------------------------------------------------------------------------

// What a buffer of ids holds after an error upstream.
int32_t wild_id(Random& random, int64_t num_experts) {
  constexpr int32_t kExtremes[] = {INT32_MIN, INT32_MIN + 1, INT32_MAX, -2, 2071690107, 123456789};
  switch (random.below(6)) {
    case 0: return static_cast<int32_t>(random.bits());
    case 1: return std::bit_cast<int32_t>(random.normal());  // a stale float
    case 2: return std::bit_cast<int32_t>(NAN);
    case 3: return static_cast<int32_t>(num_experts);  // an out-of-range sentinel
    default: return kExtremes[random.below(std::ssize(kExtremes))];
  }
}

bool valid(const Array& ids, int64_t num_experts) {
  for (int64_t t = 0; t < ids.size(0); ++t) {
    for (int64_t k = 0; k < ids.size(1); ++k) {
      if (ids.id(t, k) < -1 || ids.id(t, k) >= num_experts) return false;
    }
  }
  return true;
}

// Each pair with an expert has one slot, in that expert's range, that maps back to its token. The ranges are monotone and end
// at the number of such pairs; the other slots are -1.
bool invariants_hold(const Array& ids, const PlanArrays& p, int64_t num_experts) {
  if (p.expert_offsets.id(0) != 0) return false;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (p.expert_offsets.id(e) > p.expert_offsets.id(e + 1)) return false;
  }
  std::vector<bool> taken(static_cast<size_t>(p.num_slots()));
  int64_t pairs = 0;
  for (int64_t t = 0; t < ids.size(0); ++t) {
    for (int64_t k = 0; k < ids.size(1); ++k) {
      const int32_t expert = ids.id(t, k), slot = p.slot_indices.id(t, k);
      if (expert == -1) {
        if (slot != -1) return false;
        continue;
      }
      ++pairs;
      if (slot < p.expert_offsets.id(expert) || slot >= p.expert_offsets.id(expert + 1)) return false;
      if (taken[static_cast<size_t>(slot)] || p.token_indices.id(slot) != t) return false;
      taken[static_cast<size_t>(slot)] = true;
    }
  }
  for (int64_t s = pairs; s < p.num_slots(); ++s) {
    if (p.token_indices.id(s) != -1) return false;
  }
  return p.used() == pairs;
}

TEST(plan_fuzz) {
  const int64_t count = count_from("SWITCHGEAR_FUZZ_COUNT", 10'000);
  int64_t refused = 0;
  for (int64_t i = 0; i < count; ++i) {
    Random random(static_cast<uint64_t>(i));
    note = join("seed ", i);
    const int64_t T = random.below(18), K = 1 + random.below(9), E = 1 + random.below(20);
    const int64_t wildness = random.below(3);  // 0: only valid ids
    Array ids(DType::kInt32, {T, K});
    ids.fill([&](int64_t) -> int64_t {
      if (wildness > 0 && random.below(16) < wildness) return wild_id(random, E);
      return random.below(E + 1) - 1;
    });
    const bool good = valid(ids, E);
    refused += !good;
    PlanArrays got(T, K, E);
    const PlanArrays untouched = got;
    std::string message;
    try {
      plan({.topk_ids = ids, .plan = got.plan()}, {static_cast<int>(1 + random.below(3))});
    } catch (const ValueError& error) {
      message = error.what();
    }
    if (good) {
      CHECK(message.empty(), message);
      CHECK(invariants_hold(ids, got, E));
    } else {
      CHECK(message.find("topk_ids") != std::string::npos, message);
      CHECK(got.expert_offsets.bytes() == untouched.expert_offsets.bytes());
      CHECK(got.token_indices.bytes() == untouched.token_indices.bytes());
      CHECK(got.slot_indices.bytes() == untouched.slot_indices.bytes());
    }
  }
  CHECK(refused > count / 10 && refused < count - count / 10, refused, " of ", count, " plans were refused");
}

}  // namespace
}  // namespace switchgear::test
