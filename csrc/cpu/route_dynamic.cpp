// SPDX-License-Identifier: BSD-3-Clause
// route_dynamic: as many experts as a token needs, until together they reach a mass, or while each reaches a score.
//
//   work about 25·T·E flop as in route; traffic T·E·size + 8·T·M bytes; compute-bound
//
// Experts are taken from a heap, best first, until the mass is reached or the scores are too low. So a token with few experts
// never sorts the others.
#include <algorithm>
#include <vector>

#include "experts.h"
#include "kernels.h"
#include "ops.h"
#include "ranking.h"
#include "rows.h"
#include "scores.h"
#include "threads.h"

namespace switchgear::cpu {
namespace {

struct Row {
  explicit Row(int64_t num_experts) : logits(num_experts), scores(num_experts), keys(num_experts) {}
  std::vector<float> logits, scores;
  std::vector<int64_t> keys;
};

// Writes the choices of one row of logits and returns their number.
int64_t choose(const RouteDynamicOptions& options, const RowKernels& rows, const std::vector<float>& bias, Row& row,
               int64_t max_experts, int32_t* topk_ids, float* topk_weights) {
  const auto num_experts = static_cast<int64_t>(row.logits.size());
  rows.scores(options.score_function, row.logits.data(), row.scores.data(), num_experts, 1);
  for (int64_t j = 0; j < num_experts; ++j) {
    row.keys[j] = key_of(bias.empty() ? row.logits[j] : row.scores[j] + bias[j], j);
  }
  std::make_heap(row.keys.begin(), row.keys.end());
  int64_t count = 0;
  double mass = 0.0;  // of all better experts, including those below the threshold
  for (int64_t rank = 0; rank < max_experts; ++rank) {
    if (rank >= options.min_experts && !(mass < options.top_p)) break;
    std::pop_heap(row.keys.begin(), row.keys.end() - rank);
    const int64_t best = row.keys[num_experts - 1 - rank];
    const int32_t expert = index_of(best);
    const float score = row.scores[expert];
    mass += score;
    if (rank >= options.min_experts && !(score >= options.threshold)) {
      if (bias.empty()) break;  // the scores descend
      continue;
    }
    topk_ids[count] = expert;
    topk_weights[count++] = score;
  }
  return count;
}

}  // namespace

void route_dynamic(const RouteDynamicArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const TensorView& input = args.router_logits;
  const RouteDynamicOptions& options = args.options;
  const int64_t num_experts = input.shape[1], max_experts = args.topk_ids.shape[1];
  const std::vector<float> bias = sanitised_bias(args.selection_bias);
  const auto route_rows = [&](int64_t begin, int64_t end, int) {
    Row row(num_experts);
    for (int64_t t = begin; t < end; ++t) {
      k.load_row(row.logits.data(), row_of(input, t), input.dtype, num_experts);
      context.rows.sanitise(row.logits.data(), num_experts);
      int32_t* ids = args.topk_ids.as<int32_t>() + t * max_experts;
      float* weights = args.topk_weights.as<float>() + t * max_experts;
      const int64_t count = choose(options, context.rows, bias, row, max_experts, ids, weights);
      std::fill(ids + count, ids + max_experts, -1);
      std::fill(weights + count, weights + max_experts, 0.0f);
      finish_weights(weights, count, options.normalize, options.scale);
    }
  };
  parallel_for_ranges(context.num_threads, input.shape[0], grain_rows(num_experts), route_rows);
}

}  // namespace switchgear::cpu
