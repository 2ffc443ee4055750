// SPDX-License-Identifier: BSD-3-Clause
// Lists the items of each group, ascending: the plan of n tokens with one choice each. Ids out of range are in no group.
#pragma once
#include "plan.h"
#include "workspace.h"

namespace switchgear::cuda {

struct Members {
  Plan plan;
  std::byte* workspace;

  Members(Workspace& memory, int64_t num_items, int64_t num_groups) {
    plan.expert_offsets = view(memory.take<int32_t>(num_groups + 1), DType::kInt32, num_groups + 1);
    plan.token_indices = view(memory.take<int32_t>(num_items), DType::kInt32, num_items);
    plan.slot_indices = view(memory.take<int32_t>(num_items), DType::kInt32, num_items, 1);
    workspace = memory.take<std::byte>(plan_workspace_size(num_items, num_groups));
  }
  void list(const int32_t* groups, void* stream) const {
    const int64_t num_items = plan.token_indices.shape[0];
    const TensorView ids = view(const_cast<int32_t*>(groups), DType::kInt32, num_items, 1);
    cuda::plan({.topk_ids = ids, .plan = plan}, workspace, {}, stream);
  }
  int32_t* offsets() const { return plan.expert_offsets.as<int32_t>(); }
  int32_t* items() const { return plan.token_indices.as<int32_t>(); }
};

}  // namespace switchgear::cuda
