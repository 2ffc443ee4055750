// SPDX-License-Identifier: BSD-3-Clause
// One function per op of ops.h, for each Python module. Outputs are arguments too: arrays that the op writes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string_view>
#include <utility>

#include "arrays.h"
#include "module.h"
#include "names.h"
#include "registry.h"
#include "switchgear/check.h"

namespace py = pybind11;
using py::handle;

namespace switchgear {
namespace {

constexpr Names<ScoreFunction, 2> kScoreFunctions{
    {{"softmax", ScoreFunction::kSoftmax}, {"sigmoid", ScoreFunction::kSigmoid}}};
constexpr Names<GroupScore, 2> kGroupScores{{{"max", GroupScore::kMax}, {"top2_sum", GroupScore::kTop2Sum}}};
constexpr Names<Drop, 4> kDrops{
    {{"order", Drop::kOrder}, {"reverse", Drop::kReverse}, {"choice", Drop::kChoice}, {"priority", Drop::kPriority}}};
constexpr Names<Activation, 6> kActivations{{{"silu", Activation::kSilu},
                                             {"gelu", Activation::kGelu},
                                             {"gelu_tanh", Activation::kGeluTanh},
                                             {"relu", Activation::kRelu},
                                             {"relu2", Activation::kRelu2},
                                             {"swiglu_oai", Activation::kSwigluOai}}};

GluOptions glu_options(std::string_view activation, bool gated, bool interleaved, float alpha, float limit) {
  return {.activation = parse("activation", kActivations, activation),
          .gated = gated,
          .interleaved = interleaved,
          .alpha = alpha,
          .limit = limit};
}

// Without top_k, which is the width of topk_ids.
RouteOptions route_options(std::string_view score_function, bool normalize, float scale, int64_t num_groups,
                           int64_t topk_groups, std::string_view group_score) {
  return {.score_function = parse("score_function", kScoreFunctions, score_function),
          .normalize = normalize,
          .scale = scale,
          .num_groups = num_groups,
          .topk_groups = topk_groups,
          .group_score = parse("group_score", kGroupScores, group_score)};
}

// ---- route ---

void py_route(handle router_logits, handle selection_bias, handle topk_ids, handle topk_weights,
              std::string_view score_function, bool normalize, float scale, int64_t num_groups, int64_t topk_groups,
              std::string_view group_score, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  RouteArgs args{.router_logits = arrays.in("router_logits", router_logits),
                 .selection_bias = arrays.in_or_none("selection_bias", selection_bias),
                 .options = route_options(score_function, normalize, scale, num_groups, topk_groups, group_score),
                 .topk_ids = arrays.out("topk_ids", topk_ids),
                 .topk_weights = arrays.out("topk_weights", topk_weights)};
  args.options.top_k = args.topk_ids.shape[1];
  run(route, args, execution);
}

void py_route_backward(handle grad_topk_weights, handle router_logits, handle topk_ids, handle grad_router_logits,
                       std::string_view score_function, bool normalize, float scale, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  RouteBackwardArgs args{.grad_topk_weights = arrays.in("grad_topk_weights", grad_topk_weights),
                         .router_logits = arrays.in("router_logits", router_logits),
                         .topk_ids = arrays.in("topk_ids", topk_ids),
                         .options = {.score_function = parse("score_function", kScoreFunctions, score_function),
                                     .normalize = normalize,
                                     .scale = scale},
                         .grad_router_logits = arrays.out("grad_router_logits", grad_router_logits)};
  args.options.top_k = args.topk_ids.shape[1];
  run(route_backward, args, execution);
}

// ---- gate ---

GateArgs gate_args(Arrays& arrays, handle x, handle weight, handle bias, handle router_logits) {
  return {.x = arrays.in("x", x),
          .weight = arrays.in("weight", weight),
          .bias = arrays.in_or_none("bias", bias),
          .router_logits = arrays.out("router_logits", router_logits)};
}

void py_gate(handle x, handle weight, handle bias, handle router_logits, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  run(gate, gate_args(arrays, x, weight, bias, router_logits), execution);
}

void py_gate_route(handle x, handle weight, handle bias, handle selection_bias, handle router_logits, handle topk_ids,
                   handle topk_weights, std::string_view score_function, bool normalize, float scale,
                   int64_t num_groups, int64_t topk_groups, std::string_view group_score, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  GateRouteArgs args{.gate = gate_args(arrays, x, weight, bias, router_logits),
                     .selection_bias = arrays.in_or_none("selection_bias", selection_bias),
                     .options = route_options(score_function, normalize, scale, num_groups, topk_groups, group_score),
                     .topk_ids = arrays.out("topk_ids", topk_ids),
                     .topk_weights = arrays.out("topk_weights", topk_weights)};
  args.options.top_k = args.topk_ids.shape[1];
  run(gate_route, args, execution);
}

// ---- routing policies ---

void py_route_dynamic(handle router_logits, handle selection_bias, handle topk_ids, handle topk_weights,
                      int64_t min_experts, std::string_view score_function, double top_p, float threshold,
                      bool normalize, float scale, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const RouteDynamicArgs args{.router_logits = arrays.in("router_logits", router_logits),
                              .selection_bias = arrays.in_or_none("selection_bias", selection_bias),
                              .options = {.score_function = parse("score_function", kScoreFunctions, score_function),
                                          .min_experts = min_experts,
                                          .top_p = top_p,
                                          .threshold = threshold,
                                          .normalize = normalize,
                                          .scale = scale},
                              .topk_ids = arrays.out("topk_ids", topk_ids),
                              .topk_weights = arrays.out("topk_weights", topk_weights)};
  run(route_dynamic, args, execution);
}

void py_column_topk(handle values, handle sequence_ids, handle limits, handle topk_ids, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const ColumnTopkArgs args{.values = arrays.in("values", values),
                            .sequence_ids = arrays.in_or_none("sequence_ids", sequence_ids),
                            .limits = arrays.in("limits", limits),
                            .topk_ids = arrays.out("topk_ids", topk_ids)};
  run(column_topk, args, execution);
}

void py_fit_capacity(handle topk_ids, handle priorities, handle scores, handle sequence_ids, handle limits,
                     handle kept_ids, int64_t num_experts, std::string_view drop, int64_t candidates,
                     ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const FitCapacityArgs args{
      .topk_ids = arrays.in("topk_ids", topk_ids),
      .priorities = arrays.in_or_none("priorities", priorities),
      .scores = arrays.in_or_none("scores", scores),
      .sequence_ids = arrays.in_or_none("sequence_ids", sequence_ids),
      .limits = arrays.in("limits", limits),
      .options = {.num_experts = num_experts, .drop = parse("drop", kDrops, drop), .candidates = candidates},
      .kept_ids = arrays.out("kept_ids", kept_ids)};
  run(fit_capacity, args, execution);
}

void py_assign_balanced(handle values, handle sequence_ids, handle expert_ids, int64_t num_sequences, double eps,
                        int64_t max_iterations, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const AssignBalancedArgs args{.values = arrays.in("values", values),
                                .sequence_ids = arrays.in_or_none("sequence_ids", sequence_ids),
                                .num_sequences = num_sequences,
                                .eps = eps,
                                .max_iterations = max_iterations,
                                .expert_ids = arrays.out("expert_ids", expert_ids)};
  run(assign_balanced, args, execution);
}

void py_assign_capped(handle values, handle sequence_ids, handle limits, handle assignment, int64_t cap, double entropy,
                      int64_t iterations, double tolerance, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const AssignCappedArgs args{.values = arrays.in("values", values),
                              .sequence_ids = arrays.in_or_none("sequence_ids", sequence_ids),
                              .limits = arrays.in("limits", limits),
                              .cap = cap,
                              .entropy = entropy,
                              .iterations = iterations,
                              .tolerance = tolerance,
                              .assignment = arrays.out("assignment", assignment)};
  run(assign_capped, args, execution);
}

// ---- plan ---

void py_plan(handle topk_ids, handle expert_offsets, handle token_indices, handle slot_indices,
             ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const PlanArgs args{.topk_ids = arrays.in("topk_ids", topk_ids),
                      .plan = {.expert_offsets = arrays.out("expert_offsets", expert_offsets),
                               .token_indices = arrays.out("token_indices", token_indices),
                               .slot_indices = arrays.out("slot_indices", slot_indices)}};
  run(plan, args, execution);
}

Plan plan_in(Arrays& arrays, handle expert_offsets, handle token_indices, handle slot_indices) {
  return {.expert_offsets = arrays.in("expert_offsets", expert_offsets),
          .token_indices = arrays.in("token_indices", token_indices),
          .slot_indices = arrays.in("slot_indices", slot_indices)};
}

// ---- permute, combine ---

void py_permute(handle x, handle expert_offsets, handle token_indices, handle slot_indices, handle topk_weights,
                handle permuted_x, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const PermuteArgs args{.x = arrays.in("x", x),
                         .plan = plan_in(arrays, expert_offsets, token_indices, slot_indices),
                         .topk_weights = arrays.in_or_none("topk_weights", topk_weights),
                         .permuted_x = arrays.out("permuted_x", permuted_x)};
  run(permute, args, execution);
}

void py_combine(handle permuted_y, handle expert_offsets, handle token_indices, handle slot_indices,
                handle topk_weights, handle y, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const CombineArgs args{.permuted_y = arrays.in("permuted_y", permuted_y),
                         .plan = plan_in(arrays, expert_offsets, token_indices, slot_indices),
                         .topk_weights = arrays.in_or_none("topk_weights", topk_weights),
                         .y = arrays.out("y", y)};
  run(combine, args, execution);
}

void py_combine_weight_backward(handle grad_y, handle permuted_y, handle expert_offsets, handle token_indices,
                                handle slot_indices, handle grad_topk_weights, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const CombineBackwardArgs args{.grad_y = arrays.in("grad_y", grad_y),
                                 .permuted_y = arrays.in("permuted_y", permuted_y),
                                 .plan = plan_in(arrays, expert_offsets, token_indices, slot_indices),
                                 .grad_topk_weights = arrays.out("grad_topk_weights", grad_topk_weights)};
  run(combine_weight_backward, args, execution);
}

// ---- grouped_gemm ---

void py_grouped_gemm(handle x, handle weight, handle form, handle bias, handle expert_offsets, handle token_indices,
                     handle out, bool transposed, bool input_gradient, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const GroupedGemmArgs args{.x = arrays.in("x", x),
                             .weight = arrays.weight("weight", weight, form),
                             .bias = arrays.in_or_none("bias", bias),
                             .expert_offsets = arrays.in("expert_offsets", expert_offsets),
                             .token_indices = arrays.in_or_none("token_indices", token_indices),
                             .out = arrays.out("out", out),
                             .transposed = transposed,
                             .input_gradient = input_gradient};
  run(grouped_gemm, args, execution);
}

void py_grouped_gemm_wgrad(handle grad_out, handle x, handle expert_offsets, handle token_indices, handle experts,
                           handle grad_weight, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const GroupedGemmWgradArgs args{.grad_out = arrays.in("grad_out", grad_out),
                                  .x = arrays.in("x", x),
                                  .expert_offsets = arrays.in("expert_offsets", expert_offsets),
                                  .token_indices = arrays.in_or_none("token_indices", token_indices),
                                  .experts = arrays.in_or_none("experts", experts),
                                  .grad_weight = arrays.out("grad_weight", grad_weight)};
  run(grouped_gemm_wgrad, args, execution);
}

// ---- glu ---

void py_glu(handle h, handle a, std::string_view activation, bool gated, bool interleaved, float alpha, float limit,
            ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const GluArgs args{.h = arrays.in("h", h),
                     .options = glu_options(activation, gated, interleaved, alpha, limit),
                     .a = arrays.out("a", a)};
  run(glu, args, execution);
}

void py_glu_backward(handle grad_a, handle h, handle grad_h, std::string_view activation, bool gated, bool interleaved,
                     float alpha, float limit, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  const GluBackwardArgs args{.grad_a = arrays.in("grad_a", grad_a),
                             .h = arrays.in("h", h),
                             .options = glu_options(activation, gated, interleaved, alpha, limit),
                             .grad_h = arrays.out("grad_h", grad_h)};
  run(glu_backward, args, execution);
}

// ---- the whole layer ---

struct WeightArgument {
  handle tensors, form;
};

struct AdapterArguments {
  handle gate_up, down, seed, dropout;
};

ExpertWeights weights_in(Arrays& arrays, WeightArgument gate_up_proj, WeightArgument down_proj, handle gate_up_bias,
                         handle down_bias, const AdapterArguments& adapters) {
  ExpertWeights weights{.gate_up_proj = arrays.weight("gate_up_proj", gate_up_proj.tensors, gate_up_proj.form),
                        .down_proj = arrays.weight("down_proj", down_proj.tensors, down_proj.form),
                        .gate_up_bias = arrays.in_or_none("gate_up_bias", gate_up_bias),
                        .down_bias = arrays.in_or_none("down_bias", down_bias)};
  const auto has = [](handle list) { return !list.is_none() && py::len(list) > 0; };
  if (has(adapters.gate_up)) weights.gate_up_adapter = arrays.adapter(kGateUpAdapter, adapters.gate_up);
  if (has(adapters.down)) weights.down_adapter = arrays.adapter(kDownAdapter, adapters.down);
  if (has(adapters.dropout)) {
    const std::array both{&weights.gate_up_adapter, &weights.down_adapter};
    arrays.dropout(both, adapters.seed, adapters.dropout);
  }
  return weights;
}

void py_moe_forward(handle x, handle gate_up_proj, handle gate_up_form, handle down_proj, handle down_form,
                    handle gate_up_bias, handle down_bias, handle topk_ids, handle topk_weights, handle y, handle h,
                    std::string_view activation, bool gated, bool interleaved, float alpha, float limit,
                    ExecutionArgument execution, handle gate_up_adapter, handle down_adapter, handle dropout_seed,
                    handle dropout) {
  Arrays arrays = arrays_of(execution);
  const MoeForwardArgs args{
      .x = arrays.in("x", x),
      .weights = weights_in(arrays, {gate_up_proj, gate_up_form}, {down_proj, down_form}, gate_up_bias, down_bias,
                            {gate_up_adapter, down_adapter, dropout_seed, dropout}),
      .topk_ids = arrays.in("topk_ids", topk_ids),
      .topk_weights = arrays.in("topk_weights", topk_weights),
      .options = glu_options(activation, gated, interleaved, alpha, limit),
      .y = arrays.out("y", y),
      .h = arrays.out_or_none("h", h)};
  run(moe_forward, args, execution);
}

void py_moe_accumulate(handle x, handle gate_up_proj, handle gate_up_form, handle down_proj, handle down_form,
                       handle gate_up_bias, handle down_bias, handle topk_ids, handle topk_weights, handle sums,
                       std::string_view activation, bool gated, bool interleaved, float alpha, float limit,
                       ExecutionArgument execution, handle gate_up_adapter, handle down_adapter) {
  const py::none none;
  Arrays arrays = arrays_of(execution);
  const MoeForwardArgs args{.x = arrays.in("x", x),
                            .weights = weights_in(arrays, {gate_up_proj, gate_up_form}, {down_proj, down_form},
                                                  gate_up_bias, down_bias, {gate_up_adapter, down_adapter, none, none}),
                            .topk_ids = arrays.in("topk_ids", topk_ids),
                            .topk_weights = arrays.in("topk_weights", topk_weights),
                            .options = glu_options(activation, gated, interleaved, alpha, limit),
                            .sums = arrays.in_out("sums", sums)};
  run(moe_forward, args, execution);
}

void py_moe_backward(handle grad_y, handle x, handle h, handle gate_up_proj, handle gate_up_form, handle down_proj,
                     handle down_form, handle gate_up_bias, handle down_bias, handle topk_ids, handle topk_weights,
                     handle experts, handle grad_x, handle grad_gate_up_proj, handle grad_down_proj,
                     handle grad_gate_up_bias, handle grad_down_bias, handle grad_topk_weights,
                     std::string_view activation, bool gated, bool interleaved, float alpha, float limit,
                     ExecutionArgument execution, handle gate_up_adapter, handle down_adapter, handle dropout_seed,
                     handle dropout, handle grad_gate_up_a, handle grad_gate_up_b, handle grad_down_a,
                     handle grad_down_b, bool adds) {
  Arrays arrays = arrays_of(execution);
  const auto weight_gradient = [&](const char* name, handle array) {
    if (array.is_none()) return TensorView{};
    return adds ? arrays.in_out(name, array) : arrays.out(name, array);
  };
  const MoeBackwardArgs args{
      .grad_y = arrays.in("grad_y", grad_y),
      .x = arrays.in("x", x),
      .h = arrays.in("h", h),
      .weights = weights_in(arrays, {gate_up_proj, gate_up_form}, {down_proj, down_form}, gate_up_bias, down_bias,
                            {gate_up_adapter, down_adapter, dropout_seed, dropout}),
      .topk_ids = arrays.in("topk_ids", topk_ids),
      .topk_weights = arrays.in("topk_weights", topk_weights),
      .experts = arrays.in_or_none("experts", experts),
      .options = glu_options(activation, gated, interleaved, alpha, limit),
      .grad_x = arrays.out_or_none("grad_x", grad_x),
      .grad_gate_up_proj = weight_gradient("grad_gate_up_proj", grad_gate_up_proj),
      .grad_down_proj = weight_gradient("grad_down_proj", grad_down_proj),
      .grad_gate_up_bias = arrays.out_or_none("grad_gate_up_bias", grad_gate_up_bias),
      .grad_down_bias = arrays.out_or_none("grad_down_bias", grad_down_bias),
      .grad_topk_weights = arrays.out_or_none("grad_topk_weights", grad_topk_weights),
      .grad_gate_up_a = arrays.out_or_none("grad_gate_up_a", grad_gate_up_a),
      .grad_gate_up_b = arrays.out_or_none("grad_gate_up_b", grad_gate_up_b),
      .grad_down_a = arrays.out_or_none("grad_down_a", grad_down_a),
      .grad_down_b = arrays.out_or_none("grad_down_b", grad_down_b),
      .adds = adds};
  run(moe_backward, args, execution);
}

}  // namespace
}  // namespace switchgear

