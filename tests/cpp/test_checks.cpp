// SPDX-License-Identifier: BSD-3-Clause
// What each op refuses: every tensor with every property that it must not have, options at both sides of their limits, and
// indices out of range. Errors name the argument, and nothing has been written.
#include <array>
#include <functional>
#include <limits>
#include <tuple>
#include <utility>

#include "cases.h"
#include "checks.h"
#include "switchgear/compact.h"
#include "switchgear/minifloat.h"
#include "switchgear/panels.h"

namespace switchgear::test {
namespace {

constexpr int64_t T = 3, H = 4, E = 5, K = 2, I = 7, N = 14, S = T * K, M = 2, B = 2;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();

std::string complaint_of(const std::function<void()>& run) {
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

TensorView floats(std::initializer_list<int64_t> shape) {
  TensorView v{.ndim = static_cast<int>(shape.size())};
  std::copy(shape.begin(), shape.end(), v.shape.begin());
  return v;
}
TensorView ints(std::initializer_list<int64_t> shape) {
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

std::vector<Tensor> plan_tensors(Plan& plan) {
  return {{.name = "slot_indices", .view = &plan.slot_indices},
          {.name = "token_indices", .view = &plan.token_indices},
          {.name = "expert_offsets", .view = &plan.expert_offsets, .own = 1}};
}

std::vector<Tensor> operator+(std::vector<Tensor> a, const std::vector<Tensor>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

Plan plan_views() { return {ints({E + 1}), ints({S}), ints({T, K})}; }

Op route_op(RouteArgs& a) {
  return {"route",
          {{"router_logits", &a.router_logits, kRows},
           {"selection_bias", &a.selection_bias, kDense, true},
           {"topk_ids", &a.topk_ids, kDense, false, true},
           {"topk_weights", &a.topk_weights, kDense, false, true}},
          [&] { route(a, {1}); }};
}
RouteArgs route_args() { return {floats({T, E}), floats({E}), {.top_k = K}, ints({T, K}), floats({T, K})}; }

Op route_backward_op(RouteBackwardArgs& a) {
  return {"route_backward",
          {{"router_logits", &a.router_logits, kRows},
           {"topk_ids", &a.topk_ids},
           {"grad_topk_weights", &a.grad_topk_weights},
           {"grad_router_logits", &a.grad_router_logits, kRows, false, true}},
          [&] { route_backward(a, {1}); }};
}
RouteBackwardArgs route_backward_args() {
  return {floats({T, K}), floats({T, E}), ints({T, K}), {.top_k = K}, floats({T, E})};
}

std::vector<Tensor> gate_tensors(GateArgs& a) {
  return {{"x", &a.x, kRows},
          {"weight", &a.weight, kRows},
          {"bias", &a.bias, kDense, true},
          {"router_logits", &a.router_logits, kRows, false, true}};
}
Op gate_op(GateArgs& a) {
  return {"gate", gate_tensors(a), [&] { switchgear::gate(a, {1}); }};
}
GateArgs gate_args() { return {floats({T, H}), floats({E, H}), floats({E}), floats({T, E})}; }

Op gate_route_op(GateRouteArgs& a) {
  return {"gate_route",
          gate_tensors(a.gate) + std::vector<Tensor>{{"selection_bias", &a.selection_bias, kDense, true},
                                                     {"topk_ids", &a.topk_ids, kDense, false, true},
                                                     {"topk_weights", &a.topk_weights, kDense, false, true}},
          [&] { gate_route(a, {1}); }};
}
GateRouteArgs gate_route_args() { return {gate_args(), floats({E}), {.top_k = K}, ints({T, K}), floats({T, K})}; }

Op route_dynamic_op(RouteDynamicArgs& a) {
  return {"route_dynamic",
          {{"router_logits", &a.router_logits, kRows},
           {"selection_bias", &a.selection_bias, kDense, true},
           {"topk_ids", &a.topk_ids, kDense, false, true},
           {"topk_weights", &a.topk_weights, kDense, false, true}},
          [&] { route_dynamic(a, {1}); }};
}
RouteDynamicArgs route_dynamic_args() { return {floats({T, E}), floats({E}), {}, ints({T, M}), floats({T, M})}; }

Op column_topk_op(ColumnTopkArgs& a) {
  return {"column_topk",
          {{"values", &a.values, kRows},
           {"sequence_ids", &a.sequence_ids, kDense, true},
           {"limits", &a.limits, kDense, false, false, 1},
           {"topk_ids", &a.topk_ids, kDense, false, true}},
          [&] { column_topk(a, {1}); }};
}
ColumnTopkArgs column_topk_args() { return {floats({T, E}), ints({T}), ints({B}), ints({T, E})}; }

Op fit_capacity_op(FitCapacityArgs& a) {
  return {"fit_capacity",
          {{"topk_ids", &a.topk_ids},
           {"priorities", &a.priorities},
           {"scores", &a.scores, kDense, true},
           {"sequence_ids", &a.sequence_ids, kDense, true},
           {"limits", &a.limits, kDense, false, false, 1},
           {"kept_ids", &a.kept_ids, kDense, false, true}},
          [&] { fit_capacity(a, {1}); }};
}
FitCapacityArgs fit_capacity_args() {
  return {ints({T, K}), floats({T, K}), floats({T, E}),
          ints({T}),    ints({B}),      {.num_experts = E, .drop = Drop::kPriority, .candidates = 3},
          ints({T, K})};
}

Op assign_balanced_op(AssignBalancedArgs& a) {
  return {"assign_balanced",
          {{"values", &a.values, kDense, false, false, 2},
           {"sequence_ids", &a.sequence_ids, kDense, true},
           {"expert_ids", &a.expert_ids, kDense, false, true}},
          [&] { assign_balanced(a, {1}); }};
}
AssignBalancedArgs assign_balanced_args() {
  return {.values = floats({T, E}), .sequence_ids = ints({T}), .num_sequences = B, .expert_ids = ints({T})};
}

Op assign_capped_op(AssignCappedArgs& a) {
  return {"assign_capped",
          {{"values", &a.values, kRows},
           {"sequence_ids", &a.sequence_ids, kDense, true},
           {"limits", &a.limits, kDense, false, false, 1},
           {"assignment", &a.assignment, kDense, false, true}},
          [&] { assign_capped(a, {1}); }};
}
AssignCappedArgs assign_capped_args() {
  return {.values = floats({T, E}), .sequence_ids = ints({T}), .limits = ints({B}), .assignment = floats({T, E})};
}

Op plan_op(PlanArgs& a) {
  return {"plan",
          {{"topk_ids", &a.topk_ids},
           {"expert_offsets", &a.plan.expert_offsets, kDense, false, true, 1},
           {"token_indices", &a.plan.token_indices, kDense, false, true},
           {"slot_indices", &a.plan.slot_indices, kDense, false, true}},
          [&] { plan(a, {1}); }};
}
PlanArgs plan_args() { return {ints({T, K}), plan_views()}; }

Op permute_op(PermuteArgs& a) {
  return {"permute",
          plan_tensors(a.plan) + std::vector<Tensor>{{"x", &a.x, kRows},
                                                     {"topk_weights", &a.topk_weights, kDense, true},
                                                     {"permuted_x", &a.permuted_x, kRows, false, true}},
          [&] { permute(a, {1}); }};
}
PermuteArgs permute_args() { return {floats({T, H}), plan_views(), floats({T, K}), floats({S, H})}; }

Op combine_op(CombineArgs& a) {
  return {"combine",
          plan_tensors(a.plan) + std::vector<Tensor>{{"permuted_y", &a.permuted_y, kRows},
                                                     {"topk_weights", &a.topk_weights, kDense, true},
                                                     {"y", &a.y, kRows, false, true}},
          [&] { combine(a, {1}); }};
}
CombineArgs combine_args() { return {floats({S, H}), plan_views(), floats({T, K}), floats({T, H})}; }

Op combine_weight_backward_op(CombineBackwardArgs& a) {
  return {"combine_weight_backward",
          plan_tensors(a.plan) + std::vector<Tensor>{{"grad_y", &a.grad_y, kRows},
                                                     {"permuted_y", &a.permuted_y, kRows},
                                                     {"grad_topk_weights", &a.grad_topk_weights, kDense, false, true}},
          [&] { combine_weight_backward(a, {1}); }};
}
CombineBackwardArgs combine_weight_backward_args() {
  return {floats({T, H}), floats({S, H}), plan_views(), floats({T, K})};
}

Op grouped_gemm_op(GroupedGemmArgs& a) {
  return {"grouped_gemm",
          {{"x", &a.x, kRows, false, false, 1},
           {"weight", &a.weight.data, kPlainMatrices},
           {"bias", &a.bias, kRows, true},
           {"expert_offsets", &a.expert_offsets},
           {"token_indices", &a.token_indices, kDense, true},
           {"out", &a.out, kRows, false, true}},
          [&] { grouped_gemm(a, {1}); }};
}
GroupedGemmArgs grouped_gemm_args() {
  return {.x = floats({T, H}),
          .weight = {.data = floats({E, N, H})},
          .bias = floats({E, N}),
          .expert_offsets = ints({E + 1}),
          .token_indices = ints({S}),
          .out = floats({S, N})};
}

Op grouped_gemm_wgrad_op(GroupedGemmWgradArgs& a) {
  return {"grouped_gemm_wgrad",
          {{"x", &a.x, kRows, false, false, 1},
           {"token_indices", &a.token_indices, kDense, true},
           {"grad_out", &a.grad_out, kRows},
           {"grad_weight", &a.grad_weight, kPlainMatrices, false, true},
           {"expert_offsets", &a.expert_offsets}},
          [&] { grouped_gemm_wgrad(a, {1}); }};
}
GroupedGemmWgradArgs grouped_gemm_wgrad_args() {
  return {.grad_out = floats({S, N}),
          .x = floats({T, H}),
          .expert_offsets = ints({E + 1}),
          .token_indices = ints({S}),
          .grad_weight = floats({E, N, H})};
}

Op glu_op(GluArgs& a) {
  return {"glu", {{"h", &a.h, kRows}, {"a", &a.a, kRows, false, true}}, [&] { glu(a, {1}); }};
}
GluArgs glu_args() { return {floats({S, N}), {}, floats({S, I})}; }

Op glu_backward_op(GluBackwardArgs& a) {
  return {"glu_backward",
          {{"h", &a.h, kRows}, {"grad_a", &a.grad_a, kRows}, {"grad_h", &a.grad_h, kRows, false, true}},
          [&] { glu_backward(a, {1}); }};
}
GluBackwardArgs glu_backward_args() { return {floats({S, I}), floats({S, N}), {}, floats({S, N})}; }

std::vector<Tensor> weight_tensors(ExpertWeights& w) {
  return {{"gate_up_proj", &w.gate_up_proj.data, kPlainMatrices},
          {"down_proj", &w.down_proj.data, kPlainMatrices},
          {"gate_up_bias", &w.gate_up_bias, kRows, true},
          {"down_bias", &w.down_bias, kRows, true}};
}
ExpertWeights expert_weights() {
  return {{.data = floats({E, N, H})}, {.data = floats({E, H, I})}, floats({E, N}), floats({E, H})};
}

Op moe_forward_op(MoeForwardArgs& a) {
  return {"moe_forward",
          std::vector<Tensor>{{"x", &a.x, kRows}} + weight_tensors(a.weights) +
              std::vector<Tensor>{{"topk_ids", &a.topk_ids},
                                  {"topk_weights", &a.topk_weights},
                                  {"y", &a.y, kRows, false, true},
                                  {"h", &a.h, kRows, true, true}},
          [&] { moe_forward(a, {1}); }};
}
MoeForwardArgs moe_forward_args() {
  return {.x = floats({T, H}),
          .weights = expert_weights(),
          .topk_ids = ints({T, K}),
          .topk_weights = floats({T, K}),
          .y = floats({T, H}),
          .h = floats({S, N})};
}

Op moe_backward_op(MoeBackwardArgs& a) {
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
MoeBackwardArgs moe_backward_args() {
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

std::vector<Op> all_ops() {
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
          moe_backward_op(keep(moe_backward_args()))};
}
// ---- tensors -----------------------------------------------------------------------------------------------------------

// A copy of a view with one property changed, for as long as it lives.
struct Changed {
  Changed(TensorView& view, const std::function<void(TensorView&)>& change) : view(view), before(view) { change(view); }
  ~Changed() { view = before; }
  Changed(const Changed&) = delete;
  TensorView& view;
  TensorView before;
};

void refuses_tensor(Op& op, const Tensor& t) {
  const auto refuses = [&](const char* what, const std::string& expected,
                           const std::function<void(TensorView&)>& change) {
    const Changed changed(*t.view, change);
    op.refuses(expected, join(t.name, ' ', what));
  };
  const std::string named = join(t.name, ": expected ");
  const int last = t.view->ndim - 1;
  refuses("of int64", join("TypeError: ", named), [](TensorView& v) { v.dtype = DType::kInt64; });
  refuses("with one more dimension", named + "shape", [&](TensorView& v) {
    v.shape[v.ndim] = v.stride[v.ndim] = 1;
    ++v.ndim;
  });
  if (!t.optional) refuses("missing", named + "shape", [](TensorView& v) { v = {}; });
  refuses("without memory", named + "data, got a null pointer", [](TensorView& v) { v.data = nullptr; });
  refuses("at an odd address", named + "data aligned", [](TensorView& v) { v.data = v.as<char>() + 1; });
  refuses("reversed", named + "non-negative strides", [&](TensorView& v) { v.stride[0] = -v.stride[0]; });
  refuses("with gaps in its rows", named, [&](TensorView& v) {
    v.stride[last] = 2;
    if (t.memory == Memory::kMatrices) v.stride[last - 1] = 2 * v.shape[last];
  });
  if (t.memory == Memory::kContiguous && last > 0) {
    refuses("with gaps behind its rows", named + "a contiguous", [](TensorView& v) { ++v.stride[0]; });
  }
  if (t.output && t.memory != Memory::kContiguous) {
    refuses("with rows one element apart", named + "elements that do not share",
            [](TensorView& v) { v.stride[0] = v.shape[1] - 1; });
  }
  for (int i = 0; i <= last; ++i) {
    if ((t.own >> i & 1) != 0) continue;
    refuses("that is smaller", "", [&](TensorView& v) { --v.shape[i]; });
    refuses("that is empty", "", [&](TensorView& v) { v.shape[i] = 0; });
  }
  for (size_t j = 0; t.output && j < op.tensors.size(); ++j) {
    if (op.tensors[j].view == t.view) continue;
    const std::string expected = ": expected memory of its own, got memory shared with ";
    const int64_t bytes = op.tensors[j].view->extent(), own = t.view->extent();
    const auto moved = [&](int64_t by) {
      return [&, by](TensorView& v) { v.data = op.tensors[j].view->as<char>() + by; };
    };
    refuses("at the start of another", expected, moved(0));
    refuses("at the last element of another", expected, moved(bytes - 4));
    refuses("up to the first element of another", expected, moved(4 - own));
  }
}

TEST(ops_refuse_what_tensors_must_not_be) {
  std::vector<Op> ops = all_ops();
  for (Op& op : ops) {
    op.bind();
    const std::string complaint = complaint_of(op.run);
    CHECK(complaint == "none", op.name, ": ", complaint);
    for (const Tensor& t : op.tensors) refuses_tensor(op, t);
  }
}

TEST(ops_accept_no_tokens) {
  std::vector<Op> ops = all_ops();
  for (Op& op : ops) {
    op.bind();
    for (const Tensor& t : op.tensors) {
      TensorView& v = *t.view;
      for (int i = 0; i < v.ndim && t.name != std::string("expert_offsets"); ++i) {
        if (v.shape[i] == T || v.shape[i] == S) v.shape[i] = 0;
      }
      if (v.numel() == 0) v.data = nullptr;
    }
    const std::string complaint = complaint_of(op.run);
    CHECK(complaint == "none", op.name, ": ", complaint);
  }
}

// ---- options and indices -------------------------------------------------------------------------------------------------

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

template <typename Args>
void check_route_options(Limits<Args>&& l, bool writes_weights) {
  l.refuses("expected shape [T=3, K=1], got int32[3, 2]", [](Args& a) { a.options.top_k = 1; });
  l.refuses("num_groups: expected a divisor of E=5, got 0", [](Args& a) { a.options.num_groups = 0; });
  l.refuses("num_groups: expected a divisor of E=5, got 2", [](Args& a) { a.options.num_groups = 2; });
  l.refuses("topk_groups: expected 1 to num_groups=1, got 0", [](Args& a) { a.options.topk_groups = 0; });
  l.refuses("topk_groups: expected 1 to num_groups=1, got 2", [](Args& a) { a.options.topk_groups = 2; });
  l.refuses("topk_groups: expected groups with at least top_k=2 experts, got 1 of 1 each",
            [](Args& a) { a.options.num_groups = 5; });
  l.accepts("as many groups as experts", [](Args& a) { a.options.num_groups = 5, a.options.topk_groups = 2; });
  l.refuses("scale: expected a finite number, got inf", [](Args& a) { a.options.scale = kInf; });
  if (writes_weights) l.accepts("a scale of 0", [](Args& a) { a.options.scale = 0.0f; });
}

TEST(routers_refuse_options_past_their_limits) {
  check_route_options(limits_of(route_args(), route_op), true);
  check_route_options(limits_of(gate_route_args(), gate_route_op), true);
  Array ids(DType::kInt32, {T, E + 1}), weights(DType::kFloat32, {T, E + 1});
  auto forward = limits_of(route_args(), route_op);
  forward.refuses("top_k: expected 1 to E=5, got 6",
                  [&](RouteArgs& a) { a.options.top_k = E + 1, a.topk_ids = ids, a.topk_weights = weights; });
  auto backward = limits_of(route_backward_args(), route_backward_op);
  backward.refuses("top_k: expected 1 to E=5, got 6", [&](RouteBackwardArgs& a) {
    a.options.top_k = E + 1, a.topk_ids = ids, a.grad_topk_weights = weights;
  });
  check_route_options(std::move(backward), false);
  backward.index(backward.args.topk_ids, 5, 5, "topk_ids: expected values in [-1, 5), got 5 at [2, 1]");
  backward.index(backward.args.topk_ids, 0, -2, "topk_ids: expected values in [-1, 5), got -2 at [0, 0]");
  for (const int32_t id : {-1, 4}) backward.index(backward.args.topk_ids, 2, id, nullptr);

  using Args = RouteDynamicArgs;
  auto l = limits_of(route_dynamic_args(), route_dynamic_op);
  l.refuses("min_experts: expected 0 to M=2, got 3", [](Args& a) { a.options.min_experts = 3; });
  l.refuses("min_experts: expected 0 to M=2, got -1", [](Args& a) { a.options.min_experts = -1; });
  l.accepts("2 experts", [](Args& a) { a.options.min_experts = 2; });
  l.accepts("0 experts", [](Args& a) { a.options.min_experts = 0; });
  l.refuses("top_p: expected at least 0", [](Args& a) { a.options.top_p = -1e-9; });
  l.refuses("top_p: expected at least 0", [](Args& a) { a.options.top_p = std::nan(""); });
  l.accepts("a share of 0", [](Args& a) { a.options.top_p = 0.0; });
  l.refuses("threshold: expected a number", [](Args& a) { a.options.threshold = kNaN; });
  l.accepts("a threshold of -inf", [](Args& a) { a.options.threshold = -kInf; });
  l.refuses("scale: expected a finite number", [](Args& a) { a.options.scale = kNaN; });
  l.refuses("topk_ids: expected at most E=5 experts a token, got 6",
            [&](Args& a) { a.topk_ids = ids, a.topk_weights = weights; });
}

template <typename Args>
void check_sequences(Limits<Args>& l) {
  l.index(l.args.sequence_ids, 1, 2, "sequence_ids: expected values in [0, 2), got 2 at [1]");
  l.index(l.args.sequence_ids, 2, -1, "sequence_ids: expected values in [0, 2), got -1 at [2]");
  l.index(l.args.sequence_ids, 2, 1, nullptr);
}
template <typename Args>
void check_limits(Limits<Args>& l) {
  check_sequences(l);
  l.index(l.args.limits, 1, -1, "limits: expected values in [0, 2147483647), got -1 at [1]");
  l.index(l.args.limits, 1, 2147483646, nullptr);
  l.refuses("limits: expected B of at least 1", [](Args& a) { a.limits.shape[0] = 0; });
}

TEST(policies_refuse_options_past_their_limits) {
  auto columns = limits_of(column_topk_args(), column_topk_op);
  check_limits(columns);

  auto fit = limits_of(fit_capacity_args(), fit_capacity_op);
  check_limits(fit);
  fit.index(fit.args.topk_ids, 3, 5, "topk_ids: expected values in [-1, 5), got 5 at [1, 1]");
  fit.index(fit.args.topk_ids, 3, -2, "topk_ids: expected values in [-1, 5), got -2 at [1, 1]");
  for (const int32_t id : {-1, 4}) fit.index(fit.args.topk_ids, 3, id, nullptr);
  fit.refuses("num_experts: expected at least 1, got 0", [](FitCapacityArgs& a) { a.options.num_experts = 0; });
  fit.accepts("1 expert", [](FitCapacityArgs& a) { a.options.num_experts = 1, a.scores = {}; });

  using Balanced = AssignBalancedArgs;
  auto balanced = limits_of(assign_balanced_args(), assign_balanced_op);
  check_sequences(balanced);
  balanced.refuses("num_sequences: expected at least 1, got 0", [](Balanced& a) { a.num_sequences = 0; });
  balanced.accepts("1 sequence", [](Balanced& a) { a.num_sequences = 1; });
  balanced.refuses("num_sequences: expected at least 1", [](Balanced& a) { a.num_sequences = int64_t{1} << 31; });
  balanced.refuses("eps: expected a finite number", [](Balanced& a) { a.eps = kInf; });
  balanced.refuses("max_iterations: expected at least 0, got -1", [](Balanced& a) { a.max_iterations = -1; });
  balanced.accepts("no iterations", [](Balanced& a) { a.max_iterations = 0; });

  using Capped = AssignCappedArgs;
  auto capped = limits_of(assign_capped_args(), assign_capped_op);
  check_limits(capped);
  capped.refuses("cap: expected at least 1, got 0", [](Capped& a) { a.cap = 0; });
  capped.refuses("entropy: expected a positive number, got 0", [](Capped& a) { a.entropy = 0.0; });
  capped.refuses("entropy: expected a positive number", [](Capped& a) { a.entropy = kInf; });
  capped.refuses("iterations: expected at least 0, got -1", [](Capped& a) { a.iterations = -1; });
  capped.accepts("no iterations", [](Capped& a) { a.iterations = 0; });
  capped.refuses("tolerance: expected at least 0", [](Capped& a) { a.tolerance = -1e-9; });
  capped.refuses("tolerance: expected at least 0", [](Capped& a) { a.tolerance = std::nan(""); });
}

// Of a plan whose offsets are 0, with no token in any slot; then the first expert has 2 slots.
template <typename Args>
void check_offsets(Limits<Args>& l, const TensorView& offsets, const TensorView& tokens, int32_t num_slots) {
  l.index(offsets, 0, 1, "expert_offsets: expected 0 first, got 1");
  l.index(offsets, 3, 1, "expert_offsets: expected values that do not decrease, got 0 after 1 at [4]");
  l.index(offsets, 1, -1, "expert_offsets: expected values that do not decrease, got -1 after 0 at [1]");
  const std::string most =
      join("expert_offsets: expected at most ", num_slots, " slots, got ", num_slots + 1, " at [5]");
  l.index(offsets, 5, num_slots + 1, most.c_str());
  l.index(offsets, 5, num_slots, nullptr);
  if (!tokens.defined()) return;
  l.index(tokens, 1, 3, nullptr);  // of no expert
  offsets.as<int32_t>()[5] = 2;
  l.index(tokens, 1, 3, "token_indices: expected values in [0, 3), got 3 at [1]");
  l.index(tokens, 1, -1, "token_indices: expected values in [0, 3), got -1 at [1]");
  l.index(tokens, 1, 2, nullptr);
  l.index(tokens, 2, 3, nullptr);
  offsets.as<int32_t>()[5] = 0;
}

template <typename Args>
void check_plan(Limits<Args>&& l) {
  const Plan& plan = l.args.plan;
  check_offsets(l, plan.expert_offsets, plan.token_indices, S);
  l.index(plan.slot_indices, 5, S, "slot_indices: expected values in [-1, 6), got 6 at [2, 1]");
  l.index(plan.slot_indices, 5, -2, "slot_indices: expected values in [-1, 6), got -2 at [2, 1]");
  for (const int32_t slot : {-1, 5}) l.index(plan.slot_indices, 5, slot, nullptr);
}

TEST(ops_refuse_plans_out_of_range) {
  check_plan(limits_of(permute_args(), permute_op));
  check_plan(limits_of(combine_args(), combine_op));
  check_plan(limits_of(combine_weight_backward_args(), combine_weight_backward_op));
  auto gemm = limits_of(grouped_gemm_args(), grouped_gemm_op);
  check_offsets(gemm, gemm.args.expert_offsets, gemm.args.token_indices, S);
  auto wgrad = limits_of(grouped_gemm_wgrad_args(), grouped_gemm_wgrad_op);
  check_offsets(wgrad, wgrad.args.expert_offsets, wgrad.args.token_indices, S);

  auto p = limits_of(plan_args(), plan_op);
  p.index(p.args.topk_ids, 1, 5, "topk_ids: expected values in [-1, 5), got 5 at [0, 1]");
  p.index(p.args.topk_ids, 1, 4, nullptr);
  p.refuses("expert_offsets: expected E+1 of at least 2", [](PlanArgs& a) { a.plan.expert_offsets.shape[0] = 1; });
  p.refuses("topk_ids: expected less than 2^31 slots", [](PlanArgs& a) {
    a.topk_ids.shape[0] = int64_t{1} << 30;
    a.topk_ids.stride[0] = 2;
  });

  auto forward = limits_of(moe_forward_args(), moe_forward_op);
  forward.index(forward.args.topk_ids, 1, 5, "topk_ids: expected values in [-1, 5), got 5 at [0, 1]");
  auto backward = limits_of(moe_backward_args(), moe_backward_op);
  backward.index(backward.args.topk_ids, 1, -2, "topk_ids: expected values in [-1, 5), got -2 at [0, 1]");
}

template <typename Args>
void check_glu_options(Limits<Args>&& l) {
  l.refuses("activation: expected gated experts for swiglu_oai",
            [](Args& a) { a.options = {.activation = Activation::kSwigluOai, .gated = false}; });
  l.refuses("limit: expected 0 (none) or a positive number, got -1", [](Args& a) { a.options.limit = -1.0f; });
  l.refuses("limit: expected 0 (none) or a positive number, got inf", [](Args& a) { a.options.limit = kInf; });
  l.refuses("alpha: expected a finite number", [](Args& a) { a.options.alpha = kNaN; });
  l.refuses("", [](Args& a) { a.options.gated = false; });  // I = N
}

TEST(layers_refuse_options_past_their_limits) {
  check_glu_options(limits_of(glu_args(), glu_op));
  check_glu_options(limits_of(glu_backward_args(), glu_backward_op));
  auto forward = limits_of(moe_forward_args(), moe_forward_op);
  check_glu_options(std::move(forward));
  auto backward = limits_of(moe_backward_args(), moe_backward_op);
  check_glu_options(std::move(backward));

  auto odd = limits_of(glu_args(), glu_op);
  odd.refuses("h: expected an even N (gates and ups) for gated experts, got N=13", [](GluArgs& a) { --a.h.shape[1]; });
  forward.refuses("down_proj: expected its rows in 1 part, got 2",
                  [](MoeForwardArgs& a) { a.weights.down_proj.parts = 2; });
  backward.refuses("gate_up_proj: expected matrices [N, 4], got [0, 0] in int8",
                   [](MoeBackwardArgs& a) { a.weights.gate_up_proj.format = Format::kInt8; });
  backward.refuses("down_proj: expected matrices [4, 7], got [0, 0] in mxfp4",
                   [](MoeBackwardArgs& a) { a.weights.down_proj.format = Format::kMxfp4; });

  using Gemm = GroupedGemmArgs;
  auto gemm = limits_of(grouped_gemm_args(), grouped_gemm_op);
  gemm.refuses("weight: expected plain weights for input_gradient, got panels",
               [](Gemm& a) { a.input_gradient = true, a.weight.format = Format::kPanels; });
  gemm.refuses("weight: expected int8, int4, fp8, mxfp4, nf4 or groups to be transposed, got plain", [](Gemm& a) {
    std::swap(a.weight.data.shape[1], a.weight.data.shape[2]),
        std::swap(a.weight.data.stride[1], a.weight.data.stride[2]), a.transposed = true;
  });
  for (const int threads : {-1, 4097}) {
    const std::string complaint = complaint_of([&] { glu(keep(glu_args()), {threads}); });
    CHECK(complaint.find("num_threads: expected 0 (the default) to 4096, got ") == 0, complaint);
  }
}

// Tensors of a call share their dtype, except those that stay in float32.
TEST(ops_refuse_other_dtypes) {
  auto l = limits_of(permute_args(), permute_op);
  l.refuses("TypeError: permuted_x: expected bfloat16 like x, got float32[6, 4]",
            [](PermuteArgs& a) { a.x.dtype = DType::kBFloat16; });
  l.refuses("TypeError: topk_weights: expected float32, got float16[3, 2]",
            [](PermuteArgs& a) { a.topk_weights.dtype = DType::kFloat16; });
  auto g = limits_of(gate_args(), gate_op);
  g.accepts("x in bfloat16", [](GateArgs& a) { a.x.dtype = DType::kBFloat16; });
  g.refuses("TypeError: weight: expected bfloat16 like x, got float16[5, 4]",
            [](GateArgs& a) { a.x.dtype = DType::kBFloat16, a.weight.dtype = DType::kFloat16; });
}

// ---- memory --------------------------------------------------------------------------------------------------------------

// Two blocks of columns of one matrix may be side by side, but not share a column, in either order.
TEST(outputs_may_be_columns_of_the_matrix_of_inputs) {
  GluArgs& a = keep(glu_args());
  Array both(DType::kFloat32, {S, 24});
  both.fill([](int64_t) { return 0; });
  const auto columns = [&](int64_t first, int64_t count) {
    TensorView v = both;
    v.data = v.as<float>() + first;
    v.shape[1] = count;
    return v;
  };
  struct Place {
    int64_t h, a;
    bool overlaps;
  };
  for (const auto& [h, at, overlaps] : {Place{0, 14, false},
                                        {0, 16, false},
                                        {0, 13, true},
                                        {10, 0, false},
                                        {7, 0, false},
                                        {6, 0, true},
                                        {3, 5, true},
                                        {5, 5, true}}) {
    a.h = columns(h, N), a.a = columns(at, I);
    const std::string complaint = complaint_of([&] { glu(a, {1}); });
    CHECK((complaint.find("a: expected memory of its own") == 0) == overlaps, "h at ", h, ", a at ", at, ": ",
          complaint);
  }
  // One row further on: the last column of h is that of no other row.
  a.h = columns(0, N), a.a = columns(14, I);
  a.h.shape[0] = a.a.shape[0] = S - 1;
  a.a.data = a.a.as<float>() + 24;
  CHECK(complaint_of([&] { glu(a, {1}); }) == "none");
  a.a.data = a.a.as<float>() - 1;
  CHECK(complaint_of([&] { glu(a, {1}); }).find("a: expected memory of its own") == 0);
}

// Outputs with strides: elements of their own in any order of dimensions, or not.
TEST(outputs_do_not_share_elements) {
  auto l = limits_of(grouped_gemm_wgrad_args(), grouped_gemm_wgrad_op);
  using Args = GroupedGemmWgradArgs;
  l.accepts("columns first", [](Args& a) { a.grad_weight.stride = {N * H, 1, N}; });
  l.accepts("experts between", [](Args& a) { a.grad_weight.stride = {H, E * H, 1}; });
  l.refuses("grad_weight: expected elements that do not share memory",
            [](Args& a) { a.grad_weight.stride = {H, E * H - 1, 1}; });
  l.refuses("grad_weight: expected elements that do not share memory",
            [](Args& a) { a.grad_weight.stride = {N * H, 1, N - 1}; });
  l.refuses("grad_weight: expected elements that do not share memory",
            [](Args& a) { a.grad_weight.stride = {0, H, 1}; });
  l.refuses("grad_weight: expected a stride of 1 in one of the last two dimensions",
            [](Args& a) { a.grad_weight.stride = {N * H, 2, 2 * N}; });
}

// Experts with their own base pointers and numbers of rows.
TEST(separate_matrices_are_checked_one_by_one) {
  auto l = limits_of(grouped_gemm_args(), grouped_gemm_op);
  using Args = GroupedGemmArgs;
  std::array<const void*, E> base;
  std::array<int64_t, E> rows;
  rows.fill(N);
  for (int64_t e = 0; e < E; ++e) base[static_cast<size_t>(e)] = l.args.weight.data.as<const float>() + e * N * H;
  l.args.weight.base = base.data();
  l.args.weight.row_count = rows.data();
  l.accepts("separate matrices", [](Args&) {});
  l.refuses("weight: expected a number of rows for each expert, got none",
            [](Args& a) { a.weight.row_count = nullptr; });
  const auto with = [&](int64_t count, const void* p, const char* expected) {
    const auto before = std::pair(rows[2], base[2]);
    rows[2] = count, base[2] = p;
    if (expected == nullptr) l.accepts("another matrix", [](Args&) {});
    if (expected != nullptr) l.refuses(expected, [](Args&) {});
    std::tie(rows[2], base[2]) = before;
  };
  with(N + 1, base[2], "weight[2]: expected 0 to 14 rows, got 15");
  with(-1, base[2], "weight[2]: expected 0 to 14 rows, got -1");
  with(1, nullptr, "weight: expected data, got a null pointer");
  with(0, nullptr, nullptr);
  with(N, static_cast<const char*>(base[2]) + 1, "weight: expected data aligned to its elements (float32)");
  const char* const out = l.args.out.as<const char>();
  with(N, out + 4 * (S * N - 1), "out: expected memory of its own, got memory shared with weight");
  with(1, out - 4 * (H - 1), "out: expected memory of its own, got memory shared with weight");
}

// Kernels read copies of indices, which live as long as the call, whether they fit its own 256 places or not.
TEST(indices_are_copied) {
  Call call({});
  std::vector<Array> all;
  for (const int64_t count : {200, 56, 1, 300, 0, 255, 2}) {
    all.emplace_back(DType::kInt32, std::vector<int64_t>{count});
    all.back().fill([&](int64_t i) { return 1000 * count + i; });
  }
  std::vector<TensorView> copies;
  for (const Array& indices : all) {
    copies.push_back(indices);
    call.own(copies.back());
  }
  for (size_t j = 0; j < all.size(); ++j) {
    CHECK((copies[j].data != all[j].view().data) == (all[j].numel() > 0));
    for (int64_t i = 0; i < all[j].numel(); ++i) CHECK(copies[j].as<const int32_t>()[i] == all[j].id(i), j, " at ", i);
  }
  TensorView remote = all[0];
  remote.device.type = DeviceType::kCUDA;
  call.own(remote);
  CHECK(remote.data == all[0].view().data, "memory of a device is not read");
}

// ---- weights that are not plain --------------------------------------------------------------------------------------------

// A product with a weight [2, 32, 96] in another format, of which one property is changed.
struct Stored {
  static constexpr int64_t kRows = 32, kCols = 96;

  explicit Stored(Weight w) : weight(std::move(w)) {
    for (TensorView* v : tensors()) {
      if (!v->defined()) continue;
      arrays.emplace_back(v->dtype, std::vector<int64_t>(v->shape.begin(), v->shape.begin() + v->ndim), 0, 0);
      arrays.back().poison(0);
      *v = arrays.back();
    }
    weight.rows = kRows, weight.cols = kCols;
  }
  std::vector<TensorView*> tensors() { return {&weight.data, &weight.scales, &weight.row_scales, &weight.zeros}; }

  std::string complaint(const std::function<void(Weight&)>& change, DType dtype = DType::kFloat32) {
    Weight w = weight;
    change(w);
    const Array x(dtype, {3, kCols}), offsets = zeros({w.num_experts() + 1});
    Array out(dtype, {3, kRows});
    return complaint_of([&] { grouped_gemm({.x = x, .weight = w, .expert_offsets = offsets, .out = out}, {1}); });
  }
  static Array zeros(std::vector<int64_t> shape) {
    Array array(DType::kInt32, std::move(shape));
    array.poison(0);
    return array;
  }
  void accepts(const char* what, const std::function<void(Weight&)>& change, DType dtype = DType::kFloat32) {
    const std::string text = complaint(change, dtype);
    CHECK(text == "none", name_of(weight.format), " with ", what, ": ", text);
  }
  void refuses(const char* by, const std::function<void(Weight&)>& change, DType dtype = DType::kFloat32) {
    const std::string text = complaint(change, dtype);
    CHECK(text.find(by) == 0 && text != "none", name_of(weight.format), ": '", text, "' instead of '", by, "'");
  }
  // Every tensor has one shape.
  void refuses_shapes() {
    accepts("nothing changed", [](Weight&) {});
    const size_t count = tensors().size();
    for (size_t i = 0; i < count; ++i) {
      if (!tensors()[i]->defined()) continue;
      const auto change = [&](const std::function<void(TensorView&)>& edit) {
        return [&, edit](Weight& w) {
          const std::array<TensorView*, 4> all{&w.data, &w.scales, &w.row_scales, &w.zeros};
          edit(*all[i]);
        };
      };
      for (int d = 0; d < tensors()[i]->ndim; ++d) {
        if (d == 0 && i == 0 && !weight.scales.defined()) continue;  // E is that of the data alone
        refuses("", change([&](TensorView& v) { --v.shape[d]; }));
        refuses("", change([&](TensorView& v) { ++v.shape[d]; }));
      }
      refuses("", change([](TensorView& v) { ++v.stride[1]; }));
      refuses("TypeError: ", change([](TensorView& v) { v.dtype = DType::kInt32; }));
    }
    refuses("weight: expected matrices [N, 96], got [32, 97]", [](Weight& w) { ++w.cols; });
    refuses("", [](Weight& w) { ++w.rows; });
    refuses("", [](Weight& w) { --w.rows; });
  }

  Weight weight;
  std::vector<Array> arrays;
};

TensorView bytes(DType dtype, std::initializer_list<int64_t> shape) {
  TensorView v = floats(shape);
  v.dtype = dtype;
  return v;
}

Weight integers(Format format, int64_t group_size, int64_t groups) {
  return {.format = format,
          .data = bytes(DType::kUInt8, {2, 2, format == Format::kInt8 ? 24 : 12, 64}),
          .scales = bytes(DType::kInt8, {2, 2, groups, 16}),
          .row_scales = floats({2, 2, 16}),
          .zeros = bytes(DType::kUInt8, {2, 2, groups, 16}),
          .group_size = group_size};
}

TEST(integers_of_other_shapes_are_errors) {
  for (const auto& [group_size, groups] : {std::pair<int64_t, int64_t>{0, 1}, {16, 6}, {64, 2}, {128, 1}}) {
    for (const Format format : {Format::kInt8, Format::kInt4}) {
      Stored s(integers(format, group_size, groups));
      s.refuses_shapes();
      s.accepts("no zeros", [](Weight& w) { w.zeros = {}; });
      for (const int64_t other : {-16, 1, 8, 15, 17, 24, 48}) {
        s.refuses("weight: expected a group_size of 0 (the whole row) or a power of two from 16 on, got ",
                  [&](Weight& w) { w.group_size = other; });
      }
      s.refuses("weight: expected parts that divide N=32, got 0", [](Weight& w) { w.parts = 0; });
      s.refuses("weight: expected parts that divide N=32, got 3", [](Weight& w) { w.parts = 3; });
      s.accepts("2 parts", [](Weight& w) { w.parts = 2; });
      s.refuses("weight_scales: expected shape", [](Weight& w) { w.scales = {}; });
      s.refuses("weight_row_scales: expected shape", [](Weight& w) { w.row_scales = {}; });
    }
  }
  // Two parts of 8 rows have a block of 16 each, like one of 32.
  Stored s(integers(Format::kInt8, 0, 1));
  const Array x(DType::kFloat32, {3, Stored::kCols}), offsets = Stored::zeros({3});
  Array out(DType::kFloat32, {3, 16});
  Weight w = s.weight;
  w.rows = 16, w.parts = 2;
  const auto run = [&] { grouped_gemm({.x = x, .weight = w, .expert_offsets = offsets, .out = out}, {1}); };
  CHECK(complaint_of(run) == "none", complaint_of(run));
  w.parts = 1;
  CHECK(complaint_of(run).find("weight: expected shape") == 0, complaint_of(run));
}

TEST(integers_of_too_many_columns_are_errors) {
  for (const int64_t cols : {int64_t{65536}, int64_t{65537}}) {
    const Array data(DType::kUInt8, {1, 1, (cols + 7) / 8 * 2, 64}, 0, 0), scales(DType::kInt8, {1, 1, 1, 16}, 0, 0);
    const Array row_scales(DType::kFloat32, {1, 1, 16}), x(DType::kFloat32, {1, cols}), offsets = Stored::zeros({2});
    Array out(DType::kFloat32, {1, 16});
    const Weight w{
        .format = Format::kInt8, .data = data, .scales = scales, .row_scales = row_scales, .rows = 16, .cols = cols};
    const std::string text =
        complaint_of([&] { grouped_gemm({.x = x, .weight = w, .expert_offsets = offsets, .out = out}, {1}); });
    CHECK(text.find(cols == 65536 ? "none" : "weight: expected at most 65536 columns, got 65537") == 0, text);
  }
}

TEST(minifloats_of_other_shapes_are_errors) {
  const auto data = [](Format format) { return bytes(DType::kUInt8, {2, 2, 3, minifloat_step_bytes(format)}); };
  for (const auto& [group_size, groups] : {std::pair<int64_t, int64_t>{0, 1}, {32, 3}, {64, 2}, {96, 1}}) {
    Stored s({.format = Format::kFp8,
              .data = data(Format::kFp8),
              .scales = floats({2, 2, groups, 16}),
              .group_size = group_size});
    s.refuses_shapes();
    for (const int64_t other : {-32, 16, 33}) {
      s.refuses("weight: expected a group_size of 0 (the whole row) or a multiple of 32, got ",
                [&](Weight& w) { w.group_size = other; });
    }
    s.refuses("weight: expected parts that divide N=32, got 5", [](Weight& w) { w.parts = 5; });
  }
  Stored s({.format = Format::kMxfp4,
            .data = data(Format::kMxfp4),
            .scales = bytes(DType::kUInt8, {2, 2, 3, 16}),
            .group_size = 32});
  s.refuses_shapes();
  for (const int64_t other : {0, 16, 64}) {
    s.refuses("weight: expected a group_size of 32, got ", [&](Weight& w) { w.group_size = other; });
  }
}

TEST(groups_of_other_shapes_are_errors) {
  Array records(DType::kInt32, {2, 2});
  const auto set = [&](int32_t first, int32_t bits) {
    auto* const p = records.view().as<int32_t>();
    p[0] = 0, p[1] = 3, p[2] = first, p[3] = bits;
  };
  set(3, 1);
  Stored s({.format = Format::kGroups,
            .data = bytes(DType::kUInt8, {4, 2, 3, 64}),
            .scales = bytes(DType::kFloat16, {2, 2, 3, 16}),
            .zeros = bytes(DType::kUInt8, {2, 2, 3, 16}),
            .group_size = 32});
  s.weight.records = records;
  s.accepts("3 bits and 1 bit", [](Weight&) {});
  s.accepts("no zeros", [](Weight& w) { w.zeros = {}; });
  for (const int64_t other : {-32, 16, 33}) {
    s.refuses("weight: expected a group_size of 0 (the whole row) or a multiple of 32, got ",
              [&](Weight& w) { w.group_size = other; });
  }
  s.refuses("weight_scales: expected shape", [](Weight& w) { w.scales.shape[2] = 2; });
  s.refuses("TypeError: weight_scales: expected float16", [](Weight& w) { w.scales.dtype = DType::kBFloat16; });
  s.refuses("weight_zeros: expected shape", [](Weight& w) { w.zeros.shape[2] = 2; });
  s.refuses("weight_records: expected a tensor", [](Weight& w) { w.records = {}; });
  s.refuses("weight_records: expected shape", [](Weight& w) { w.records.shape[1] = 1; });
  for (const auto& [first, bits] : {std::pair{3, 0}, {0, 5}, {-1, 1}, {2, 3}, {4, 1}, {INT32_MAX, 4}}) {
    set(first, bits);
    s.refuses("weight_records: expected ", [](Weight&) {});
  }
  s.refuses("weight: expected plain weights on this device, got bits3", [](Weight& w) { w.format = Format::kBits3; });
}

TEST(compact_weights_of_other_shapes_are_errors) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    Stored s({.format = Format::kCompact,
              .data = bytes(DType::kUInt8, {2, Stored::kRows, compact_row_bytes(Stored::kCols, 0, dtype)})});
    auto* const p = s.weight.data.as<uint8_t>();
    for (int64_t row = 0; row < 2 * Stored::kRows; ++row)
      p[row * s.weight.data.shape[2] + kCompactElementBytes] = static_cast<uint8_t>(size_of(dtype));
    s.refuses_shapes();
    s.accepts("a row more in x", [](Weight&) {}, dtype);
    if (dtype == DType::kFloat32)
      s.refuses(
          "TypeError: weight: expected compact bfloat16 like x, got compact elements of 4 bytes", [](Weight&) {},
          DType::kBFloat16);
    s.refuses("TypeError: weight: expected float16 like x, got compact weights", [](Weight&) {}, DType::kFloat16);
    for (const int bad : {0, 1, 3, 8}) {
      p[kCompactElementBytes] = static_cast<uint8_t>(bad);
      s.refuses("TypeError: weight: expected compact float32 like x, got compact elements of ", [](Weight&) {});
    }
  }
}

// Experts in slots: indices of the data.
TEST(slots_are_checked) {
  Stored s({.format = Format::kMxfp4,
            .data = bytes(DType::kUInt8, {2, 2, 3, 256}),
            .scales = bytes(DType::kUInt8, {2, 2, 3, 16}),
            .group_size = 32});
  Array slots = Stored::zeros({5});
  slots.set_id(1, 4);
  s.accepts("5 experts in 2 slots", [&](Weight& w) { w.slots = slots; });
  for (const int32_t bad : {-1, 2}) {
    slots.set_id(bad, 4);
    s.refuses("weight_slots: expected values in [0, 2), got ", [&](Weight& w) { w.slots = slots; });
  }
  slots.set_id(0, 4);
  const std::array<const void*, 5> base{};
  s.refuses("weight_slots: expected none beside matrices of their own",
            [&](Weight& w) { w.slots = slots, w.base = base.data(); });
}

// gate_up_proj and down_proj are both integers, or neither; gate_up_proj has its gates and ups in parts.
TEST(formats_of_a_layer_fit) {
  constexpr int64_t kH = 32, kI = 32;
  const auto stored = [](Format format, int64_t rows, int64_t parts) {
    Weight w = format == Format::kInt8 ? integers(format, 0, 1) : Weight{.format = format, .group_size = 32};
    const int64_t blocks = rows / 16;
    w.data = bytes(DType::kUInt8, {2, blocks, format == Format::kInt8 ? 8 : 1, format == Format::kInt8 ? 64 : 256});
    w.scales = bytes(format == Format::kInt8 ? DType::kInt8 : DType::kUInt8, {2, blocks, 1, 16});
    w.row_scales = format == Format::kInt8 ? floats({2, blocks, 16}) : TensorView{};
    w.zeros = {};
    Stored s(w);
    s.weight.rows = rows, s.weight.cols = 32, s.weight.parts = parts;
    return s;
  };
  Stored wide = stored(Format::kInt8, 2 * kI, 2), mx_wide = stored(Format::kMxfp4, 2 * kI, 2);
  Stored down = stored(Format::kInt8, kH, 1), mx_down = stored(Format::kMxfp4, kH, 1);
  const Array x(DType::kFloat32, {3, kH}), ids = Stored::zeros({3, 1}), weights(DType::kFloat32, {3, 1});
  Array y(DType::kFloat32, {3, kH});
  const auto complaint = [&](const Weight& first, const Weight& second, const GluOptions& options = {}) {
    return complaint_of([&] {
      moe_forward({.x = x,
                   .weights = {.gate_up_proj = first, .down_proj = second},
                   .topk_ids = ids,
                   .topk_weights = weights,
                   .options = options,
                   .y = y},
                  {1});
    });
  };
  const auto begins = [](const std::string& text, const char* with) {
    CHECK(text.find(with) == 0, text, " instead of ", with);
  };
  begins(complaint(wide.weight, down.weight), "none");
  begins(complaint(mx_wide.weight, mx_down.weight), "none");
  begins(complaint(wide.weight, mx_down.weight),
         "down_proj: expected int8 or int4 beside gate_up_proj in int8, got mxfp4");
  begins(complaint(mx_wide.weight, down.weight),
         "down_proj: expected no integers beside gate_up_proj in mxfp4, got int8");
  for (Stored* s : {&wide, &mx_wide}) {
    const Weight& second = s == &wide ? down.weight : mx_down.weight;
    begins(complaint(s->weight, second, {.interleaved = true}), "gate_up_proj: expected its rows in parts of 1, got 2");
    s->weight.parts = 1;
    begins(complaint(s->weight, second), "gate_up_proj: expected its rows in parts of 2, got 1");
    begins(complaint(s->weight, second, {.interleaved = true}), "none");
  }
  down.weight.parts = 2;
  begins(complaint(wide.weight, down.weight, {.interleaved = true}), "down_proj: expected its rows in 1 part, got 2");
}

}  // namespace
}  // namespace switchgear::test
