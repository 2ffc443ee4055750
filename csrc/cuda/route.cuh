// SPDX-License-Identifier: BSD-3-Clause
// route: router_logits [T,E] -> the K best experts of each token and their weights; and the gradient.
//
//   work about 30·T·E instructions for the exponentials and, per choice, 5·E/L + 15 for each of the L lanes of a token
//   traffic T·E·size + 8·T·K bytes; bound by instructions
//
// Up to 512 experts, a token has L = 4 … 32 lanes (route_kernel). Each lane holds N = 8 or 16 consecutive logits in registers
// as keys: integers in ranking order. K times, the lanes agree on the largest key and, among equals, the lowest expert. With
// more experts (route_wide_kernel): one warp per token, with keys in shared memory, from which the best are taken one by one
// (ranking.cuh). Rows too long for shared memory use global memory.
//
// Numeric contract: the bits of csrc/cpu/route.cpp, for any bit pattern of logits (score.cuh); the gradient in float64.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   route_kernel: 80 registers, 8 of local memory
//   route_wide_kernel: 80 registers
//   route_backward_kernel: 64 registers
#pragma once
#include "platform.cuh"
#include "ranking.cuh"
#include "score.cuh"
#include "switchgear/ops.h"
#include "vector.cuh"

namespace switchgear::cuda {

constexpr int kRouteThreads = 128;

// ---- rows ----------------------------------------------------------------------------------------------------------------

struct RouteParams {
  const void* router_logits;
  int64_t row_stride;
  const float* selection_bias;  // or null
  int32_t* topk_ids;
  float* topk_weights;
  uint32_t* scratch;  // for the wide kernel, if rows are too long for shared memory, else null
  int64_t num_tokens;
  DType dtype;
  ScoreFunction score_function;
  GroupScore group_score;
  bool normalize;
  bool aligned;  // logits can be read 16 bytes at a time
  float scale;
  int num_experts, top_k, num_groups, topk_groups;

