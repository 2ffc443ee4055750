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
// With an adapter a projection multiplies by W + s·B·A: first a small GEMM, u [S,r] = s·(rows·Aᵀ), then u·Bᵀ is the first part
// of the inner dimension of the projection's own GEMM. 2·S·r·(C + N) flop more, and r·(C + N) elements per touched expert.
// Dropout masks a copy of the rows that A reads, in the memory of permuted_y. See adapter.h.
//
// Weights of other formats than plain: stored.h. Integers multiply rows rounded to int8: x once, then a.
//
// Numeric contract: products accumulate in float32; h (if stored), a, u and permuted_y are rounded to the dtype of x, y once
// more; a is computed from the unrounded h, the second projection's u from the rounded a. Deterministic, and batch-invariant
// within each of the kernels of gemm.h.
#include <algorithm>

#include "adapter.h"
#include "expert_weights.h"
#include "moe.h"
#include "ops.h"
#include "stored.h"

namespace switchgear::cuda {
namespace {

struct ForwardMemory {
  OwnPlan own;
  SeparateMatrix *gate_up, *down;
  ProjectionAdapter gate_up_adapter, down_adapter;
  TensorView u, v, a;                      // u, v: small rows of the adapters
  QuantizedRows quantized_x, quantized_a;  // for weights of integers
  SharedRows shared;                       // rows that an adapter masks; then permuted_y

  ForwardMemory(Workspace& memory, const MoeForwardArgs& args)
      : own(memory, args.topk_ids, args.weights.gate_up_proj.num_experts()),
        gate_up(memory.take<SeparateMatrix>(separate_count(args.weights.gate_up_proj))),
        down(memory.take<SeparateMatrix>(separate_count(args.weights.down_proj))),
        gate_up_adapter(memory, args.weights.gate_up_adapter, 0, args.weights.gate_up_proj, true),
        down_adapter(memory, args.weights.down_adapter, 1, args.weights.down_proj, true),
        u(take_rows(memory, args.x.dtype, args.topk_ids.numel(), gate_up_adapter.width())),
        v(take_rows(memory, args.x.dtype, args.topk_ids.numel(), down_adapter.width())),
        a(take_rows(memory, args.x.dtype, args.topk_ids.numel(), args.weights.down_proj.num_cols())),
        quantized_x(memory, args.weights.gate_up_proj, args.x.shape[0]),
        quantized_a(memory, args.weights.down_proj, args.topk_ids.numel()),
        shared(memory, args.x.dtype, args.topk_ids.numel(),
               std::max(args.x.shape[1], down_adapter.drops() ? a.shape[1] : 0)) {}
};

// Sets the adapter's term of g, whose a are the rows that A reads.
void add_adapter(Gemm& g, const ProjectionAdapter& adapter, const TensorView& small_rows, const SharedRows& shared,
                 void* stream) {
  g.low = {};
  if (!adapter.defined()) return;
  Rows rows = g.a;
  if (adapter.drops()) {
    const TensorView masked = shared.view_of(g.c);
    adapter.mask(rows, masked, stream);
    rows = rows_of(masked);
  }
  g.low = adapter.term(adapter.multiply(ProjectionAdapter::Side::kA, rows, small_rows, g, stream));
}

}  // namespace

void moe_forward(const MoeForwardArgs& args, Execution exec) {
  const int64_t num_slots = args.topk_ids.numel();
  if (num_slots == 0) return;
  Workspace sizes;
  const ForwardMemory layout(sizes, args);
  Workspace memory(allocate(exec, sizes.size()));
  const ForwardMemory m(memory, args);
  const ExpertWeights& weights = args.weights;
  check_separate("gate_up_proj", weights.gate_up_proj);
  check_separate("down_proj", weights.down_proj);
  const Plan& p = m.own.plan;
  m.own.make(args.topk_ids, exec.stream);
  const auto* const expert_offsets = p.expert_offsets.as<const int32_t>();
  m.gate_up_adapter.copy_matrices(expert_offsets, num_slots, exec.stream);
  m.down_adapter.copy_matrices(expert_offsets, num_slots, exec.stream);

  Gemm g{.dtype = args.x.dtype,
         .allow_tf32 = exec.allow_tf32,
         .a = rows_of(args.x, p.token_indices.as<const int32_t>()),
         .b = operand_of(weights.gate_up_proj, true, m.gate_up),
         .schedule = m.own.schedule(exec),
         .bias = weights.gate_up_bias.data,
         .bias_stride = weights.gate_up_bias.stride[0],
         .expert_offsets = expert_offsets,
         .num_experts = weights.gate_up_proj.num_experts(),
         .num_slots = num_slots,
         .n = weights.gate_up_proj.num_rows(),
         .c = args.x.shape[1],
         .epilogue = Epilogue::kGlu,
         .out = m.a.data,
         .out_stride = m.a.stride[0],
         .options = args.options,
         .h = args.h.data,
         .h_stride = args.h.stride[0]};
  add_adapter(g, m.gate_up_adapter, m.u, m.shared, exec.stream);
  forward_gemm(g, "gate_up_proj", weights.gate_up_proj, m.quantized_x, exec.stream);

  const TensorView permuted_y = m.shared.view_of(args.y.shape[1]);
  g.a = rows_of(m.a);
  g.b = operand_of(weights.down_proj, true, m.down);
  g.bias = weights.down_bias.data;
  g.bias_stride = weights.down_bias.stride[0];
  g.n = args.y.shape[1];
  g.c = m.a.shape[1];
  g.epilogue = Epilogue::kStore;
  g.out = permuted_y.data;
  g.out_stride = permuted_y.stride[0];
  g.h = nullptr;
  add_adapter(g, m.down_adapter, m.v, m.shared, exec.stream);
  forward_gemm(g, "down_proj", weights.down_proj, m.quantized_a, exec.stream);
  cuda::combine({.permuted_y = permuted_y, .plan = p, .topk_weights = args.topk_weights, .y = args.y}, exec);
}

}  // namespace switchgear::cuda
