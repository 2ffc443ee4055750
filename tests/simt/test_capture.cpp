// SPDX-License-Identifier: BSD-3-Clause
// A captured op, replayed with other inputs in the same memory, has the bits of a call with these inputs. So a launcher keeps
// nothing that depends on values, and passes no pointer to memory of its own. While a stream captures, the shim refuses calls
// that wait or allocate.
#include <cuda_runtime.h>

#include "api.h"
#include "layer.h"
#include "run_op.h"

namespace switchgear::test {
namespace {

using Arrays = std::vector<Array*>;

std::vector<Array> copies_of(const Arrays& arrays) {
  std::vector<Array> copies;
  for (const Array* array : arrays) copies.push_back(*array);
  return copies;
}

// Values only: captured pointers must stay valid.
void set(const Arrays& arrays, const std::vector<Array>& values) {
  for (size_t i = 0; i < arrays.size(); ++i) {
    const Array& from = values[i];
    const auto lead = static_cast<size_t>(from.view().as<const uint8_t>() - from.bytes().data());
    std::memcpy(arrays[i]->view().data, from.view().data, from.bytes().size() - lead);
  }
}

// The same values from the last element to the first.
void reverse(const Arrays& arrays) {
  for (Array* array : arrays) {
    const Array before = *array;
    const int64_t n = array->numel(), width = array->size(array->view().ndim - 1);
    array->fill([&](int64_t i) -> double {
      const int64_t j = n - 1 - i;
      if (array->view().ndim == 1) {
        return array->view().dtype == DType::kInt32 ? before.id(j) : before(j);
      }
      return array->view().dtype == DType::kInt32 ? before.id(j / width, j % width) : before(j / width, j % width);
    });
  }
}

void check_capture(const std::string& name, const Arrays& inputs, const Arrays& outputs,
                   const std::function<void(Execution)>& op) {
  note = name;
  const auto call = [&] {
    for (Array* output : outputs) output->poison();
    OpMemory memory(0xff);
    op(memory.execution());
    return copies_of(outputs);
  };
  const std::vector<Array> values = copies_of(inputs), first = call();
  reverse(inputs);
  const std::vector<Array> second = call();
  set(inputs, values);

  for (Array* output : outputs) output->poison();
  const std::vector<Array> poisoned = copies_of(outputs);
  OpMemory memory(0x55);
  const Execution exec = memory.execution();
  const auto stream = static_cast<cudaStream_t>(exec.stream);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t ready = nullptr;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  try {
    op(exec);
  } catch (const std::exception& error) {
    CHECK(false, error.what());
  }
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess && cudaGraphInstantiate(&ready, graph, 0) == cudaSuccess);
  for (size_t i = 0; i < outputs.size(); ++i) {
    CHECK(outputs[i]->bytes() == poisoned[i].bytes(), "output ", i, " is written before the graph runs");
  }
  for (const bool changed : {true, false, true}) {
    set(inputs, values);
    if (changed) reverse(inputs);
    for (Array* output : outputs) output->poison();
    cudaGraphLaunch(ready, stream);
    for (size_t i = 0; i < outputs.size(); ++i) {
      CHECK(same_bits(*outputs[i], changed ? second[i] : first[i]), "output ", i, changed ? " of other inputs" : "");
    }
  }
  cudaGraphExecDestroy(ready);
  cudaGraphDestroy(graph);
  set(inputs, values);
}

TEST(captured_layers) {
  for (const simt::Device& device : {simt::sm_80(), simt::sm_90()}) {
    simt::device() = device;
    Layer l({"layer", 30, 40, 24, 5, 2, Ids::kEmptySlots}, DType::kBFloat16, {}, true, false, 3, true);
    Array y = l.empty({l.c.T, l.c.H}, 0), h = l.empty({l.c.T * l.c.K, l.N}, 0);
    check_capture("moe_forward", {&l.x, &l.ids, &l.topk_weights}, {&y, &h}, [&](Execution e) {
      cuda::moe_forward({.x = l.x,
                         .weights = l.weights(),
                         .topk_ids = l.ids,
                         .topk_weights = l.topk_weights,
                         .options = l.options,
                         .y = y,
                         .h = h},
                        e);
    });
    h.fill([](int64_t i) { return static_cast<double>(i % 7) - 3.0; });
    Array grad_x = l.x, gate_up = l.gate_up_proj, down = l.down_proj, weights = l.topk_weights;
    check_capture("moe_backward", {&l.x, &l.ids, &l.topk_weights, &l.grad_y}, {&grad_x, &gate_up, &down, &weights},
                  [&](Execution e) {
                    cuda::moe_backward({.grad_y = l.grad_y,
                                        .x = l.x,
                                        .h = h,
                                        .weights = l.weights(),
                                        .topk_ids = l.ids,
                                        .topk_weights = l.topk_weights,
                                        .options = l.options,
                                        .grad_x = grad_x,
                                        .grad_gate_up_proj = gate_up,
                                        .grad_down_proj = down,
                                        .grad_topk_weights = weights},
                                       e);
                  });
  }
  simt::device() = simt::sm_90();
}

TEST(captured_stages) {
  simt::device() = simt::sm_90();
  Layer l({"layer", 20, 64, 32, 4, 2}, DType::kBFloat16, {}, false, false, 4, true);
  const Plan plan = l.plan.plan();
  Array rows = l.rows({l.c.T * l.c.K, l.c.H}, 1.0, 0), h = l.rows({l.c.T * l.c.K, l.N}, 1.0, 0);
  Array a = l.rows({l.c.T * l.c.K, l.c.I}, 1.0, 0), grad_h = h, y = l.x, weights = l.topk_weights;
  Array gate_up = l.gate_up_proj;
  PlanArrays planned = l.plan;
  check_capture("plan", {&l.ids}, {&planned.expert_offsets, &planned.token_indices, &planned.slot_indices},
                [&](Execution e) { cuda::plan({.topk_ids = l.ids, .plan = planned.plan()}, e); });
  check_capture("permute", {&l.x, &l.topk_weights}, {&rows}, [&](Execution e) {
    cuda::permute({.x = l.x, .plan = plan, .topk_weights = l.topk_weights, .permuted_x = rows}, e);
  });
  check_capture("combine", {&rows, &l.topk_weights}, {&y}, [&](Execution e) {
    cuda::combine({.permuted_y = rows, .plan = plan, .topk_weights = l.topk_weights, .y = y}, e);
  });
  check_capture("combine_weight_backward", {&rows, &l.grad_y}, {&weights}, [&](Execution e) {
    cuda::combine_weight_backward({.grad_y = l.grad_y, .permuted_y = rows, .plan = plan, .grad_topk_weights = weights},
                                  e);
  });
  check_capture("grouped_gemm", {&l.x}, {&h}, [&](Execution e) {
    cuda::grouped_gemm({.x = l.x,
                        .weight = l.weights().gate_up_proj,
                        .expert_offsets = plan.expert_offsets,
                        .token_indices = plan.token_indices,
                        .out = h},
                       e);
  });
  check_capture("grouped_gemm_wgrad", {&l.x, &h}, {&gate_up}, [&](Execution e) {
    cuda::grouped_gemm_wgrad({.grad_out = h,
                              .x = l.x,
                              .expert_offsets = plan.expert_offsets,
                              .token_indices = plan.token_indices,
                              .grad_weight = gate_up},
                             e);
  });
  check_capture("glu", {&h}, {&a}, [&](Execution e) { cuda::glu({.h = h, .options = l.options, .a = a}, e); });
  check_capture("glu_backward", {&a, &h}, {&grad_h}, [&](Execution e) {
    cuda::glu_backward({.grad_a = a, .h = h, .options = l.options, .grad_h = grad_h}, e);
  });
}

Array numbered(DType dtype, std::vector<int64_t> shape, int64_t modulus) {
  Array array(dtype, std::move(shape));
  array.fill([&](int64_t i) { return i * 7919 % modulus; });
  return array;
}

TEST(captured_routing) {
  for (const int64_t E : {6, 1100}) {
    const int64_t T = E > 1000 ? 5 : 40, K = 3, B = 2;
    Random random(8);
    const std::string experts = join(" of ", E, " experts");
    Array logits = random_array(random, DType::kFloat32, {T, E}, 2.0), grad = logits;
    Array ids(DType::kInt32, {T, K}), weights(DType::kFloat32, {T, K}), columns(DType::kInt32, {T, E});
    Array sequences = numbered(DType::kInt32, {T}, B), limits = numbered(DType::kInt32, {B}, 3);
    limits.fill([](int64_t i) { return 2 + i; });
    check_capture("route" + experts, {&logits}, {&ids, &weights}, [&](Execution e) {
      cuda::route({.router_logits = logits, .options = {.top_k = K}, .topk_ids = ids, .topk_weights = weights}, e);
    });
    Array x = random_array(random, DType::kBFloat16, {T, 32}), gate = random_array(random, DType::kBFloat16, {E, 32});
    Array gate_logits(DType::kFloat32, {T, E});
    check_capture("gate" + experts, {&x, &gate}, {&gate_logits},
                  [&](Execution e) { cuda::gate({.x = x, .weight = gate, .router_logits = gate_logits}, e); });
    Array grad_weights = random_array(random, DType::kFloat32, {T, K});
    check_capture("route_backward" + experts, {&logits, &grad_weights}, {&grad}, [&](Execution e) {
      cuda::route_backward({.grad_topk_weights = grad_weights,
                            .router_logits = logits,
                            .topk_ids = ids,
                            .options = {.top_k = K},
                            .grad_router_logits = grad},
                           e);
    });
    check_capture("route_dynamic" + experts, {&logits}, {&ids, &weights}, [&](Execution e) {
      cuda::route_dynamic(
          {.router_logits = logits, .options = {.top_p = 0.4}, .topk_ids = ids, .topk_weights = weights}, e);
    });
    check_capture("column_topk" + experts, {&logits, &sequences, &limits}, {&columns}, [&](Execution e) {
      cuda::column_topk({.values = logits, .sequence_ids = sequences, .limits = limits, .topk_ids = columns}, e);
    });
    Array chosen = numbered(DType::kInt32, {T, K}, E), kept = chosen;
    check_capture("fit_capacity" + experts, {&chosen, &logits, &sequences, &limits}, {&kept}, [&](Execution e) {
      cuda::fit_capacity({.topk_ids = chosen,
                          .scores = logits,
                          .sequence_ids = sequences,
                          .limits = limits,
                          .options = {.num_experts = E, .candidates = K + 2},
                          .kept_ids = kept},
                         e);
    });
    Array owners(DType::kInt32, {T});
    check_capture("assign_balanced" + experts, {&logits, &sequences}, {&owners}, [&](Execution e) {
      cuda::assign_balanced(
          {.values = logits, .sequence_ids = sequences, .num_sequences = B, .max_iterations = 5, .expert_ids = owners},
          e);
    });
  }
}

// More pairs than one block plans.
TEST(captured_large_plan) {
  const int64_t T = 2800, K = 3, E = 40;
  Array ids = numbered(DType::kInt32, {T, K}, E + 1);
  PlanArrays planned(T, K, E);
  check_capture("a large plan", {&ids}, {&planned.expert_offsets, &planned.token_indices, &planned.slot_indices},
                [&](Execution e) { cuda::plan({.topk_ids = ids, .plan = planned.plan()}, e); });
}

}  // namespace
}  // namespace switchgear::test
