// SPDX-License-Identifier: BSD-3-Clause
// Prefix sums over the lanes of a warp and the threads of a block.
#pragma once
#include "platform.cuh"

namespace switchgear::cuda {

// The sum of `value` over the lanes up to this one.
__device__ inline int32_t inclusive_sum(int32_t value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t lower = __shfl_up_sync(0xffffffffu, value, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) value += lower;
  }
  return value;
}

// The sum of `value` over all lower threads of the block; `total` is the sum over all threads. `sums` has an entry per warp.
__device__ inline int32_t exclusive_sum(int32_t value, int32_t* sums, int32_t* total) {
  const int warp = static_cast<int>(threadIdx.x / 32), num_warps = static_cast<int>(blockDim.x / 32);
  const int32_t inclusive = inclusive_sum(value);
  if (threadIdx.x % 32 == 31) sums[warp] = inclusive;
  __syncthreads();
  int32_t before = 0, all = 0;
  for (int w = 0; w < num_warps; ++w) {
    before += w < warp ? sums[w] : 0;
    all += sums[w];
  }
  __syncthreads();  // `sums` may be reused
  *total = all;
  return before + inclusive - value;
}

}  // namespace switchgear::cuda
