// SPDX-License-Identifier: BSD-3-Clause
// route: router_logits [T,E] -> the K best experts of each token and their weights; and its gradient.
//
//   work about 25·T·E flop (one exponential per logit); traffic T·E·size + 8·T·K bytes; compute-bound
//
// Rows are independent; rows.inl processes all logits of a block of rows. Logits are sanitised first, so any bit pattern
// gives K distinct experts. A ranking is always the total order (value descending, index ascending). Float operations run in
// the written order and are never fused: scores have the same bits on every backend, ISA and number of threads.
#include <algorithm>
#include <limits>
#include <vector>

#include "experts.h"
#include "ops.h"
#include "ranking.h"
#include "rows.h"
#include "scores.h"
#include "threads.h"

namespace switchgear::cpu {
namespace {

float group_score(const float* values, int64_t n, GroupScore kind) {
  float best = values[0];
  float second = 0.0f;  // a group of one has no second
  for (int64_t j = 1; j < n; ++j) {
    second = j == 1 ? std::min(best, values[j]) : std::max(second, std::min(best, values[j]));
    best = std::max(best, values[j]);
  }
  // By a bias of -Inf: the sum would close the whole group.
  const bool is_closed = second == std::numeric_limits<float>::lowest();
  return kind == GroupScore::kMax || is_closed ? best : best + second;
}

// Memory of one thread for a block of rows.
struct Scratch {
  Scratch(int64_t num_experts, int64_t num_groups)
      : logits(kRowBlock * num_experts),
        scores(kRowBlock * num_experts),
        ranked(num_experts),
        keys(ceil_div(num_experts, kKeyLanes) * kKeyLanes),
        group_keys(num_groups) {}

