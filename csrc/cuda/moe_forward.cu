// SPDX-License-Identifier: BSD-3-Clause
// moe_forward: y[t] = Σ_k topk_weights[t,k] · (glu(x[t]·W_guᵀ + b_gu)·W_dᵀ + b_d)
//
//   x [T,H]   gate_up_proj [E,N,H]   down_proj [E,H,I]   y [T,H]   h [S,N], for training only
//   work 2·S·H·(N + I) flop (6·S·H·I for gated experts); traffic: touched weights, S·(2 I + 2 H) elements of a and
//   permuted_y, S·N of h
//   bound by reading weights below about 150 (A100) or 300 (H100) rows per expert, by the tensor cores above
//
// plan, then two grouped GEMMs and combine. The first GEMM gathers rows of x in its loads and applies the gate in its epilogue.
// So no permuted x reaches memory and, without h, no pre-activation. combine reads the rows of a token in a fixed order.
// Temporary memory: the plan, a [S,I] and permuted_y [S,H].
//
// Numeric contract: products accumulate in float32; h (if stored), a and permuted_y are rounded to the dtype of x, y once
// more; a is computed from the unrounded h. Deterministic, and batch-invariant within each of the kernels of gemm.h.
#include "expert_weights.h"
#include "moe.h"
#include "ops.h"

namespace switchgear::cuda {
namespace {

struct ForwardMemory {
  OwnPlan own;
  SeparateMatrix *gate_up, *down;
  TensorView a, permuted_y;

  ForwardMemory(Workspace& memory, const MoeForwardArgs& args)
      : own(memory, args.topk_ids, args.weights.gate_up_proj.data.shape[0]),
        gate_up(memory.take<SeparateMatrix>(separate_count(args.weights.gate_up_proj))),
        down(memory.take<SeparateMatrix>(separate_count(args.weights.down_proj))),
        a(take_rows(memory, args.x.dtype, args.topk_ids.numel(), args.weights.down_proj.data.shape[2])),
        permuted_y(take_rows(memory, args.x.dtype, args.topk_ids.numel(), args.x.shape[1])) {}
};

}  // namespace

void moe_forward(const MoeForwardArgs& args, Execution exec) {
  const int64_t num_slots = args.topk_ids.numel();
  if (num_slots == 0) return;
  Workspace sizes;
  const ForwardMemory layout(sizes, args);
  Workspace memory(allocate(exec, sizes.size()));
  const ForwardMemory m(memory, args);
  const ExpertWeights& weights = args.weights;
  write_separate("gate_up_proj", weights.gate_up_proj, m.gate_up, exec.stream);
  write_separate("down_proj", weights.down_proj, m.down, exec.stream);
  const Plan& p = m.own.plan;
  plan({.topk_ids = args.topk_ids, .plan = p}, m.own.workspace, exec.stream);

  Gemm g{.dtype = args.x.dtype,
         .allow_tf32 = exec.allow_tf32,
         .a = {args.x.data, args.x.stride[0], args.x.shape[0], p.token_indices.as<const int32_t>()},
         .b = operand_of(weights.gate_up_proj, true, m.gate_up),
         .bias = weights.gate_up_bias.data,
         .bias_stride = weights.gate_up_bias.stride[0],
         .expert_offsets = p.expert_offsets.as<const int32_t>(),
         .num_experts = weights.gate_up_proj.data.shape[0],
         .num_slots = num_slots,
         .n = weights.gate_up_proj.data.shape[1],
         .c = args.x.shape[1],
         .epilogue = Epilogue::kGlu,
         .out = m.a.data,
         .out_stride = m.a.stride[0],
         .options = args.options,
         .h = args.h.data,
         .h_stride = args.h.stride[0]};
  gemm(g, exec.stream);

  g.a = {m.a.data, m.a.stride[0], num_slots, nullptr};
  g.b = operand_of(weights.down_proj, true, m.down);
  g.bias = weights.down_bias.data;
  g.bias_stride = weights.down_bias.stride[0];
  g.n = args.y.shape[1];
  g.c = m.a.shape[1];
  g.epilogue = Epilogue::kStore;
  g.out = m.permuted_y.data;
  g.out_stride = m.permuted_y.stride[0];
  g.h = nullptr;
  gemm(g, exec.stream);
  cuda::combine({.permuted_y = m.permuted_y, .plan = p, .topk_weights = args.topk_weights, .y = args.y}, exec);
}

}  // namespace switchgear::cuda
