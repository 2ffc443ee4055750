// SPDX-License-Identifier: BSD-3-Clause
// Checks the arguments of each op once, against the shapes in ops.h, then calls the device's table. Kernels trust them.
#include "switchgear/ops.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>

#include "checks.h"
#include "decoder_layer.h"
#include "switchgear/backend.h"
#include "switchgear/check.h"

namespace switchgear {
namespace {

using enum Kind;
using enum Layout;

// Tokens, experts and slots are numbered in int32.
constexpr int64_t kMostIndices = std::numeric_limits<int32_t>::max();

// S = T·K
Dim slots(const Dim& T, const Dim& K) {
  SWITCHGEAR_CHECK(ValueError, K.size <= kMostIndices && T.size <= kMostIndices / K.size,
                   "topk_ids: expected less than 2^31 slots, got ", T.size, " tokens with ", K.size, " choices each");
  return {"S", 0, T.size * K.size};
}

// ---- plans, which the caller may have changed ---

// slot_indices [T,K], token_indices [S], expert_offsets [E+1]
void plan_shapes(Call& call, const Plan& plan, Dim& T, Dim& K, Dim& S) {
  Dim offsets{"E+1", 2};
  call.input("slot_indices", plan.slot_indices, kInt32, {&T, &K});
  S = slots(T, K);
  call.input("token_indices", plan.token_indices, kInt32, {&S});
  call.input("expert_offsets", plan.expert_offsets, kInt32, {&offsets});
}

// Index arrays are copied before they are checked (Call::own), so ops that have some change a copy of their arguments.

// Slots past expert_offsets[E] belong to no expert, and no kernel reads their token_indices.
void check_tokens(Call& call, TensorView& token_indices, const TensorView& expert_offsets, int64_t num_tokens) {
  if (!readable(expert_offsets)) return;
  call.own(token_indices);
  TensorView used = token_indices;
  used.shape[0] = expert_offsets.as<const int32_t>()[expert_offsets.shape[0] - 1];
  check_range("token_indices", used, 0, num_tokens);
}

// The experts whose gradients are computed, if given.
void check_trained(Call& call, TensorView& experts, int64_t num_experts) {
  if (!experts.defined()) return;
  call.own(experts);
  check_experts("experts", experts, num_experts);
}

void check_offsets(Call& call, TensorView& expert_offsets, int64_t num_slots) {
  call.own(expert_offsets);
  check_offsets("expert_offsets", expert_offsets, num_slots);
}

void check_ids(Call& call, TensorView& topk_ids, const Dim& E) {
  call.own(topk_ids);
  check_range("topk_ids", topk_ids, -1, E.size);
}

void check_plan(Call& call, Plan& plan, const Dim& T, const Dim& S) {
  check_offsets(call, plan.expert_offsets, S.size);
  check_tokens(call, plan.token_indices, plan.expert_offsets, T.size);
  call.own(plan.slot_indices);
  check_range("slot_indices", plan.slot_indices, -1, S.size);
}

void check_slots(Call& call, ExpertWeights& weights) {
  check_slots(call, kGateUpProj, weights.gate_up_proj);
  check_slots(call, kDownProj, weights.down_proj);
}

void check_sequence_ids(Call& call, TensorView& sequence_ids, int64_t num_sequences) {
  if (!sequence_ids.defined()) return;
  call.own(sequence_ids);
  check_range("sequence_ids", sequence_ids, 0, num_sequences);
}

void check_sequences(Call& call, TensorView& sequence_ids, TensorView& limits, const Dim& B) {
  check_sequence_ids(call, sequence_ids, B.size);
  call.own(limits);
  check_range("limits", limits, 0, kMostIndices + 1);
}

// ---- options ---

// Enumerations come from other languages too.
template <typename Enum>
void check_known(const char* name, Enum value, Enum last) {
  SWITCHGEAR_CHECK(ValueError, value <= last, name, ": expected 0 to ", static_cast<int>(last), ", got ",
                   static_cast<int>(value));
}

void check_options(const RouteOptions& options, const Dim& E) {
  const int64_t k = options.top_k, groups = options.num_groups, chosen = options.topk_groups;
  SWITCHGEAR_CHECK(ValueError, k >= 1 && k <= E.size, "top_k: expected 1 to E=", E.size, ", got ", k);
  SWITCHGEAR_CHECK(ValueError, groups >= 1 && E.size % groups == 0, "num_groups: expected a divisor of E=", E.size,
                   ", got ", groups);
  SWITCHGEAR_CHECK(ValueError, chosen >= 1 && chosen <= groups, "topk_groups: expected 1 to num_groups=", groups,
                   ", got ", chosen);
  SWITCHGEAR_CHECK(ValueError, chosen * (E.size / groups) >= k, "topk_groups: expected groups with at least top_k=", k,
                   " experts, got ", chosen, " of ", E.size / groups, " each");
  SWITCHGEAR_CHECK(ValueError, std::isfinite(options.scale), "scale: expected a finite number, got ", options.scale);
  check_known("score_function", options.score_function, ScoreFunction::kSigmoid);
  check_known("group_score", options.group_score, GroupScore::kTop2Sum);
}

void check_options(const GluOptions& options) {
  check_known("activation", options.activation, static_cast<Activation>(kActivationNames.size() - 1));
  SWITCHGEAR_CHECK(ValueError, options.gated || options.activation != Activation::kSwigluOai,
                   "activation: expected gated experts for swiglu_oai, got gated=False");
  SWITCHGEAR_CHECK(ValueError, options.limit >= 0 && std::isfinite(options.limit),
                   "limit: expected 0 (none) or a positive number, got ", options.limit);
  SWITCHGEAR_CHECK(ValueError, std::isfinite(options.alpha), "alpha: expected a finite number, got ", options.alpha);
}

void check_eps(float eps) {
  SWITCHGEAR_CHECK(ValueError, eps > 0 && std::isfinite(eps), "eps: expected a positive number, got ", eps);
}

// Routers keep some tensors in float32 whatever the dtype of x.
Kind float32_or_shared(const TensorView& tensor) { return tensor.dtype == DType::kFloat32 ? kFloat32 : kFloat; }

// All of a route but its logits: of route and gate_route.
template <typename Args>
void route_shapes(Call& call, const Args& args, Dim& T, Dim& E) {
  Dim K{"K", 1, args.options.top_k};
  call.optional_input("selection_bias", args.selection_bias, kFloat32, {&E});
  call.output("topk_ids", args.topk_ids, kInt32, {&T, &K});
  call.output("topk_weights", args.topk_weights, kFloat32, {&T, &K});
  slots(T, K);
  check_options(args.options, E);
}

void gate_shapes(Call& call, const GateArgs& args, Dim& T, Dim& E) {
  Dim H{"H"};
  const auto& [x, weight, bias, router_logits] = args;
  call.input("x", x, kFloat, {&T, &H}, kRows);
  call.input("weight", weight, float32_or_shared(weight), {&E, &H}, kRows);
  call.optional_input("bias", bias, float32_or_shared(bias), {&E});
  call.output("router_logits", router_logits, float32_or_shared(router_logits), {&T, &E}, kRows);
}

bool multiplies_transposed(Format format) { return has_parts(format); }

// I = N/2 for gated experts, N for plain ones
Dim intermediate(const char* name, const GluOptions& options, const Dim& N) {
  SWITCHGEAR_CHECK(ValueError, !options.gated || N.size % 2 == 0, name,
                   ": expected an even N (gates and ups) for gated experts, got N=", N.size);
  return {"I", 1, options.gated ? N.size / 2 : N.size};
}

// gate_up_bias [E,N], down_bias [E,H]
void bias_shapes(Call& call, const ExpertWeights& weights, Dim& E, Dim& H, Dim& N) {
  call.optional_input("gate_up_bias", weights.gate_up_bias, kFloat, {&E, &N}, kRows);
  call.optional_input("down_bias", weights.down_bias, kFloat, {&E, &H}, kRows);
}

// moe_backward decodes stored weights for gradients of other tensors; only a plain weight has a gradient itself.
void check_frozen(const char* name, const Weight& weight, const TensorView& gradient) {
  SWITCHGEAR_CHECK(ValueError, weight.format == Format::kPlain || !gradient.defined(), name,
                   ": expected plain weights for their gradients, got ", name_of(weight.format));
}

// a [E,r,C], b [E,N,r], scales [E] and ranks [E]
void adapter_input(Call& call, const AdapterNames& names, const Adapter& adapter, Dim& E, Dim& N, Dim& C) {
  if (!adapter.defined()) return;
  SWITCHGEAR_CHECK(ValueError, call.backend().takes_adapters, names.adapter, ": expected none on this device, got ",
                   describe(adapter.a));
  Dim rank{"r"};
  call.input(names.a, adapter.a, kFloat, {&E, &rank, &C}, kMatrices);
  call.input(names.b, adapter.b, kFloat, {&E, &N, &rank}, kMatrices);
  call.input(names.scales, adapter.scales, kFloat32, {&E});
  call.optional_input(names.ranks, adapter.ranks, kInt32, {&E});
  SWITCHGEAR_CHECK(ValueError, adapter.dropout >= 0 && adapter.dropout < 1,
                   "dropout: expected two probabilities in [0, 1), got ", adapter.dropout);
  const TensorView& seed = adapter.device_seed;
  const bool is_near = seed.device.type == adapter.a.device.type && seed.device.index == adapter.a.device.index;
  SWITCHGEAR_CHECK(ValueError, !seed.defined() || is_near, "dropout_seed: expected it on the CPU or beside ", names.a,
                   ", got ", describe(seed));
}

void adapter_inputs(Call& call, const ExpertWeights& weights, Dim& E, Dim& H, Dim& I, Dim& N) {
  adapter_input(call, kGateUpAdapter, weights.gate_up_adapter, E, N, H);
  adapter_input(call, kDownAdapter, weights.down_adapter, E, H, I);
}

// The contents, if they are in host memory. Ranks are indices, so they are replaced by a copy.
void check_adapter(Call& call, const AdapterNames& names, Adapter& adapter) {
  if (!adapter.defined() || !readable(adapter.scales)) return;
  for (int64_t e = 0; e < adapter.scales.shape[0]; ++e) {
    const float scale = adapter.scales.as<const float>()[e];
    SWITCHGEAR_CHECK(ValueError, std::isfinite(scale), names.scales, ": expected finite numbers, got ", scale,
                     " for expert ", e);
  }
  if (!adapter.ranks.defined()) return;
  call.own(adapter.ranks);
  check_range(names.ranks, adapter.ranks, 0, adapter.rank() + 1);
}

void check_adapters(Call& call, ExpertWeights& weights) {
  check_adapter(call, kGateUpAdapter, weights.gate_up_adapter);
  check_adapter(call, kDownAdapter, weights.down_adapter);
}

void check_sums(const Call& call, const MoeForwardArgs& args) {
  SWITCHGEAR_CHECK(ValueError, call.backend().device == DeviceType::kCPU, "sums: expected none on this device, got ",
                   describe(args.sums));
  SWITCHGEAR_CHECK(ValueError, !args.y.defined(), "y: expected none beside sums, got ", describe(args.y));
}

// Only grouped_gemm multiplies separate matrices of different heights.
void check_heights(const char* name, const Weight& weight) {
  if (weight.base == nullptr) return;
  for (int64_t e = 0; e < weight.data.shape[0]; ++e) {
    SWITCHGEAR_CHECK(ValueError, weight.row_count[e] == weight.data.shape[1], name, '[', e, "]: expected ",
                     weight.data.shape[1], " rows like the largest, got ", weight.row_count[e]);
  }
}

// H, which the weights have, so that an error names x if its width is another one.
Dim hidden_size(const ExpertWeights& weights) {
  const Weight& weight = weights.gate_up_proj;
  const bool has_columns = weight.format != Format::kPlain || weight.data.ndim == 3;
  return {"H", 1, has_columns && weight.num_cols() > 0 ? weight.num_cols() : Dim::kUnknown};
}

// gate_up_proj [E,N,H] and down_proj [E,H,I] in any formats that one layer can combine
void weight_shapes(Call& call, const ExpertWeights& weights, const GluOptions& options, Dim& E, Dim& H, Dim& I,
                   Dim& N) {
  const Weight &gate_up = weights.gate_up_proj, &down = weights.down_proj;
  weight_input(call, kGateUpProj, gate_up, E, N, H);
  check_heights("gate_up_proj", gate_up);
  I = intermediate("gate_up_proj", options, N);
  const bool has_halves = options.gated && !options.interleaved;
  if (has_parts(gate_up.format)) {
    const int64_t parts = has_halves ? 2 : 1;
    SWITCHGEAR_CHECK(ValueError, gate_up.parts == parts, "gate_up_proj: expected its rows in parts of ", parts,
                     ", got ", gate_up.parts);
  }
  if (gate_up.format == Format::kPanels && has_halves) {
    const int64_t rows = call.backend().panel_layout(call.float_dtype()).rows;
    SWITCHGEAR_CHECK(ValueError, I.size % rows == 0, "gate_up_proj: expected I of panels, a multiple of ", rows,
                     ", got ", I.size);
  }
  weight_input(call, kDownProj, down, E, H, I);
  check_heights("down_proj", down);
  SWITCHGEAR_CHECK(ValueError, is_integer(gate_up.format) == is_integer(down.format), "down_proj: expected ",
                   is_integer(gate_up.format) ? "int8 or int4" : "no integers", " beside gate_up_proj in ",
                   name_of(gate_up.format), ", got ", name_of(down.format));
  SWITCHGEAR_CHECK(ValueError, down.parts == 1, "down_proj: expected its rows in 1 part, got ", down.parts);
  bias_shapes(call, weights, E, H, N);
}

}  // namespace

// ---- route ---

void route(const RouteArgs& args, Execution exec) {
  Call call(exec);
  Dim T{"T", 0}, E{"E"};
  call.input("router_logits", args.router_logits, kFloat, {&T, &E}, kRows);
  route_shapes(call, args, T, E);
  call.check_overlap();
  call.run(&Backend::route, args, exec);
}

void route_backward(const RouteBackwardArgs& given, Execution exec) {
  RouteBackwardArgs args = given;
  Call call(exec);
  Dim T{"T", 0}, E{"E"}, K{"K", 1, args.options.top_k};
  call.input("router_logits", args.router_logits, kFloat, {&T, &E}, kRows);
  call.input("topk_ids", args.topk_ids, kInt32, {&T, &K});
  call.input("grad_topk_weights", args.grad_topk_weights, kFloat32, {&T, &K});
  check_options(args.options, E);
  call.output("grad_router_logits", args.grad_router_logits, kFloat, {&T, &E}, kRows);
  call.check_overlap();
  check_ids(call, args.topk_ids, E);
  call.run(&Backend::route_backward, args, exec);
}

// ---- gate ---

void gate(const GateArgs& args, Execution exec) {
  Call call(exec);
  Dim T{"T", 0}, E{"E"};
  gate_shapes(call, args, T, E);
  call.check_overlap();
  call.run(&Backend::gate, args, exec);
}

void gate_route(const GateRouteArgs& args, Execution exec) {
  Call call(exec);
  Dim T{"T", 0}, E{"E"};
  gate_shapes(call, args.gate, T, E);
  route_shapes(call, args, T, E);
  call.check_overlap();
  call.run(&Backend::gate, args.gate, exec);
  const RouteArgs route_args{.router_logits = args.gate.router_logits,
                             .selection_bias = args.selection_bias,
                             .options = args.options,
                             .topk_ids = args.topk_ids,
                             .topk_weights = args.topk_weights};
  call.run(&Backend::route, route_args, exec);
}

// ---- routing policies ---

void route_dynamic(const RouteDynamicArgs& args, Execution exec) {
  Call call(exec);
  const RouteDynamicOptions& options = args.options;
  Dim T{"T", 0}, E{"E"}, M{"M"};
  call.input("router_logits", args.router_logits, kFloat, {&T, &E}, kRows);
  call.optional_input("selection_bias", args.selection_bias, kFloat32, {&E});
  call.output("topk_ids", args.topk_ids, kInt32, {&T, &M});
  call.output("topk_weights", args.topk_weights, kFloat32, {&T, &M});
  slots(T, M);
  SWITCHGEAR_CHECK(ValueError, M.size <= E.size, "topk_ids: expected at most E=", E.size, " experts a token, got ",
                   M.size);
  SWITCHGEAR_CHECK(ValueError, options.min_experts >= 0 && options.min_experts <= M.size,
                   "min_experts: expected 0 to M=", M.size, ", got ", options.min_experts);
  SWITCHGEAR_CHECK(ValueError, options.top_p >= 0, "top_p: expected at least 0, got ", options.top_p);
  SWITCHGEAR_CHECK(ValueError, !std::isnan(options.threshold), "threshold: expected a number, got ", options.threshold);
  SWITCHGEAR_CHECK(ValueError, std::isfinite(options.scale), "scale: expected a finite number, got ", options.scale);
  call.check_overlap();
  call.run(&Backend::route_dynamic, args, exec);
}

void column_topk(const ColumnTopkArgs& given, Execution exec) {
  ColumnTopkArgs args = given;
  Call call(exec);
  Dim T{"T", 0}, E{"E"}, B{"B"};
  call.input("values", args.values, kFloat, {&T, &E}, kRows);
  call.optional_input("sequence_ids", args.sequence_ids, kInt32, {&T});
  call.input("limits", args.limits, kInt32, {&B});
  call.output("topk_ids", args.topk_ids, kInt32, {&T, &E});
  slots(T, E);
  call.check_overlap();
  check_sequences(call, args.sequence_ids, args.limits, B);
  call.run(&Backend::column_topk, args, exec);
}

void fit_capacity(const FitCapacityArgs& given, Execution exec) {
  FitCapacityArgs args = given;
  Call call(exec);
  const FitCapacityOptions& options = args.options;
  Dim T{"T", 0}, K{"K"}, E{"E", 1, options.num_experts}, B{"B"};
  SWITCHGEAR_CHECK(ValueError, E.size >= 1 && E.size <= kMostIndices, "num_experts: expected 1 to 2^31 - 1, got ",
                   E.size);
  call.input("topk_ids", args.topk_ids, kInt32, {&T, &K});
  check_known("drop", options.drop, Drop::kPriority);
  SWITCHGEAR_CHECK(ValueError, options.candidates >= 0, "candidates: expected at least 0, got ", options.candidates);
  if (options.drop == Drop::kPriority) call.input("priorities", args.priorities, kFloat32, {&T, &K});
  call.optional_input("scores", args.scores, kFloat32, {&T, &E});
  call.optional_input("sequence_ids", args.sequence_ids, kInt32, {&T});
  call.input("limits", args.limits, kInt32, {&B});
  call.output("kept_ids", args.kept_ids, kInt32, {&T, &K});
  slots(T, K);
  call.check_overlap();
  check_ids(call, args.topk_ids, E);
  check_sequences(call, args.sequence_ids, args.limits, B);
  call.run(&Backend::fit_capacity, args, exec);
}

void assign_balanced(const AssignBalancedArgs& given, Execution exec) {
  AssignBalancedArgs args = given;
  Call call(exec);
  Dim T{"T", 0}, E{"E"};
  SWITCHGEAR_CHECK(ValueError, args.num_sequences >= 1 && args.num_sequences <= kMostIndices,
                   "num_sequences: expected 1 to 2^31 - 1, got ", args.num_sequences);
  SWITCHGEAR_CHECK(ValueError, std::isfinite(args.eps), "eps: expected a finite number, got ", args.eps);
  SWITCHGEAR_CHECK(ValueError, args.max_iterations >= 0, "max_iterations: expected at least 0, got ",
                   args.max_iterations);
  call.input("values", args.values, kFloat32, {&T, &E});
  call.optional_input("sequence_ids", args.sequence_ids, kInt32, {&T});
  call.output("expert_ids", args.expert_ids, kInt32, {&T});
  slots(T, E);
  call.check_overlap();
  check_sequence_ids(call, args.sequence_ids, args.num_sequences);
  call.run(&Backend::assign_balanced, args, exec);
}

void assign_capped(const AssignCappedArgs& given, Execution exec) {
  AssignCappedArgs args = given;
  Call call(exec);
  Dim T{"T", 0}, E{"E"}, B{"B"};
  SWITCHGEAR_CHECK(ValueError, args.cap >= 1, "cap: expected at least 1, got ", args.cap);
  SWITCHGEAR_CHECK(ValueError, std::isfinite(args.entropy) && args.entropy >= std::numeric_limits<float>::min(),
                   "entropy: expected a finite number of at least 2^-126, got ", args.entropy);
  SWITCHGEAR_CHECK(ValueError, args.iterations >= 0, "iterations: expected at least 0, got ", args.iterations);
  SWITCHGEAR_CHECK(ValueError, args.tolerance >= 0, "tolerance: expected at least 0, got ", args.tolerance);
  call.input("values", args.values, kFloat, {&T, &E}, kRows);
  call.optional_input("sequence_ids", args.sequence_ids, kInt32, {&T});
  call.input("limits", args.limits, kInt32, {&B});
  call.output("assignment", args.assignment, kFloat32, {&T, &E});
  slots(T, E);
  call.check_overlap();
  check_sequences(call, args.sequence_ids, args.limits, B);
  call.run(&Backend::assign_capped, args, exec);
}

// ---- plan ---

void plan(const PlanArgs& given, Execution exec) {
  PlanArgs args = given;
  Call call(exec);
  Dim T{"T", 0}, K{"K"}, offsets{"E+1", 2};
  call.input("topk_ids", args.topk_ids, kInt32, {&T, &K});
  Dim S = slots(T, K);
  call.output("expert_offsets", args.plan.expert_offsets, kInt32, {&offsets});
  call.output("token_indices", args.plan.token_indices, kInt32, {&S});
  call.output("slot_indices", args.plan.slot_indices, kInt32, {&T, &K});
  call.check_overlap();
  check_ids(call, args.topk_ids, {"E", 1, offsets.size - 1});
  call.run(&Backend::plan, args, exec);
}

// ---- permute, combine ---

void permute(const PermuteArgs& given, Execution exec) {
  PermuteArgs args = given;
  Call call(exec);
  Dim T{"T", 0}, K{"K"}, S{"S", 0}, H{"H"};
  call.input("x", args.x, kFloat, {&T, &H}, kRows);
  plan_shapes(call, args.plan, T, K, S);
  call.optional_input("topk_weights", args.topk_weights, kFloat32, {&T, &K});
  call.output("permuted_x", args.permuted_x, kFloat, {&S, &H}, kRows);
  call.check_overlap();
  check_plan(call, args.plan, T, S);
  call.run(&Backend::permute, args, exec);
}

void combine(const CombineArgs& given, Execution exec) {
  CombineArgs args = given;
  Call call(exec);
  Dim T{"T", 0}, K{"K"}, S{"S", 0}, H{"H"};
  plan_shapes(call, args.plan, T, K, S);
  call.input("permuted_y", args.permuted_y, kFloat, {&S, &H}, kRows);
  call.optional_input("topk_weights", args.topk_weights, kFloat32, {&T, &K});
  call.output("y", args.y, kFloat, {&T, &H}, kRows);
  call.check_overlap();
  check_plan(call, args.plan, T, S);
  call.run(&Backend::combine, args, exec);
}

void combine_weight_backward(const CombineBackwardArgs& given, Execution exec) {
  CombineBackwardArgs args = given;
  Call call(exec);
  Dim T{"T", 0}, K{"K"}, S{"S", 0}, H{"H"};
  call.input("grad_y", args.grad_y, kFloat, {&T, &H}, kRows);
  plan_shapes(call, args.plan, T, K, S);
  call.input("permuted_y", args.permuted_y, kFloat, {&S, &H}, kRows);
  call.output("grad_topk_weights", args.grad_topk_weights, kFloat32, {&T, &K});
  call.check_overlap();
  check_plan(call, args.plan, T, S);
  call.run(&Backend::combine_weight_backward, args, exec);
}

// ---- grouped_gemm ---

void grouped_gemm(const GroupedGemmArgs& given, Execution exec) {
  GroupedGemmArgs args = given;
  Call call(exec);
  Dim R{"R", 0}, C{"C"}, E{"E"}, N{"N"}, S{"S", 0};
  call.input("x", args.x, kFloat, {&R, args.transposed ? &N : &C}, kRows);
  SWITCHGEAR_CHECK(ValueError, !args.input_gradient || args.weight.format == Format::kPlain,
                   "weight: expected plain weights for input_gradient, got ", name_of(args.weight.format));
  weight_input(call, kWeight, args.weight, E, N, C);
  SWITCHGEAR_CHECK(ValueError, !args.transposed || multiplies_transposed(args.weight.format),
                   "weight: expected a format with parts (int8, fp8, groups, q4_k, …) to be transposed, got ",
                   name_of(args.weight.format));
  SWITCHGEAR_CHECK(ValueError, !args.transposed || !args.bias.defined(), "bias: expected none for a transposed weight");
  call.optional_input("bias", args.bias, kFloat, {&E, &N}, kRows);
  Dim offsets{"E+1", 2, E.size + 1};
  call.input("expert_offsets", args.expert_offsets, kInt32, {&offsets});
  call.optional_input("token_indices", args.token_indices, kInt32, {&S});
  Dim& slots = args.token_indices.defined() ? S : R;
  call.output("out", args.out, kFloat, {&slots, args.transposed ? &C : &N}, kRows);
  call.check_overlap();
  check_slots(call, kWeight, args.weight);
  check_offsets(call, args.expert_offsets, args.out.shape[0]);
  if (args.token_indices.defined()) check_tokens(call, args.token_indices, args.expert_offsets, R.size);
  call.run(&Backend::grouped_gemm, args, exec);
}

void grouped_gemm_wgrad(const GroupedGemmWgradArgs& given, Execution exec) {
  GroupedGemmWgradArgs args = given;
  Call call(exec);
  Dim R{"R", 0}, C{"C"}, E{"E"}, N{"N"}, S{"S", 0};
  call.input("x", args.x, kFloat, {&R, &C}, kRows);
  call.optional_input("token_indices", args.token_indices, kInt32, {&S});
  call.input("grad_out", args.grad_out, kFloat, {args.token_indices.defined() ? &S : &R, &N}, kRows);
  Dim n{"n", 0};
  call.optional_input("experts", args.experts, kInt32, {&n});
  const bool has_all = !args.experts.defined();
  call.output("grad_weight", args.grad_weight, kFloat, {has_all ? &E : &n, &N, &C}, kMatrices);
  Dim offsets{"E+1", 2, has_all ? E.size + 1 : Dim::kUnknown};
  call.input("expert_offsets", args.expert_offsets, kInt32, {&offsets});
  call.check_overlap();
  check_offsets(call, args.expert_offsets, args.grad_out.shape[0]);
  check_trained(call, args.experts, offsets.size - 1);
  if (args.token_indices.defined()) check_tokens(call, args.token_indices, args.expert_offsets, R.size);
  call.run(&Backend::grouped_gemm_wgrad, args, exec);
}

// ---- glu ---

void glu(const GluArgs& args, Execution exec) {
  Call call(exec);
  Dim S{"S", 0}, N{"N"};
  check_options(args.options);
  call.input("h", args.h, kFloat, {&S, &N}, kRows);
  Dim I = intermediate("h", args.options, N);
  call.output("a", args.a, kFloat, {&S, &I}, kRows);
  call.check_overlap();
  call.run(&Backend::glu, args, exec);
}

void glu_backward(const GluBackwardArgs& args, Execution exec) {
  Call call(exec);
  Dim S{"S", 0}, N{"N"};
  check_options(args.options);
  call.input("h", args.h, kFloat, {&S, &N}, kRows);
  Dim I = intermediate("h", args.options, N);
  call.input("grad_a", args.grad_a, kFloat, {&S, &I}, kRows);
  call.output("grad_h", args.grad_h, kFloat, {&S, &N}, kRows);
  call.check_overlap();
  call.run(&Backend::glu_backward, args, exec);
}

// ---- the whole layer ---

void moe_forward(const MoeForwardArgs& given, Execution exec) {
  MoeForwardArgs args = given;
  Call call(exec);
  Dim T{"T", 0}, K{"K"}, H = hidden_size(args.weights), E{"E"}, I{"I"}, N{"N"};
  check_options(args.options);
  call.input("x", args.x, kFloat, {&T, &H}, kRows);
  weight_shapes(call, args.weights, args.options, E, H, I, N);
  adapter_inputs(call, args.weights, E, H, I, N);
  call.input("topk_ids", args.topk_ids, kInt32, {&T, &K});
  call.input("topk_weights", args.topk_weights, kFloat32, {&T, &K});
  Dim S = slots(T, K);
  if (args.sums.defined()) {
    check_sums(call, args);
    call.output("sums", args.sums, kFloat32, {&T, &H}, kRows);
  } else {
    call.output("y", args.y, kFloat, {&T, &H}, kRows);
  }
  call.optional_output("h", args.h, kFloat, {&S, &N}, kRows);
  call.check_overlap();
  check_slots(call, args.weights);
  check_ids(call, args.topk_ids, E);
  check_adapters(call, args.weights);
  call.run(&Backend::moe_forward, args, exec);
}

void moe_backward(const MoeBackwardArgs& given, Execution exec) {
  MoeBackwardArgs args = given;
  Call call(exec);
  Dim T{"T", 0}, K{"K"}, H = hidden_size(args.weights), E{"E"}, I{"I"}, N{"N"};
  check_options(args.options);
  call.input("x", args.x, kFloat, {&T, &H}, kRows);
  call.input("grad_y", args.grad_y, kFloat, {&T, &H}, kRows);
  weight_shapes(call, args.weights, args.options, E, H, I, N);
  check_frozen("gate_up_proj", args.weights.gate_up_proj, args.grad_gate_up_proj);
  check_frozen("down_proj", args.weights.down_proj, args.grad_down_proj);
  adapter_inputs(call, args.weights, E, H, I, N);
  call.input("topk_ids", args.topk_ids, kInt32, {&T, &K});
  call.input("topk_weights", args.topk_weights, kFloat32, {&T, &K});
  Dim S = slots(T, K);
  call.input("h", args.h, kFloat, {&S, &N}, kRows);
  Dim n{"n", 0};
  call.optional_input("experts", args.experts, kInt32, {&n});
  Dim& trained = args.experts.defined() ? n : E;
  call.optional_output("grad_x", args.grad_x, args.adds_x ? kFloat32 : kFloat, {&T, &H}, kRows);
  call.optional_output("grad_gate_up_proj", args.grad_gate_up_proj, kFloat, {&trained, &N, &H}, kMatrices);
  call.optional_output("grad_down_proj", args.grad_down_proj, kFloat, {&trained, &H, &I}, kMatrices);
  call.optional_output("grad_gate_up_bias", args.grad_gate_up_bias, kFloat, {&trained, &N}, kRows);
  call.optional_output("grad_down_bias", args.grad_down_bias, kFloat, {&trained, &H}, kRows);
  call.optional_output("grad_topk_weights", args.grad_topk_weights, kFloat32, {&T, &K});
  const auto adapter_outputs = [&](const Adapter& adapter, const char* a, const TensorView& grad_a, const char* b,
                                   const TensorView& grad_b, Dim& rows, Dim& columns) {
    SWITCHGEAR_CHECK(ValueError, adapter.defined() || !(grad_a.defined() || grad_b.defined()), a,
                     ": expected none without an adapter");
    if (!adapter.defined()) return;
    Dim rank{"r", 1, adapter.rank()};
    call.optional_output(a, grad_a, kFloat, {&E, &rank, &columns}, kMatrices);
    call.optional_output(b, grad_b, kFloat, {&E, &rows, &rank}, kMatrices);
  };
  adapter_outputs(args.weights.gate_up_adapter, "grad_gate_up_a", args.grad_gate_up_a, "grad_gate_up_b",
                  args.grad_gate_up_b, N, H);
  adapter_outputs(args.weights.down_adapter, "grad_down_a", args.grad_down_a, "grad_down_b", args.grad_down_b, H, I);
  SWITCHGEAR_CHECK(ValueError, !(args.adds || args.adds_x) || call.backend().adds_gradients,
                   "adds: expected false on this device, got true");
  call.check_overlap();
  check_slots(call, args.weights);
  check_ids(call, args.topk_ids, E);
  check_trained(call, args.experts, E.size);
  check_adapters(call, args.weights);
  call.run(&Backend::moe_backward, args, exec);
}

// ---- attention ---

void attend(const AttendArgs& given, Execution exec) {
  AttendArgs args = given;
  Call call(exec);
  Dim B{"B", 0}, T{"T", 0}, N{"N"}, J{"J"}, C{"C"}, D{"D"}, V{"V"};
  call.input("q", args.q, kFloat, {&B, &T, &N, &D}, kRows);
  call.input("keys", args.keys, kFloat, {&B, &J, &C, &D}, kRows);
  call.input("values", args.values, kFloat, {&B, &J, &C, &V}, kRows);
  call.optional_input("starts", args.starts, kInt32, {&B});
  call.optional_input("sinks", args.sinks, kFloat32, {&N});
  call.output("out", args.out, kFloat, {&B, &T, &N, &V}, kRows);
  SWITCHGEAR_CHECK(ValueError, N.size % J.size == 0, "keys: expected a number of heads that divides N=", N.size,
                   ", got ", J.size);
  SWITCHGEAR_CHECK(ValueError, C.size <= kMostIndices, "keys: expected less than 2^31 positions, got ", C.size);
  SWITCHGEAR_CHECK(ValueError, args.length >= T.size && args.length <= C.size, "length: expected T=", T.size,
                   " to C=", C.size, ", got ", args.length);
  SWITCHGEAR_CHECK(ValueError, args.scale > 0 && std::isfinite(args.scale), "scale: expected a positive number, got ",
                   args.scale);
  SWITCHGEAR_CHECK(ValueError, args.window >= 0, "window: expected 0 (none) or more, got ", args.window);
  call.check_overlap();
  if (args.starts.defined()) {
    call.own(args.starts);
    check_range("starts", args.starts, -kMostIndices, args.length + 1);
  }
  if (T.size > 0) call.run(&Backend::attend, args, exec);
}

void rms_norm(const RmsNormArgs& args, Execution exec) {
  Call call(exec);
  Dim T{"T", 0}, H{"H"};
  call.input("x", args.x, kFloat, {&T, &H}, kRows);
  call.optional_input("residual", args.residual, kFloat, {&T, &H}, kRows);
  call.input("weight", args.weight, float32_or_shared(args.weight), {&H});
  check_eps(args.eps);
  call.output("y", args.y, kFloat, {&T, &H}, kRows);
  SWITCHGEAR_CHECK(ValueError, args.sum.defined() == args.residual.defined(), "sum: expected ",
                   args.residual.defined() ? "it beside residual, got none" : "none without residual, got one");
  call.optional_output("sum", args.sum, kFloat, {&T, &H}, kRows);
  call.check_overlap();
  call.run(&Backend::rms_norm, args, exec);
}

void rotate_heads(const RotateHeadsArgs& args, Execution exec) {
  Call call(exec);
  Dim B{"B", 0}, T{"T", 0}, N{"N"}, J{"J"}, D{"D"}, V{"V"}, R{"R"}, sequences{"B", 0};
  call.input("q", args.q, kFloat, {&B, &T, &N, &D}, kRows);
  call.input("k", args.k, kFloat, {&B, &T, &J, &D}, kRows);
  call.input("v", args.v, kFloat, {&B, &T, &J, &V}, kRows);
  SWITCHGEAR_CHECK(ValueError, args.cos.defined() == args.sin.defined(), "sin: expected it with cos, got ",
                   args.cos.defined() ? "cos alone" : "sin alone");
  if (args.cos.defined()) {
    call.input("cos", args.cos, float32_or_shared(args.cos), {&sequences, &T, &R}, kRows);
    call.input("sin", args.sin, float32_or_shared(args.sin), {&sequences, &T, &R}, kRows);
    SWITCHGEAR_CHECK(ValueError, sequences.size == 1 || sequences.size == B.size, "cos: expected 1 or B=", B.size,
                     " sequences, got ", sequences.size);
    SWITCHGEAR_CHECK(ValueError, 2 * R.size <= D.size, "cos: expected at most ", D.size / 2, " angles, got ", R.size);
  }
  const auto check_weight = [&](const char* name, const TensorView& weight, const Dim& heads) {
    Dim size{"D", 1};
    call.optional_input(name, weight, float32_or_shared(weight), {&size});
    SWITCHGEAR_CHECK(ValueError, !weight.defined() || size.size == D.size || size.size == heads.size * D.size, name,
                     ": expected D=", D.size, " elements, or ", heads.size, " times as many, got ", size.size);
  };
  check_weight("q_weight", args.q_weight, N);
  check_weight("k_weight", args.k_weight, J);
  check_eps(args.eps);
  call.output("q_out", args.q_out, kFloat, {&B, &T, &N, &D}, kRows);
  call.output("k_out", args.k_out, kFloat, {&B, &T, &J, &D}, kRows);
  call.output("v_out", args.v_out, kFloat, {&B, &T, &J, &V}, kRows);
  call.check_overlap();
  if (T.size > 0) call.run(&Backend::rotate_heads, args, exec);
}

// ---- attention_block ---

namespace {

// out [T,N] = x [T,C] · weightᵀ + bias
void multiply(const Linear& linear, const TensorView& x, const TensorView& out, Execution exec) {
  if (linear.weight.data.ndim == 2) {
    return gate({.x = x, .weight = linear.weight.data, .bias = linear.bias, .router_logits = out}, exec);
  }
  const int64_t end = x.shape[0];
  SWITCHGEAR_CHECK(ValueError, end <= kMostIndices, "x: expected less than 2^31 rows, got ", end);
  std::array offsets{0, static_cast<int32_t>(end)};
  GroupedGemmArgs args{.x = x, .weight = linear.weight, .bias = linear.bias, .out = out};
  args.expert_offsets = view(offsets.data(), DType::kInt32, 2);
  if (args.bias.defined()) args.bias = view(args.bias.data, args.bias.dtype, 1, args.bias.shape[0]);
  grouped_gemm(args, exec);
}

int64_t rows_of(const Linear& linear) {
  return linear.weight.data.ndim == 2 ? linear.weight.data.shape[0] : linear.weight.num_rows();
}

// The new tokens' part of a cache [B,J,C,D], as [B,T,J,D].
TensorView tokens_of(TensorView cache, int64_t begin, int64_t count) {
  cache.data = static_cast<char*>(cache.data) + begin * cache.stride[2] * size_of(cache.dtype);
  cache.shape[2] = count;
  std::swap(cache.shape[1], cache.shape[2]);
  std::swap(cache.stride[1], cache.stride[2]);
  return cache;
}

}  // namespace

void attention_block(const AttentionBlockArgs& args, Execution exec) {
  Call call(exec);
  Dim B{"B", 0}, T{"T", 0}, H{"H"}, J{"J"}, C{"C"}, D{"D"}, V{"V"}, rows{"B·T", 0};
  call.input("x", args.x, kFloat, {&B, &T, &H});
  call.output("keys", args.keys, kFloat, {&B, &J, &C, &D}, kRows);
  call.output("values", args.values, kFloat, {&B, &J, &C, &V}, kRows);
  call.output("y", args.y, kFloat, {&rows, &H});
  call.output("sum", args.sum, kFloat, {&rows, &H});
  call.check_overlap();
  SWITCHGEAR_CHECK(ValueError, args.length >= T.size && args.length <= C.size, "length: expected T=", T.size,
                   " to C=", C.size, ", got ", args.length);
  const int64_t num_rows = B.size * T.size, heads = rows_of(args.q_proj) / D.size;
  SWITCHGEAR_CHECK(ValueError, heads >= 1, "q_proj: expected at least D=", D.size, " rows, got ", rows_of(args.q_proj));
  const int64_t q_width = heads * D.size, k_width = J.size * D.size, v_width = J.size * V.size,
                out_width = heads * V.size;
  const DType dtype = args.x.dtype;
  const auto memory = std::make_unique_for_overwrite<char[]>(
      static_cast<size_t>(num_rows * size_of(dtype) * (2 * H.size + 2 * q_width + k_width + v_width + out_width)));
  char* next = memory.get();
  const auto take = [&](int64_t width) {
    const TensorView taken = view(next, dtype, num_rows, width);
    next += num_rows * width * size_of(dtype);
    return taken;
  };
  const auto heads_of = [&](const TensorView& taken, int64_t count) {
    return view(taken.data, dtype, B.size, T.size, count, taken.shape[1] / count);
  };

  const TensorView x = view(args.x.data, dtype, num_rows, H.size), normed = take(H.size), mixed = take(H.size);
  const TensorView q = take(q_width), k = take(k_width), v = take(v_width), turned = take(q_width),
                   attended = take(out_width);
  rms_norm({.x = x, .weight = args.input_norm, .eps = args.input_eps, .y = normed}, exec);
  multiply(args.q_proj, normed, q, exec);
  multiply(args.k_proj, normed, k, exec);
  multiply(args.v_proj, normed, v, exec);
  RotateHeadsArgs rotation{.q = heads_of(q, heads),
                           .k = heads_of(k, J.size),
                           .v = heads_of(v, J.size),
                           .cos = args.cos,
                           .sin = args.sin,
                           .q_weight = args.q_norm,
                           .k_weight = args.k_norm,
                           .eps = args.head_eps,
                           .q_out = heads_of(turned, heads),
                           .k_out = tokens_of(args.keys, args.length - T.size, T.size),
                           .v_out = tokens_of(args.values, args.length - T.size, T.size)};
  for (TensorView* angles : {&rotation.cos, &rotation.sin}) {
    angles->shape[2] = std::min(angles->shape[2], args.angles);
  }
  rotate_heads(rotation, exec);
  attend({.q = rotation.q_out,
          .keys = args.keys,
          .values = args.values,
          .starts = args.starts,
          .sinks = args.sinks,
          .length = args.length,
          .scale = args.scale,
          .window = args.window,
          .out = heads_of(attended, heads)},
         exec);
  multiply(args.o_proj, attended, mixed, exec);
  rms_norm(
      {.x = mixed, .residual = x, .weight = args.output_norm, .eps = args.output_eps, .y = args.y, .sum = args.sum},
      exec);
}

// ---- decoder_layers ---

namespace {

// To the nearest bfloat16, ties to even; NaN stays NaN.
float round_to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return std::isnan(value) ? value : std::bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

void decoder_layer(const DecoderLayerArgs& args, Execution exec) {
  Call call(exec);
  Dim B{"B", 0}, T{"T", 0}, H{"H"}, E{"E"};
  const TensorView &x = args.attention.x, &router = args.router.gate.weight;
  call.input("x", x, kFloat, {&B, &T, &H});
  call.input("weight", router, float32_or_shared(router), {&E, &H}, kRows);
  call.output("y", args.y, kFloat, {&B, &T, &H});
  call.check_overlap();
  check_options(args.router.options, E);

  const int64_t num_rows = B.size * T.size, top_k = args.router.options.top_k, width = size_of(x.dtype);
  const int64_t of_rows = num_rows * H.size * width, of_choices = num_rows * top_k * 4;
  const auto memory = std::make_unique_for_overwrite<char[]>(
      static_cast<size_t>(3 * of_rows + 2 * of_choices + num_rows * E.size * size_of(router.dtype)));
  char* next = memory.get();
  const auto take = [&](int64_t bytes, DType dtype, int64_t columns) {
    const TensorView taken = view(next, dtype, num_rows, columns);
    next += bytes;
    return taken;
  };
  const TensorView topk_ids = take(of_choices, DType::kInt32, top_k);
  const TensorView topk_weights = take(of_choices, DType::kFloat32, top_k);
  const TensorView normed = take(of_rows, x.dtype, H.size), sum = take(of_rows, x.dtype, H.size);
  const TensorView mixed = take(of_rows, x.dtype, H.size);
  const TensorView router_logits = take(0, router.dtype, E.size);  // the last

  AttentionBlockArgs attention = args.attention;
  attention.y = normed;
  attention.sum = sum;
  attention_block(attention, exec);
  GateRouteArgs choice = args.router;
  choice.gate.x = normed;
  choice.gate.router_logits = router_logits;
  choice.topk_ids = topk_ids;
  choice.topk_weights = topk_weights;
  gate_route(choice, exec);
  if (args.rounds && x.dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < topk_weights.numel(); ++i) {
      topk_weights.as<float>()[i] = round_to_bfloat16(topk_weights.as<float>()[i]);
    }
  }
  MoeForwardArgs experts = args.experts;
  experts.x = normed;
  experts.topk_ids = topk_ids;
  experts.topk_weights = topk_weights;
  experts.y = mixed;
  moe_forward(experts, exec);
  // The op adds rows, too; what it normalises is not used.
  rms_norm({.x = mixed,
            .residual = sum,
            .weight = attention.output_norm,
            .eps = attention.output_eps,
            .y = normed,
            .sum = view(args.y.data, args.y.dtype, num_rows, H.size)},
           exec);
}

}  // namespace

void decoder_layers(const std::vector<DecoderLayerArgs>& layers, Execution exec) {
  for (const DecoderLayerArgs& args : layers) decoder_layer(args, exec);
}

}  // namespace switchgear
