// SPDX-License-Identifier: BSD-3-Clause
// plan for ops that make one on their way: the same kernels with memory of the caller's.
#pragma once
#include <cstdint>

#include "switchgear/ops.h"

namespace switchgear::cuda {

// Bytes of temporary memory, 0 where a single block does it all.
int64_t plan_workspace_size(int64_t num_slots, int64_t num_experts);

// `workspace` is aligned to 4 bytes.
void plan(const PlanArgs& args, void* workspace, void* stream);

}  // namespace switchgear::cuda