PYBIND11_MODULE(SWITCHGEAR_MODULE, m) {
  using namespace switchgear;
  using namespace py::literals;

  m.doc() = "The native ops of switchgear. Arrays come through DLPack; outputs are passed in and written.";
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const ValueError& e) {
      py::set_error(PyExc_ValueError, e.what());
    } catch (const TypeError& e) {
      py::set_error(PyExc_TypeError, e.what());
    }
  });

  define_module(m);  // first, since the ops' signatures name its types
  m.def("route", &py_route, "Writes the top_k experts of each token and their weights.",  //
        "router_logits"_a, "selection_bias"_a, "topk_ids"_a, "topk_weights"_a, "score_function"_a, "normalize"_a,
        "scale"_a, "num_groups"_a, "topk_groups"_a, "group_score"_a, py::arg(kExecutionArgument));
  m.def("route_backward", &py_route_backward, "Writes the gradient of router_logits.",  //
        "grad_topk_weights"_a, "router_logits"_a, "topk_ids"_a, "grad_router_logits"_a, "score_function"_a,
        "normalize"_a, "scale"_a, py::arg(kExecutionArgument));
  m.def("gate", &py_gate, "Writes the logits of a linear router.",  //
        "x"_a, "weight"_a, "bias"_a, "router_logits"_a, py::arg(kExecutionArgument));
  m.def("gate_route", &py_gate_route,
        "Writes the logits of a linear router, its top_k experts and their weights.",  //
        "x"_a, "weight"_a, "bias"_a, "selection_bias"_a, "router_logits"_a, "topk_ids"_a, "topk_weights"_a,
        "score_function"_a, "normalize"_a, "scale"_a, "num_groups"_a, "topk_groups"_a, "group_score"_a,
        py::arg(kExecutionArgument));
  const Backend& backend = default_backend();  // Python composes the ops it lacks from others
  if (backend.route_dynamic != nullptr) {
    m.def("route_dynamic", &py_route_dynamic, "Writes as many experts as each token needs, and their weights.",  //
          "router_logits"_a, "selection_bias"_a, "topk_ids"_a, "topk_weights"_a, "min_experts"_a, "score_function"_a,
          "top_p"_a, "threshold"_a, "normalize"_a, "scale"_a, py::arg(kExecutionArgument));
  }
  if (backend.column_topk != nullptr) {
    m.def("column_topk", &py_column_topk, "Writes the experts that take each token as one of their best.",  //
          "values"_a, "sequence_ids"_a, "limits"_a, "topk_ids"_a, py::arg(kExecutionArgument));
  }
  if (backend.fit_capacity != nullptr) {
    m.def("fit_capacity", &py_fit_capacity, "Writes the choices that fit the capacity.",  //
          "topk_ids"_a, "priorities"_a, "scores"_a, "sequence_ids"_a, "limits"_a, "kept_ids"_a, "num_experts"_a,
          "drop"_a, "candidates"_a, py::arg(kExecutionArgument));
  }
  if (backend.assign_balanced != nullptr) {
    m.def("assign_balanced", &py_assign_balanced, "Writes an expert for each token, in a balanced assignment.",  //
          "values"_a, "sequence_ids"_a, "expert_ids"_a, "num_sequences"_a, "eps"_a, "max_iterations"_a,
          py::arg(kExecutionArgument));
  }
  if (backend.assign_capped != nullptr) {
    m.def("assign_capped", &py_assign_capped, "Writes the assignment by which experts choose if tokens have a cap.",  //
          "values"_a, "sequence_ids"_a, "limits"_a, "assignment"_a, "cap"_a, "entropy"_a, "iterations"_a, "tolerance"_a,
          py::arg(kExecutionArgument));
  }
  m.def("plan", &py_plan, "Writes the slots of topk_ids in the order (expert, token, choice).",  //
        "topk_ids"_a, "expert_offsets"_a, "token_indices"_a, "slot_indices"_a, py::arg(kExecutionArgument));
  m.def("permute", &py_permute, "Writes the rows of x in slot order.",  //
        "x"_a, "expert_offsets"_a, "token_indices"_a, "slot_indices"_a, "topk_weights"_a, "permuted_x"_a,
        py::arg(kExecutionArgument));
  m.def("combine", &py_combine, "Writes the weighted sum of each token's slots.",  //
        "permuted_y"_a, "expert_offsets"_a, "token_indices"_a, "slot_indices"_a, "topk_weights"_a, "y"_a,
        py::arg(kExecutionArgument));
  m.def("combine_weight_backward", &py_combine_weight_backward, "Writes the gradient of topk_weights in combine.",  //
        "grad_y"_a, "permuted_y"_a, "expert_offsets"_a, "token_indices"_a, "slot_indices"_a, "grad_topk_weights"_a,
        py::arg(kExecutionArgument));
  m.def("grouped_gemm", &py_grouped_gemm, "Writes the product of each row with its expert's weight.",  //
        "x"_a, "weight"_a, "form"_a, "bias"_a, "expert_offsets"_a, "token_indices"_a, "out"_a, "transposed"_a,
        "input_gradient"_a, py::arg(kExecutionArgument));
  m.def("grouped_gemm_wgrad", &py_grouped_gemm_wgrad, "Writes the gradient of grouped_gemm's weight.",  //
        "grad_out"_a, "x"_a, "expert_offsets"_a, "token_indices"_a, "experts"_a, "grad_weight"_a,
        py::arg(kExecutionArgument));
  m.def("glu", &py_glu, "Writes the activation of h.",  //
        "h"_a, "a"_a, "activation"_a, "gated"_a, "interleaved"_a, "alpha"_a, "limit"_a, py::arg(kExecutionArgument));
  m.def("glu_backward", &py_glu_backward, "Writes the gradient of h in glu.",  //
        "grad_a"_a, "h"_a, "grad_h"_a, "activation"_a, "gated"_a, "interleaved"_a, "alpha"_a, "limit"_a,
        py::arg(kExecutionArgument));
  const py::none none;
  m.def("moe_forward", &py_moe_forward, "Writes the output of the whole expert layer, and h if given.",  //
        "x"_a, "gate_up_proj"_a, "gate_up_form"_a, "down_proj"_a, "down_form"_a, "gate_up_bias"_a, "down_bias"_a,
        "topk_ids"_a, "topk_weights"_a, "y"_a, "h"_a, "activation"_a, "gated"_a, "interleaved"_a, "alpha"_a, "limit"_a,
        py::arg(kExecutionArgument), "gate_up_adapter"_a = none, "down_adapter"_a = none, "dropout_seed"_a = none,
        "dropout"_a = none);
  m.def("moe_accumulate", &py_moe_accumulate, "Adds the output of the expert layer to float32 sums, expert by expert.",
        "x"_a, "gate_up_proj"_a, "gate_up_form"_a, "down_proj"_a, "down_form"_a, "gate_up_bias"_a, "down_bias"_a,
        "topk_ids"_a, "topk_weights"_a, "sums"_a, "activation"_a, "gated"_a, "interleaved"_a, "alpha"_a, "limit"_a,
        py::arg(kExecutionArgument), "gate_up_adapter"_a = none, "down_adapter"_a = none);
  m.def("moe_backward", &py_moe_backward, "Writes the gradients of moe_forward whose outputs are given.",  //
        "grad_y"_a, "x"_a, "h"_a, "gate_up_proj"_a, "gate_up_form"_a, "down_proj"_a, "down_form"_a, "gate_up_bias"_a,
        "down_bias"_a, "topk_ids"_a, "topk_weights"_a, "experts"_a, "grad_x"_a, "grad_gate_up_proj"_a,
        "grad_down_proj"_a, "grad_gate_up_bias"_a, "grad_down_bias"_a, "grad_topk_weights"_a, "activation"_a, "gated"_a,
        "interleaved"_a, "alpha"_a, "limit"_a, py::arg(kExecutionArgument), "gate_up_adapter"_a = none,
        "down_adapter"_a = none, "dropout_seed"_a = none, "dropout"_a = none, "grad_gate_up_a"_a = none,
        "grad_gate_up_b"_a = none, "grad_down_a"_a = none, "grad_down_b"_a = none, "adds"_a = false);
}
