// SPDX-License-Identifier: BSD-3-Clause
// A stable counting sort by group: which of n items are in each group, ascending.
#pragma once
#include <cstdint>
#include <vector>

namespace switchgear::cpu {

struct Grouping {
  std::vector<int32_t> offsets;  // [groups + 1]: group g has members[offsets[g], offsets[g + 1])
  std::vector<int32_t> members;

  int64_t size(int64_t group) const { return offsets[group + 1] - offsets[group]; }
  int32_t* begin(int64_t group) { return members.data() + offsets[group]; }
};

// group_of(i), i < n, returns a group in [0, num_groups), or a negative number for none. It is called twice per item.
template <typename GroupOf>
Grouping group_by(int64_t n, int64_t num_groups, GroupOf&& group_of) {
  Grouping result;
  result.offsets.resize(num_groups + 1);
  for (int64_t i = 0; i < n; ++i) {
    if (const int64_t g = group_of(i); g >= 0) ++result.offsets[g + 1];
  }
  for (int64_t g = 0; g < num_groups; ++g) result.offsets[g + 1] += result.offsets[g];
  result.members.resize(result.offsets[num_groups]);
  std::vector<int32_t> next(result.offsets.begin(), result.offsets.end() - 1);
  for (int64_t i = 0; i < n; ++i) {
    if (const int64_t g = group_of(i); g >= 0) result.members[next[g]++] = static_cast<int32_t>(i);
  }
  return result;
}

// The tokens of each of num_sequences sequences; all tokens are one sequence if ids is null.
inline Grouping by_sequence(const int32_t* sequence_ids, int64_t num_tokens, int64_t num_sequences) {
  return group_by(num_tokens, num_sequences, [&](int64_t t) { return sequence_ids != nullptr ? sequence_ids[t] : 0; });
}

}  // namespace switchgear::cpu
