// SPDX-License-Identifier: BSD-3-Clause
// moe_backward: the gradients of moe_forward from x and the saved pre-activation h.
//
//   per slot s of token t and expert e, with g = grad_y[t]·W_d (∂/∂a before the weight), a = glu(h[s]), w = topk_weight:
//     grad_topk_weight = <g, a> + <grad_y[t], b_d>      grad_h = glu'(h[s], w·g)
//   grad_x[t] = Σ_s grad_h[s]·W_gu      grad_W_gu = Σ_s grad_h[s]ᵀ x[t]      grad_W_d = Σ_s grad_y[t]ᵀ (w·a)
//   work 2·S·H·(I + N + N + I) flop (12·S·H·I for gated experts); traffic: touched weights, weight gradients written once,
//   S·(2 N + 2 I + 2 H) elements of grad_h, w·a and grad_x by slot, read about twice
//
// 1. One grouped GEMM gathers rows of grad_y; its epilogue recomputes a, and writes grad_h, w·a and partial sums of <g, a>.
// With adapters W + s·B·A, and A reading rows times the mask m of dropout:
//     gv = s·(grad_y·B_d)                grad_a also has m ⊙ (gv·A_d)          p = s·((w·a ⊙ m)·A_dᵀ)
//     gu = s·(grad_h·B_gu)               grad_x also has m ⊙ (gu·A_gu)         u = s·((x ⊙ m)·A_guᵀ)
//     grad_A_d = gvᵀ(w·a ⊙ m)   grad_B_d = grad_yᵀ p   grad_A_gu = guᵀ(x ⊙ m)   grad_B_gu = grad_hᵀ u
//   2·S·r·(H + I + H + N) flop for gradients of rows, the same again for p and u, and twice that for A and B
//
// 2. grad_W_d, grad_W_gu: products over the slots of an expert. grad_x: a grouped GEMM, then combine with weights of 1.
// Undefined outputs, and intermediates that only they need, are not computed. Temporary memory: the plan, grad_h [S,N], and
// one region for w·a [S,I], then x ⊙ m and grad_x by slot [S,H]; two regions of small rows [S,r]; weights and parts of their
// gradients, S·(I/32 + 1) floats.
//
// Numeric contract: products accumulate in float32; grad_h, w·a, small rows and the slots' grad_x are rounded to the dtype of
// x, outputs once more. Deterministic: no atomics, and each sum has a fixed order.
#include <algorithm>
#include <utility>

#include "adapter.h"
#include "expert_weights.h"
#include "launch.h"
#include "moe.cuh"
#include "moe.h"
#include "ops.h"
#include "stored.h"

