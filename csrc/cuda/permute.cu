// SPDX-License-Identifier: BSD-3-Clause
#include "permute.cuh"

#include "launch.h"
#include "ops.h"

namespace switchgear::cuda {

void permute(const PermuteArgs& args, Execution exec) {
  const TensorView& x = args.x;
  const int64_t num_slots = args.permuted_x.shape[0];
  if (num_slots == 0) return;
  with_element_type(x.dtype, [&]<typename T>() {
    RowBlocks blocks = row_blocks(x.shape[0], vectors_of<T>(x.shape[1]));
    const int64_t block_threads = blocks.block.x * blocks.block.y;
    const PermuteParams<T> params{
        .x = x.as<const T>(),
        .x_stride = x.stride[0],
        .num_used = args.plan.expert_offsets.as<const int32_t>() + args.plan.expert_offsets.shape[0] - 1,
        .token_indices = args.plan.token_indices.as<const int32_t>(),
        .slot_indices = args.plan.slot_indices.as<const int32_t>(),
        .topk_weights = args.topk_weights.as<const float>(),
        .permuted_x = args.permuted_x.as<T>(),
        .permuted_stride = args.permuted_x.stride[0],
        .num_tokens = x.shape[0],
        .num_slots = num_slots,
        .hidden_size = x.shape[1],
        .top_k = static_cast<int>(args.plan.slot_indices.shape[1]),
        .aligned = rows_aligned(x) && rows_aligned(args.permuted_x),
        .token_blocks = blocks.grid.x};
    blocks.grid.x += static_cast<unsigned>((num_slots + block_threads - 1) / block_threads);
    launch(permute_kernel<T>, blocks.grid, blocks.block, 0, exec.stream, params);
  });
}

}  // namespace switchgear::cuda
