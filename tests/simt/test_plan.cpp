// SPDX-License-Identifier: BSD-3-Clause
#include "cases.h"
#include "plan.h"
#include "run_op.h"

namespace switchgear::test {
namespace {

// Ids outside [0,E) are empty slots.
Array without_wild_ids(const Array& ids, int64_t num_experts) {
  Array result = ids;
  result.fill([&](int64_t i) -> int64_t {
    const int32_t id = ids.id(i / ids.size(1), i % ids.size(1));
    return id >= 0 && id < num_experts ? id : -1;
  });
  return result;
}

void check_plan(const Array& ids, int64_t num_experts) {
  const PlanArrays want = reference_plan(without_wild_ids(ids, num_experts), num_experts);
  PlanArrays got(ids.size(0), ids.size(1), num_experts);
  run_op({&got.expert_offsets, &got.token_indices, &got.slot_indices},
         [&](Execution exec) { cuda::plan({.topk_ids = ids, .plan = got.plan()}, exec); });
  CHECK(same_bits(got.expert_offsets, want.expert_offsets));
  CHECK(same_bits(got.token_indices, want.token_indices));
  CHECK(same_bits(got.slot_indices, want.slot_indices));
}

TEST(plan_matches_reference) {
  for_each_case([](const Case& c) {
    Random random(1);
    check_plan(make_ids(random, c), c.E);
  });
}

enum class Spread { kEven, kOneExpert, kFew, kRuns, kWild };

int32_t draw_id(Random& random, Spread spread, int64_t i, int64_t E) {
  switch (spread) {
    case Spread::kEven: return static_cast<int32_t>(random.below(E));
    case Spread::kOneExpert: return static_cast<int32_t>(E - 1);
    case Spread::kFew: return static_cast<int32_t>(random.below(2) * (E - 1));
    case Spread::kRuns: return static_cast<int32_t>(i / 40 * 7 % E);  // experts change within a warp's 32 pairs
    case Spread::kWild: break;
  }
  constexpr int32_t kExtremes[] = {INT32_MIN, INT32_MAX, -2, -1, 2071690107};
  const int64_t kind = random.below(8);
  if (kind < std::ssize(kExtremes)) return kExtremes[kind];
  return static_cast<int32_t>(kind == 5 ? E : random.below(E));
}

// Sizes around those at which a warp, a segment, a chunk, a window or the algorithm changes.
TEST(plan_at_the_edges_of_its_pieces) {
  struct Sizes {
    int64_t T, K, E;
  };
  constexpr Sizes kSizes[] = {{1, 1, 1},       {0, 3, 7},      {31, 1, 32},   {32, 1, 33},   {33, 2, 1},
                              {1, 8, 128},     {100, 8, 64},   {1, 4, 4096},  {3, 2, 11264}, {3, 2, 11265},
                              {0, 2, 12000},   {1024, 8, 16},  {8193, 1, 16}, {2731, 3, 8},  {5120, 2, 1024},
                              {1025, 8, 1025}, {2100, 4, 2500}};
  int variant = 0;
  for (const auto& [T, K, E] : kSizes) {
    for (const Spread spread : {Spread::kEven, Spread::kOneExpert, Spread::kFew, Spread::kRuns, Spread::kWild}) {
      if ((T * K > 4096 || T == 0) && spread != Spread::kEven && spread != Spread::kWild) continue;
      if (E > 4096 && spread != Spread::kWild) continue;
      if (!takes_variant(variant++)) continue;
      note = join("T=", T, " K=", K, " E=", E, " spread ", static_cast<int>(spread));
      Random random(static_cast<uint64_t>(T + 7 * K + 31 * E));
      Array ids(DType::kInt32, {T, K});
      ids.fill([&](int64_t i) { return draw_id(random, spread, i, E); });
      check_plan(ids, E);
    }
  }
}

// As many experts as counters in 48 KB, and blocks as large as the launch bounds.
TEST(plan_of_48_kb) {
  Random random(3);
  for (const auto& [T, E] : {std::pair<int64_t, int64_t>{3, 12288}, {1024, 8}}) {
    note = join("T=", T, " E=", E);
    Array ids(DType::kInt32, {T, 2});
    ids.fill([&](int64_t i) { return draw_id(random, Spread::kEven, i, E); });
    check_plan(ids, E);
  }
}

TEST(plan_fuzz) {
  const int64_t count = count_from("SWITCHGEAR_FUZZ_COUNT", 150);
  for (int64_t i = 0; i < count; ++i) {
    Random random(static_cast<uint64_t>(i));
    note = join("seed ", i);
    const int64_t T = random.below(60), K = 1 + random.below(9), E = 1 + random.below(40);
    Array ids(DType::kInt32, {T, K});
    ids.fill([&](int64_t) -> int64_t {
      return random.below(16) == 0 ? static_cast<int32_t>(random.bits()) : random.below(E + 2) - 1;
    });
    check_plan(ids, E);
  }
}

TEST(plan_needs_memory_only_for_many_pairs) {
  CHECK(cuda::plan_workspace_size(8 * 64, 128) == 0);
  CHECK(cuda::plan_workspace_size(0, 128) == 0);
  CHECK(cuda::plan_workspace_size(8 * 32768, 128) == 4 * 128 * (128 + 1));
  // Never much more than the pairs themselves.
  for (const int64_t E : {1, 64, 4096, 100'000}) {
    for (const int64_t S : {0, 10'000, 1'000'000, 2'000'000'000}) {
      CHECK(cuda::plan_workspace_size(S, E) <= 4 * std::max(S, 2048 * (S / 2048)) + 8 * E + 4 * E, "S=", S, " E=", E);
    }
  }
}

}  // namespace
}  // namespace switchgear::test
