// SPDX-License-Identifier: BSD-3-Clause
// Calls of all ops that are valid, for tests of what they refuse: each has a property changed at a time.
#pragma once

#include <array>
#include <functional>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cases.h"
#include "checks.h"

namespace switchgear::test {

constexpr int64_t T = 3, H = 4, E = 5, K = 2, I = 7, N = 14, S = T * K, M = 2, B = 2, R = 8;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();

inline std::string complaint_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const ValueError& error) {
    return error.what();
  } catch (const TypeError& error) {
    return join("TypeError: ", error.what());
  }
  return "none";
}

// ---- calls that are valid ----------------------------------------------------------------------------------------------

enum class Memory { kContiguous, kRows, kMatrices };

struct Tensor {
  const char* name;
  TensorView* view;
  Memory memory = Memory::kContiguous;
  bool optional = false;
  bool output = false;
  unsigned own = 0;  // bit i: no other tensor must have the size i
};

// A call in which every tensor, the optional ones too, has memory of its own.
struct Op {
  const char* name;
  std::vector<Tensor> tensors;
  std::function<void()> run;
  std::vector<Array> arrays;

  Op(const char* name, std::vector<Tensor> all, std::function<void()> run)
      : name(name), tensors(std::move(all)), run(std::move(run)) {
    for (const Tensor& t : tensors) {
      Array array(t.view->dtype, {t.view->shape.begin(), t.view->shape.begin() + t.view->ndim}, 0, 4);
      if (!t.output) array.fill([](int64_t) { return 0; });
      arrays.push_back(std::move(array));
    }
    bind();
  }
  void bind() {
    for (size_t i = 0; i < arrays.size(); ++i) *tensors[i].view = arrays[i];
  }

  // Checks that the call is refused with a message that has the expected text, and writes nothing.
  void refuses(const std::string& expected, const std::string& what) {
    for (size_t i = 0; i < arrays.size(); ++i) {
      if (tensors[i].output) arrays[i].poison(7);
    }
    const std::vector<Array> before = arrays;
    const std::string complaint = complaint_of(run);
    CHECK(complaint.find(expected) != std::string::npos && complaint != "none", name, " with ", what, ": '", complaint,
          "' instead of '", expected, "'");
    for (size_t i = 0; i < arrays.size(); ++i) CHECK(arrays[i].bytes() == before[i].bytes(), name, " with ", what);
  }
};

inline TensorView floats(std::initializer_list<int64_t> shape) {
  TensorView v{.ndim = static_cast<int>(shape.size())};
  std::copy(shape.begin(), shape.end(), v.shape.begin());
  return v;
}
inline TensorView ints(std::initializer_list<int64_t> shape) {
  TensorView v = floats(shape);
  v.dtype = DType::kInt32;
  return v;
}

// Arguments that outlive the functions which refer to them.
template <typename Args>
Args& keep(Args args) {
  static Args kept;
  return kept = std::move(args);
}

constexpr auto kRows = Memory::kRows;
constexpr auto kPlainMatrices = Memory::kMatrices;
constexpr auto kDense = Memory::kContiguous;

inline std::vector<Tensor> plan_tensors(Plan& plan) {
  return {{.name = "slot_indices", .view = &plan.slot_indices},
          {.name = "token_indices", .view = &plan.token_indices},
          {.name = "expert_offsets", .view = &plan.expert_offsets, .own = 1}};
}

