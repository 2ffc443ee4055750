// SPDX-License-Identifier: BSD-3-Clause
// Barriers and lanes.
#include "planted.h"
#include "ptx.cuh"

using namespace switchgear::cuda;

namespace {

__global__ void reverse_kernel(float* y, bool planted) {
  SHARED_ARRAY(float, tile, 128);
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!planted) __syncthreads();
  y[threadIdx.x] = tile[127 - threadIdx.x];
}
PLANT(missing_syncthreads, kByRace) {
  std::vector<float> y(128);
  launch(reverse_kernel, 1, 128, 0, nullptr, y.data(), planted);
}

// The second use of the tile must wait for the first one's readers.
__global__ void reuse_kernel(float* y, bool planted) {
  SHARED_ARRAY(float, tile, 128);
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = static_cast<float>(threadIdx.x + round);
    __syncthreads();
    sum += tile[127 - threadIdx.x];
    if (!planted) __syncthreads();
  }
  y[threadIdx.x] = sum;
}
PLANT(missing_second_syncthreads, kByRace) {
  std::vector<float> y(128);
  launch(reuse_kernel, 1, 128, 0, nullptr, y.data(), planted);
}

__global__ void neighbour_kernel(float* y, bool planted) {
  SHARED_ARRAY(float, tile, 32);
  tile[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!planted) __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}
PLANT(missing_syncwarp, kByRace) {
  std::vector<float> y(32);
  launch(neighbour_kernel, 1, 32, 0, nullptr, y.data(), planted);
}

__global__ void divergent_kernel(float* y, bool planted) {
  if (!planted || threadIdx.x < 32) {
    __syncthreads();
    y[threadIdx.x] = 1.0f;
  } else {
    __syncthreads();
    y[threadIdx.x] = 2.0f;
  }
}
PLANT(divergent_barrier, kByBoth) {
  std::vector<float> y(64);
  launch(divergent_kernel, 1, 64, 0, nullptr, y.data(), planted);
}

__global__ void early_exit_kernel(float* y, int n, bool planted) {
  const int i = static_cast<int>(threadIdx.x);
  if (planted && i >= n) return;
  __syncthreads();
  if (i < n) y[i] = 1.0f;
}
PLANT(barrier_after_exit, kByBoth) {
  std::vector<float> y(48);
  launch(early_exit_kernel, 1, 64, 0, nullptr, y.data(), 48, planted);
}

// Two of three warps use the barrier, but it counts all three.
__global__ void named_barrier_kernel(float* y, bool planted) {
  if (threadIdx.x < 64) ptx::bar_sync(1, planted ? 96 : 64);
  y[threadIdx.x] = 1.0f;
}
PLANT(named_barrier_count, kByBoth) {
  std::vector<float> y(96);
  launch(named_barrier_kernel, 1, 96, 0, nullptr, y.data(), planted);
}

__global__ void half_warp_kernel(float* y, bool planted) {
  float v = static_cast<float>(threadIdx.x);
  if (threadIdx.x < 16) v += __shfl_down_sync(0x0000ffffu, v, 8, planted ? 32 : 16);
  y[threadIdx.x] = v;
}
PLANT(shuffle_from_inactive_lane, kByBoth) {
  std::vector<float> y(32);
  launch(half_warp_kernel, 1, 32, 0, nullptr, y.data(), planted);
}

__global__ void absent_lanes_kernel(float* y, bool planted) {
  float v = static_cast<float>(threadIdx.x);
  if (!planted || threadIdx.x < 16) v += __shfl_xor_sync(0xffffffffu, v, 1);
  y[threadIdx.x] = v;
}
PLANT(full_mask_in_half_a_warp, kByBoth) {
  std::vector<float> y(32);
  launch(absent_lanes_kernel, 1, 32, 0, nullptr, y.data(), planted);
}

}  // namespace
