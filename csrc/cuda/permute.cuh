// SPDX-License-Identifier: BSD-3-Clause
// permute: permuted_x[s] = x[token_indices[s]], times the slot's weight if given; zero rows past expert_offsets[E].
//
//   x [T,H]   slot_indices, topk_weights [T,K]   token_indices [S]   permuted_x [S,H]
//   traffic (T read + S written)·H·size bytes; memory-bound
//
// The kernel loops over tokens, not slots: a thread reads one vector of x[t] and stores it to the K slots of the token. So x is
// read once although its rows go to K experts far apart. The last blocks look for slots that no token writes, one thread per
// slot, and write those rows together: zeros past the last used slot, else x[token_indices[s]] (with a weight of 0). So all of
// the output is written even for a user-supplied plan whose two index arrays do not match.
//
// Numeric contract: a copy, or one float32 product rounded once. Indices out of range are skipped.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   permute_kernel: 40 registers, 1024 bytes of shared memory
#pragma once
#include "vector.cuh"

namespace switchgear::cuda {

template <typename T>
struct PermuteParams {
  const T* x;
  int64_t x_stride;
  const int32_t* num_used;  // expert_offsets[E]
  const int32_t* token_indices;
  const int32_t* slot_indices;
  const float* topk_weights;  // or null
  T* permuted_x;
  int64_t permuted_stride;
  int64_t num_tokens, num_slots, hidden_size;
  int top_k;
  bool aligned;
  unsigned token_blocks;  // blocks below handle tokens, the others slots
};

template <typename T>
__device__ inline Words scale(const Words& words, float factor) {
  float values[kVectorSize<T>];
  unpack<T>(values, words);
#pragma unroll
  for (float& v : values) v *= factor;
  return pack<T>(values);
}

template <typename T>
__device__ inline void permute_token(const PermuteParams<T>& p, int64_t token, int64_t column, int count, bool whole) {
  const Words words = load_vector(p.x + token * p.x_stride + column, count, whole);
  const int64_t num_used = *p.num_used;
#pragma unroll 4
  for (int k = 0; k < p.top_k; ++k) {
    const int64_t i = token * p.top_k + k;
    const int64_t slot = p.slot_indices[i];
    if (slot < 0 || slot >= num_used || slot >= p.num_slots) continue;
    T* const out = p.permuted_x + slot * p.permuted_stride + column;
    store_vector(out, p.topk_weights == nullptr ? words : scale<T>(words, p.topk_weights[i]), count, whole);
  }
}

constexpr int32_t kClaimed = -2;  // a token writes this row

// The token whose row belongs in a slot that no token writes, or -1 for zeros.
template <typename T>
__device__ inline int32_t unclaimed_token(const PermuteParams<T>& p, int64_t slot) {
  if (slot >= *p.num_used) return -1;
  const int32_t token = p.token_indices[slot];
  if (token < 0 || token >= p.num_tokens) return -1;
  for (int k = 0; k < p.top_k; ++k) {
    if (p.slot_indices[token * static_cast<int64_t>(p.top_k) + k] == slot) return kClaimed;
  }
  return token;
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) permute_kernel(PermuteParams<T> p) {
  constexpr int kVector = kVectorSize<T>;
  SHARED_ARRAY(int32_t, tokens, kRowThreads);
  const int64_t num_vectors = (p.hidden_size + kVector - 1) / kVector;
  const auto for_vectors = [&](int64_t first, int64_t step, const auto& body) {
    for (int64_t v = first; v < num_vectors; v += step) {
      const int64_t column = v * kVector;
      const int count = static_cast<int>(p.hidden_size - column < kVector ? p.hidden_size - column : kVector);
      body(column, count, p.aligned && count == kVector);
    }
  };
  if (blockIdx.x < p.token_blocks) {
    const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (token >= p.num_tokens) return;
    for_vectors(blockIdx.y * blockDim.x + threadIdx.x, gridDim.y * blockDim.x,
                [&](int64_t column, int count, bool whole) { permute_token(p, token, column, count, whole); });
    return;
  }
  if (blockIdx.y > 0) return;
  const int num_threads = static_cast<int>(blockDim.x * blockDim.y);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x - p.token_blocks) * num_threads;
  tokens[thread] = first_slot + thread < p.num_slots ? unclaimed_token(p, first_slot + thread) : kClaimed;
  __syncthreads();
  for (int i = 0; i < num_threads; ++i) {
    const int32_t token = tokens[i];
    if (token == kClaimed) continue;
    T* const out = p.permuted_x + (first_slot + i) * p.permuted_stride;
    for_vectors(thread, num_threads, [&](int64_t column, int count, bool whole) {
      Words words{};
      if (token >= 0) words = load_vector(p.x + token * p.x_stride + column, count, whole);
      if (token >= 0 && p.topk_weights != nullptr) words = scale<T>(words, 0.0f);
      store_vector(out + column, words, count, whole);
    });
  }
}

}  // namespace switchgear::cuda
