// SPDX-License-Identifier: BSD-3-Clause
#include <utility>

#include "expert_weights.h"
#include "gemm.h"
#include "ops.h"
#include "workspace.h"

namespace switchgear::cuda {
namespace {

Rows rows_of(const TensorView& x, const TensorView& token_indices) {
  return {x.data, x.stride[0], x.shape[0], token_indices.as<const int32_t>()};
}

}  // namespace

void grouped_gemm(const GroupedGemmArgs& args, Execution exec) {
  if (args.out.shape[0] == 0) return;
  const int64_t count = separate_count(args.weight);
  Workspace memory(allocate(exec, count * static_cast<int64_t>(sizeof(SeparateMatrix))));
  auto* const separate = memory.take<SeparateMatrix>(count);
  write_separate("weight", args.weight, separate, exec.stream);
  gemm({.dtype = args.x.dtype,
        .allow_tf32 = exec.allow_tf32,
        .a = rows_of(args.x, args.token_indices),
        .b = operand_of(args.weight, true, separate),
        .bias = args.bias.data,
        .bias_stride = args.bias.stride[0],
        .expert_offsets = args.expert_offsets.as<const int32_t>(),
        .num_experts = args.weight.data.shape[0],
        .num_slots = args.out.shape[0],
        .n = args.out.shape[1],
        .c = args.x.shape[1],
        .out = args.out.data,
        .out_stride = args.out.stride[0]},
       exec.stream);
}

void grouped_gemm_wgrad(const GroupedGemmWgradArgs& args, Execution exec) {
  const TensorView& gradient = args.grad_weight;
  Wgrad g{.dtype = args.x.dtype,
          .allow_tf32 = exec.allow_tf32,
          .a = rows_of(args.grad_out, {}),
          .b = rows_of(args.x, args.token_indices),
          .expert_offsets = args.expert_offsets.as<const int32_t>(),
          .experts = args.experts.as<const int32_t>(),
          .num_experts = args.expert_offsets.shape[0] - 1,
          .num_slots = args.grad_out.shape[0],
          .num_matrices = gradient.shape[0],
          .m = gradient.shape[1],
          .n = gradient.shape[2],
          .out = gradient.data,
          .out_expert_stride = gradient.stride[0],
          .out_stride = gradient.stride[1]};
  if (gradient.stride[2] != 1) {  // stored transposed: so is the product
    std::swap(g.a, g.b);
    std::swap(g.m, g.n);
    g.out_stride = gradient.stride[2];
  }
  wgrad(g, exec.stream);
}

}  // namespace switchgear::cuda
