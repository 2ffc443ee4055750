// SPDX-License-Identifier: BSD-3-Clause
#include "route_dynamic.cuh"

#include "launch.h"
#include "ops.h"
#include "warp_rows.h"

namespace switchgear::cuda {

void route_dynamic(const RouteDynamicArgs& args, Execution exec) {
  const RouteDynamicOptions& options = args.options;
  const TensorView& logits = args.router_logits;
  if (logits.shape[0] == 0) return;
  const WarpRows rows(logits.shape[0], logits.shape[1]);
  const RouteDynamicParams params{.router_logits = logits.data,
                                  .row_stride = logits.stride[0],
                                  .selection_bias = args.selection_bias.as<const float>(),
                                  .topk_ids = args.topk_ids.as<int32_t>(),
                                  .topk_weights = args.topk_weights.as<float>(),
                                  .scratch = reinterpret_cast<uint32_t*>(allocate(exec, 4 * rows.scratch_words())),
                                  .num_tokens = logits.shape[0],
                                  .top_p = options.top_p,
                                  .dtype = logits.dtype,
                                  .score_function = options.score_function,
                                  .normalize = options.normalize,
                                  .threshold = options.threshold,
                                  .scale = options.scale,
                                  .num_experts = static_cast<int>(logits.shape[1]),
                                  .max_experts = static_cast<int>(args.topk_ids.shape[1]),
                                  .min_experts = static_cast<int>(options.min_experts)};
  launch(route_dynamic_kernel, dim3(static_cast<unsigned>(rows.blocks)), dim3(32), rows.shared_bytes(), exec.stream,
         params);
}

}  // namespace switchgear::cuda
