// SPDX-License-Identifier: BSD-3-Clause
// plan for ops that make their own: the same kernels, with memory that the caller provides.
#pragma once
#include <cstdint>

#include "gemm.h"
#include "switchgear/ops.h"

namespace switchgear::cuda {

// Bytes of temporary memory; 0 if a single block does all the work.
int64_t plan_workspace_size(int64_t num_slots, int64_t num_experts);

// `workspace` is aligned to 4 bytes. `counter`, if given, is set to zeros for the products that use the plan.
void plan(const PlanArgs& args, void* workspace, TileCounter* counter, void* stream);

}  // namespace switchgear::cuda
