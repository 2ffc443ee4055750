// SPDX-License-Identifier: BSD-3-Clause
// switchgear._C: one function per op of ops.h. Outputs are arrays too, and are written.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string_view>
#include <utility>

#include "arrays.h"
#include "cpu/workspace.h"
#include "switchgear/backend.h"
#include "switchgear/check.h"

namespace py = pybind11;
using py::handle;

namespace switchgear {
namespace {

template <typename Enum, size_t n>
using Names = std::array<std::pair<std::string_view, Enum>, n>;

constexpr Names<ScoreFunction, 2> kScoreFunctions{
    {{"softmax", ScoreFunction::kSoftmax}, {"sigmoid", ScoreFunction::kSigmoid}}};
constexpr Names<GroupScore, 2> kGroupScores{{{"max", GroupScore::kMax}, {"top2_sum", GroupScore::kTop2Sum}}};
constexpr Names<Activation, 6> kActivations{{{"silu", Activation::kSilu},
                                             {"gelu", Activation::kGelu},
                                             {"gelu_tanh", Activation::kGeluTanh},
                                             {"relu", Activation::kRelu},
                                             {"relu2", Activation::kRelu2},
                                             {"swiglu_oai", Activation::kSwigluOai}}};

template <typename Enum, size_t n>
Enum parse(const char* name, const Names<Enum, n>& names, std::string_view value) {
  std::string expected;
  for (const auto& [text, result] : names) {
    if (text == value) return result;
    if (!expected.empty()) expected += ", ";
    expected += text;
  }
  throw ValueError(join(name, ": expected one of ", expected, ", got ", value));
}

GluOptions glu_options(std::string_view activation, bool gated, bool interleaved, float alpha, float limit) {
  return {.activation = parse("activation", kActivations, activation),
          .gated = gated,
          .interleaved = interleaved,
          .alpha = alpha,
          .limit = limit};
}

template <typename Args>
void run(void (*op)(const Args&, Execution), const Args& args, int num_threads) {
  const py::gil_scoped_release release;
  op(args, {.num_threads = num_threads});
}

// ---- route ---

void py_route(handle router_logits, handle selection_bias, handle topk_ids, handle topk_weights,
              std::string_view score_function, bool normalize, float scale, int64_t num_groups, int64_t topk_groups,
              std::string_view group_score, int num_threads) {
  Arrays arrays;
  RouteArgs args{.router_logits = arrays.in("router_logits", router_logits),
                 .selection_bias = arrays.in_or_none("selection_bias", selection_bias),
                 .options = {.score_function = parse("score_function", kScoreFunctions, score_function),
                             .normalize = normalize,
                             .scale = scale,
                             .num_groups = num_groups,
                             .topk_groups = topk_groups,
                             .group_score = parse("group_score", kGroupScores, group_score)},
                 .topk_ids = arrays.out("topk_ids", topk_ids),
                 .topk_weights = arrays.out("topk_weights", topk_weights)};
  args.options.top_k = args.topk_ids.shape[1];
  run(route, args, num_threads);
}

void py_route_backward(handle grad_topk_weights, handle router_logits, handle topk_ids, handle grad_router_logits,
                       std::string_view score_function, bool normalize, float scale, int num_threads) {
  Arrays arrays;
  RouteBackwardArgs args{.grad_topk_weights = arrays.in("grad_topk_weights", grad_topk_weights),
                         .router_logits = arrays.in("router_logits", router_logits),
                         .topk_ids = arrays.in("topk_ids", topk_ids),
                         .options = {.score_function = parse("score_function", kScoreFunctions, score_function),
                                     .normalize = normalize,
                                     .scale = scale},
                         .grad_router_logits = arrays.out("grad_router_logits", grad_router_logits)};
  args.options.top_k = args.topk_ids.shape[1];
  run(route_backward, args, num_threads);
}

// ---- plan ---

void py_plan(handle topk_ids, handle expert_offsets, handle token_indices, handle slot_indices, int num_threads) {
  Arrays arrays;
  const PlanArgs args{.topk_ids = arrays.in("topk_ids", topk_ids),
                      .plan = {.expert_offsets = arrays.out("expert_offsets", expert_offsets),
                               .token_indices = arrays.out("token_indices", token_indices),
                               .slot_indices = arrays.out("slot_indices", slot_indices)}};
  run(plan, args, num_threads);
}

Plan plan_in(Arrays& arrays, handle expert_offsets, handle token_indices, handle slot_indices) {
  return {.expert_offsets = arrays.in("expert_offsets", expert_offsets),
          .token_indices = arrays.in("token_indices", token_indices),
          .slot_indices = arrays.in("slot_indices", slot_indices)};
}

// ---- permute, combine ---

void py_permute(handle x, handle expert_offsets, handle token_indices, handle slot_indices, handle topk_weights,
                handle permuted_x, int num_threads) {
  Arrays arrays;
  const PermuteArgs args{.x = arrays.in("x", x),
                         .plan = plan_in(arrays, expert_offsets, token_indices, slot_indices),
                         .topk_weights = arrays.in_or_none("topk_weights", topk_weights),
                         .permuted_x = arrays.out("permuted_x", permuted_x)};
  run(permute, args, num_threads);
}

void py_combine(handle permuted_y, handle expert_offsets, handle token_indices, handle slot_indices,
                handle topk_weights, handle y, int num_threads) {
  Arrays arrays;
  const CombineArgs args{.permuted_y = arrays.in("permuted_y", permuted_y),
                         .plan = plan_in(arrays, expert_offsets, token_indices, slot_indices),
                         .topk_weights = arrays.in_or_none("topk_weights", topk_weights),
                         .y = arrays.out("y", y)};
  run(combine, args, num_threads);
}

void py_combine_weight_backward(handle grad_y, handle permuted_y, handle expert_offsets, handle token_indices,
                                handle slot_indices, handle grad_topk_weights, int num_threads) {
  Arrays arrays;
  const CombineBackwardArgs args{.grad_y = arrays.in("grad_y", grad_y),
                                 .permuted_y = arrays.in("permuted_y", permuted_y),
                                 .plan = plan_in(arrays, expert_offsets, token_indices, slot_indices),
                                 .grad_topk_weights = arrays.out("grad_topk_weights", grad_topk_weights)};
  run(combine_weight_backward, args, num_threads);
}

// ---- grouped_gemm ---

void py_grouped_gemm(handle x, handle weight, handle bias, handle expert_offsets, handle token_indices, handle out,
                     int num_threads) {
  Arrays arrays;
  const GroupedGemmArgs args{.x = arrays.in("x", x),
                             .weight = arrays.matrices("weight", weight),
                             .bias = arrays.in_or_none("bias", bias),
                             .expert_offsets = arrays.in("expert_offsets", expert_offsets),
                             .token_indices = arrays.in_or_none("token_indices", token_indices),
                             .out = arrays.out("out", out)};
  run(grouped_gemm, args, num_threads);
}

void py_grouped_gemm_wgrad(handle grad_out, handle x, handle expert_offsets, handle token_indices, handle grad_weight,
                           int num_threads) {
  Arrays arrays;
  const GroupedGemmWgradArgs args{.grad_out = arrays.in("grad_out", grad_out),
                                  .x = arrays.in("x", x),
                                  .expert_offsets = arrays.in("expert_offsets", expert_offsets),
                                  .token_indices = arrays.in_or_none("token_indices", token_indices),
                                  .grad_weight = arrays.out("grad_weight", grad_weight)};
  run(grouped_gemm_wgrad, args, num_threads);
}

// ---- glu ---

void py_glu(handle h, handle a, std::string_view activation, bool gated, bool interleaved, float alpha, float limit,
            int num_threads) {
  Arrays arrays;
  const GluArgs args{.h = arrays.in("h", h),
                     .options = glu_options(activation, gated, interleaved, alpha, limit),
                     .a = arrays.out("a", a)};
  run(glu, args, num_threads);
}

void py_glu_backward(handle grad_a, handle h, handle grad_h, std::string_view activation, bool gated, bool interleaved,
                     float alpha, float limit, int num_threads) {
  Arrays arrays;
  const GluBackwardArgs args{.grad_a = arrays.in("grad_a", grad_a),
                             .h = arrays.in("h", h),
                             .options = glu_options(activation, gated, interleaved, alpha, limit),
                             .grad_h = arrays.out("grad_h", grad_h)};
  run(glu_backward, args, num_threads);
}

// ---- the whole layer ---

ExpertWeights weights_in(Arrays& arrays, handle gate_up_proj, handle down_proj, handle gate_up_bias, handle down_bias) {
  return {.gate_up_proj = {.packed = arrays.in("gate_up_proj", gate_up_proj)},
          .down_proj = {.packed = arrays.in("down_proj", down_proj)},
          .gate_up_bias = arrays.in_or_none("gate_up_bias", gate_up_bias),
          .down_bias = arrays.in_or_none("down_bias", down_bias)};
}

void py_moe_forward(handle x, handle gate_up_proj, handle down_proj, handle gate_up_bias, handle down_bias,
                    handle topk_ids, handle topk_weights, handle y, handle h, std::string_view activation, bool gated,
                    bool interleaved, float alpha, float limit, int num_threads) {
  Arrays arrays;
  const MoeForwardArgs args{.x = arrays.in("x", x),
                            .weights = weights_in(arrays, gate_up_proj, down_proj, gate_up_bias, down_bias),
                            .topk_ids = arrays.in("topk_ids", topk_ids),
                            .topk_weights = arrays.in("topk_weights", topk_weights),
                            .options = glu_options(activation, gated, interleaved, alpha, limit),
                            .y = arrays.out("y", y),
                            .h = arrays.out_or_none("h", h)};
  run(moe_forward, args, num_threads);
}

void py_moe_backward(handle grad_y, handle x, handle h, handle gate_up_proj, handle down_proj, handle gate_up_bias,
                     handle down_bias, handle topk_ids, handle topk_weights, handle grad_x, handle grad_gate_up_proj,
                     handle grad_down_proj, handle grad_gate_up_bias, handle grad_down_bias, handle grad_topk_weights,
                     std::string_view activation, bool gated, bool interleaved, float alpha, float limit,
                     int num_threads) {
  Arrays arrays;
  const MoeBackwardArgs args{.grad_y = arrays.in("grad_y", grad_y),
                             .x = arrays.in("x", x),
                             .h = arrays.in("h", h),
                             .weights = weights_in(arrays, gate_up_proj, down_proj, gate_up_bias, down_bias),
                             .topk_ids = arrays.in("topk_ids", topk_ids),
                             .topk_weights = arrays.in("topk_weights", topk_weights),
                             .options = glu_options(activation, gated, interleaved, alpha, limit),
                             .grad_x = arrays.out_or_none("grad_x", grad_x),
                             .grad_gate_up_proj = arrays.out_or_none("grad_gate_up_proj", grad_gate_up_proj),
                             .grad_down_proj = arrays.out_or_none("grad_down_proj", grad_down_proj),
                             .grad_gate_up_bias = arrays.out_or_none("grad_gate_up_bias", grad_gate_up_bias),
                             .grad_down_bias = arrays.out_or_none("grad_down_bias", grad_down_bias),
                             .grad_topk_weights = arrays.out_or_none("grad_topk_weights", grad_topk_weights)};
  run(moe_backward, args, num_threads);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = SWITCHGEAR_COMPILER;
  info["flags"] = SWITCHGEAR_FLAGS;
  info["isas"] = py::str(SWITCHGEAR_ISAS).attr("split")();
  info["openmp"] = py::bool_(SWITCHGEAR_WITH_OPENMP);
  info["cuda"] = py::bool_(SWITCHGEAR_WITH_CUDA);
  return info;
}

}  // namespace
}  // namespace switchgear

