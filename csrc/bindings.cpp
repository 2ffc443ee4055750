// SPDX-License-Identifier: BSD-3-Clause
// One function per op of ops.h, for each Python module: (inputs, options, outputs, execution). Outputs are arrays that the op
// writes. The ops of a whole layer take a tuple `Layer` (reference/layer.py) in place of options.
#include <pybind11/pybind11.h>

#include <array>
#include <string_view>
#include <vector>

#include "arrays.h"
#include "decoder_layer.h"
#include "fields.h"
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
constexpr auto kActivations = [] {
  Names<Activation, kActivationNames.size()> names;
  for (size_t i = 0; i < names.size(); ++i) names[i] = {kActivationNames[i], static_cast<Activation>(i)};
  return names;
}();

// The four arguments of a call.
struct Call {
  Call(handle inputs, Py_ssize_t num_inputs, handle options, Py_ssize_t num_options, handle outputs,
       Py_ssize_t num_outputs, ExecutionArgument execution)
      : arrays(arrays_of(execution)),
        inputs(arrays, "inputs", inputs, num_inputs),
        options(arrays, "options", options, num_options),
        outputs(arrays, "outputs", outputs, num_outputs) {}
  Arrays arrays;
  Fields inputs, options, outputs;
};

GluOptions glu_options(Fields& fields) {
  return {.activation = parse("activation", kActivations, fields.value<std::string_view>("activation")),
          .gated = fields.value<bool>("gated"),
          .interleaved = fields.value<bool>("interleaved"),
          .alpha = fields.value<float>("alpha"),
          .limit = fields.value<float>("limit")};
}

// Without top_k, which is the width of topk_ids.
RouteOptions route_options(Fields& fields) {
  return {.score_function = parse("score_function", kScoreFunctions, fields.value<std::string_view>("score_function")),
          .normalize = fields.value<bool>("normalize"),
          .scale = fields.value<float>("scale"),
          .num_groups = fields.value<int64_t>("num_groups"),
          .topk_groups = fields.value<int64_t>("topk_groups"),
          .group_score = parse("group_score", kGroupScores, fields.value<std::string_view>("group_score"))};
}

// ---- route ---

void py_route(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 2, options, 6, outputs, 2, execution);
  RouteArgs args{.router_logits = call.inputs.in("router_logits"),
                 .selection_bias = call.inputs.in_or_none("selection_bias"),
                 .options = route_options(call.options),
                 .topk_ids = call.outputs.out("topk_ids"),
                 .topk_weights = call.outputs.out("topk_weights")};
  args.options.top_k = args.topk_ids.shape[1];
  run(route, args, execution);
}

void py_route_backward(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 3, options, 3, outputs, 1, execution);
  RouteBackwardArgs args{.grad_topk_weights = call.inputs.in("grad_topk_weights"),
                         .router_logits = call.inputs.in("router_logits"),
                         .topk_ids = call.inputs.in("topk_ids"),
                         .options = {.score_function = parse("score_function", kScoreFunctions,
                                                             call.options.value<std::string_view>("score_function")),
                                     .normalize = call.options.value<bool>("normalize"),
                                     .scale = call.options.value<float>("scale")},
                         .grad_router_logits = call.outputs.out("grad_router_logits")};
  args.options.top_k = args.topk_ids.shape[1];
  run(route_backward, args, execution);
}

// ---- gate ---

GateArgs gate_args(Call& call) {
  return {.x = call.inputs.in("x"),
          .weight = call.inputs.in("weight"),
          .bias = call.inputs.in_or_none("bias"),
          .router_logits = call.outputs.out("router_logits")};
}

void py_gate(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 3, options, 0, outputs, 1, execution);
  run(gate, gate_args(call), execution);
}

void py_gate_route(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 4, options, 6, outputs, 3, execution);
  GateRouteArgs args{.gate = gate_args(call),
                     .selection_bias = call.inputs.in_or_none("selection_bias"),
                     .options = route_options(call.options),
                     .topk_ids = call.outputs.out("topk_ids"),
                     .topk_weights = call.outputs.out("topk_weights")};
  args.options.top_k = args.topk_ids.shape[1];
  run(gate_route, args, execution);
}

// ---- routing policies ---

RouteDynamicOptions route_dynamic_options(Fields& fields) {
  RouteDynamicOptions options;
  options.min_experts = fields.value<int64_t>("min_experts");
  options.score_function = parse("score_function", kScoreFunctions, fields.value<std::string_view>("score_function"));
  options.top_p = fields.value<double>("top_p");
  options.threshold = fields.value<float>("threshold");
  options.normalize = fields.value<bool>("normalize");
  options.scale = fields.value<float>("scale");
  return options;
}