namespace switchgear::cuda {
namespace {

unsigned blocks_of(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

// Which intermediate results the requested outputs need.
struct Needs {
  bool weighted_a, parts, product;

  explicit Needs(const MoeBackwardArgs& args)
      : weighted_a(args.grad_down_proj.defined() || args.grad_down_a.defined() || args.grad_down_b.defined()),
        parts(args.grad_topk_weights.defined()),
        product(weighted_a || parts || args.grad_x.defined() || args.grad_gate_up_proj.defined() ||
                args.grad_gate_up_bias.defined() || args.grad_gate_up_a.defined() || args.grad_gate_up_b.defined()) {}
};

struct BackwardMemory {
  OwnPlan own;
  SeparateMatrix *gate_up, *down;
  ProjectionAdapter gate_up_adapter, down_adapter;
  SharedRows small_grads, small_rows;  // gv, then gu; p, then u
  float *slot_weights, *parts;
  TensorView grad_h, weighted_a, masked_x, slots_grad_x;  // the last three share memory

  BackwardMemory(Workspace& memory, const MoeBackwardArgs& args, const Needs& needs)
      : own(memory, args.topk_ids, args.weights.gate_up_proj.num_experts()),
        gate_up(memory.take<SeparateMatrix>(separate_count(args.weights.gate_up_proj))),
        down(memory.take<SeparateMatrix>(separate_count(args.weights.down_proj))),
        gate_up_adapter(memory, args.weights.gate_up_adapter, 0, args.weights.gate_up_proj, false),
        down_adapter(memory, args.weights.down_adapter, 1, args.weights.down_proj, false),
        small_grads(memory, args.x.dtype, args.topk_ids.numel(), widest()),
        small_rows(memory, args.x.dtype, args.topk_ids.numel(), widest()) {
    const int64_t num_slots = args.topk_ids.numel(), size = args.weights.down_proj.num_cols();
    const DType dtype = args.x.dtype;
    slot_weights = memory.take<float>(num_slots);
    parts = memory.take<float>(needs.parts ? num_slots * weight_parts_of(size) : 0);
    grad_h = take_rows(memory, dtype, needs.product ? num_slots : 0, args.h.shape[1]);
    const bool masks_x = gate_up_adapter.drops() && (args.grad_gate_up_a.defined() || args.grad_gate_up_b.defined());
    const int64_t hidden_size = args.grad_x.defined() || masks_x ? args.x.shape[1] : 0;
    const SharedRows shared(memory, dtype, num_slots, std::max(needs.weighted_a ? size : 0, hidden_size));
    if (needs.weighted_a) weighted_a = shared.view_of(size);
    if (hidden_size > 0) masked_x = slots_grad_x = shared.view_of(hidden_size);
  }
  int64_t widest() const { return std::max(gate_up_adapter.width(), down_adapter.width()); }
};

// grad_weight[e] = Σ_s left[s] ⊗ right[s]
void weight_gradient(const TensorView& gradient, const TensorView& experts, const Rows& left, const Rows& right,
                     const Gemm& like, void* stream) {
  if (!gradient.defined() || gradient.numel() == 0) return;
  Wgrad g{.dtype = like.dtype,
          .allow_tf32 = like.allow_tf32,
          .a = left,
          .b = right,
          .expert_offsets = like.expert_offsets,
          .experts = experts.as<const int32_t>(),
          .num_experts = like.num_experts,
          .num_slots = like.num_slots,
          .num_matrices = gradient.shape[0],
          .m = gradient.shape[1],
          .n = gradient.shape[2],
          .out = gradient.data,
          .out_expert_stride = gradient.stride[0],
          .out_stride = gradient.stride[1],
          .schedule = like.schedule};
  if (gradient.stride[2] != 1) {  // stored transposed: so is the product
    std::swap(g.a, g.b);
    std::swap(g.m, g.n);
    g.out_stride = gradient.stride[2];
  }
  wgrad(g, stream);
}

void bias_gradient(const TensorView& grad_bias, const TensorView& experts, const Rows& rows, const float* slot_weights,
                   const Gemm& like, void* stream) {
  if (grad_bias.numel() == 0) return;
  with_element_type(like.dtype, [&]<typename T>() {
    const BiasGradientParams<T> params{.rows = rows,
                                       .slot_weights = slot_weights,
                                       .expert_offsets = like.expert_offsets,
                                       .experts = experts.as<const int32_t>(),
                                       .grad_bias = grad_bias.as<T>(),
                                       .grad_stride = grad_bias.stride[0],
                                       .num_experts = static_cast<int32_t>(like.num_experts),
                                       .num_slots = static_cast<int32_t>(like.num_slots),
                                       .width = static_cast<int32_t>(grad_bias.shape[1])};
    const unsigned blocks = static_cast<unsigned>(grad_bias.shape[0]) * blocks_of(params.width, kBiasColumns);
    launch(bias_gradient_kernel<T>, dim3(blocks), dim3(kBiasColumns, kBiasRows), 0, stream, params);
  });
}

void topk_weights_gradient(const MoeBackwardArgs& args, const BackwardMemory& m, void* stream) {
  if (!args.grad_topk_weights.defined() || args.topk_ids.numel() == 0) return;
  with_element_type(args.grad_y.dtype, [&]<typename T>() {
    const WeightGradientParams<T> params{.parts = m.parts,
                                         .slot_indices = m.own.plan.slot_indices.as<const int32_t>(),
                                         .topk_ids = args.topk_ids.as<const int32_t>(),
                                         .grad_y = args.grad_y.as<const T>(),
                                         .grad_stride = args.grad_y.stride[0],
                                         .bias = args.weights.down_bias.as<const T>(),
                                         .bias_stride = args.weights.down_bias.stride[0],
                                         .grad_topk_weights = args.grad_topk_weights.as<float>(),
                                         .num_pairs = args.topk_ids.numel(),
                                         .num_slots = args.topk_ids.numel(),
                                         .num_parts = weight_parts_of(args.weights.down_proj.num_cols()),
                                         .num_experts = args.weights.gate_up_proj.num_experts(),
                                         .hidden_size = args.grad_y.shape[1],
                                         .top_k = static_cast<int>(args.topk_ids.shape[1])};
    launch(weight_gradient_kernel<T>, dim3(blocks_of(params.num_pairs, kMoeThreads / 32)), dim3(kMoeThreads), 0, stream,
           params);
  });
}

// The gradient of a projection's small rows, from that of its product: gv or gu.
Rows small_gradient(const ProjectionAdapter& adapter, const Rows& grad, const SharedRows& memory, const Gemm& like,
                    bool needed, void* stream) {
  if (!needed || !adapter.defined()) return {};
  return adapter.multiply(ProjectionAdapter::Side::kB, grad, memory.view_of(adapter.width()), like, stream);
}

struct AdapterGradients {
  const TensorView &a, &b;
};
struct AdapterRows {
  Rows rows, small_grad, grad;  // what A reads; the gradients of small rows and of the product
};

// Gradients of A and B. Dropout writes the masked rows to `masked`.
void adapter_gradients(const AdapterGradients& gradients, const ProjectionAdapter& adapter, AdapterRows r,
                       const TensorView& masked, const SharedRows& memory, const Gemm& like, void* stream) {
  using Side = ProjectionAdapter::Side;
  if (!adapter.defined() || !(gradients.a.defined() || gradients.b.defined())) return;
  if (adapter.drops()) {
    adapter.mask(r.rows, masked, stream);
    r.rows = rows_of(masked);
  }
  weight_gradient(gradients.a, {}, r.small_grad, r.rows, like, stream);
  if (gradients.b.defined()) {
    const Rows small = adapter.multiply(Side::kA, r.rows, memory.view_of(adapter.width()), like, stream);
    weight_gradient(gradients.b, {}, r.grad, small, like, stream);
  }
  adapter.clear_ranks(Side::kA, gradients.a, stream);
  adapter.clear_ranks(Side::kB, gradients.b, stream);
}

}  // namespace

void moe_backward(const MoeBackwardArgs& args, Execution exec) {
  const Needs needs(args);
  Workspace sizes;
  const BackwardMemory layout(sizes, args, needs);
  Workspace memory(allocate(exec, sizes.size()));
  const BackwardMemory m(memory, args, needs);
  const ExpertWeights& weights = args.weights;
  check_separate("gate_up_proj", weights.gate_up_proj);
  check_separate("down_proj", weights.down_proj);
  const Plan& p = m.own.plan;
  const int64_t num_slots = args.topk_ids.numel();
  m.own.make(args.topk_ids, exec.stream, args.topk_weights, m.slot_weights);

  const auto* const token_indices = p.token_indices.as<const int32_t>();
  const Rows x = rows_of(args.x, token_indices), grad_y = rows_of(args.grad_y, token_indices);
  const Rows grad_h = rows_of(m.grad_h), weighted_a = rows_of(m.weighted_a);
  m.gate_up_adapter.copy_matrices(p.expert_offsets.as<const int32_t>(), num_slots, exec.stream);
  m.down_adapter.copy_matrices(p.expert_offsets.as<const int32_t>(), num_slots, exec.stream);
  Gemm g{.dtype = args.x.dtype,
         .allow_tf32 = exec.allow_tf32,
         .a = grad_y,
         .b = operand_of(weights.down_proj, false, m.down),
         .schedule = m.own.schedule(exec),
         .expert_offsets = p.expert_offsets.as<const int32_t>(),
         .num_experts = weights.gate_up_proj.num_experts(),
         .num_slots = num_slots,
         .n = weights.down_proj.num_cols(),
         .c = args.grad_y.shape[1],
         .epilogue = Epilogue::kGluBackward,
         .out = m.grad_h.data,
         .out_stride = m.grad_h.stride[0],
         .options = args.options,
         .h = args.h.data,
         .h_stride = args.h.stride[0],
         .slot_weights = m.slot_weights,
         .weighted_a = m.weighted_a.data,
         .weighted_a_stride = m.weighted_a.stride[0],
         .weight_parts = needs.parts ? m.parts : nullptr};
  const Rows grad_v = small_gradient(m.down_adapter, grad_y, m.small_grads, g, needs.product, exec.stream);
  g.low = m.down_adapter.term(grad_v);
  if (needs.product) backward_gemm(g, "down_proj", weights.down_proj, exec.stream);
  weight_gradient(args.grad_down_proj, args.experts, grad_y, weighted_a, g, exec.stream);
  bias_gradient(args.grad_down_bias, args.experts, grad_y, m.slot_weights, g, exec.stream);
  adapter_gradients({args.grad_down_a, args.grad_down_b}, m.down_adapter, {weighted_a, grad_v, grad_y}, m.weighted_a,
                    m.small_rows, g, exec.stream);
  weight_gradient(args.grad_gate_up_proj, args.experts, grad_h, x, g, exec.stream);
  bias_gradient(args.grad_gate_up_bias, args.experts, grad_h, nullptr, g, exec.stream);
  const bool needs_grad_u = args.grad_x.defined() || args.grad_gate_up_a.defined();
  const Rows grad_u = small_gradient(m.gate_up_adapter, grad_h, m.small_grads, g, needs_grad_u, exec.stream);
  adapter_gradients({args.grad_gate_up_a, args.grad_gate_up_b}, m.gate_up_adapter, {x, grad_u, grad_h}, m.masked_x,
                    m.small_rows, g, exec.stream);
  const bool has_grad_x = args.grad_x.defined() && num_slots > 0;
  if (has_grad_x) {
    g.a = grad_h;
    g.b = operand_of(weights.gate_up_proj, false, m.gate_up);
    g.n = args.x.shape[1];
    g.c = args.h.shape[1];
    g.low = m.gate_up_adapter.term(grad_u);
    g.epilogue = Epilogue::kStore;
    g.out = m.slots_grad_x.data;
    g.out_stride = m.slots_grad_x.stride[0];
    backward_gemm(g, "gate_up_proj", weights.gate_up_proj, exec.stream);
  }
  topk_weights_gradient(args, m, exec.stream);  // after the products, which follow each other without a gap
  if (has_grad_x) cuda::combine({.permuted_y = m.slots_grad_x, .plan = p, .y = args.grad_x}, exec);
}

}  // namespace switchgear::cuda
