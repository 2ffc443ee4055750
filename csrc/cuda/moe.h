// SPDX-License-Identifier: BSD-3-Clause
// What moe_forward and moe_backward share: the plan that an op makes for itself, and rows in its memory.
#pragma once
#include "gemm.h"
#include "plan.h"
#include "workspace.h"

namespace switchgear::cuda {

struct OwnPlan {
  Plan plan;
  TileCounter* counter;  // of all products of the op: they run one after another
  std::byte* workspace;

  OwnPlan(Workspace& memory, const TensorView& topk_ids, int64_t num_experts) {
    const int64_t num_tokens = topk_ids.shape[0], top_k = topk_ids.shape[1], num_slots = num_tokens * top_k;
    plan.expert_offsets = view(memory.take<int32_t>(num_experts + 1), DType::kInt32, num_experts + 1);
    plan.token_indices = view(memory.take<int32_t>(num_slots), DType::kInt32, num_slots);
    plan.slot_indices = view(memory.take<int32_t>(num_slots), DType::kInt32, num_tokens, top_k);
    counter = memory.take<TileCounter>(1);
    workspace = memory.take<std::byte>(plan_workspace_size(num_slots, num_experts));
  }

  // Writes slot_weights too, if given: the weights of topk_weights [T,K] in slot order.
  void make(const TensorView& topk_ids, void* stream, const TensorView& topk_weights = {},
            float* slot_weights = nullptr) const {
    const PlanExtras extras{counter, topk_weights.as<const float>(), slot_weights};
    cuda::plan({.topk_ids = topk_ids, .plan = plan}, workspace, extras, stream);
  }
  Schedule schedule(const Execution& exec) const { return {counter, exec.reserved_multiprocessors, true}; }
};

// A matrix [rows, columns] whose rows start at multiples of 16 bytes.
inline TensorView take_rows(Workspace& memory, DType dtype, int64_t rows, int64_t columns) {
  const int64_t stride = (columns + 7) / 8 * 8;
  TensorView result = view(memory.take<std::byte>(rows * stride * size_of(dtype)), dtype, rows, columns);
  result.stride[0] = stride;
  return result;
}

// Several matrices of [rows, columns] that share the memory of the widest, one after another.
class SharedRows {
 public:
  SharedRows(Workspace& memory, DType dtype, int64_t rows, int64_t widest)
      : all_(take_rows(memory, dtype, rows, widest)) {}

  TensorView view_of(int64_t columns) const {
    TensorView part = view(all_.data, all_.dtype, all_.shape[0], columns);
    part.stride[0] = (columns + 7) / 8 * 8;
    return part;
  }

 private:
  TensorView all_;
};

inline Rows rows_of(const TensorView& view, const int32_t* indices = nullptr) {
  return {view.data, view.stride[0], view.shape[0], indices};
}

}  // namespace switchgear::cuda