  __device__ bool grouped() const { return num_groups > 1; }
  // Scores are monotone: ranking logits avoids ties by rounding, and needs K divisions instead of E.
  __device__ bool by_logit() const { return selection_bias == nullptr && !grouped(); }
  __device__ bool softmax() const { return score_function == ScoreFunction::kSoftmax; }
};

// ---- groups of experts -----------------------------------------------------------------------------------------------------

// Sets group_keys[g] to kTaken for the best groups. keys[e] are the ranking keys. Both arrays are in memory of the token's
// lanes.
template <int kLanes>
__device__ inline void take_best_groups(const RouteParams& p, const uint32_t* keys, uint32_t* group_keys, int lane) {
  const int size = p.num_experts / p.num_groups;
  for (int g = lane; g < p.num_groups; g += kLanes) {
    uint32_t best = kTaken, second = kTaken;
    int j = g % size;  // lanes start at different banks
    for (int i = 0; i < size; ++i) {
      const uint32_t key = keys[g * size + j];
      const uint32_t lower = key < best ? key : best;
      best = key < best ? best : key;
      second = lower > second ? lower : second;
      j = j + 1 < size ? j + 1 : 0;
    }
    float score = value_of(best);
    const float other = size > 1 ? value_of(second) : 0.0f;
    const bool is_closed = other == -FLT_MAX;  // by a bias of -Inf: the sum would close the group
    if (p.group_score == GroupScore::kTop2Sum && !is_closed) score = add(score, other);
    group_keys[g] = key_of(score);
  }
  for (int i = 0; i < p.topk_groups; ++i) {  // a lane reads and writes only its own entries
    uint32_t best = kTaken, at = 0;
    for (int g = lane; g < p.num_groups; g += kLanes) {
      if (group_keys[g] > best) best = group_keys[g], at = g;
    }
    const uint32_t top = max_over<kLanes>(best);
    at = min_over<kLanes>(best == top ? at : ~0u);
    if (static_cast<int>(at % kLanes) == lane) group_keys[at] = kTaken;
  }
  __syncwarp();
}

// ---- weights -------------------------------------------------------------------------------------------------------------

// Stores the ids and weights of the chosen experts, with the token's lanes; weights[K] is their scratch memory.
template <int kLanes>
__device__ inline void store_choices(const RouteParams& p, const RowScale& scale, int64_t token, bool active,
                                     const int32_t* chosen, float* weights, int lane) {
  for (int k = lane; k < p.top_k; k += kLanes) {
    const float logit = sanitise(load_float(p.router_logits, p.dtype, token * p.row_stride + chosen[k]));
    weights[k] = scale.score(logit);
  }
  __syncwarp();
  double total = 0.0;
  if (p.normalize) {
    for (int k = 0; k < p.top_k; ++k) total = add(total, static_cast<double>(weights[k]));
    total = add(total, 1e-20);
  }
  const double reciprocal = divide(1.0, total);
  for (int k = lane; k < p.top_k; k += kLanes) {
    float weight = weights[k];
    if (p.normalize) weight = static_cast<float>(quotient(static_cast<double>(weight), total, reciprocal));
    if (!active) continue;
    p.topk_ids[token * p.top_k + k] = chosen[k];
    p.topk_weights[token * p.top_k + k] = multiply(weight, p.scale);
  }
}

// ---- up to kLanes · kPerLane experts -------------------------------------------------------------------------------------

// Lane i gets experts [i · kPerLane, (i + 1) · kPerLane); logits past the last expert are -Inf, whose exponential is 0.
template <typename T, int kPerLane>
__device__ inline void load_logits(float (&logits)[kPerLane], const T* row, int first, int num_experts, bool aligned) {
  constexpr int kVector = kVectorSize<T>;
#pragma unroll
  for (int i = 0; i < kPerLane; i += kVector) {
    const int left = num_experts - first - i, count = left < kVector ? left : kVector;
    float values[kVector];
    unpack<T>(values, load_vector(row + first + i, count, aligned && count == kVector));
#pragma unroll
    for (int j = 0; j < kVector; ++j) logits[i + j] = j < count ? sanitise(values[j]) : -INFINITY;
  }
}

template <int kPerLane>
__device__ inline void load_logits(float (&logits)[kPerLane], const RouteParams& p, int64_t token, int first) {
  const int64_t start = token * p.row_stride;
  switch (p.dtype) {
    case DType::kBFloat16:
      return load_logits(logits, static_cast<const __nv_bfloat16*>(p.router_logits) + start, first, p.num_experts,
                         p.aligned);
    case DType::kFloat16:
      return load_logits(logits, static_cast<const __half*>(p.router_logits) + start, first, p.num_experts, p.aligned);
    default:
      return load_logits(logits, static_cast<const float*>(p.router_logits) + start, first, p.num_experts, p.aligned);
  }
}

// Words of dynamic shared memory per token of the block: chosen [K] and weights [K], and with groups keys [E] and
// group_keys [G].
inline int64_t route_words(int64_t top_k, int64_t num_experts, int64_t num_groups) {
  return 2 * top_k + (num_groups > 1 ? num_experts + num_groups : 0);
}

template <int kLanes, int kPerLane>
__global__ void __launch_bounds__(kRouteThreads) route_kernel(RouteParams p) {
  SHARED_DYN(uint32_t, shared);
  const int lane = static_cast<int>(threadIdx.x) % kLanes, place = static_cast<int>(threadIdx.x) / kLanes;
  const int first = lane * kPerLane;
  int64_t token = static_cast<int64_t>(blockIdx.x) * (kRouteThreads / kLanes) + place;
  const bool active = token < p.num_tokens;
  if (!active) token = p.num_tokens - 1;  // lanes without a token repeat the last one and store nothing
  const int words = 2 * p.top_k + (p.grouped() ? p.num_experts + p.num_groups : 0);
  int32_t* const chosen = reinterpret_cast<int32_t*>(shared) + place * words;
  float* const weights = reinterpret_cast<float*>(chosen + p.top_k);

  uint32_t keys[kPerLane];
  RowScale scale{p.score_function, 0.0f, 1.0, 1.0};
  {
    float logits[kPerLane];
    load_logits(logits, p, token, first);
    if (p.softmax()) {
      uint32_t largest = kTaken;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const uint32_t key = key_of(logits[i]);
        largest = key > largest ? key : largest;
      }
      const float max = value_of(max_over<kLanes>(largest));
      scale = row_scale(p.score_function, max, sum_of_exponentials<kLanes>(logits, max));
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool present = first + i < p.num_experts;
      float ranked = logits[i];
      if (!p.by_logit()) ranked = scale.score(ranked);
      if (p.selection_bias != nullptr && present) ranked = add(ranked, sanitise(p.selection_bias[first + i]));
      keys[i] = present ? key_of(ranked) : kTaken;
    }
  }

