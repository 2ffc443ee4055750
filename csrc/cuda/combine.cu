// SPDX-License-Identifier: BSD-3-Clause
#include "combine.cuh"

#include "launch.h"
#include "ops.h"

namespace switchgear::cuda {

void combine(const CombineArgs& args, Execution exec) {
  const TensorView& y = args.y;
  if (y.shape[0] == 0) return;
  with_element_type(y.dtype, [&]<typename T>() {
    const CombineParams<T> params{.permuted_y = args.permuted_y.as<const T>(),
                                  .permuted_stride = args.permuted_y.stride[0],
                                  .slot_indices = args.plan.slot_indices.as<const int32_t>(),
                                  .topk_weights = args.topk_weights.as<const float>(),
                                  .y = y.as<T>(),
                                  .y_stride = y.stride[0],
                                  .num_tokens = y.shape[0],
                                  .num_slots = args.permuted_y.shape[0],
                                  .hidden_size = y.shape[1],
                                  .top_k = static_cast<int>(args.plan.slot_indices.shape[1]),
                                  .aligned = rows_aligned(args.permuted_y) && rows_aligned(y)};
    const RowBlocks blocks = row_blocks(y.shape[0], vectors_of<T>(y.shape[1]));
    launch(combine_kernel<T>, blocks.grid, blocks.block, 0, exec.stream, params);
  });
}

void combine_weight_backward(const CombineBackwardArgs& args, Execution exec) {
  const TensorView& grad_y = args.grad_y;
  const int64_t num_pairs = args.grad_topk_weights.numel();
  if (num_pairs == 0) return;
  with_element_type(grad_y.dtype, [&]<typename T>() {
    const CombineBackwardParams<T> params{.grad_y = grad_y.as<const T>(),
                                          .grad_stride = grad_y.stride[0],
                                          .permuted_y = args.permuted_y.as<const T>(),
                                          .permuted_stride = args.permuted_y.stride[0],
                                          .slot_indices = args.plan.slot_indices.as<const int32_t>(),
                                          .grad_topk_weights = args.grad_topk_weights.as<float>(),
                                          .num_pairs = num_pairs,
                                          .num_slots = args.permuted_y.shape[0],
                                          .hidden_size = grad_y.shape[1],
                                          .top_k = static_cast<int>(args.grad_topk_weights.shape[1]),
                                          .aligned = rows_aligned(grad_y) && rows_aligned(args.permuted_y)};
    constexpr int kPairs = kRowThreads / 32;
    const dim3 grid(static_cast<unsigned>((num_pairs + kPairs - 1) / kPairs));
    launch(combine_weight_backward_kernel<T>, grid, dim3(kRowThreads), 0, exec.stream, params);
  });
}

}  // namespace switchgear::cuda
