// SPDX-License-Identifier: BSD-3-Clause
// permute gathers the rows of x into slot order; combine is its transpose, a weighted sum of each token's slots.
// The gradient of permute is combine and that of combine is permute with weights, so two loops serve both directions. The
// gradient of the weights is a dot product per slot.
//
//   permute        traffic (S read + S written)·H·size bytes
//   combine        traffic (S read + T written)·H·size bytes
//   combine_weight_backward         (S + T)·H·size bytes read
//
// All are memory-bound. Each output row belongs to one task, so nothing depends on the number of threads. Sums run in
// float32, choices ascending, and are rounded once.
#include <algorithm>
#include <cstring>
#include <vector>

#include "experts.h"
#include "ops.h"
#include "threads.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kGrainBytes = 65536;  // about 10 µs of copying; less is not worth waking a thread

int64_t grain_of(int64_t row_bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

}  // namespace

void permute(const PermuteArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const TensorView& x = args.x;
  const int64_t num_slots = args.permuted_x.shape[0];
  const int64_t hidden_size = x.shape[1];
  const int64_t row_bytes = hidden_size * size_of(x.dtype);
  const int64_t top_k = args.plan.slot_indices.shape[1];
  const int64_t num_experts = args.plan.expert_offsets.shape[0] - 1;
  const int64_t num_used = args.plan.expert_offsets.as<const int32_t>()[num_experts];
  const int32_t* token_indices = args.plan.token_indices.as<const int32_t>();
  const int32_t* slot_indices = args.plan.slot_indices.as<const int32_t>();
  const float* topk_weights = args.topk_weights.as<const float>();

  // K is small next to H: searching for the choice costs less than an array of weights in slot order.
  const auto weight_of = [&](int64_t slot) {
    const int64_t first = token_indices[slot] * top_k;
    const int32_t* end = slot_indices + first + top_k;
    const int32_t* found = std::find(slot_indices + first, end, static_cast<int32_t>(slot));
    return found != end ? topk_weights[found - slot_indices] : 0.0f;
  };

  const auto gather = [&](int64_t begin, int64_t end, int) {
    std::vector<float> scaled(topk_weights != nullptr ? hidden_size : 0);
    for (int64_t s = begin; s < end; ++s) {
      char* out = row_of(args.permuted_x, s);
      if (s >= num_used) {
        std::memset(out, 0, row_bytes);
      } else if (topk_weights == nullptr) {
        std::memcpy(out, row_of(x, token_indices[s]), row_bytes);
      } else {
        std::fill(scaled.begin(), scaled.end(), 0.0f);
        k.add_scaled_row(scaled.data(), row_of(x, token_indices[s]), x.dtype, weight_of(s), hidden_size);
        k.store_row(out, x.dtype, scaled.data(), hidden_size);
      }
    }
  };
  parallel_for_ranges(context.num_threads, num_slots, grain_of(row_bytes), gather);
}

void combine(const CombineArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const TensorView& input = args.permuted_y;
  const int64_t num_tokens = args.y.shape[0];
  const int64_t hidden_size = args.y.shape[1];
  const int64_t top_k = args.plan.slot_indices.shape[1];
  const int32_t* slot_indices = args.plan.slot_indices.as<const int32_t>();
  const float* topk_weights = args.topk_weights.as<const float>();
  const auto sum_slots = [&](int64_t begin, int64_t end, int) {
    std::vector<float> sum(hidden_size);
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
        if (slot_indices[i] < 0) continue;
        const float weight = topk_weights != nullptr ? topk_weights[i] : 1.0f;
        k.add_scaled_row(sum.data(), row_of(input, slot_indices[i]), input.dtype, weight, hidden_size);
      }
      k.store_row(row_of(args.y, t), input.dtype, sum.data(), hidden_size);
    }
  };
  const int64_t grain = grain_of(hidden_size * top_k * size_of(input.dtype));
  parallel_for_ranges(context.num_threads, num_tokens, grain, sum_slots);
}

void combine_weight_backward(const CombineBackwardArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const TensorView& grad_y = args.grad_y;
  const int64_t hidden_size = grad_y.shape[1];
  const int64_t top_k = args.plan.slot_indices.shape[1];
  const int32_t* slot_indices = args.plan.slot_indices.as<const int32_t>();
  float* grad_topk_weights = args.grad_topk_weights.as<float>();
  const auto dot = [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * top_k; i < end * top_k; ++i) {
      if (slot_indices[i] < 0) {
        grad_topk_weights[i] = 0.0f;
        continue;
      }
      const char* slot_row = row_of(args.permuted_y, slot_indices[i]);
      grad_topk_weights[i] = k.dot_rows(row_of(grad_y, i / top_k), slot_row, grad_y.dtype, hidden_size);
    }
  };
  const int64_t grain = grain_of(hidden_size * top_k * size_of(grad_y.dtype));
  parallel_for_ranges(context.num_threads, grad_y.shape[0], grain, dot);
}

}  // namespace switchgear::cpu
