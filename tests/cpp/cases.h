// SPDX-License-Identifier: BSD-3-Clause
// The cases of all ops: sizes that are multiples of nothing, extremes, and the patterns of ids that break routers in
// practice. Reference plans are made here by sorting into buckets.
#pragma once
#include <cstdlib>

#include "support.h"

namespace switchgear::test {

enum class Ids { kDistinct, kDuplicates, kEmptySlots, kOneExpert, kLastExpert, kEvenExperts, kNone };

struct Case {
  const char* name;
  int64_t T, H, I, E, K;
  Ids ids = Ids::kDistinct;
};

constexpr Case kCases[] = {
    {"no tokens", 0, 16, 8, 4, 2},
    {"one token", 1, 33, 17, 5, 2},
    {"one of everything", 1, 1, 1, 1, 1},
    {"one expert", 13, 24, 12, 1, 1},
    {"one expert, chosen thrice", 7, 9, 5, 1, 3, Ids::kDuplicates},
    {"all experts chosen", 9, 31, 20, 6, 6},
    {"odd sizes", 37, 67, 43, 7, 3},
    {"one past the panels", 29, 129, 65, 4, 2},
    {"whole panels", 32, 128, 64, 4, 2},
    {"all to one", 50, 40, 24, 16, 1, Ids::kOneExpert},
    {"all to the last", 300, 19, 11, 9, 1, Ids::kLastExpert},
    {"odd experts empty", 41, 35, 21, 12, 2, Ids::kEvenExperts},
    {"more experts than slots", 3, 23, 13, 131, 2},
    {"empty slots", 45, 27, 30, 6, 4, Ids::kEmptySlots},
    {"a warp of experts, empty slots", 21, 24, 8, 32, 2, Ids::kEmptySlots},
    {"two warps of experts, empty slots", 13, 16, 9, 64, 3, Ids::kEmptySlots},
    {"nothing chosen", 11, 14, 10, 3, 2, Ids::kNone},
    {"duplicates", 26, 45, 18, 5, 4, Ids::kDuplicates},
    {"deep sums", 4, 1031, 38, 2, 1},
};

inline Array make_ids(Random& random, const Case& c) {
  Array ids(DType::kInt32, {c.T, c.K});
  std::vector<int32_t> experts;
  ids.fill([&](int64_t i) -> int64_t {
    const int64_t choice = i % c.K;
    switch (c.ids) {
      case Ids::kOneExpert: return c.E / 2;
      case Ids::kLastExpert: return c.E - 1;
      case Ids::kDuplicates: return random.below(c.E);
      case Ids::kEvenExperts: return 2 * ((choice + random.below(2)) % ((c.E + 1) / 2));
      case Ids::kEmptySlots: return random.below(3) == 0 ? -1 : random.below(c.E);
      case Ids::kNone: return -1;
      case Ids::kDistinct: break;
    }
    if (choice == 0) {
      experts.resize(static_cast<size_t>(c.E));
      for (int32_t e = 0; e < c.E; ++e) experts[static_cast<size_t>(e)] = e;
    }
    std::swap(experts[static_cast<size_t>(choice)], experts[static_cast<size_t>(choice + random.below(c.E - choice))]);
    return experts[static_cast<size_t>(choice)];
  });
  return ids;
}

struct PlanArrays {
  PlanArrays(int64_t T, int64_t K, int64_t E)
      : expert_offsets(DType::kInt32, {E + 1}),
        token_indices(DType::kInt32, {T * K}),
        slot_indices(DType::kInt32, {T, K}) {}

  Plan plan() const { return {expert_offsets, token_indices, slot_indices}; }
  int64_t num_slots() const { return token_indices.size(0); }
  int64_t used() const { return expert_offsets.id(expert_offsets.size(0) - 1); }

  Array expert_offsets, token_indices, slot_indices;
};

// Slots ordered by (expert, token, choice).
inline PlanArrays reference_plan(const Array& ids, int64_t num_experts) {
  PlanArrays result(ids.size(0), ids.size(1), num_experts);
  std::vector<std::vector<int64_t>> buckets(static_cast<size_t>(num_experts));
  for (int64_t t = 0; t < ids.size(0); ++t) {
    for (int64_t k = 0; k < ids.size(1); ++k) {
      if (ids.id(t, k) >= 0) buckets[static_cast<size_t>(ids.id(t, k))].push_back(t * ids.size(1) + k);
    }
  }
  result.slot_indices.fill([](int64_t) { return -1; });
  result.token_indices.fill([](int64_t) { return -1; });
  int32_t slot = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    result.expert_offsets.set_id(slot, e);
    for (const int64_t pair : buckets[static_cast<size_t>(e)]) {
      result.token_indices.set_id(static_cast<int32_t>(pair / ids.size(1)), slot);
      result.slot_indices.set_id(slot++, pair / ids.size(1), pair % ids.size(1));
    }
  }
  result.expert_offsets.set_id(slot, num_experts);
  return result;
}

// A list of trained experts: every second one, up to the last.
inline Array every_second(int64_t num_experts) {
  Array experts(DType::kInt32, {(num_experts + 1) / 2});
  experts.fill([&](int64_t i) { return (num_experts + 1) % 2 + 2 * i; });
  return experts;
}

// The gradients of some experts have the bits of those of all: got [E,…] and some [n,…].
inline bool same_experts(const Array& got, const Array& some, const Array& experts) {
  const int64_t columns = got.size(1), depth = got.view().ndim == 3 ? got.size(2) : 0;
  for (int64_t i = 0; i < experts.size(0); ++i) {
    const int64_t e = experts.id(i);
    for (int64_t j = 0; j < columns; ++j) {
      if (depth == 0 && got(e, j) != some(i, j)) return false;
      for (int64_t k = 0; k < depth; ++k) {
        if (got(e, j, k) != some(i, j, k)) return false;
      }
    }
  }
  return true;
}

// Calls body(case) for each case, with the case's name in `note`.
template <typename Body>
void for_each_case(Body&& body) {
  for (const Case& c : kCases) {
    note = c.name;
    body(c);
  }
  note.clear();
}

// `count` from the environment variable `name` if it is set; long runs raise it.
inline int64_t count_from(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoll(text) : otherwise;
}

}  // namespace switchgear::test