inline std::vector<Tensor> operator+(std::vector<Tensor> a, const std::vector<Tensor>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

inline Plan plan_views() { return {ints({E + 1}), ints({S}), ints({T, K})}; }

inline Op route_op(RouteArgs& a) {
  return {"route",
          {{"router_logits", &a.router_logits, kRows},
           {"selection_bias", &a.selection_bias, kDense, true},
           {"topk_ids", &a.topk_ids, kDense, false, true},
           {"topk_weights", &a.topk_weights, kDense, false, true}},
          [&] { route(a, {1}); }};
}
inline RouteArgs route_args() { return {floats({T, E}), floats({E}), {.top_k = K}, ints({T, K}), floats({T, K})}; }

inline Op route_backward_op(RouteBackwardArgs& a) {
  return {"route_backward",
          {{"router_logits", &a.router_logits, kRows},
           {"topk_ids", &a.topk_ids},
           {"grad_topk_weights", &a.grad_topk_weights},
           {"grad_router_logits", &a.grad_router_logits, kRows, false, true}},
          [&] { route_backward(a, {1}); }};
}
inline RouteBackwardArgs route_backward_args() {
  return {floats({T, K}), floats({T, E}), ints({T, K}), {.top_k = K}, floats({T, E})};
}

inline std::vector<Tensor> gate_tensors(GateArgs& a) {
  return {{"x", &a.x, kRows},
          {"weight", &a.weight, kRows},
          {"bias", &a.bias, kDense, true},
          {"router_logits", &a.router_logits, kRows, false, true}};
}
inline Op gate_op(GateArgs& a) {
  return {"gate", gate_tensors(a), [&] { switchgear::gate(a, {1}); }};
}
inline GateArgs gate_args() { return {floats({T, H}), floats({E, H}), floats({E}), floats({T, E})}; }

inline Op gate_route_op(GateRouteArgs& a) {
  return {"gate_route",
          gate_tensors(a.gate) + std::vector<Tensor>{{"selection_bias", &a.selection_bias, kDense, true},
                                                     {"topk_ids", &a.topk_ids, kDense, false, true},
                                                     {"topk_weights", &a.topk_weights, kDense, false, true}},
          [&] { gate_route(a, {1}); }};
}
inline GateRouteArgs gate_route_args() {
  return {gate_args(), floats({E}), {.top_k = K}, ints({T, K}), floats({T, K})};
}

inline Op route_dynamic_op(RouteDynamicArgs& a) {
  return {"route_dynamic",
          {{"router_logits", &a.router_logits, kRows},
           {"selection_bias", &a.selection_bias, kDense, true},
           {"topk_ids", &a.topk_ids, kDense, false, true},
           {"topk_weights", &a.topk_weights, kDense, false, true}},
          [&] { route_dynamic(a, {1}); }};
}
inline RouteDynamicArgs route_dynamic_args() { return {floats({T, E}), floats({E}), {}, ints({T, M}), floats({T, M})}; }

inline Op column_topk_op(ColumnTopkArgs& a) {
  return {"column_topk",
          {{"values", &a.values, kRows},
           {"sequence_ids", &a.sequence_ids, kDense, true},
           {"limits", &a.limits, kDense, false, false, 1},
           {"topk_ids", &a.topk_ids, kDense, false, true}},
          [&] { column_topk(a, {1}); }};
}
inline ColumnTopkArgs column_topk_args() { return {floats({T, E}), ints({T}), ints({B}), ints({T, E})}; }

inline Op fit_capacity_op(FitCapacityArgs& a) {
  return {"fit_capacity",
          {{"topk_ids", &a.topk_ids},
           {"priorities", &a.priorities},
           {"scores", &a.scores, kDense, true},
           {"sequence_ids", &a.sequence_ids, kDense, true},
           {"limits", &a.limits, kDense, false, false, 1},
           {"kept_ids", &a.kept_ids, kDense, false, true}},
          [&] { fit_capacity(a, {1}); }};
}
inline FitCapacityArgs fit_capacity_args() {
  return {ints({T, K}), floats({T, K}), floats({T, E}),
          ints({T}),    ints({B}),      {.num_experts = E, .drop = Drop::kPriority, .candidates = 3},
          ints({T, K})};
}

inline Op assign_balanced_op(AssignBalancedArgs& a) {
  return {"assign_balanced",
          {{"values", &a.values, kDense, false, false, 2},
           {"sequence_ids", &a.sequence_ids, kDense, true},
           {"expert_ids", &a.expert_ids, kDense, false, true}},
          [&] { assign_balanced(a, {1}); }};
}
inline AssignBalancedArgs assign_balanced_args() {
  return {.values = floats({T, E}), .sequence_ids = ints({T}), .num_sequences = B, .expert_ids = ints({T})};
}

inline Op assign_capped_op(AssignCappedArgs& a) {
  return {"assign_capped",
          {{"values", &a.values, kRows},
           {"sequence_ids", &a.sequence_ids, kDense, true},
           {"limits", &a.limits, kDense, false, false, 1},
           {"assignment", &a.assignment, kDense, false, true}},
          [&] { assign_capped(a, {1}); }};
}
inline AssignCappedArgs assign_capped_args() {
  return {.values = floats({T, E}), .sequence_ids = ints({T}), .limits = ints({B}), .assignment = floats({T, E})};
}

inline Op plan_op(PlanArgs& a) {
  return {"plan",
          {{"topk_ids", &a.topk_ids},
           {"expert_offsets", &a.plan.expert_offsets, kDense, false, true, 1},
           {"token_indices", &a.plan.token_indices, kDense, false, true},
           {"slot_indices", &a.plan.slot_indices, kDense, false, true}},
          [&] { plan(a, {1}); }};
}
inline PlanArgs plan_args() { return {ints({T, K}), plan_views()}; }

inline Op permute_op(PermuteArgs& a) {
  return {"permute",
          plan_tensors(a.plan) + std::vector<Tensor>{{"x", &a.x, kRows},
                                                     {"topk_weights", &a.topk_weights, kDense, true},
                                                     {"permuted_x", &a.permuted_x, kRows, false, true}},
          [&] { permute(a, {1}); }};
}
inline PermuteArgs permute_args() { return {floats({T, H}), plan_views(), floats({T, K}), floats({S, H})}; }

inline Op combine_op(CombineArgs& a) {
  return {"combine",
          plan_tensors(a.plan) + std::vector<Tensor>{{"permuted_y", &a.permuted_y, kRows},
                                                     {"topk_weights", &a.topk_weights, kDense, true},
                                                     {"y", &a.y, kRows, false, true}},
          [&] { combine(a, {1}); }};
}
inline CombineArgs combine_args() { return {floats({S, H}), plan_views(), floats({T, K}), floats({T, H})}; }

inline Op combine_weight_backward_op(CombineBackwardArgs& a) {
  return {"combine_weight_backward",
          plan_tensors(a.plan) + std::vector<Tensor>{{"grad_y", &a.grad_y, kRows},
                                                     {"permuted_y", &a.permuted_y, kRows},
                                                     {"grad_topk_weights", &a.grad_topk_weights, kDense, false, true}},
          [&] { combine_weight_backward(a, {1}); }};
}
inline CombineBackwardArgs combine_weight_backward_args() {
  return {floats({T, H}), floats({S, H}), plan_views(), floats({T, K})};
}

inline Op grouped_gemm_op(GroupedGemmArgs& a) {
  return {"grouped_gemm",
          {{"x", &a.x, kRows, false, false, 1},
           {"weight", &a.weight.data, kPlainMatrices},
           {"bias", &a.bias, kRows, true},
           {"expert_offsets", &a.expert_offsets},
           {"token_indices", &a.token_indices, kDense, true},
           {"out", &a.out, kRows, false, true}},
          [&] { grouped_gemm(a, {1}); }};
}
inline GroupedGemmArgs grouped_gemm_args() {
  return {.x = floats({T, H}),
          .weight = {.data = floats({E, N, H})},
          .bias = floats({E, N}),
          .expert_offsets = ints({E + 1}),
          .token_indices = ints({S}),
          .out = floats({S, N})};
}

inline Op grouped_gemm_wgrad_op(GroupedGemmWgradArgs& a) {
  return {"grouped_gemm_wgrad",
          {{"x", &a.x, kRows, false, false, 1},
           {"token_indices", &a.token_indices, kDense, true},
           {"grad_out", &a.grad_out, kRows},
           {"grad_weight", &a.grad_weight, kPlainMatrices, false, true},
           {"expert_offsets", &a.expert_offsets}},
          [&] { grouped_gemm_wgrad(a, {1}); }};
}
inline GroupedGemmWgradArgs grouped_gemm_wgrad_args() {
  return {.grad_out = floats({S, N}),
          .x = floats({T, H}),
          .expert_offsets = ints({E + 1}),
          .token_indices = ints({S}),
          .grad_weight = floats({E, N, H})};
}

inline Op glu_op(GluArgs& a) {
  return {"glu", {{"h", &a.h, kRows}, {"a", &a.a, kRows, false, true}}, [&] { glu(a, {1}); }};
}
inline GluArgs glu_args() { return {floats({S, N}), {}, floats({S, I})}; }

inline Op glu_backward_op(GluBackwardArgs& a) {
  return {"glu_backward",
          {{"h", &a.h, kRows}, {"grad_a", &a.grad_a, kRows}, {"grad_h", &a.grad_h, kRows, false, true}},
          [&] { glu_backward(a, {1}); }};
}
inline GluBackwardArgs glu_backward_args() { return {floats({S, I}), floats({S, N}), {}, floats({S, N})}; }

inline std::vector<Tensor> weight_tensors(ExpertWeights& w) {
  return {{"gate_up_proj", &w.gate_up_proj.data, kPlainMatrices},
          {"down_proj", &w.down_proj.data, kPlainMatrices},
          {"gate_up_bias", &w.gate_up_bias, kRows, true},
          {"down_bias", &w.down_bias, kRows, true},
          {"down_adapter_a", &w.down_adapter.a, kPlainMatrices, true},
          {"down_adapter_b", &w.down_adapter.b, kPlainMatrices},
          {"down_adapter_scales", &w.down_adapter.scales},
          {"down_adapter_ranks", &w.down_adapter.ranks, kDense, true}};
}
inline ExpertWeights expert_weights() {
  return {.gate_up_proj = {.data = floats({E, N, H})},
          .down_proj = {.data = floats({E, H, I})},
          .gate_up_bias = floats({E, N}),
          .down_bias = floats({E, H}),
          .down_adapter = {.a = floats({E, R, I}), .b = floats({E, H, R}), .scales = floats({E}), .ranks = ints({E})}};
}

inline Op moe_forward_op(MoeForwardArgs& a) {
  return {"moe_forward",
          std::vector<Tensor>{{"x", &a.x, kRows}} + weight_tensors(a.weights) +
              std::vector<Tensor>{{"topk_ids", &a.topk_ids},
                                  {"topk_weights", &a.topk_weights},
                                  {"y", &a.y, kRows, false, true},
                                  {"h", &a.h, kRows, true, true}},
          [&] { moe_forward(a, {1}); }};
}
inline MoeForwardArgs moe_forward_args() {
  return {.x = floats({T, H}),
          .weights = expert_weights(),
          .topk_ids = ints({T, K}),
          .topk_weights = floats({T, K}),
          .y = floats({T, H}),
          .h = floats({S, N})};
}

inline Op moe_backward_op(MoeBackwardArgs& a) {
  return {"moe_backward",
          std::vector<Tensor>{{"x", &a.x, kRows}, {"grad_y", &a.grad_y, kRows}} + weight_tensors(a.weights) +
              std::vector<Tensor>{{"topk_ids", &a.topk_ids},
                                  {"topk_weights", &a.topk_weights},
                                  {"h", &a.h, kRows},
                                  {"grad_x", &a.grad_x, kRows, true, true},
                                  {"grad_gate_up_proj", &a.grad_gate_up_proj, kPlainMatrices, true, true},
                                  {"grad_down_proj", &a.grad_down_proj, kPlainMatrices, true, true},
                                  {"grad_gate_up_bias", &a.grad_gate_up_bias, kRows, true, true},
                                  {"grad_down_bias", &a.grad_down_bias, kRows, true, true},
                                  {"grad_topk_weights", &a.grad_topk_weights, kDense, true, true}},
          [&] { moe_backward(a, {1}); }};
}
inline MoeBackwardArgs moe_backward_args() {
  return {.grad_y = floats({T, H}),
          .x = floats({T, H}),
          .h = floats({S, N}),
          .weights = expert_weights(),
          .topk_ids = ints({T, K}),
          .topk_weights = floats({T, K}),
          .grad_x = floats({T, H}),
          .grad_gate_up_proj = floats({E, N, H}),
          .grad_down_proj = floats({E, H, I}),
          .grad_gate_up_bias = floats({E, N}),
          .grad_down_bias = floats({E, H}),
          .grad_topk_weights = floats({T, K})};
}

inline Op attend_op(AttendArgs& a) {
  return {"attend",
          {{"q", &a.q, kRows},
           {"keys", &a.keys, kRows},
           {"values", &a.values, kRows},
           {"starts", &a.starts, kDense, true},
           {"sinks", &a.sinks, kDense, true},
           {"out", &a.out, kRows, false, true}},
          [&] { attend(a, {1}); }};
}
inline AttendArgs attend_args() {
  return {.q = floats({B, T, 10, 4}),
          .keys = floats({B, 5, 9, 4}),
          .values = floats({B, 5, 9, 8}),
          .starts = ints({B}),
          .sinks = floats({10}),
          .length = 5,
          .out = floats({B, T, 10, 8})};
}

inline Op rms_norm_op(RmsNormArgs& a) {
  return {"rms_norm",
          {{"x", &a.x, kRows},
           {"residual", &a.residual, kRows, true},
           {"weight", &a.weight},
           {"y", &a.y, kRows, false, true},
           {"sum", &a.sum, kRows, true, true}},
          [&] { rms_norm(a, {1}); }};
}
inline RmsNormArgs rms_norm_args() {
  return {.x = floats({T, H}),
          .residual = floats({T, H}),
          .weight = floats({H}),
          .y = floats({T, H}),
          .sum = floats({T, H})};
}

inline Op rotate_heads_op(RotateHeadsArgs& a) {
  return {"rotate_heads",
          {{"q", &a.q, kRows},
           {"k", &a.k, kRows},
           {"v", &a.v, kRows},
           {"cos", &a.cos, kRows, true, false, 1},
           {"sin", &a.sin, kRows, true, false, 1},
           {"q_weight", &a.q_weight, kDense, true},
           {"k_weight", &a.k_weight, kDense, true},
           {"q_out", &a.q_out, kRows, false, true},
           {"k_out", &a.k_out, kRows, false, true},
           {"v_out", &a.v_out, kRows, false, true}},
          [&] { rotate_heads(a, {1}); }};
}
inline RotateHeadsArgs rotate_heads_args() {
  return {.q = floats({B, T, 12, 10}),
          .k = floats({B, T, 4, 10}),
          .v = floats({B, T, 4, 8}),
          .cos = floats({B, T, 5}),
          .sin = floats({B, T, 5}),
          .q_weight = floats({10}),
          .k_weight = floats({40}),
          .q_out = floats({B, T, 12, 10}),
          .k_out = floats({B, T, 4, 10}),
          .v_out = floats({B, T, 4, 8})};
}

inline std::vector<Op> all_ops() {
  return {route_op(keep(route_args())),
          route_backward_op(keep(route_backward_args())),
          gate_op(keep(gate_args())),
          gate_route_op(keep(gate_route_args())),
          route_dynamic_op(keep(route_dynamic_args())),
          column_topk_op(keep(column_topk_args())),
          fit_capacity_op(keep(fit_capacity_args())),
          assign_balanced_op(keep(assign_balanced_args())),
          assign_capped_op(keep(assign_capped_args())),
          plan_op(keep(plan_args())),
          permute_op(keep(permute_args())),
          combine_op(keep(combine_args())),
          combine_weight_backward_op(keep(combine_weight_backward_args())),
          grouped_gemm_op(keep(grouped_gemm_args())),
          grouped_gemm_wgrad_op(keep(grouped_gemm_wgrad_args())),
          glu_op(keep(glu_args())),
          glu_backward_op(keep(glu_backward_args())),
          moe_forward_op(keep(moe_forward_args())),
          moe_backward_op(keep(moe_backward_args())),
          attend_op(keep(attend_args())),
          rms_norm_op(keep(rms_norm_args())),
          rotate_heads_op(keep(rotate_heads_args()))};
}
// A copy of a view with one property changed, for as long as it lives.
struct Changed {
  Changed(TensorView& view, const std::function<void(TensorView&)>& change) : view(view), before(view) { change(view); }
  ~Changed() { view = before; }
  Changed(const Changed&) = delete;
  TensorView& view;
  TensorView before;
};

// An op and its arguments, of which one is changed at a time.
template <typename Args>
struct Limits {
  Args& args;
  Op op;

  using Change = std::function<void(Args&)>;
  void refuses(const char* expected, const Change& change) {
    const Args before = args;
    change(args);
    op.refuses(expected, "another option");
    args = before;
  }
  void accepts(const char* what, const Change& change) {
    const Args before = args;
    change(args);
    const std::string complaint = complaint_of(op.run);
    CHECK(complaint == "none", op.name, " with ", what, ": ", complaint);
    args = before;
  }
  // Indices are 0; one becomes `value`.
  void index(const TensorView& indices, int64_t i, int32_t value, const char* expected) {
    auto* const p = indices.as<int32_t>() + i;
    const int32_t before = std::exchange(*p, value);
    if (expected == nullptr) {
      accepts(join(value, " at ", i).c_str(), [](Args&) {});
    } else {
      refuses(expected, [](Args&) {});
    }
    *p = before;
  }
};

template <typename Args, typename MakeOp>
Limits<Args> limits_of(Args args, MakeOp&& make_op) {
  Args& kept = keep(std::move(args));
  Limits<Args> limits{kept, make_op(kept)};
  limits.op.bind();
  return limits;
}

}  // namespace switchgear::test
