// SPDX-License-Identifier: BSD-3-Clause
#include <stdexcept>
#include <string>
#include <tuple>

#include "expert_weights.h"
#include "gemm.h"
#include "ops.h"
#include "platform.cuh"
#include "stored.h"
#include "workspace.h"

namespace switchgear::cuda {
namespace {

Rows rows_of(const TensorView& x, const TensorView& token_indices) {
  return {x.data, x.stride[0], x.shape[0], token_indices.as<const int32_t>()};
}

// With the counter if the kernel takes one. Queues the kernel that sets it to zero.
Schedule schedule_of(const Execution& exec, TileCounter* counter, bool counts) {
  Schedule schedule{.reserved_multiprocessors = exec.reserved_multiprocessors};
  if (!counts) return schedule;
  schedule.counter = counter;
  const cudaError_t error =
      cudaMemsetAsync(schedule.counter, 0, sizeof(TileCounter), static_cast<cudaStream_t>(exec.stream));
  if (error != cudaSuccess) throw std::runtime_error(std::string("cudaMemsetAsync: ") + cudaGetErrorString(error));
  return schedule;
}

}  // namespace

void grouped_gemm(const GroupedGemmArgs& args, Execution exec) {
  if (args.out.shape[0] == 0) return;
  check_separate("weight", args.weight);
  const int64_t count = separate_count(args.weight);
  const bool plain = args.weight.format == Format::kPlain;
  const auto layout = [&](Workspace& memory) {
    SeparateMatrix* const separate = memory.take<SeparateMatrix>(count);
    TileCounter* const counter = memory.take<TileCounter>(plain && size_of(args.x.dtype) == 2 && on_hopper() ? 1 : 0);
    return std::tuple(separate, counter,
                      args.transposed ? QuantizedRows() : QuantizedRows(memory, args.weight, args.x.shape[0]));
  };
  Workspace sizes;
  layout(sizes);
  Workspace memory(allocate(exec, sizes.size()));
  const auto [separate, counter, quantized] = layout(memory);
  Gemm g{.dtype = args.x.dtype,
         .allow_tf32 = exec.allow_tf32,
         .a = rows_of(args.x, args.token_indices),
         .b = operand_of(args.weight, !args.transposed, separate),
         .bias = args.bias.data,
         .bias_stride = args.bias.stride[0],
         .expert_offsets = args.expert_offsets.as<const int32_t>(),
         .num_experts = args.expert_offsets.shape[0] - 1,
         .num_slots = args.out.shape[0],
         .n = args.out.shape[1],
         .c = args.x.shape[1],
         .out = args.out.data,
         .out_stride = args.out.stride[0]};
  g.schedule = schedule_of(exec, counter, plain && sm90_takes(g));
  if (args.transposed) {
    backward_gemm(g, "weight", args.weight, exec.stream);
  } else {
    forward_gemm(g, "weight", args.weight, quantized, exec.stream);
  }
}

void grouped_gemm_wgrad(const GroupedGemmWgradArgs& args, Execution exec) {
  const TensorView& gradient = args.grad_weight;
  Wgrad g{.dtype = args.x.dtype,
          .allow_tf32 = exec.allow_tf32,
          .a = rows_of(args.grad_out, {}),
          .b = rows_of(args.x, args.token_indices),
          .expert_offsets = args.expert_offsets.as<const int32_t>(),
          .experts = args.experts.as<const int32_t>(),
          .num_experts = args.expert_offsets.shape[0] - 1,
          .num_slots = args.grad_out.shape[0],
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
  if (g.num_matrices > 0 && sm90_takes(g)) {
    Workspace memory(allocate(exec, sizeof(TileCounter)));
    g.schedule = schedule_of(exec, memory.take<TileCounter>(1), true);
  } else {
    g.schedule = schedule_of(exec, nullptr, false);
  }
  wgrad(g, exec.stream);
}

}  // namespace switchgear::cuda