void py_route_dynamic(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 2, options, 6, outputs, 2, execution);
  const RouteDynamicArgs args{.router_logits = call.inputs.in("router_logits"),
                              .selection_bias = call.inputs.in_or_none("selection_bias"),
                              .options = route_dynamic_options(call.options),
                              .topk_ids = call.outputs.out("topk_ids"),
                              .topk_weights = call.outputs.out("topk_weights")};
  run(route_dynamic, args, execution);
}

void py_column_topk(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 3, options, 0, outputs, 1, execution);
  const ColumnTopkArgs args{.values = call.inputs.in("values"),
                            .sequence_ids = call.inputs.in_or_none("sequence_ids"),
                            .limits = call.inputs.in("limits"),
                            .topk_ids = call.outputs.out("topk_ids")};
  run(column_topk, args, execution);
}

void py_fit_capacity(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 5, options, 3, outputs, 1, execution);
  const FitCapacityArgs args{.topk_ids = call.inputs.in("topk_ids"),
                             .priorities = call.inputs.in_or_none("priorities"),
                             .scores = call.inputs.in_or_none("scores"),
                             .sequence_ids = call.inputs.in_or_none("sequence_ids"),
                             .limits = call.inputs.in("limits"),
                             .options = {.num_experts = call.options.value<int64_t>("num_experts"),
                                         .drop = parse("drop", kDrops, call.options.value<std::string_view>("drop")),
                                         .candidates = call.options.value<int64_t>("candidates")},
                             .kept_ids = call.outputs.out("kept_ids")};
  run(fit_capacity, args, execution);
}

void py_assign_balanced(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 2, options, 3, outputs, 1, execution);
  const AssignBalancedArgs args{.values = call.inputs.in("values"),
                                .sequence_ids = call.inputs.in_or_none("sequence_ids"),
                                .num_sequences = call.options.value<int64_t>("num_sequences"),
                                .eps = call.options.value<double>("eps"),
                                .max_iterations = call.options.value<int64_t>("max_iterations"),
                                .expert_ids = call.outputs.out("expert_ids")};
  run(assign_balanced, args, execution);
}

void py_assign_capped(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 3, options, 4, outputs, 1, execution);
  const AssignCappedArgs args{.values = call.inputs.in("values"),
                              .sequence_ids = call.inputs.in_or_none("sequence_ids"),
                              .limits = call.inputs.in("limits"),
                              .cap = call.options.value<int64_t>("cap"),
                              .entropy = call.options.value<double>("entropy"),
                              .iterations = call.options.value<int64_t>("iterations"),
                              .tolerance = call.options.value<double>("tolerance"),
                              .assignment = call.outputs.out("assignment")};
  run(assign_capped, args, execution);
}

// ---- plan ---

void py_plan(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 1, options, 0, outputs, 3, execution);
  const PlanArgs args{.topk_ids = call.inputs.in("topk_ids"),
                      .plan = {.expert_offsets = call.outputs.out("expert_offsets"),
                               .token_indices = call.outputs.out("token_indices"),
                               .slot_indices = call.outputs.out("slot_indices")}};
  run(plan, args, execution);
}

Plan plan_in(Fields& inputs) {
  return {.expert_offsets = inputs.in("expert_offsets"),
          .token_indices = inputs.in("token_indices"),
          .slot_indices = inputs.in("slot_indices")};
}

// ---- permute, combine ---

void py_permute(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 5, options, 0, outputs, 1, execution);
  const PermuteArgs args{.x = call.inputs.in("x"),
                         .plan = plan_in(call.inputs),
                         .topk_weights = call.inputs.in_or_none("topk_weights"),
                         .permuted_x = call.outputs.out("permuted_x")};
  run(permute, args, execution);
}

void py_combine(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 5, options, 0, outputs, 1, execution);
  const CombineArgs args{.permuted_y = call.inputs.in("permuted_y"),
                         .plan = plan_in(call.inputs),
                         .topk_weights = call.inputs.in_or_none("topk_weights"),
                         .y = call.outputs.out("y")};
  run(combine, args, execution);
}

void py_combine_weight_backward(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 5, options, 0, outputs, 1, execution);
  const CombineBackwardArgs args{.grad_y = call.inputs.in("grad_y"),
                                 .permuted_y = call.inputs.in("permuted_y"),
                                 .plan = plan_in(call.inputs),
                                 .grad_topk_weights = call.outputs.out("grad_topk_weights")};
  run(combine_weight_backward, args, execution);
}

