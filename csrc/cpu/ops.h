// SPDX-License-Identifier: BSD-3-Clause
// The ops of the CPU backend: the functions of its table. csrc/ops.cpp has checked the arguments.
#pragma once
#include "context.h"

namespace switchgear::cpu {

#define SWITCHGEAR_DECLARATION(op, Args, tensor) void op(const Args& args, const Context& context);
SWITCHGEAR_OPS(SWITCHGEAR_DECLARATION)
SWITCHGEAR_CPU_OPS(SWITCHGEAR_DECLARATION)
#undef SWITCHGEAR_DECLARATION

// grouped_gemm and moe_forward of integer weights, and grouped_gemm of x·W with stored weights.
void integer_grouped_gemm(const GroupedGemmArgs& args, const Context& context);
void integer_moe_forward(const MoeForwardArgs& args, const Context& context);
void transposed_grouped_gemm(const GroupedGemmArgs& args, const Context& context);

}  // namespace switchgear::cpu
