// SPDX-License-Identifier: BSD-3-Clause
// What every op of the backend's table guarantees. All work is queued on the given stream, on the device of the tensors,
// without waiting for it. Temporary memory comes from the allocator in one call; its size depends only on the arguments. So an
// op can be captured in a CUDA graph.
#include "api.h"
#include "layer.h"
#include "run_op.h"
#include "switchgear/backend.h"

namespace switchgear::test {
namespace {

TensorView on_device(TensorView v) {
  v.device = {DeviceType::kCUDA, 1};
  return v;
}

// All operands of a layer's ops, on the second device.
struct Operands {
  explicit Operands(const Layer& l)
      : l(l),
        logits(l.empty({l.c.T, l.c.E}, 0)),
        h(l.empty({l.c.T * l.c.K, l.N}, 0)),
        a(l.empty({l.c.T * l.c.K, l.c.I}, 0)),
        rows(l.empty({l.c.T * l.c.K, l.c.H}, 0)),
        y(l.empty({l.c.T, l.c.H}, 0)),
        gradients(l) {
    for (Array* array : {&logits, &h, &a, &rows}) array->fill([](int64_t i) { return static_cast<double>(i % 5); });
  }
  Plan plan() const {
    return {on_device(l.plan.expert_offsets), on_device(l.plan.token_indices), on_device(l.plan.slot_indices)};
  }
  ExpertWeights weights() const {
    ExpertWeights weights = l.weights();
    for (TensorView* v : {&weights.gate_up_proj.data, &weights.down_proj.data}) *v = on_device(*v);
    return weights;
  }

  const Layer& l;
  Array logits, h, a, rows, y;
  Gradients gradients;
};

struct Seen {
  int allocations = 0;
  int64_t bytes = 0;
};

Seen check_op(const char* name, const std::function<void(Execution)>& op) {
  note = name;
  int stream = 0;
  Seen seen;
  std::vector<std::unique_ptr<uint8_t[]>> memory;
  struct Context {
    Seen* seen;
    std::vector<std::unique_ptr<uint8_t[]>>* memory;
  } context{&seen, &memory};
  const auto allocate = [](void* opaque, int64_t bytes) -> void* {
    auto& [seen, memory] = *static_cast<Context*>(opaque);
    ++seen->allocations;
    seen->bytes = bytes;
    memory->push_back(std::make_unique<uint8_t[]>(static_cast<size_t>(bytes) + 256));
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory->back().get()) + 255) / 256 * 256);
  };
  simt::forget_streams();
  op({.stream = &stream, .allocator = {allocate, &context}});
  CHECK(!simt::used_streams().empty(), "nothing was queued");
  for (const void* used : simt::used_streams()) CHECK(used == &stream, "queued on another stream");
  for (const int device : simt::used_devices()) CHECK(device == 1, "queued on device ", device);
  CHECK(simt::host_waits() == 0, "waits for the device");
  CHECK(seen.allocations <= 1, seen.allocations, " allocations");
  int current = -1;
  cudaGetDevice(&current);
  CHECK(current == 0, "left device ", current, " current");
  return seen;
}