// ---- grouped_gemm ---

void py_grouped_gemm(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 6, options, 2, outputs, 1, execution);
  const GroupedGemmArgs args{.x = call.inputs.in("x"),
                             .weight = call.inputs.weight("weight"),
                             .bias = call.inputs.in_or_none("bias"),
                             .expert_offsets = call.inputs.in("expert_offsets"),
                             .token_indices = call.inputs.in_or_none("token_indices"),
                             .out = call.outputs.out("out"),
                             .transposed = call.options.value<bool>("transposed"),
                             .input_gradient = call.options.value<bool>("input_gradient")};
  run(grouped_gemm, args, execution);
}

void py_grouped_gemm_wgrad(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 5, options, 0, outputs, 1, execution);
  const GroupedGemmWgradArgs args{.grad_out = call.inputs.in("grad_out"),
                                  .x = call.inputs.in("x"),
                                  .expert_offsets = call.inputs.in("expert_offsets"),
                                  .token_indices = call.inputs.in_or_none("token_indices"),
                                  .experts = call.inputs.in_or_none("experts"),
                                  .grad_weight = call.outputs.out("grad_weight")};
  run(grouped_gemm_wgrad, args, execution);
}

// ---- glu ---

void py_glu(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 1, options, 5, outputs, 1, execution);
  const GluArgs args{.h = call.inputs.in("h"), .options = glu_options(call.options), .a = call.outputs.out("a")};
  run(glu, args, execution);
}

void py_glu_backward(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 2, options, 5, outputs, 1, execution);
  const GluBackwardArgs args{.grad_a = call.inputs.in("grad_a"),
                             .h = call.inputs.in("h"),
                             .options = glu_options(call.options),
                             .grad_h = call.outputs.out("grad_h")};
  run(glu_backward, args, execution);
}

// ---- the whole layer ---

// Reads the fields of `Layer` in reference/layer.py into the arguments of an op. has_choices: None may stand for topk_ids and
// topk_weights if not.
template <typename Args>
void read_layer(Arrays& arrays, handle layer, Args& args, bool has_choices = true) {
  Fields fields(arrays, "layer", layer, 17);
  ExpertWeights& weights = args.weights;
  weights = {.gate_up_proj = fields.weight("gate_up_proj"),
             .down_proj = fields.weight("down_proj"),
             .gate_up_bias = fields.in_or_none("gate_up_bias"),
             .down_bias = fields.in_or_none("down_bias")};
  args.topk_ids = has_choices ? fields.in("topk_ids") : fields.in_or_none("topk_ids");
  args.topk_weights = has_choices ? fields.in("topk_weights") : fields.in_or_none("topk_weights");
  args.options = glu_options(fields);
  const auto has = [](handle list) { return !list.is_none() && py::len(list) > 0; };
  const handle gate_up_adapter = fields.next(), down_adapter = fields.next();
  const handle dropout_seed = fields.next(), dropout = fields.next();
  if (has(gate_up_adapter)) weights.gate_up_adapter = arrays.adapter(kGateUpAdapter, gate_up_adapter);
  if (has(down_adapter)) weights.down_adapter = arrays.adapter(kDownAdapter, down_adapter);
  if (has(dropout)) {
    const std::array both{&weights.gate_up_adapter, &weights.down_adapter};
    arrays.dropout(both, dropout_seed, dropout);
  }
}

MoeForwardArgs forward_args(Arrays& arrays, handle inputs, handle layer) {
  MoeForwardArgs args{.x = Fields(arrays, "inputs", inputs, 1).in("x")};
  read_layer(arrays, layer, args);
  return args;
}

void py_moe_forward(handle inputs, handle layer, handle outputs, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  MoeForwardArgs args = forward_args(arrays, inputs, layer);
  Fields out(arrays, "outputs", outputs, 2);
  args.y = out.out("y");
  args.h = out.out_or_none("h");
  run(moe_forward, args, execution);
}

void py_moe_accumulate(handle inputs, handle layer, handle outputs, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  MoeForwardArgs args = forward_args(arrays, inputs, layer);
  Fields out(arrays, "outputs", outputs, 2);
  args.sums = out.in_out("sums");
  args.h = out.out_or_none("h");
  run(moe_forward, args, execution);
}

