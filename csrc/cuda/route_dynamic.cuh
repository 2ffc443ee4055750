// SPDX-License-Identifier: BSD-3-Clause
// route_dynamic: router_logits [T,E] -> each token's best experts, until their scores reach a total mass or fall below a
// threshold, at most M: topk_ids, topk_weights [T,M].
//
//   work about 30·T·E instructions for exponentials and keys, and E/32 + 60 per lane and choice
//   traffic T·E·size + 8·T·M bytes; bound by instructions
//
// One warp per token: keys of all experts in shared memory (global memory if a row is too long). The best are taken one by one
// (ranking.cuh) until the mass is reached or the scores are too low. So a token with few experts never sorts the others. All
// lanes compute the same sums, and write the outputs together at the end.
//
// Numeric contract: the bits of csrc/cpu/route_dynamic.cpp, for any bit pattern of logits: scores are those of route; the mass
// and the sum of weights are float64, in the order of choices.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   route_dynamic_kernel: 80 registers
#pragma once
#include "platform.cuh"
#include "ranking.cuh"
#include "score.cuh"
#include "switchgear/ops.h"
#include "vector.cuh"

namespace switchgear::cuda {

struct RouteDynamicParams {
  const void* router_logits;
  int64_t row_stride;
  const float* selection_bias;  // or null
  int32_t* topk_ids;
  float* topk_weights;
  uint32_t* scratch;  // keys of each block if rows are too long for shared memory, else null
  int64_t num_tokens;
  double top_p;
  DType dtype;
  ScoreFunction score_function;
  bool normalize;
  float threshold, scale;
  int num_experts, max_experts, min_experts;
};

// A block is one warp; blocks loop over the tokens.
__global__ void __launch_bounds__(32) route_dynamic_kernel(RouteDynamicParams p) {
  SHARED_DYN(uint32_t, shared);
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t* const keys = p.scratch != nullptr ? p.scratch + static_cast<int64_t>(blockIdx.x) * p.num_experts : shared;
  const bool biased = p.selection_bias != nullptr;

  for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
    const auto logit = [&](int e) { return sanitise(load_float(p.router_logits, p.dtype, token * p.row_stride + e)); };
    const RowScale scale = scale_of_row(p.score_function, p.num_experts, lane, logit);
    for (int e = lane; e < p.num_experts; e += 32) {
      float ranked = logit(e);
      // Scores are monotone: without a bias, ranking logits avoids ties by rounding.
      if (biased) ranked = add(scale.score(ranked), sanitise(p.selection_bias[e]));
      keys[e] = key_of(ranked);
    }
    Ranking ranking(keys, p.num_experts, lane);

    int32_t* const ids = p.topk_ids + token * p.max_experts;
    float* const weights = p.topk_weights + token * p.max_experts;
    int count = 0;
    double mass = 0.0;   // of all better experts, including those below the threshold
    double total = 0.0;  // of the chosen experts
    for (int rank = 0; rank < p.max_experts; ++rank) {
      const bool needed = rank < p.min_experts;
      if (!needed && !(mass < p.top_p)) break;
      const int expert = static_cast<int>(ranking.take().expert);
      const float score = scale.score(logit(expert));
      mass = add(mass, static_cast<double>(score));
      if (!needed && !(score >= p.threshold)) {
        if (!biased) break;  // the scores descend
        continue;
      }
      total = add(total, static_cast<double>(score));
      if (lane == 0) {
        ids[count] = expert;
        weights[count] = score;
      }
      ++count;
    }

    __syncwarp();
    total = add(total, 1e-20);
    const double reciprocal = divide(1.0, total);
    for (int k = lane; k < p.max_experts; k += 32) {
      if (k >= count) {
        ids[k] = -1;
        weights[k] = 0.0f;
        continue;
      }
      float weight = weights[k];
      if (p.normalize) weight = static_cast<float>(quotient(static_cast<double>(weight), total, reciprocal));
      weights[k] = multiply(weight, p.scale);
    }
    __syncwarp();  // before the next token's keys
  }
}

}  // namespace switchgear::cuda
