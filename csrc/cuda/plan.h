// SPDX-License-Identifier: BSD-3-Clause
// plan for ops that make their own: the same kernels, with memory that the caller provides.
#pragma once
#include <cstdint>

#include "gemm.h"
#include "switchgear/ops.h"

namespace switchgear::cuda {

// Bytes of temporary memory; 0 if a single block does all the work.
int64_t plan_workspace_size(int64_t num_slots, int64_t num_experts);

// What the kernels also do for the products that use the plan, if given.
struct PlanExtras {
  TileCounter* counter = nullptr;       // set to zeros
  const float* topk_weights = nullptr;  // [T,K], copied …
  float* slot_weights = nullptr;        // … in slot order, [S]; those of unassigned slots are left as they are
};

// `workspace` is aligned to 4 bytes.
void plan(const PlanArgs& args, void* workspace, const PlanExtras& extras, void* stream);

}  // namespace switchgear::cuda
