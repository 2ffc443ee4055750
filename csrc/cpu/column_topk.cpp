// SPDX-License-Identifier: BSD-3-Clause
// column_topk: each expert takes the best tokens of each sequence (expert choice).
//
//   work about 10·T·E instructions; traffic T·E·size bytes, and 4·T·E for the result; bound by instructions
//
// A task is one sequence and up to 16 columns, a cache line of float32. It transposes their keys (integers in the order of
// the values) and finds the key of the last token that each column takes. A histogram of the upper 11 bits gives the bin of
// that key, and only the keys in this bin are ranked. Of the tokens with exactly this key the first ones are taken. Then each
// token compares its row with the cuts of its sequence and lists its experts.
#include <algorithm>
#include <array>
#include <vector>

#include "experts.h"
#include "grouping.h"
#include "kernels.h"
#include "ops.h"
#include "ranking.h"
#include "threads.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kColumns = 16;
constexpr int kBinBits = 11;
constexpr int kShift = 32 - kBinBits;

uint32_t as_unsigned(int32_t key) { return static_cast<uint32_t>(key) ^ 0x80000000u; }

// Takes keys above `key`, and tokens up to `last` with exactly this key.
struct Cut {
  int32_t key = std::numeric_limits<int32_t>::max();  // no value has it: takes nothing
  int32_t last = -1;
};

// The cut after the `count` best of n keys, 0 < count < n; tokens[i] is the token of keys[i], ascending.
Cut cut_after(const int32_t* keys, const int32_t* tokens, int64_t n, int64_t count, std::vector<int32_t>& candidates) {
  std::array<int32_t, 1 << kBinBits> histogram{};
  for (int64_t i = 0; i < n; ++i) ++histogram[as_unsigned(keys[i]) >> kShift];
  uint32_t bin = histogram.size() - 1;
  int64_t rest = count;  // number taken from this bin
  while (rest > histogram[bin]) rest -= histogram[bin--];

  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    candidates[found] = keys[i];
    found += as_unsigned(keys[i]) >> kShift == bin;
  }
  std::nth_element(candidates.begin(), candidates.begin() + (rest - 1), candidates.begin() + found, std::greater<>());
  Cut cut{.key = candidates[rest - 1]};
  const auto above =
      std::count_if(candidates.begin(), candidates.begin() + (rest - 1), [&](int32_t key) { return key > cut.key; });
  int64_t equal = rest - above;
  for (int64_t i = 0; equal > 0; ++i) {
    if (keys[i] == cut.key && --equal == 0) cut.last = tokens[i];
  }
  return cut;
}

}  // namespace

void column_topk(const ColumnTopkArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const TensorView& values = args.values;
  const int64_t num_tokens = values.shape[0], num_experts = values.shape[1], num_sequences = args.limits.shape[0];
  const int32_t* sequence_ids = args.sequence_ids.as<const int32_t>();  // may be null
  const int32_t* limits = args.limits.as<const int32_t>();
  int32_t* topk_ids = args.topk_ids.as<int32_t>();
  const int num_threads = context.num_threads;
  const int64_t grain = grain_rows(num_experts);

  std::vector<int32_t> keys(num_tokens * num_experts);
  parallel_for_ranges(num_threads, num_tokens, grain, [&](int64_t begin, int64_t end, int) {
    std::vector<float> row(num_experts);
    for (int64_t t = begin; t < end; ++t) {
      k.load_row(row.data(), row_of(values, t), values.dtype, num_experts);
      for (int64_t e = 0; e < num_experts; ++e) keys[t * num_experts + e] = ordered(sanitise(row[e]));
    }
  });

  Grouping sequences = by_sequence(sequence_ids, num_tokens, num_sequences);
  std::vector<Cut> cuts(num_sequences * num_experts);
  const int64_t blocks = ceil_div(num_experts, kColumns);
  parallel_for(num_threads, num_sequences * blocks, [&](int64_t task, int) {
    const int64_t b = task / blocks, first = task % blocks * kColumns, n = sequences.size(b);
    const int64_t width = std::min(kColumns, num_experts - first);
    Cut* cut = cuts.data() + b * num_experts + first;
    if (limits[b] == 0 || n == 0) return;
    if (limits[b] >= n) {
      std::fill_n(cut, width, Cut{.key = std::numeric_limits<int32_t>::min()});  // below every value: takes all
      return;
    }
    const int32_t* tokens = sequences.begin(b);
    std::vector<int32_t> columns(width * n), candidates(n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < width; ++c) columns[c * n + i] = keys[tokens[i] * num_experts + first + c];
    }
    for (int64_t c = 0; c < width; ++c) cut[c] = cut_after(&columns[c * n], tokens, n, limits[b], candidates);
  });

  parallel_for_ranges(num_threads, num_tokens, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      const Cut* cut = cuts.data() + (sequence_ids != nullptr ? sequence_ids[t] : 0) * num_experts;
      const int32_t* row = keys.data() + t * num_experts;
      int32_t* ids = topk_ids + t * num_experts;
      int64_t count = 0;
      for (int64_t e = 0; e < num_experts; ++e) {
        ids[count] = static_cast<int32_t>(e);  // stays if it is taken
        count += row[e] > cut[e].key || (row[e] == cut[e].key && t <= cut[e].last);
      }
      std::fill(ids + count, ids + num_experts, -1);
    }
  });
}

}  // namespace switchgear::cpu
