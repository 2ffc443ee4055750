// SPDX-License-Identifier: BSD-3-Clause
// The plan of one moe_forward or moe_backward call, in its workspace.
#pragma once
#include "ops.h"
#include "workspace.h"

namespace switchgear::cpu {

struct Slots {
  int64_t count;  // S = T·K
  Plan plan;
  const int32_t* expert_offsets;
  const int32_t* token_indices;
  const float* weights;  // [S] topk_weights in slot order

  static int64_t bytes(int64_t num_slots, int64_t num_experts) {
    return Workspace::padded((num_experts + 1) * 4) + 3 * Workspace::padded(num_slots * 4);
  }
};

inline Slots make_slots(Workspace& workspace, const TensorView& topk_ids, const TensorView& topk_weights,
                        int64_t num_experts, const Context& context) {
  const int64_t num_tokens = topk_ids.shape[0], top_k = topk_ids.shape[1], count = num_tokens * top_k;
  auto* const expert_offsets = workspace.take<int32_t>(num_experts + 1);
  auto* const token_indices = workspace.take<int32_t>(count);
  auto* const slot_indices = workspace.take<int32_t>(count);
  auto* const weights = workspace.take<float>(count);
  const Plan slot_plan{.expert_offsets = view(expert_offsets, DType::kInt32, num_experts + 1),
                       .token_indices = view(token_indices, DType::kInt32, count),
                       .slot_indices = view(slot_indices, DType::kInt32, num_tokens, top_k)};
  cpu::plan(PlanArgs{.topk_ids = topk_ids, .plan = slot_plan}, context);
  for (int64_t i = 0; i < count; ++i) {
    if (slot_indices[i] >= 0) weights[slot_indices[i]] = topk_weights.as<float>()[i];
  }
  return {count, slot_plan, expert_offsets, token_indices, weights};
}

}  // namespace switchgear::cpu
