// SPDX-License-Identifier: BSD-3-Clause
// The small kernels of moe_backward, between the products. All are memory-bound.
//
//   weight_gradient_kernel   grad_topk_weights[t,k] = Σ parts of the slot + <grad_y[t], down_bias[e]>; 0 for empty slots
//                            4·S·I/32 bytes, and with a bias S·H·size from L2
//   bias_gradient_kernel     grad_bias[e] = Σ_{s of e} weights[s] · rows[s]                        S·width·size bytes
//
// Numeric contract: float32, in orders that depend only on the widths (for bias_gradient_kernel, on an expert's rows: rows
// i, i + 8, … by one thread, then the eight sums in order). No atomics. Slots out of range are skipped.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   weight_gradient_kernel: 40 registers
//   bias_gradient_kernel: 24 registers, 1024 bytes of shared memory
#pragma once
#include "gemm_schedule.cuh"
#include "vector.cuh"

namespace switchgear::cuda {

constexpr int kMoeThreads = 256;

template <typename T>
struct WeightGradientParams {
  const float* parts;  // [S, num_parts]
  const int32_t* slot_indices;
  const int32_t* topk_ids;
  const T* grad_y;
  int64_t grad_stride;
  const T* bias;  // or null
  int64_t bias_stride;
  float* grad_topk_weights;
  int64_t num_pairs, num_slots, num_parts, num_experts, hidden_size;
  int top_k;
};

// One warp per pair.
template <typename T>
__global__ void __launch_bounds__(kMoeThreads) weight_gradient_kernel(WeightGradientParams<T> p) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * (kMoeThreads / 32) + threadIdx.x / 32;
  if (pair >= p.num_pairs) return;
  const int32_t slot = p.slot_indices[pair], expert = p.topk_ids[pair];
  float sum = 0.0f;
  if (slot >= 0 && slot < p.num_slots) {
    for (int64_t i = lane; i < p.num_parts; i += 32) sum += p.parts[slot * p.num_parts + i];
    if (p.bias != nullptr && expert >= 0 && expert < p.num_experts) {
      const T* const grad = p.grad_y + pair / p.top_k * p.grad_stride;
      const T* const bias = p.bias + expert * p.bias_stride;
      for (int64_t i = lane; i < p.hidden_size; i += 32) sum = fmaf(to_float(grad[i]), to_float(bias[i]), sum);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane == 0) p.grad_topk_weights[pair] = sum;
}

template <typename T>
struct BiasGradientParams {
  Rows rows;
  const float* slot_weights;                // null: all ones
  const int32_t *expert_offsets, *experts;  // experts: [rows of grad_bias], all if null
  T* grad_bias;
  int64_t grad_stride;
  int32_t num_experts, num_slots, width;
};

constexpr int kBiasColumns = 32, kBiasRows = 8;

// A block handles 32 columns of one row of grad_bias; threadIdx.y is one of eight sums.
template <typename T>
__global__ void __launch_bounds__(kBiasColumns* kBiasRows) bias_gradient_kernel(BiasGradientParams<T> p) {
  SHARED_ARRAY(float, sums, kBiasColumns* kBiasRows);
  const int32_t blocks = (p.width + kBiasColumns - 1) / kBiasColumns;
  const auto out_row = static_cast<int32_t>(blockIdx.x / static_cast<unsigned>(blocks));
  const auto x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int32_t column = static_cast<int32_t>(blockIdx.x % static_cast<unsigned>(blocks)) * kBiasColumns + x;
  const SlotRange slots = slots_of_matrix(p.expert_offsets, p.experts, out_row, p.num_experts, p.num_slots);
  float sum = 0.0f;
  for (int32_t slot = slots.begin + y; slot < slots.end && column < p.width; slot += kBiasRows) {
    const int32_t row = p.rows.indices != nullptr ? p.rows.indices[slot] : slot;
    if (row < 0 || row >= p.rows.count) continue;
    const float value = to_float(static_cast<const T*>(p.rows.data)[row * p.rows.stride + column]);
    sum = fmaf(p.slot_weights != nullptr ? p.slot_weights[slot] : 1.0f, value, sum);
  }
  sums[y * kBiasColumns + x] = sum;
  __syncthreads();
  if (y > 0 || column >= p.width) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kBiasRows; ++i) total += sums[i * kBiasColumns + x];
  p.grad_bias[out_row * p.grad_stride + column] = from_float<T>(total);
}

}  // namespace switchgear::cuda
