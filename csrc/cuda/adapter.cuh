// SPDX-License-Identifier: BSD-3-Clause
// The small kernels of adapters, around the products. All are memory-bound.
//
//   copy_matrix_kernel     an adapter's matrix in another layout, zeros past each expert's rank; experts with slots only
//                          2·E_hit·r·L elements, L = N or C
//   mask_rows_kernel       out[s] = mask ⊙ rows[s], in slot order; may be in place            2·S·C elements
//   clear_ranks_kernel     zeros in the gradient of a matrix past each expert's rank            E·r·L elements, at most
//
// Numeric contract: copies and zeros; values in device memory (ranks, indices) may be anything.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   copy_matrix_kernel: 32 registers
//   mask_rows_kernel: 40 registers
//   clear_ranks_kernel: 32 registers
#pragma once
#include "dropout.cuh"
#include "gemm_schedule.cuh"
#include "vector.cuh"

namespace switchgear::cuda {

constexpr int kAdapterThreads = 256;

// Strides in elements.
struct RankedStrides {
  int64_t expert, rank, other;
};

template <typename T>
struct CopyMatrixParams {
  const T* from;
  T* to;
  RankedStrides from_strides, to_strides;
  const int32_t* ranks;           // [E] or null
  const int32_t* expert_offsets;  // [E+1]
  int32_t num_experts, num_slots;
  int32_t rank, padded_rank, length;  // L
  int32_t blocks;                     // per expert
  bool along_rank;                    // the rank is the contiguous dimension of `to`
};

template <typename T>
__global__ void __launch_bounds__(kAdapterThreads) copy_matrix_kernel(const __grid_constant__ CopyMatrixParams<T> p) {
  const auto expert = static_cast<int32_t>(blockIdx.x) / p.blocks;
  const SlotRange slots = slots_of(p.expert_offsets, expert, p.num_experts, p.num_slots);
  if (slots.begin == slots.end) return;
  const int64_t at =
      static_cast<int64_t>(static_cast<int32_t>(blockIdx.x) - expert * p.blocks) * kAdapterThreads + threadIdx.x;
  const int64_t inner = p.along_rank ? p.padded_rank : p.length;
  const int64_t outer = p.along_rank ? p.length : p.padded_rank;
  if (at >= outer * inner) return;
  const int64_t k = p.along_rank ? at % inner : at / inner, other = p.along_rank ? at / inner : at % inner;
  const int32_t rank = p.ranks != nullptr && p.ranks[expert] < p.rank ? p.ranks[expert] : p.rank;
  T value = from_float<T>(0.0f);
  if (k < rank) value = p.from[expert * p.from_strides.expert + k * p.from_strides.rank + other * p.from_strides.other];
  p.to[expert * p.to_strides.expert + k * p.to_strides.rank + other * p.to_strides.other] = value;
}

template <typename T>
struct MaskRowsParams {
  Rows rows;
  T* out;
  int64_t out_stride;
  int64_t num_slots;
  int32_t width;
  DropoutMask mask;
  bool aligned;
};

// One thread per vector.
template <typename T>
__global__ void __launch_bounds__(kAdapterThreads) mask_rows_kernel(const __grid_constant__ MaskRowsParams<T> p) {
  constexpr int kVector = kVectorSize<T>;
  const int32_t vectors = (p.width + kVector - 1) / kVector;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kAdapterThreads + threadIdx.x, slot = at / vectors;
  if (slot >= p.num_slots) return;
  const int32_t column = static_cast<int32_t>(at - slot * vectors) * kVector;
  const int count = p.width - column < kVector ? p.width - column : kVector;
  const int64_t row = p.rows.indices != nullptr ? p.rows.indices[slot] : slot;
  const bool inside = row >= 0 && row < p.rows.count;
  const T* const from = static_cast<const T*>(p.rows.data) + (inside ? row * p.rows.stride + column : 0);
  float values[kVector];
  unpack<T>(values, load_vector(from, inside ? count : 0, p.aligned && inside && count == kVector));
  const DropoutRow mask(p.mask, static_cast<int32_t>(slot));
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = mask.keeps(column + i) ? values[i] : 0.0f;
  store_vector(p.out + slot * p.out_stride + column, pack<T>(values), count, p.aligned && count == kVector);
}

template <typename T>
struct ClearRanksParams {
  T* gradient;
  RankedStrides strides;
  const int32_t* ranks;  // [E]
  int32_t rank, length, blocks;
};

template <typename T>
__global__ void __launch_bounds__(kAdapterThreads) clear_ranks_kernel(const __grid_constant__ ClearRanksParams<T> p) {
  const auto expert = static_cast<int32_t>(blockIdx.x) / p.blocks;
  const int64_t at =
      static_cast<int64_t>(static_cast<int32_t>(blockIdx.x) - expert * p.blocks) * kAdapterThreads + threadIdx.x;
  if (at >= static_cast<int64_t>(p.rank) * p.length || at / p.length < p.ranks[expert]) return;
  p.gradient[expert * p.strides.expert + at / p.length * p.strides.rank + at % p.length * p.strides.other] =
      from_float<T>(0.0f);
}

}  // namespace switchgear::cuda