TEST(ops_are_queued_where_and_as_their_caller_says) {
  const Backend& ops = cuda_backend();
  for (const simt::Device& device : {simt::sm_80(), simt::sm_86(), simt::sm_90()}) {
    simt::device() = device;
    const Layer l({"layer", 40, 72, 40, 4, 2}, DType::kBFloat16, {}, false, false, 3, true);
    const Operands o(l);
    const TensorView x = on_device(l.x), ids = on_device(l.ids), weights = on_device(l.topk_weights);
    Array new_ids = l.ids, new_weights = l.topk_weights;
    PlanArrays new_plan = l.plan;
    const Plan plan{on_device(new_plan.expert_offsets), on_device(new_plan.token_indices),
                    on_device(new_plan.slot_indices)};
    const RouteOptions route{.top_k = l.c.K};
    check_op("route", [&](Execution e) {
      ops.route({.router_logits = on_device(o.logits),
                 .options = route,
                 .topk_ids = on_device(new_ids),
                 .topk_weights = on_device(new_weights)},
                e);
    });
    check_op("route_backward", [&](Execution e) {
      Array grad = o.logits;
      ops.route_backward({.grad_topk_weights = weights,
                          .router_logits = on_device(o.logits),
                          .topk_ids = ids,
                          .options = route,
                          .grad_router_logits = on_device(grad)},
                         e);
    });
    check_op("gate", [&](Execution e) {
      Array logits = o.logits;
      const Array weight(DType::kBFloat16, {l.c.E, l.c.H});
      ops.gate({.x = x, .weight = on_device(weight), .router_logits = on_device(logits)}, e);
    });
    check_op("plan", [&](Execution e) { ops.plan({.topk_ids = ids, .plan = plan}, e); });
    check_op("permute", [&](Execution e) {
      ops.permute({.x = x, .plan = o.plan(), .topk_weights = weights, .permuted_x = on_device(o.rows)}, e);
    });
    check_op("combine", [&](Execution e) {
      ops.combine({.permuted_y = on_device(o.rows), .plan = o.plan(), .topk_weights = weights, .y = on_device(o.y)}, e);
    });
    check_op("combine_weight_backward", [&](Execution e) {
      ops.combine_weight_backward({.grad_y = on_device(l.grad_y),
                                   .permuted_y = on_device(o.rows),
                                   .plan = o.plan(),
                                   .grad_topk_weights = on_device(new_weights)},
                                  e);
    });
    check_op("grouped_gemm", [&](Execution e) {
      ops.grouped_gemm({.x = x,
                        .weight = o.weights().gate_up_proj,
                        .expert_offsets = o.plan().expert_offsets,
                        .token_indices = o.plan().token_indices,
                        .out = on_device(o.h)},
                       e);
    });
    check_op("grouped_gemm_wgrad", [&](Execution e) {
      ops.grouped_gemm_wgrad({.grad_out = on_device(o.h),
                              .x = x,
                              .expert_offsets = o.plan().expert_offsets,
                              .token_indices = o.plan().token_indices,
                              .grad_weight = on_device(o.gradients.gate_up_proj)},
                             e);
    });
    check_op("glu", [&](Execution e) { ops.glu({.h = on_device(o.h), .options = l.options, .a = on_device(o.a)}, e); });
    check_op("glu_backward", [&](Execution e) {
      Array grad = o.h;
      ops.glu_backward({.grad_a = on_device(o.a), .h = on_device(o.h), .options = l.options, .grad_h = on_device(grad)},
                       e);
    });
    // Temporary memory as defined in moe_forward.cu and moe_backward.cu: rows of whole vectors, each array padded to 256 bytes.
    const int64_t S = l.c.T * l.c.K, up = 256;
    const auto padded = [&](int64_t bytes) { return (bytes + up - 1) / up * up; };
    const int64_t own_plan = padded((l.c.E + 1) * 4) + 2 * padded(S * 4) + padded(8);
    const Seen forward = check_op("moe_forward", [&](Execution e) {
      ops.moe_forward({.x = x,
                       .weights = o.weights(),
                       .topk_ids = ids,
                       .topk_weights = weights,
                       .options = l.options,
                       .y = on_device(o.y),
                       .h = on_device(o.h)},
                      e);
    });
    CHECK(forward.bytes == own_plan + padded(S * l.c.I * 2) + padded(S * l.c.H * 2), forward.bytes, " bytes");
    const Seen backward = check_op("moe_backward", [&](Execution e) {
      ops.moe_backward({.grad_y = on_device(l.grad_y),
                        .x = x,
                        .h = on_device(o.h),
                        .weights = o.weights(),
                        .topk_ids = ids,
                        .topk_weights = weights,
                        .options = l.options,
                        .grad_x = on_device(o.gradients.x),
                        .grad_gate_up_proj = on_device(o.gradients.gate_up_proj),
                        .grad_down_proj = on_device(o.gradients.down_proj),
                        .grad_topk_weights = on_device(new_weights)},
                       e);
    });
    CHECK(backward.bytes == own_plan + padded(S * 4) + padded(S * ((l.c.I + 31) / 32) * 4) + padded(S * l.N * 2) +
                                padded(S * std::max(l.c.I, l.c.H) * 2),
          backward.bytes, " bytes");

    // Adapters need small rows, but no copies, if their layout is the weight's and their rank is a multiple of 8.
    const int64_t r = 8;
    const auto ones = [](DType dtype, std::vector<int64_t> shape) {
      Array array(dtype, std::move(shape), 0, 0);
      array.fill([](int64_t) { return 1.0; });
      return array;
    };
    const Array a[] = {ones(DType::kBFloat16, {l.c.E, r, l.c.H}), ones(DType::kBFloat16, {l.c.E, r, l.c.I})};
    const Array b[] = {ones(DType::kBFloat16, {l.c.E, l.N, r}), ones(DType::kBFloat16, {l.c.E, l.c.H, r})};
    const Array scales = ones(DType::kFloat32, {l.c.E});
    Array seed(DType::kInt32, {2}, 0, 0);
    seed.fill([](int64_t i) { return 7 * i; });
    TensorView device_seed = on_device(seed);
    device_seed.dtype = DType::kInt64;
    device_seed.shape[0] = 1;
    ExpertWeights adapted = o.weights();
    adapted.gate_up_adapter = {.a = on_device(a[0]), .b = on_device(b[0]), .scales = on_device(scales)};
    adapted.down_adapter = {.a = on_device(a[1]), .b = on_device(b[1]), .scales = on_device(scales)};
    for (const double dropout : {0.0, 0.25}) {
      for (Adapter* adapter : {&adapted.gate_up_adapter, &adapted.down_adapter}) {
        adapter->dropout = dropout;
        adapter->device_seed = device_seed;
      }
      const Seen with_adapters = check_op("moe_forward with adapters", [&](Execution e) {
        ops.moe_forward({.x = x,
                         .weights = adapted,
                         .topk_ids = ids,
                         .topk_weights = weights,
                         .options = l.options,
                         .y = on_device(o.y),
                         .h = on_device(o.h)},
                        e);
      });
      CHECK(with_adapters.bytes == forward.bytes + 2 * padded(S * r * 2), with_adapters.bytes, " bytes");
      Array grads[] = {a[0], b[0], a[1], b[1]};
      const Seen trained = check_op("moe_backward with adapters", [&](Execution e) {
        ops.moe_backward({.grad_y = on_device(l.grad_y),
                          .x = x,
                          .h = on_device(o.h),
                          .weights = adapted,
                          .topk_ids = ids,
                          .topk_weights = weights,
                          .options = l.options,
                          .grad_x = on_device(o.gradients.x),
                          .grad_topk_weights = on_device(new_weights),
                          .grad_gate_up_a = on_device(grads[0]),
                          .grad_gate_up_b = on_device(grads[1]),
                          .grad_down_a = on_device(grads[2]),
                          .grad_down_b = on_device(grads[3])},
                         e);
      });
      CHECK(trained.bytes == backward.bytes + 2 * padded(S * r * 2), trained.bytes, " bytes");
    }
  }
  simt::device() = simt::sm_90();
}

