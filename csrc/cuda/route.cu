// SPDX-License-Identifier: BSD-3-Clause
#include "route.cuh"

#include "launch.h"
#include "ops.h"
#include "warp_rows.h"

namespace switchgear::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kLanes, int kPerLane>
void route_in_registers(const RouteParams& params, void* stream) {
  constexpr int kTokens = kRouteThreads / kLanes;
  const int64_t bytes = kTokens * 4 * route_words(params.top_k, params.num_experts, params.num_groups);
  launch(route_kernel<kLanes, kPerLane>, dim3(static_cast<unsigned>(ceil_div(params.num_tokens, kTokens))),
         dim3(kRouteThreads), static_cast<size_t>(bytes), stream, params);
}

void route_wide(RouteParams params, const Execution& exec) {
  const WarpRows rows(params.num_tokens, route_wide_words(params.top_k, params.num_experts, params.num_groups));
  params.scratch = reinterpret_cast<uint32_t*>(allocate(exec, 4 * rows.scratch_words()));
  launch(route_wide_kernel, dim3(static_cast<unsigned>(rows.blocks)), dim3(32), rows.shared_bytes(), exec.stream,
         params);
}

}  // namespace

void route(const RouteArgs& args, Execution exec) {
  const RouteOptions& options = args.options;
  const TensorView& logits = args.router_logits;
  if (logits.shape[0] == 0) return;
  const RouteParams params{.router_logits = logits.data,
                           .row_stride = logits.stride[0],
                           .selection_bias = args.selection_bias.as<const float>(),
                           .topk_ids = args.topk_ids.as<int32_t>(),
                           .topk_weights = args.topk_weights.as<float>(),
                           .num_tokens = logits.shape[0],
                           .dtype = logits.dtype,
                           .score_function = options.score_function,
                           .group_score = options.group_score,
                           .normalize = options.normalize,
                           .aligned = rows_aligned(logits),
                           .scale = options.scale,
                           .num_experts = static_cast<int>(logits.shape[1]),
                           .top_k = static_cast<int>(options.top_k),
                           .num_groups = static_cast<int>(options.num_groups),
                           .topk_groups = static_cast<int>(options.topk_groups)};
  if (params.num_experts <= 32) return route_in_registers<4, 8>(params, exec.stream);
  if (params.num_experts <= 64) return route_in_registers<8, 8>(params, exec.stream);
  if (params.num_experts <= 128) return route_in_registers<8, 16>(params, exec.stream);
  if (params.num_experts <= 256) return route_in_registers<16, 16>(params, exec.stream);
  if (params.num_experts <= 512) return route_in_registers<32, 16>(params, exec.stream);
  route_wide(params, exec);
}

void route_backward(const RouteBackwardArgs& args, Execution exec) {
  const TensorView& logits = args.router_logits;
  if (logits.shape[0] == 0) return;
  const RouteBackwardParams params{.router_logits = logits.data,
                                   .row_stride = logits.stride[0],
                                   .topk_ids = args.topk_ids.as<const int32_t>(),
                                   .grad_topk_weights = args.grad_topk_weights.as<const float>(),
                                   .grad_router_logits = args.grad_router_logits.data,
                                   .grad_stride = args.grad_router_logits.stride[0],
                                   .num_tokens = logits.shape[0],
                                   .dtype = logits.dtype,
                                   .score_function = args.options.score_function,
                                   .normalize = args.options.normalize,
                                   .scale = args.options.scale,
                                   .num_experts = static_cast<int>(logits.shape[1]),
                                   .top_k = static_cast<int>(args.topk_ids.shape[1])};
  constexpr int kTokens = kRouteThreads / 32;
  launch(route_backward_kernel, dim3(static_cast<unsigned>(ceil_div(params.num_tokens, kTokens))), dim3(kRouteThreads),
         0, exec.stream, params);
}

}  // namespace switchgear::cuda
