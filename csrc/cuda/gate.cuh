// SPDX-License-Identifier: BSD-3-Clause
// gate: router_logits[t,e] = Σ_k x[t,k] · weight[e,k] + bias[e], the product of a linear router.
//
//   work T·H·E fused multiply-adds; traffic: x once per 8 experts and the weight once per 16 tokens, from L2
//   bound by multiply-adds, or with few tokens by latency
//
// A warp computes a tile of kTokens x kExperts logits. Its lanes run along k, 8 adjacent elements each, and read x and the
// weight as vectors of 16 bytes. At the end the lanes' sums are added pairwise. Warps of a block share their experts, so the
// weight comes from L1 for all but the first.
//
// Numeric contract: all sums in float32. Lane l adds k = 8·l … 8·l + 7, then the same 256 further on, and so on; then lanes are
// added in a tree. The order depends only on k, not on the tile: a token's logits have the same bits in any batch.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   gate_kernel: 128 registers
#pragma once
#include "platform.cuh"
#include "vector.cuh"

namespace switchgear::cuda {

constexpr int kGateWarps = 4;
constexpr int kGateRun = 8;  // adjacent elements of a lane

struct GateParams {
  const void* x;
  const void* weight;
  const void* bias;  // or null
  void* router_logits;
  int64_t x_stride, weight_stride, logits_stride;
  int64_t num_tokens, depth, num_experts;
  DType bias_dtype, logits_dtype;
  bool x_aligned, weight_aligned;  // rows can be read 16 bytes at a time
};

// `count` elements, and then zeros.
template <typename T>
__device__ inline void load_elements(float (&values)[kGateRun], const T* p, int count, bool aligned) {
  constexpr int kVector = kVectorSize<T>;
#pragma unroll
  for (int i = 0; i < kGateRun; i += kVector) {
    float part[kVector];
    unpack<T>(part, load_vector(p + i, count - i, aligned && count - i >= kVector));
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[i + j] = part[j];
  }
}

template <typename X, typename W, int kTokens, int kExperts>
__global__ void __launch_bounds__(32 * kGateWarps) gate_kernel(GateParams p) {
  static_assert(kTokens * kExperts <= 32);  // a lane stores one logit
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first_token = (static_cast<int64_t>(blockIdx.x) * kGateWarps + warp) * kTokens;
  const int64_t first_expert = static_cast<int64_t>(blockIdx.y) * kExperts;
  if (first_token >= p.num_tokens) return;  // a whole warp

  // Rows past the last are the last one again; their sums are not stored.
  const X* x[kTokens];
  const W* weight[kExperts];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const int64_t token = first_token + t < p.num_tokens ? first_token + t : p.num_tokens - 1;
    x[t] = static_cast<const X*>(p.x) + token * p.x_stride;
  }
#pragma unroll
  for (int e = 0; e < kExperts; ++e) {
    const int64_t expert = first_expert + e < p.num_experts ? first_expert + e : p.num_experts - 1;
    weight[e] = static_cast<const W*>(p.weight) + expert * p.weight_stride;
  }

  float sums[kTokens][kExperts] = {};
  for (int64_t k = lane * kGateRun; k < p.depth; k += 32 * kGateRun) {
    const int count = static_cast<int>(p.depth - k < kGateRun ? p.depth - k : kGateRun);
    float rows[kTokens][kGateRun];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) load_elements(rows[t], x[t] + k, count, p.x_aligned);
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      float column[kGateRun];
      load_elements(column, weight[e] + k, count, p.weight_aligned);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
#pragma unroll
        for (int i = 0; i < kGateRun; ++i) sums[t][e] = fmaf(rows[t][i], column[i], sums[t][e]);
      }
    }
  }

  float own = 0.0f;  // the logit that this lane stores
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      float sum = sums[t][e];
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
      if (lane == t * kExperts + e) own = sum;
    }
  }
  const int64_t token = first_token + lane / kExperts, expert = first_expert + lane % kExperts;
  if (lane >= kTokens * kExperts || token >= p.num_tokens || expert >= p.num_experts) return;
  if (p.bias != nullptr) own += load_float(p.bias, p.bias_dtype, expert);
  store_float(p.router_logits, p.logits_dtype, token * p.logits_stride + expert, own);
}

}  // namespace switchgear::cuda