  if (p.grouped()) {
    uint32_t* const all_keys = reinterpret_cast<uint32_t*>(weights + p.top_k);
    uint32_t* const group_keys = all_keys + p.num_experts;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (first + i < p.num_experts) all_keys[first + i] = keys[i];
    }
    __syncwarp();
    take_best_groups<kLanes>(p, all_keys, group_keys, lane);
    const int size = p.num_experts / p.num_groups;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (first + i < p.num_experts && group_keys[(first + i) / size] != kTaken) keys[i] = kTaken;
    }
  }

  for (int k = 0; k < p.top_k; ++k) {
    uint32_t best = kTaken;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) best = keys[i] > best ? keys[i] : best;
    const uint32_t top = max_over<kLanes>(best);
    uint32_t at = ~0u;  // the lowest expert with this key
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i) at = keys[i] == top ? first + i : at;
    at = min_over<kLanes>(at);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) keys[i] = static_cast<uint32_t>(first + i) == at ? kTaken : keys[i];
    if (lane == 0) chosen[k] = static_cast<int32_t>(at);
  }
  __syncwarp();
  store_choices<kLanes>(p, scale, token, active, chosen, weights, lane);
}

// ---- any number of experts -----------------------------------------------------------------------------------------------

// Words of memory per row: keys [E], chosen [K], weights [K], group_keys [G].
inline int64_t route_wide_words(int64_t top_k, int64_t num_experts, int64_t num_groups) {
  return num_experts + 2 * top_k + num_groups;
}

// A block is one warp; blocks loop over the tokens.
__global__ void __launch_bounds__(32) route_wide_kernel(RouteParams p) {
  SHARED_DYN(uint32_t, shared);
  const int lane = static_cast<int>(threadIdx.x), num_experts = p.num_experts;
  const int64_t words = static_cast<int64_t>(num_experts) + 2 * p.top_k + p.num_groups;
  uint32_t* const keys = p.scratch != nullptr ? p.scratch + blockIdx.x * words : shared;
  int32_t* const chosen = reinterpret_cast<int32_t*>(keys + num_experts);
  float* const weights = reinterpret_cast<float*>(chosen + p.top_k);
  uint32_t* const group_keys = reinterpret_cast<uint32_t*>(weights + p.top_k);

  for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
    const auto logit = [&](int e) { return sanitise(load_float(p.router_logits, p.dtype, token * p.row_stride + e)); };
    const RowScale scale = scale_of_row(p.score_function, num_experts, lane, logit);
    for (int e = lane; e < num_experts; e += 32) {
      float ranked = logit(e);
      if (!p.by_logit()) ranked = scale.score(ranked);
      if (p.selection_bias != nullptr) ranked = add(ranked, sanitise(p.selection_bias[e]));
      keys[e] = key_of(ranked);
    }
    __syncwarp();
    if (p.grouped()) {
      take_best_groups<32>(p, keys, group_keys, lane);
      const int size = num_experts / p.num_groups;
      for (int e = lane; e < num_experts; e += 32) {
        if (group_keys[e / size] != kTaken) keys[e] = kTaken;
      }
      __syncwarp();
    }

    Ranking ranking(keys, num_experts, lane);
    for (int k = 0; k < p.top_k; ++k) {
      const Best best = ranking.take();
      if (lane == 0) chosen[k] = static_cast<int32_t>(best.expert);
    }
    __syncwarp();
    store_choices<32>(p, scale, token, true, chosen, weights, lane);
    __syncwarp();  // before the next token's keys
  }
}

// ---- the gradient --------------------------------------------------------------------------------------------------------

struct RouteBackwardParams {
  const void* router_logits;
  int64_t row_stride;
  const int32_t* topk_ids;
  const float* grad_topk_weights;
  void* grad_router_logits;
  int64_t grad_stride;
  int64_t num_tokens;
  DType dtype;
  ScoreFunction score_function;
  bool normalize;
  float scale;
  int num_experts, top_k;
};

