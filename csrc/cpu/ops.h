// SPDX-License-Identifier: BSD-3-Clause
// The ops of the CPU backend: the functions of its table. csrc/ops.cpp has checked the arguments.
#pragma once
#include "context.h"

namespace switchgear::cpu {

void route(const RouteArgs& args, const Context& context);
void route_backward(const RouteBackwardArgs& args, const Context& context);
void gate(const GateArgs& args, const Context& context);
void route_dynamic(const RouteDynamicArgs& args, const Context& context);
void column_topk(const ColumnTopkArgs& args, const Context& context);
void fit_capacity(const FitCapacityArgs& args, const Context& context);
void assign_balanced(const AssignBalancedArgs& args, const Context& context);
void assign_capped(const AssignCappedArgs& args, const Context& context);
void plan(const PlanArgs& args, const Context& context);
void permute(const PermuteArgs& args, const Context& context);
void combine(const CombineArgs& args, const Context& context);
void combine_weight_backward(const CombineBackwardArgs& args, const Context& context);
void grouped_gemm(const GroupedGemmArgs& args, const Context& context);
void grouped_gemm_wgrad(const GroupedGemmWgradArgs& args, const Context& context);
void glu(const GluArgs& args, const Context& context);
void glu_backward(const GluBackwardArgs& args, const Context& context);
void moe_forward(const MoeForwardArgs& args, const Context& context);
void moe_backward(const MoeBackwardArgs& args, const Context& context);

// grouped_gemm and moe_forward of integer weights, and grouped_gemm of x·W with stored weights.
void integer_grouped_gemm(const GroupedGemmArgs& args, const Context& context);
void integer_moe_forward(const MoeForwardArgs& args, const Context& context);
void transposed_grouped_gemm(const GroupedGemmArgs& args, const Context& context);

}  // namespace switchgear::cpu