// The last two outputs say whether the kernels add to the gradients of the projections, and to that of x.
void py_moe_backward(handle inputs, handle layer, handle outputs, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  Fields in(arrays, "inputs", inputs, 4), out(arrays, "outputs", outputs, 12);
  MoeBackwardArgs args{.grad_y = in.in("grad_y"), .x = in.in("x"), .h = in.in("h")};
  read_layer(arrays, layer, args);
  args.experts = in.in_or_none("experts");
  args.adds = PyTuple_GET_ITEM(outputs.ptr(), 10) == Py_True;
  args.adds_x = PyTuple_GET_ITEM(outputs.ptr(), 11) == Py_True;
  const auto weight_gradient = [&](const char* name) {
    return args.adds ? out.in_out_or_none(name) : out.out_or_none(name);
  };
  args.grad_x = args.adds_x ? out.in_out_or_none("grad_x") : out.out_or_none("grad_x");
  args.grad_gate_up_proj = weight_gradient("grad_gate_up_proj");
  args.grad_down_proj = weight_gradient("grad_down_proj");
  args.grad_gate_up_bias = out.out_or_none("grad_gate_up_bias");
  args.grad_down_bias = out.out_or_none("grad_down_bias");
  args.grad_topk_weights = out.out_or_none("grad_topk_weights");
  args.grad_gate_up_a = out.out_or_none("grad_gate_up_a");
  args.grad_gate_up_b = out.out_or_none("grad_gate_up_b");
  args.grad_down_a = out.out_or_none("grad_down_a");
  args.grad_down_b = out.out_or_none("grad_down_b");
  run(moe_backward, args, execution);
}

// ---- attention ---

void py_attend(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 5, options, 3, outputs, 1, execution);
  const AttendArgs args{.q = call.inputs.in("q"),
                        .keys = call.inputs.in("keys"),
                        .values = call.inputs.in("values"),
                        .starts = call.inputs.in_or_none("starts"),
                        .sinks = call.inputs.in_or_none("sinks"),
                        .length = call.options.value<int64_t>("length"),
                        .scale = call.options.value<float>("scale"),
                        .window = call.options.value<int64_t>("window"),
                        .out = call.outputs.out("out")};
  run(attend, args, execution);
}

void py_rms_norm(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 3, options, 1, outputs, 2, execution);
  const RmsNormArgs args{.x = call.inputs.in("x"),
                         .residual = call.inputs.in_or_none("residual"),
                         .weight = call.inputs.in("weight"),
                         .eps = call.options.value<float>("eps"),
                         .y = call.outputs.out("y"),
                         .sum = call.outputs.out_or_none("sum")};
  run(rms_norm, args, execution);
}

void py_rotate_heads(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 7, options, 2, outputs, 3, execution);
  const RotateHeadsArgs args{.q = call.inputs.in("q"),
                             .k = call.inputs.in("k"),
                             .v = call.inputs.in("v"),
                             .cos = call.inputs.in_or_none("cos"),
                             .sin = call.inputs.in_or_none("sin"),
                             .q_weight = call.inputs.in_or_none("q_weight"),
                             .k_weight = call.inputs.in_or_none("k_weight"),
                             .eps = call.options.value<float>("eps"),
                             .q_out = call.outputs.out("q_out"),
                             .k_out = call.outputs.out("k_out"),
                             .v_out = call.outputs.out("v_out"),
                             .interleaved = call.options.value<bool>("interleaved")};
  run(rotate_heads, args, execution);
}

// Of the 21 inputs and 7 options of attention_block, without its outputs.
AttentionBlockArgs attention_block_args(Fields& inputs, Fields& options) {
  const auto linear = [&](const char* name) {
    return Linear{.weight = inputs.weight(name), .bias = inputs.in_or_none(name)};
  };
  return {.x = inputs.in("x"),
          .input_norm = inputs.in("input_norm"),
          .output_norm = inputs.in("output_norm"),
          .q_proj = linear("q_proj"),
          .k_proj = linear("k_proj"),
          .v_proj = linear("v_proj"),
          .o_proj = linear("o_proj"),
          .q_norm = inputs.in_or_none("q_norm"),
          .k_norm = inputs.in_or_none("k_norm"),
          .cos = inputs.in("cos"),
          .sin = inputs.in("sin"),
          .angles = options.value<int64_t>("angles"),
          .starts = inputs.in_or_none("starts"),
          .sinks = inputs.in_or_none("sinks"),
          .length = options.value<int64_t>("length"),
          .scale = options.value<float>("scale"),
          .window = options.value<int64_t>("window"),
          .input_eps = options.value<float>("input_eps"),
          .head_eps = options.value<float>("head_eps"),
          .output_eps = options.value<float>("output_eps")};
}

