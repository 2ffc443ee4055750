// SPDX-License-Identifier: BSD-3-Clause
// The ops of the CUDA backend: the functions of its table. csrc/ops.cpp has checked the arguments, but not the values in
// device memory: kernels treat an id outside [0,E) as an empty slot and skip a slot whose indices are out of range. The
// tensors' device is current. An op allocates all of its temporary memory in one call, queues its kernels on exec.stream
// and returns.
#pragma once
#include "switchgear/ops.h"

namespace switchgear::cuda {

void route(const RouteArgs& args, Execution exec);
void route_backward(const RouteBackwardArgs& args, Execution exec);
void gate(const GateArgs& args, Execution exec);
void route_dynamic(const RouteDynamicArgs& args, Execution exec);
void column_topk(const ColumnTopkArgs& args, Execution exec);
void fit_capacity(const FitCapacityArgs& args, Execution exec);
void assign_balanced(const AssignBalancedArgs& args, Execution exec);
void assign_capped(const AssignCappedArgs& args, Execution exec);
void plan(const PlanArgs& args, Execution exec);
void permute(const PermuteArgs& args, Execution exec);
void combine(const CombineArgs& args, Execution exec);
void combine_weight_backward(const CombineBackwardArgs& args, Execution exec);
void grouped_gemm(const GroupedGemmArgs& args, Execution exec);
void grouped_gemm_wgrad(const GroupedGemmWgradArgs& args, Execution exec);
void glu(const GluArgs& args, Execution exec);
void glu_backward(const GluBackwardArgs& args, Execution exec);
void moe_forward(const MoeForwardArgs& args, Execution exec);
void moe_backward(const MoeBackwardArgs& args, Execution exec);

}  // namespace switchgear::cuda