// Policies, and the kernels of other ops for many experts and many tokens.
TEST(other_launches_are_queued_where_their_caller_says) {
  const Backend& ops = cuda_backend();
  simt::device() = simt::sm_90();
  for (const int64_t E : {6, 1100}) {
    const int64_t T = 9, K = 3, B = 2;
    Random random(5);
    const Array logits = random_array(random, DType::kFloat32, {T, E});
    Array ids(DType::kInt32, {T, K}), weights(DType::kFloat32, {T, K}), columns(DType::kInt32, {T, E});
    Array sequences(DType::kInt32, {T}), limits(DType::kInt32, {B});
    ids.fill([&](int64_t i) { return i * 7 % E; });
    sequences.fill([&](int64_t i) { return i % B; });
    limits.fill([](int64_t i) { return 1 + i; });
    check_op("route", [&](Execution e) {
      ops.route({.router_logits = on_device(logits),
                 .options = {.top_k = K},
                 .topk_ids = on_device(ids),
                 .topk_weights = on_device(weights)},
                e);
    });
    check_op("route_dynamic", [&](Execution e) {
      ops.route_dynamic({.router_logits = on_device(logits),
                         .options = {.top_p = 0.5},
                         .topk_ids = on_device(ids),
                         .topk_weights = on_device(weights)},
                        e);
    });
    check_op("column_topk", [&](Execution e) {
      ops.column_topk({.values = on_device(logits),
                       .sequence_ids = on_device(sequences),
                       .limits = on_device(limits),
                       .topk_ids = on_device(columns)},
                      e);
    });
    Array kept = ids, owners(DType::kInt32, {T});
    check_op("fit_capacity", [&](Execution e) {
      ops.fit_capacity({.topk_ids = on_device(ids),
                        .scores = on_device(logits),
                        .sequence_ids = on_device(sequences),
                        .limits = on_device(limits),
                        .options = {.num_experts = E, .candidates = K + 1},
                        .kept_ids = on_device(kept)},
                       e);
    });
    check_op("assign_balanced", [&](Execution e) {
      ops.assign_balanced({.values = on_device(logits),
                           .sequence_ids = on_device(sequences),
                           .num_sequences = B,
                           .max_iterations = 3,
                           .expert_ids = on_device(owners)},
                          e);
    });
  }
  const int64_t T = 2800, K = 3, E = 4;  // three launches
  Array ids(DType::kInt32, {T, K});
  ids.fill([&](int64_t i) { return i % E; });
  PlanArrays plan(T, K, E);
  check_op("plan of many pairs", [&](Execution e) {
    ops.plan({.topk_ids = on_device(ids),
              .plan = {on_device(plan.expert_offsets), on_device(plan.token_indices), on_device(plan.slot_indices)}},
             e);
  });
}

}  // namespace
}  // namespace switchgear::test