void py_attention_block(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Call call(inputs, 21, options, 7, outputs, 4, execution);
  AttentionBlockArgs args = attention_block_args(call.inputs, call.options);
  args.keys = call.outputs.in_out("keys");
  args.values = call.outputs.in_out("values");
  args.y = call.outputs.out("y");
  args.sum = call.outputs.out("sum");
  run(attention_block, args, execution);
}

// A tuple for each layer. inputs and options: those of attention_block, and a tuple each for the router and, of inputs, for
// `Layer`.
void py_decoder_layers(handle inputs, handle options, handle outputs, ExecutionArgument execution) {
  Arrays arrays = arrays_of(execution);
  std::vector<DecoderLayerArgs> layers(py::len(outputs));
  const auto count = static_cast<Py_ssize_t>(layers.size());
  Fields every_input(arrays, "inputs", inputs, count), every_option(arrays, "options", options, count),
      every_output(arrays, "outputs", outputs, count);
  for (DecoderLayerArgs& args : layers) {
    Fields in(arrays, "inputs", every_input.next(), 23), option(arrays, "options", every_option.next(), 8),
        out(arrays, "outputs", every_output.next(), 3);
    args.attention = attention_block_args(in, option);
    Fields router(arrays, "router", in.next(), 3), choice(arrays, "choice", option.next(), 8);
    args.router.gate.weight = router.in("weight");
    args.router.gate.bias = router.in_or_none("bias");
    args.router.selection_bias = router.in_or_none("selection_bias");
    args.router.options = route_options(choice);
    args.router.options.top_k = choice.value<int64_t>("top_k");
    args.rounds = choice.value<bool>("rounds");
    read_layer(arrays, in.next(), args.experts, false);
    args.attention.keys = out.in_out("keys");
    args.attention.values = out.in_out("values");
    args.y = out.out("y");
  }
  run(decoder_layers, layers, execution);
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
  using Function = void (*)(handle, handle, handle, ExecutionArgument);
  const auto op = [&m](const char* name, Function function, const char* doc) {
    m.def(name, function, doc, "inputs"_a, "options"_a, "outputs"_a, py::arg(kExecutionArgument));
  };
  op("route", &py_route, "Writes the top_k experts of each token and their weights.");
  op("route_backward", &py_route_backward, "Writes the gradient of router_logits.");
  op("gate", &py_gate, "Writes the logits of a linear router.");
  op("gate_route", &py_gate_route, "Writes the logits of a linear router, its top_k experts and their weights.");
  op("route_dynamic", &py_route_dynamic, "Writes as many experts as each token needs, and their weights.");
  op("column_topk", &py_column_topk, "Writes the experts that take each token as one of their best.");
  op("fit_capacity", &py_fit_capacity, "Writes the choices that fit the capacity.");
  op("assign_balanced", &py_assign_balanced, "Writes an expert for each token, in a balanced assignment.");
  op("assign_capped", &py_assign_capped, "Writes the assignment by which experts choose if tokens have a cap.");
  op("plan", &py_plan, "Writes the slots of topk_ids in the order (expert, token, choice).");
  op("permute", &py_permute, "Writes the rows of x in slot order.");
  op("combine", &py_combine, "Writes the weighted sum of each token's slots.");
  op("combine_weight_backward", &py_combine_weight_backward, "Writes the gradient of topk_weights in combine.");
  op("grouped_gemm", &py_grouped_gemm, "Writes the product of each row with its expert's weight.");
  op("grouped_gemm_wgrad", &py_grouped_gemm_wgrad, "Writes the gradient of grouped_gemm's weight.");
  op("glu", &py_glu, "Writes the activation of h.");
  op("glu_backward", &py_glu_backward, "Writes the gradient of h in glu.");
  op("moe_forward", &py_moe_forward, "Writes the output of the whole expert layer, and h if given.");
  op("moe_accumulate", &py_moe_accumulate, "Adds the output of the expert layer to float32 sums, expert by expert.");
  op("moe_backward", &py_moe_backward, "Writes the gradients of moe_forward whose outputs are given.");
  if (default_backend().attend != nullptr) {
    op("attend", &py_attend, "Writes the attention of new tokens over a cache of keys and values.");
    op("rms_norm", &py_rms_norm, "Writes rows divided by their root mean square, times a weight.");
    op("rotate_heads", &py_rotate_heads, "Writes queries, keys and values of new tokens, normalised and rotated.");
    op("attention_block", &py_attention_block, "Writes the attention of a decoder layer, between two norms.");
    op("decoder_layers", &py_decoder_layers, "Writes the outputs of consecutive decoder layers.");
  }
}
