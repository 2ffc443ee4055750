// SPDX-License-Identifier: BSD-3-Clause
// What each op refuses: options at both sides of their limits, and indices out of range.
#include <limits>

#include "checked_ops.h"
#include "switchgear/compact.h"

namespace switchgear::test {
namespace {

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
  l.refuses("score_function: expected 0 to 1, got 2",
            [](Args& a) { a.options.score_function = static_cast<ScoreFunction>(2); });
  l.refuses("group_score: expected 0 to 1, got 255",
            [](Args& a) { a.options.group_score = static_cast<GroupScore>(255); });
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
  l.index(l.args.limits, 1, -1, "limits: expected values in [0, 2147483648), got -1 at [1]");
  l.index(l.args.limits, 1, 2147483646, nullptr);
  l.refuses("limits: expected B of at least 1", [](Args& a) { a.limits.shape[0] = 0; });
}

TEST(probes_refuse_what_they_cannot_measure) {
  CHECK(complaint_of([] { multiply_rate(DType::kInt32); }) ==
        "TypeError: dtype: expected float32, bfloat16 or float16, got int32");
  CHECK(complaint_of([] { integer_multiply_rate(5); }) == "bits: expected 8 or 4, got 5");
  CHECK(complaint_of([] { read({view(nullptr, DType::kFloat32, 8)}); }) ==
        "tensors: expected data, got a null pointer");
}

TEST(policies_refuse_options_past_their_limits) {
  auto columns = limits_of(column_topk_args(), column_topk_op);
  check_limits(columns);

  auto fit = limits_of(fit_capacity_args(), fit_capacity_op);
  check_limits(fit);
  fit.refuses("drop: expected 0 to 3, got 4", [](FitCapacityArgs& a) { a.options.drop = static_cast<Drop>(4); });
  for (const int64_t candidates : {int64_t{-1}, std::numeric_limits<int64_t>::min()}) {
    fit.refuses("candidates: expected at least 0, got ",
                [candidates](FitCapacityArgs& a) { a.options.candidates = candidates; });
  }
  fit.index(fit.args.topk_ids, 3, 5, "topk_ids: expected values in [-1, 5), got 5 at [1, 1]");
  fit.index(fit.args.topk_ids, 3, -2, "topk_ids: expected values in [-1, 5), got -2 at [1, 1]");
  for (const int32_t id : {-1, 4}) fit.index(fit.args.topk_ids, 3, id, nullptr);
  fit.refuses("num_experts: expected 1 to 2^31 - 1, got 0", [](FitCapacityArgs& a) { a.options.num_experts = 0; });
  fit.refuses("num_experts: expected 1 to 2^31 - 1",
              [](FitCapacityArgs& a) { a.options.num_experts = int64_t{1} << 31, a.scores = {}; });
  fit.accepts("1 expert", [](FitCapacityArgs& a) { a.options.num_experts = 1, a.scores = {}; });

  using Balanced = AssignBalancedArgs;
  auto balanced = limits_of(assign_balanced_args(), assign_balanced_op);
  check_sequences(balanced);
  balanced.refuses("num_sequences: expected 1 to 2^31 - 1, got 0", [](Balanced& a) { a.num_sequences = 0; });
  balanced.accepts("1 sequence", [](Balanced& a) { a.num_sequences = 1; });
  balanced.refuses("num_sequences: expected 1 to 2^31 - 1", [](Balanced& a) { a.num_sequences = int64_t{1} << 31; });
  balanced.refuses("eps: expected a finite number", [](Balanced& a) { a.eps = kInf; });
  balanced.refuses("max_iterations: expected at least 0, got -1", [](Balanced& a) { a.max_iterations = -1; });
  balanced.accepts("no iterations", [](Balanced& a) { a.max_iterations = 0; });

  using Capped = AssignCappedArgs;
  auto capped = limits_of(assign_capped_args(), assign_capped_op);
  check_limits(capped);
  capped.refuses("cap: expected at least 1, got 0", [](Capped& a) { a.cap = 0; });
  capped.refuses("entropy: expected a finite number of at least 2^-126, got 0", [](Capped& a) { a.entropy = 0.0; });
  capped.refuses("entropy: expected a finite number of at least 2^-126", [](Capped& a) { a.entropy = kInf; });
  capped.refuses("entropy: expected a finite number of at least 2^-126", [](Capped& a) { a.entropy = 0x1p-127; });
  capped.accepts("2^-126", [](Capped& a) { a.entropy = 0x1p-126; });
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
  l.refuses("activation: expected 0 to 5, got 6", [](Args& a) { a.options.activation = static_cast<Activation>(6); });
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
  gemm.refuses("to be transposed, got plain", [](Gemm& a) {
    std::swap(a.weight.data.shape[1], a.weight.data.shape[2]),
        std::swap(a.weight.data.stride[1], a.weight.data.stride[2]), a.transposed = true;
  });
  for (const int threads : {-1, 4097}) {
    const Execution exec{threads};
    const std::function<void()> calls[] = {
        [&] { glu(keep(glu_args()), exec); },
        [&] { pack_compact({}, {}, exec); },
        [&] { expand_compact({}, {}, exec); },
        [&] { multiply_rate(DType::kFloat32, exec); },
        [&] { integer_multiply_rate(8, exec); },
        [&] { read_bandwidth(exec); },
        [&] { read({}, exec); },
    };
    for (const auto& call : calls) {
      const std::string complaint = complaint_of(call);
      CHECK(complaint.find("num_threads: expected 0 (the default) to 4096, got ") == 0, complaint);
    }
  }
}

}  // namespace
}  // namespace switchgear::test
