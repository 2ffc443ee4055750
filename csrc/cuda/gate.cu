// SPDX-License-Identifier: BSD-3-Clause
#include "gate.cuh"
#include "launch.h"
#include "ops.h"

namespace switchgear::cuda {
namespace {

// Below this number of logits, one per warp keeps more warps busy than a tile would.
constexpr int64_t kFewLogits = 16384;

template <typename X, typename W, int kTokens, int kExperts>
void launch_gate(const GateParams& params, void* stream) {
  constexpr int kBlockTokens = kGateWarps * kTokens;
  const dim3 grid(static_cast<unsigned>((params.num_tokens + kBlockTokens - 1) / kBlockTokens),
                  static_cast<unsigned>((params.num_experts + kExperts - 1) / kExperts));
  launch(gate_kernel<X, W, kTokens, kExperts>, grid, dim3(32 * kGateWarps), 0, stream, params);
}

}  // namespace

void gate(const GateArgs& args, Execution exec) {
  const TensorView &x = args.x, &weight = args.weight, &logits = args.router_logits;
  if (x.shape[0] == 0) return;
  const GateParams params{.x = x.data,
                          .weight = weight.data,
                          .bias = args.bias.data,
                          .router_logits = logits.data,
                          .x_stride = x.stride[0],
                          .weight_stride = weight.stride[0],
                          .logits_stride = logits.stride[0],
                          .num_tokens = x.shape[0],
                          .depth = x.shape[1],
                          .num_experts = weight.shape[0],
                          .bias_dtype = args.bias.dtype,
                          .logits_dtype = logits.dtype,
                          .x_aligned = rows_aligned(x),
                          .weight_aligned = rows_aligned(weight)};
  const bool few = params.num_tokens * params.num_experts <= kFewLogits;
  const auto run = [&]<typename X, typename W>() {
    few ? launch_gate<X, W, 1, 1>(params, exec.stream) : launch_gate<X, W, 4, 8>(params, exec.stream);
  };
  with_element_type(x.dtype, [&]<typename X>() {
    if (weight.dtype == DType::kFloat32) return run.template operator()<X, float>();
    run.template operator()<X, X>();
  });
}

}  // namespace switchgear::cuda
