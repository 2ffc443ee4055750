// SPDX-License-Identifier: BSD-3-Clause
// combine: y[t] = Σ_k topk_weights[t,k] · permuted_y[slot_indices[t,k]], k ascending, with weights of 1 if none are given.
// combine_weight_backward, the gradient of the weights: grad[t,k] = <grad_y[t], permuted_y[slot_indices[t,k]]>.
//
//   permuted_y [S,H]   slot_indices, topk_weights, grad [T,K]   y, grad_y [T,H]
//   combine 2·S·H flop, traffic (S read + T written)·H·size bytes; combine_weight_backward (S + T)·H·size bytes read
//   both are memory-bound
//
// combine: a thread owns one vector of y and gathers that vector of the token's slots, four rows in flight. No atomics.
// combine_weight_backward: a warp owns a pair (t,k); its lanes take vectors in turn. The pairs of a token are in adjacent
// warps, so only the first one reads grad_y[t] from memory; the others hit the cache.
//
// Numeric contract: float32 sums in an order that depends only on K and H (a lane's vectors ascending, then lane i with
// lane i ^ 16, 8, …), rounded once. Slots out of range are skipped; the gradients of their weights are 0.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   combine_kernel: 56 registers
//   combine_weight_backward_kernel: 40 registers
#pragma once
#include "vector.cuh"

namespace switchgear::cuda {

template <typename T>
struct CombineParams {
  const T* permuted_y;
  int64_t permuted_stride;
  const int32_t* slot_indices;
  const float* topk_weights;  // or null
  T* y;
  int64_t y_stride;
  int64_t num_tokens, num_slots, hidden_size;
  int top_k;
  bool aligned;
};

constexpr int kRowsInFlight = 4;

template <typename T>
__device__ inline void combine_vector(const CombineParams<T>& p, int64_t token, int64_t column, int count, bool whole) {
  constexpr int kVector = kVectorSize<T>;
  float sum[kVector] = {};
  for (int first = 0; first < p.top_k; first += kRowsInFlight) {
    Words rows[kRowsInFlight];
    float weights[kRowsInFlight];
    bool used[kRowsInFlight];
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int64_t i = token * p.top_k + first + j;
      const bool inside = first + j < p.top_k;
      const int64_t slot = inside ? p.slot_indices[i] : -1;
      used[j] = slot >= 0 && slot < p.num_slots;
      weights[j] = used[j] && p.topk_weights != nullptr ? p.topk_weights[i] : 1.0f;
      if (used[j]) rows[j] = load_vector(p.permuted_y + slot * p.permuted_stride + column, count, whole);
    }
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      if (!used[j]) continue;
      float values[kVector];
      unpack<T>(values, rows[j]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] = fmaf(weights[j], values[i], sum[i]);
    }
  }
  store_vector(p.y + token * p.y_stride + column, pack<T>(sum), count, whole);
}

// At least 4 blocks per SM: otherwise nvcc may spill registers to fit a fifth.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4) combine_kernel(CombineParams<T> p) {
  constexpr int kVector = kVectorSize<T>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= p.num_tokens) return;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x * kVector;
  for (int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kVector; column < p.hidden_size;
       column += step) {
    const int count = static_cast<int>(p.hidden_size - column < kVector ? p.hidden_size - column : kVector);
    combine_vector(p, token, column, count, p.aligned && count == kVector);
  }
}

template <typename T>
struct CombineBackwardParams {
  const T* grad_y;
  int64_t grad_stride;
  const T* permuted_y;
  int64_t permuted_stride;
  const int32_t* slot_indices;
  float* grad_topk_weights;
  int64_t num_pairs, num_slots, hidden_size;
  int top_k;
  bool aligned;
};

template <typename T>
__device__ inline void add_products(float& sum, const Words& a, const Words& b) {
  float x[kVectorSize<T>], y[kVectorSize<T>];
  unpack<T>(x, a);
  unpack<T>(y, b);
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) sum = fmaf(x[i], y[i], sum);
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) combine_weight_backward_kernel(CombineBackwardParams<T> p) {
  constexpr int kVector = kVectorSize<T>;
  constexpr int kPairs = kRowThreads / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kPairs + threadIdx.x / 32;
  if (pair >= p.num_pairs) return;  // whole warps leave
  const int64_t slot = p.slot_indices[pair];
  float sum = 0.0f;
  if (slot >= 0 && slot < p.num_slots) {
    const T* const grad = p.grad_y + pair / p.top_k * p.grad_stride;
    const T* const row = p.permuted_y + slot * p.permuted_stride;
    const int64_t num_whole = p.hidden_size / kVector;
#pragma unroll 4
    for (int64_t v = lane; v < num_whole; v += 32) {
      add_products<T>(sum, load_vector(grad + v * kVector, kVector, p.aligned),
                      load_vector(row + v * kVector, kVector, p.aligned));
    }
    const int rest = static_cast<int>(p.hidden_size - num_whole * kVector);
    if (rest > 0 && lane == num_whole % 32) {
      const int64_t column = num_whole * kVector;
      add_products<T>(sum, load_vector(grad + column, rest, false), load_vector(row + column, rest, false));
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane == 0) p.grad_topk_weights[pair] = sum;
}

}  // namespace switchgear::cuda