// One warp per token, in float64 until the end; the operations and their order are those of csrc/cpu/route.cpp:
//   w_k = p[id_k], s = Σ w_k + 1e-20, g_k = grad_topk_weights[k] · scale
//   u_k = dL/dw_k = (g_k - (Σ g·w) / s) / s if normalised, else g_k;   U_j = Σ u_k over id_k = j
//   softmax: grad[j] = p_j · (U_j - Σ_k u_k · w_k);   sigmoid: grad[j] = U_j · p_j · (1 - p_j);   0 where sanitised
// Lane i takes choices i, i + 32, …; sums over choices go through all lanes in the order of choices.
class RouteGradient {
 public:
  __device__ RouteGradient(const RouteBackwardParams& p, int64_t token, int lane) : p_(p), token_(token), lane_(lane) {
    scale_ = scale_of_row(p.score_function, p.num_experts, lane, [&](int e) { return sanitise(raw_logit(e)); });
    if (p.normalize) {
      for (int base = 0; base < p.top_k; base += 32) {
        const Choice mine = choice(base + lane);
        total_ = add_lanes(total_, mine.weight);
        weighted_ = add_lanes(weighted_, multiply(mine.grad, mine.weight));
      }
      total_ = add(total_, 1e-20);
      shift_ = divide(weighted_, total_);
      reciprocal_ = divide(1.0, total_);
    }
    for (int base = 0; base < p.top_k; base += 32) {
      const Choice mine = choice(base + lane);
      dot_ = add_lanes(dot_, multiply(grad_of_weight(mine), mine.weight));
    }
  }

  // Stores all experts as if not chosen, then overwrites the chosen ones.
  __device__ void store() const {
    for (int e = lane_; e < p_.num_experts; e += 32) store_expert(e, 0.0);
    __syncwarp();
    for (int base = 0; base < p_.top_k; base += 32) {
      const int mine = choice(base + lane_).expert;
      bool first = mine >= 0;  // the first choice of this expert
      double sum = 0.0;
      for (int other_base = 0; other_base < p_.top_k; other_base += 32) {
        const Choice other = choice(other_base + lane_);
        const double grad = grad_of_weight(other);
        for (int i = 0; i < 32; ++i) {
          const bool same = __shfl_sync(kAllLanes, other.expert, i) == mine;
          const double grad_i = __shfl_sync(kAllLanes, grad, i);
          if (same) sum = add(sum, grad_i);
          if (same && other_base + i < base + lane_) first = false;
        }
      }
      if (first) store_expert(mine, sum);
    }
  }

 private:
  struct Choice {
    int expert;           // -1 for empty slots and past the last choice; grad and weight are 0 then and change no sum
    double grad, weight;  // g_k, w_k
  };

  __device__ Choice choice(int k) const {
    if (k >= p_.top_k) return {-1, 0.0, 0.0};
    const int64_t i = token_ * p_.top_k + k;
    const int expert = p_.topk_ids[i];
    if (expert < 0 || expert >= p_.num_experts) return {-1, 0.0, 0.0};
    return {expert, multiply(static_cast<double>(p_.grad_topk_weights[i]), static_cast<double>(p_.scale)),
            scale_.score(sanitise(raw_logit(expert)))};
  }

  __device__ double grad_of_weight(const Choice& c) const {
    if (!p_.normalize || c.expert < 0) return c.grad;
    const double shifted = add(c.grad, -shift_), q = quotient(shifted, total_, reciprocal_);
    return q == q ? q : multiply(shifted, reciprocal_);  // infinities
  }

  // sum + the value of lane 0 + that of lane 1 + …
  __device__ static double add_lanes(double sum, double value) {
#pragma unroll 4
    for (int i = 0; i < 32; ++i) sum = add(sum, __shfl_sync(kAllLanes, value, i));
    return sum;
  }

  __device__ float raw_logit(int e) const { return load_float(p_.router_logits, p_.dtype, token_ * p_.row_stride + e); }

  __device__ void store_expert(int e, double sum) const {
    const float raw = raw_logit(e), logit = sanitise(raw);
    const double score = scale_.score(logit);
    const double grad = p_.score_function == ScoreFunction::kSoftmax ? multiply(score, add(sum, -dot_))
                                                                     : multiply(multiply(sum, score), add(1.0, -score));
    store_float(p_.grad_router_logits, p_.dtype, token_ * p_.grad_stride + e,
                raw == logit ? static_cast<float>(grad) : 0.0f);
  }

  const RouteBackwardParams& p_;
  int64_t token_;
  int lane_;
  RowScale scale_;
  double total_ = 0.0, weighted_ = 0.0;    // s, Σ g·w
  double shift_ = 0.0, reciprocal_ = 1.0;  // Σ g·w / s, 1 / s
  double dot_ = 0.0;                       // Σ u·w
};

__global__ void __launch_bounds__(kRouteThreads) route_backward_kernel(RouteBackwardParams p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kRouteThreads / 32) + threadIdx.x / 32;
  if (token >= p.num_tokens) return;  // whole warps leave
  RouteGradient(p, token, static_cast<int>(threadIdx.x % 32)).store();
}

}  // namespace switchgear::cuda