PYBIND11_MODULE(_C, m) {
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

  m.def("route", &py_route, "Writes the top_k experts of each token and their weights.",  //
        "router_logits"_a, "selection_bias"_a, "topk_ids"_a, "topk_weights"_a, "score_function"_a, "normalize"_a,
        "scale"_a, "num_groups"_a, "topk_groups"_a, "group_score"_a, "num_threads"_a);
  m.def("route_backward", &py_route_backward, "Writes the gradient of router_logits.",  //
        "grad_topk_weights"_a, "router_logits"_a, "topk_ids"_a, "grad_router_logits"_a, "score_function"_a,
        "normalize"_a, "scale"_a, "num_threads"_a);
  m.def("plan", &py_plan, "Writes the slots of topk_ids in the order (expert, token, choice).",  //
        "topk_ids"_a, "expert_offsets"_a, "token_indices"_a, "slot_indices"_a, "num_threads"_a);
  m.def("permute", &py_permute, "Writes the rows of x in slot order.",  //
        "x"_a, "expert_offsets"_a, "token_indices"_a, "slot_indices"_a, "topk_weights"_a, "permuted_x"_a,
        "num_threads"_a);
  m.def("combine", &py_combine, "Writes the weighted sum of each token's slots.",  //
        "permuted_y"_a, "expert_offsets"_a, "token_indices"_a, "slot_indices"_a, "topk_weights"_a, "y"_a,
        "num_threads"_a);
  m.def("combine_weight_backward", &py_combine_weight_backward, "Writes the gradient of topk_weights in combine.",  //
        "grad_y"_a, "permuted_y"_a, "expert_offsets"_a, "token_indices"_a, "slot_indices"_a, "grad_topk_weights"_a,
        "num_threads"_a);
  m.def("grouped_gemm", &py_grouped_gemm, "Writes the product of each row with its expert's weight.",  //
        "x"_a, "weight"_a, "bias"_a, "expert_offsets"_a, "token_indices"_a, "out"_a, "num_threads"_a);
  m.def("grouped_gemm_wgrad", &py_grouped_gemm_wgrad, "Writes the gradient of grouped_gemm's weight.",  //
        "grad_out"_a, "x"_a, "expert_offsets"_a, "token_indices"_a, "grad_weight"_a, "num_threads"_a);
  m.def("glu", &py_glu, "Writes the activation of h.",  //
        "h"_a, "a"_a, "activation"_a, "gated"_a, "interleaved"_a, "alpha"_a, "limit"_a, "num_threads"_a);
  m.def("glu_backward", &py_glu_backward, "Writes the gradient of h in glu.",  //
        "grad_a"_a, "h"_a, "grad_h"_a, "activation"_a, "gated"_a, "interleaved"_a, "alpha"_a, "limit"_a,
        "num_threads"_a);
  m.def("moe_forward", &py_moe_forward, "Writes the output of the whole expert layer, and h where given.",  //
        "x"_a, "gate_up_proj"_a, "down_proj"_a, "gate_up_bias"_a, "down_bias"_a, "topk_ids"_a, "topk_weights"_a, "y"_a,
        "h"_a, "activation"_a, "gated"_a, "interleaved"_a, "alpha"_a, "limit"_a, "num_threads"_a);
  m.def("moe_backward", &py_moe_backward, "Writes those gradients of moe_forward that are given.",  //
        "grad_y"_a, "x"_a, "h"_a, "gate_up_proj"_a, "down_proj"_a, "gate_up_bias"_a, "down_bias"_a, "topk_ids"_a,
        "topk_weights"_a, "grad_x"_a, "grad_gate_up_proj"_a, "grad_down_proj"_a, "grad_gate_up_bias"_a,
        "grad_down_bias"_a, "grad_topk_weights"_a, "activation"_a, "gated"_a, "interleaved"_a, "alpha"_a, "limit"_a,
        "num_threads"_a);

  m.def(
      "fma_rate",
      [](std::string_view dtype, int num_threads) {
        constexpr Names<DType, 3> kDTypes{
            {{"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16}}};
        const py::gil_scoped_release release;
        return multiply_rate(parse("dtype", kDTypes, dtype), {.num_threads = num_threads});
      },
      "Multiply-adds in registers, in flop/s.", "dtype"_a, "num_threads"_a = 0);
  m.def(
      "read_bandwidth",
      [](int num_threads) {
        const py::gil_scoped_release release;
        return read_bandwidth({.num_threads = num_threads});
      },
      "Reading of memory, in bytes/s.", "num_threads"_a = 0);
  m.def("release_workspaces", &release_workspaces, "Frees the memory that is kept between calls.");
  py::class_<cpu::Buffer>(m, "Buffer", py::buffer_protocol(), "Bytes of a tensor, from memory that is kept and reused.")
      .def(py::init<int64_t>(), "size"_a)
      .def_buffer([](const cpu::Buffer& buffer) {
        return py::buffer_info(static_cast<uint8_t*>(buffer.data()), static_cast<py::ssize_t>(buffer.size()));
      });
  m.def("available_cpu_isas", &available_cpu_isas, "ISAs that were built and that this machine runs, best last.");
  m.def("cpu_isa", &cpu_isa, "The ISA in use.");
  m.def("set_cpu_isa", &set_cpu_isa, "Sets the ISA to use; ValueError for one that is not available.", "isa"_a);
  m.def("build_info", &build_info, "How the module was built: compiler, flags, isas, openmp, cuda.");
  m.attr("version") = SWITCHGEAR_VERSION;
}