  std::vector<float> logits;
  std::vector<float> scores;
  std::vector<float> ranked;
  std::vector<int64_t> keys;
  std::vector<int64_t> group_keys;
};

// Removes the experts outside the best groups, which may not be chosen, from scratch.keys.
void keep_best_groups(const float* ranked, int64_t num_experts, const RouteOptions& options, Scratch& scratch) {
  const int64_t size = num_experts / options.num_groups;
  int64_t* groups = scratch.group_keys.data();
  for (int64_t g = 0; g < options.num_groups; ++g) {
    groups[g] = key_of(group_score(ranked + g * size, size, options.group_score), g);
  }
  select_best(groups, options.num_groups, options.topk_groups);
  std::sort(groups, groups + options.topk_groups, [](int64_t a, int64_t b) { return index_of(a) < index_of(b); });
  int64_t first = 0;  // first expert after the last group that stays
  for (int64_t i = 0; i < options.topk_groups; ++i) {
    const int64_t begin = index_of(groups[i]) * size;
    std::fill(scratch.keys.begin() + first, scratch.keys.begin() + begin, kNoKey);
    first = begin + size;
  }
  std::fill(scratch.keys.begin() + first, scratch.keys.begin() + num_experts, kNoKey);
}

// One row: `ranked` are its logits or scores. Softmax weights are scores / sum.
void route_row(const RouteOptions& options, const RowKernels& rows, const float* ranked, const float* scores,
               double sum, int64_t num_experts, Scratch& scratch, int32_t* topk_ids, float* topk_weights) {
  int64_t* keys = scratch.keys.data();
  rows.make_keys(ranked, keys, num_experts);
  if (options.num_groups > 1) keep_best_groups(ranked, num_experts, options, scratch);
  if (rows.has_extract && options.top_k <= kMaxExtracted) {
    rows.extract_best(keys, num_experts, options.top_k, topk_ids);
  } else {
    select_best(keys, num_experts, options.top_k);
    for (int64_t k = 0; k < options.top_k; ++k) topk_ids[k] = index_of(keys[k]);
  }
  for (int64_t k = 0; k < options.top_k; ++k) topk_weights[k] = static_cast<float>(scores[topk_ids[k]] / sum);
  finish_weights(topk_weights, options.top_k, options.normalize, options.scale);
}

// Gradient of one row in float64; `scores` are those of route. Entries of non-finite logits are zeroed by the caller.
//   w_k = p[id_k], s = Σ w_k + 1e-20, g_k = grad_topk_weights[k] · scale
//   u_k = dL/dw_k = (g_k - (Σ g·w) / s) / s if normalised, else g_k;   U_j = Σ u_k over id_k = j
//   softmax: grad[j] = p_j · (U_j - Σ_k u_k · w_k);   sigmoid: grad[j] = U_j · p_j · (1 - p_j)
void route_backward_row(const RouteOptions& options, const float* scores, const int32_t* topk_ids,
                        const float* grad_topk_weights, int64_t num_experts, int64_t top_k, double* grad) {
  double total = 0.0;
  double weighted = 0.0;
  for (int64_t k = 0; k < top_k; ++k) {
    if (topk_ids[k] < 0) continue;
    const double weight = scores[topk_ids[k]];
    total += weight;
    weighted += static_cast<double>(grad_topk_weights[k]) * options.scale * weight;
  }
  total += 1e-20;

  std::fill_n(grad, num_experts, 0.0);
  double dot = 0.0;
  for (int64_t k = 0; k < top_k; ++k) {
    if (topk_ids[k] < 0) continue;
    double u = static_cast<double>(grad_topk_weights[k]) * options.scale;
    if (options.normalize) u = (u - weighted / total) / total;
    grad[topk_ids[k]] += u;
    dot += u * scores[topk_ids[k]];
  }
  if (options.score_function == ScoreFunction::kSoftmax) {
    for (int64_t j = 0; j < num_experts; ++j) grad[j] = scores[j] * (grad[j] - dot);
  } else {
    for (int64_t j = 0; j < num_experts; ++j) grad[j] = grad[j] * scores[j] * (1.0 - scores[j]);
  }
}

}  // namespace

void route(const RouteArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const TensorView& input = args.router_logits;
  const int64_t num_experts = input.shape[1];
  const int64_t top_k = args.options.top_k;
  const std::vector<float> bias = sanitised_bias(args.selection_bias);
  // Scores are monotone: ranking logits avoids ties by rounding, and of a softmax needs K divisions instead of E.
  const bool by_logit = bias.empty() && args.options.num_groups == 1;
  const RowKernels& rows = context.rows;
  const auto route_rows = [&](int64_t begin, int64_t end, int) {
    Scratch scratch(num_experts, args.options.num_groups);
    float *logits = scratch.logits.data(), *scores = scratch.scores.data();
    for (int64_t first = begin; first < end; first += kRowBlock) {
      const int64_t count = std::min(kRowBlock, end - first);
      double sums[kRowBlock] = {1.0, 1.0, 1.0, 1.0};
      for (int64_t r = 0; r < count; ++r) {
        k.load_row(logits + r * num_experts, row_of(input, first + r), input.dtype, num_experts);
      }
      rows.sanitise(logits, count * num_experts);
      if (by_logit && args.options.score_function == ScoreFunction::kSoftmax) {
        rows.softmax_numerators(logits, scores, sums, num_experts, count);
      } else {
        rows.scores(args.options.score_function, logits, scores, num_experts, count);
      }
      for (int64_t r = 0; r < count; ++r) {
        const float* score = scores + r * num_experts;
        const float* ranked = by_logit ? logits + r * num_experts : score;
        if (!bias.empty()) {
          for (int64_t j = 0; j < num_experts; ++j) scratch.ranked[j] = score[j] + bias[j];
          ranked = scratch.ranked.data();
        }
        const int64_t first_choice = (first + r) * top_k;
        route_row(args.options, rows, ranked, score, sums[r], num_experts, scratch,
                  args.topk_ids.as<int32_t>() + first_choice, args.topk_weights.as<float>() + first_choice);
      }
    }
  };
  const int64_t grain = ceil_div(grain_rows(num_experts), kRowBlock) * kRowBlock;
  parallel_for_ranges(context.num_threads, input.shape[0], grain, route_rows);
}

void route_backward(const RouteBackwardArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const TensorView& input = args.router_logits;
  const int64_t num_experts = input.shape[1];
  const int64_t top_k = args.topk_ids.shape[1];
  const RowKernels& rows = context.rows;
  const auto differentiate_rows = [&](int64_t begin, int64_t end, int) {
    std::vector<float> logits(num_experts), sane(num_experts), scores(num_experts);
    std::vector<double> grad(num_experts);
    for (int64_t t = begin; t < end; ++t) {
      k.load_row(logits.data(), row_of(input, t), input.dtype, num_experts);
      sane = logits;
      rows.sanitise(sane.data(), num_experts);
      rows.scores(args.options.score_function, sane.data(), scores.data(), num_experts, 1);
      route_backward_row(args.options, scores.data(), args.topk_ids.as<const int32_t>() + t * top_k,
                         args.grad_topk_weights.as<const float>() + t * top_k, num_experts, top_k, grad.data());
      for (int64_t j = 0; j < num_experts; ++j) {  // a sanitised logit is a constant
        sane[j] = logits[j] == sane[j] ? static_cast<float>(grad[j]) : 0.0f;
      }
      k.store_row(row_of(args.grad_router_logits, t), input.dtype, sane.data(), num_experts);
    }
  };
  parallel_for_ranges(context.num_threads, input.shape[0], grain_rows(num_experts), differentiate_rows);
}

}  // namespace switchgear::cpu
