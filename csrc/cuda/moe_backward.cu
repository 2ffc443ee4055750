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
// 2. grad_W_d, grad_W_gu: products over the slots of an expert. grad_x: a grouped GEMM, then combine with weights of 1.
// Undefined outputs, and intermediates that only they need, are not computed. Temporary memory: the plan, grad_h [S,N], and
// one region for w·a [S,I] and later grad_x by slot [S,H]; weights and parts of their gradients, S·(I/32 + 1) floats.
//
// Numeric contract: products accumulate in float32; grad_h, w·a and the slots' grad_x are rounded to the dtype of x, outputs
// once more. Deterministic: no atomics, and each sum has a fixed order.
#include <algorithm>
#include <utility>

#include "expert_weights.h"
#include "launch.h"
#include "moe.cuh"
#include "moe.h"
#include "ops.h"

namespace switchgear::cuda {
namespace {

unsigned blocks_of(int64_t count, int64_t per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

// Which intermediate results the requested outputs need.
struct Needs {
  bool weighted_a, parts, product;

  explicit Needs(const MoeBackwardArgs& args)
      : weighted_a(args.grad_down_proj.defined()),
        parts(args.grad_topk_weights.defined()),
        product(weighted_a || parts || args.grad_x.defined() || args.grad_gate_up_proj.defined() ||
                args.grad_gate_up_bias.defined()) {}
};

struct BackwardMemory {
  OwnPlan own;
  SeparateMatrix *gate_up, *down;
  float *slot_weights, *parts;
  TensorView grad_h, weighted_a, slots_grad_x;  // the last two share memory

  BackwardMemory(Workspace& memory, const MoeBackwardArgs& args, const Needs& needs)
      : own(memory, args.topk_ids, args.weights.gate_up_proj.data.shape[0]),
        gate_up(memory.take<SeparateMatrix>(separate_count(args.weights.gate_up_proj))),
        down(memory.take<SeparateMatrix>(separate_count(args.weights.down_proj))) {
    const int64_t num_slots = args.topk_ids.numel(), size = args.weights.down_proj.data.shape[2];
    const DType dtype = args.x.dtype;
    slot_weights = memory.take<float>(num_slots);
    parts = memory.take<float>(needs.parts ? num_slots * weight_parts_of(size) : 0);
    grad_h = take_rows(memory, dtype, needs.product ? num_slots : 0, args.h.shape[1]);
    const int64_t hidden_size = args.grad_x.defined() ? args.x.shape[1] : 0;
    const int64_t columns = std::max(needs.weighted_a ? size : 0, hidden_size);
    const TensorView shared = take_rows(memory, dtype, num_slots, columns);
    const auto part_of = [&](int64_t width) {
      TensorView part = view(shared.data, dtype, num_slots, width);
      part.stride[0] = (width + 7) / 8 * 8;
      return part;
    };
    if (needs.weighted_a) weighted_a = part_of(size);
    if (hidden_size > 0) slots_grad_x = part_of(hidden_size);
  }
};

// grad_weight[e] = Σ_s left[s] ⊗ right[s]
void weight_gradient(const TensorView& gradient, const TensorView& experts, const Rows& left, const Rows& right,
                     const Gemm& like, void* stream) {
  if (!gradient.defined()) return;
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
          .out_stride = gradient.stride[1]};
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
                                         .num_parts = weight_parts_of(args.weights.down_proj.data.shape[2]),
                                         .num_experts = args.weights.gate_up_proj.data.shape[0],
                                         .hidden_size = args.grad_y.shape[1],
                                         .top_k = static_cast<int>(args.topk_ids.shape[1])};
    launch(weight_gradient_kernel<T>, dim3(blocks_of(params.num_pairs, kMoeThreads / 32)), dim3(kMoeThreads), 0, stream,
           params);
  });
}

}  // namespace

void moe_backward(const MoeBackwardArgs& args, Execution exec) {
  const Needs needs(args);
  Workspace sizes;
  const BackwardMemory layout(sizes, args, needs);
  Workspace memory(allocate(exec, sizes.size()));
  const BackwardMemory m(memory, args, needs);
  const ExpertWeights& weights = args.weights;
  write_separate("gate_up_proj", weights.gate_up_proj, m.gate_up, exec.stream);
  write_separate("down_proj", weights.down_proj, m.down, exec.stream);
  const Plan& p = m.own.plan;
  plan({.topk_ids = args.topk_ids, .plan = p}, m.own.workspace, exec.stream);
  const int64_t num_slots = args.topk_ids.numel();
  if (num_slots > 0) {
    launch(slot_weights_kernel, dim3(blocks_of(num_slots, kMoeThreads)), dim3(kMoeThreads), 0, exec.stream,
           SlotWeightParams{p.slot_indices.as<const int32_t>(), args.topk_weights.as<const float>(), m.slot_weights,
                            num_slots, num_slots});
  }

  const auto* const token_indices = p.token_indices.as<const int32_t>();
  const Rows x{args.x.data, args.x.stride[0], args.x.shape[0], token_indices};
  const Rows grad_y{args.grad_y.data, args.grad_y.stride[0], args.grad_y.shape[0], token_indices};
  const Rows grad_h{m.grad_h.data, m.grad_h.stride[0], num_slots, nullptr};
  const Rows weighted_a{m.weighted_a.data, m.weighted_a.stride[0], num_slots, nullptr};
  Gemm g{.dtype = args.x.dtype,
         .allow_tf32 = exec.allow_tf32,
         .a = grad_y,
         .b = operand_of(weights.down_proj, false, m.down),
         .expert_offsets = p.expert_offsets.as<const int32_t>(),
         .num_experts = weights.gate_up_proj.data.shape[0],
         .num_slots = num_slots,
         .n = weights.down_proj.data.shape[2],
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
  if (needs.product) gemm(g, exec.stream);
  topk_weights_gradient(args, m, exec.stream);
  weight_gradient(args.grad_down_proj, args.experts, grad_y, weighted_a, g, exec.stream);
  bias_gradient(args.grad_down_bias, args.experts, grad_y, m.slot_weights, g, exec.stream);
  weight_gradient(args.grad_gate_up_proj, args.experts, grad_h, x, g, exec.stream);
  bias_gradient(args.grad_gate_up_bias, args.experts, grad_h, nullptr, g, exec.stream);
  if (!args.grad_x.defined() || num_slots == 0) return;

  g.a = grad_h;
  g.b = operand_of(weights.gate_up_proj, false, m.gate_up);
  g.n = args.x.shape[1];
  g.c = args.h.shape[1];
  g.epilogue = Epilogue::kStore;
  g.out = m.slots_grad_x.data;
  g.out_stride = m.slots_grad_x.stride[0];
  gemm(g, exec.stream);
  cuda::combine({.permuted_y = m.slots_grad_x, .plan = p, .y = args.grad_x}, exec);
}

}  // namespace switchgear::cuda
