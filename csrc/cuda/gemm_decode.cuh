// SPDX-License-Identifier: BSD-3-Clause
// Grouped GEMM for a few tokens: out[s,n] = Σ_k a[s,k] · b[e(s)][n,k] with up to 16 rows per expert, in 16-bit types.
//
//   work 2·S·N·C flop, negligible beside the traffic: the weights of the touched experts once, (touched experts)·N·C·2 bytes
//   bound by memory
//
// A warp owns 16 columns of one expert, for all rows of the expert. It streams the columns' weights from memory into registers,
// 64 bytes of a column at a time with kAhead loads in flight, without shared memory or barriers. 8 warps per SM keep 32 KB in
// flight, more than memory latency times an SM's share of the bandwidth (11 KB on an A100, 18 KB on an H100). Rows of a come
// through L1, where the first warp of a block brings them in for the others.
// Blocks are (columns, i): the i-th expert with rows. So the grid does not grow with the number of experts.
//
// A lane loads 16 bytes, eight depths of one column. mma needs two depths of each of four such loads, so the four lanes of a
// quad transpose 4 x 4 words by shuffles. The operands of mma are then exactly those that ldmatrix would give.
//
// Numeric contract: that of gemm_sm80.cuh, bit for bit: the same depths in the same positions of the same instructions, k
// ascending. So decoding gives the same bits as a prefill of the same rows.
//
// Floors (bf16, Qwen3-30B-A3B's layer, one token, 8 experts, 75 MB of weights): 37 us at the 2.0 TB/s of an A100, 23 us at the
// 3.35 of an H100.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   decode_kernel: 128 registers
#pragma once
#include "gemm_epilogue.cuh"
#include "gemm_sm80.cuh"

namespace switchgear::cuda {

constexpr int kDecodeRows = 16;     // per mma
constexpr int kDecodeColumns = 16;  // per warp: two mma
constexpr int kStepDepth = 32;      // depths per load: 16 bytes in each of four lanes

// w[j] of lane i of a quad becomes w[i] of lane j.
__device__ inline void transpose_quad(uint32_t (&w)[4]) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const bool odd = (lane & 1) != 0, upper = (lane & 2) != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {  // blocks of 2 x 2
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 2], 2);
    (upper ? w[i] : w[i + 2]) = other;
  }
}

// The 16 bytes of one lane: depths [depth, depth + 8) of a row or column; zeros past `end` and for a null row.
template <typename T>
__device__ inline Words load_run(const T* row, int32_t depth, int32_t end) {
  const int32_t left = row != nullptr ? end - depth : 0;
  if (left <= 0) return {};
  return load_vector(row + depth, left < 8 ? left : 8, left >= 8);
}

// Weights are read once. Streaming loads keep them from evicting the rows of a from the caches.
template <typename T>
__device__ inline Words load_weights(const T* column, int32_t depth, int32_t end) {
  const int32_t left = column != nullptr ? end - depth : 0;
  if (left < 8) return load_run(column, depth, end);
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(column + depth));
  return {{v.x, v.y, v.z, v.w}};
}

// The i-th expert with slots, or -1; sets `slots` to the expert's. All lanes of a warp call it together.
__device__ inline int32_t nonempty_expert(const Gemm& g, int32_t i, SlotRange& slots) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto num_experts = static_cast<int32_t>(g.num_experts), num_slots = static_cast<int32_t>(g.num_slots);
  for (int32_t first = 0; first < num_experts; first += 32) {
    SlotRange own{};
    if (first + lane < num_experts) own = slots_of(g.expert_offsets, first + lane, num_experts, num_slots);
    uint32_t used = __ballot_sync(0xffffffffu, own.end > own.begin);
    const int count = __popc(used);
    if (i >= count) {
      i -= count;
      continue;
    }
    for (; i > 0; --i) used &= used - 1;
    const int owner = __ffs(static_cast<int>(used)) - 1;
    slots = {__shfl_sync(0xffffffffu, own.begin, owner), __shfl_sync(0xffffffffu, own.end, owner)};
    return first + owner;
  }
  return -1;
}

// Sums of 16 rows and a warp's 16 columns, as two mma fragments.
template <typename T>
__device__ inline void multiply_rows(float (&sums)[2][4], const T* const (&rows)[2], const T* const (&columns)[2],
                                     int32_t depth) {
  const int32_t own = static_cast<int32_t>(threadIdx.x % 4) * 8;
  Words ahead[kAhead][2];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) ahead[i][j] = load_weights(columns[j], i * kStepDepth + own, depth);
  }
  for (int32_t first = 0; first < depth; first += kAhead * kStepDepth) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int32_t at = first + i * kStepDepth;
      Words a[2], b[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        a[j] = load_run(rows[j], at + own, depth);
        b[j] = ahead[i][j];
        ahead[i][j] = load_weights(columns[j], at + kAhead * kStepDepth + own, depth);
      }
      transpose_quad(b[0].w);
      transpose_quad(b[1].w);
      transpose_quad(a[0].w);
      transpose_quad(a[1].w);
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // 16 depths each
        const uint32_t a_words[4] = {a[0].w[2 * half], a[1].w[2 * half], a[0].w[2 * half + 1], a[1].w[2 * half + 1]};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t b_words[2] = {b[j].w[2 * half], b[j].w[2 * half + 1]};
          MmaProduct<T>::mma(sums[j], a_words, b_words);
        }
      }
    }
  }
}

// Applies the mask of dropout to a lane's sums: slots slot, slot + 8 and columns c, c + 1 of both fragments.
__device__ inline void mask_decoded(float (&sums)[2][4], const DropoutMask& mask, int32_t slot, const int32_t (&c)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const DropoutRow row(mask, slot + 8 * i);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int v = 0; v < 2; ++v) sums[j][2 * i + v] = row.keeps(c[j] + v) ? sums[j][2 * i + v] : 0.0f;
    }
  }
}

// A lane's part of a row: columns first, first + 1 of each of the two fragments.
struct DecodeRow {
  float v[2][2];
};

// For kGlu, gate and up are v[0][i] and v[1][i] (two halves), or v[j][0] and v[j][1] (interleaved).
template <typename T>
__device__ inline void store_decoded(const Gemm& g, float scale, const T* bias, int32_t bias_end, int64_t slot,
                                     const int32_t (&columns)[2], const int32_t (&ends)[2], DecodeRow row) {
  const bool glu = g.epilogue == Epilogue::kGlu;
  T* const raw = static_cast<T*>(glu ? g.h : g.out);
  const int64_t raw_stride = glu ? g.h_stride : g.out_stride;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t column = columns[j] + i;
      if (column >= ends[j]) continue;
      if (bias != nullptr && column < bias_end) row.v[j][i] += to_float(bias[column]);
      row.v[j][i] *= scale;
      if (raw != nullptr) raw[slot * raw_stride + column] = from_float<T>(row.v[j][i]);
    }
  }
  if (!glu) return;
  const bool pairs = g.options.gated && g.options.interleaved;  // (gate, up) in adjacent columns
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int j = i / 2, k = i % 2;
    const bool gate = !g.options.gated || (pairs ? k == 0 : j == 0);
    const int32_t column = columns[j] + k;
    if (!gate || column >= ends[j]) continue;
    const float up = pairs ? row.v[j][1] : row.v[1][k];
    static_cast<T*>(g.out)[slot * g.out_stride + (pairs ? column / 2 : column)] =
        from_float<T>(gate_value(g.options, row.v[j][k], up));
  }
}

// At least 4 blocks per SM: otherwise nvcc may spill registers to fit a fifth.
template <typename T>
__global__ void __launch_bounds__(32 * kDecodeWarps, 4) decode_kernel(const __grid_constant__ Gemm g) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const auto group = static_cast<int32_t>(blockIdx.x * kDecodeWarps) + warp;
  const TileColumns tile = tile_columns(g, group, kDecodeColumns);
  const auto num_experts = static_cast<int32_t>(g.num_experts);
  const bool unassigned = blockIdx.y + 1 == gridDim.y;  // unassigned rows, past expert_offsets[E], are zeroed
  SlotRange slots = slots_of(g.expert_offsets, num_experts, num_experts, static_cast<int32_t>(g.num_slots));
  const int32_t expert = unassigned ? 0 : nonempty_expert(g, static_cast<int32_t>(blockIdx.y), slots);
  if (expert < 0) return;
  const T* const bias =
      unassigned || g.bias == nullptr ? nullptr : static_cast<const T*>(g.bias) + expert * g.bias_stride;
  const int32_t n_end = ExpertMatrix<T>(g.b, g.n, g.c, expert).n_end;
  const auto bias_end = g.epilogue == Epilogue::kStore ? n_end : static_cast<int32_t>(g.n);
  // Lane 4 i + q loads column i of both fragments and holds the sums of columns 2 q and 2 q + 1.
  int32_t own[2], ends[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    own[j] = tile.column(8 * j + lane % 4 * 2);
    ends[j] = tile.end(8 * j);
  }
  for (int32_t first = slots.begin; first < slots.end; first += kDecodeRows) {
    float sums[2][4] = {};
#pragma unroll 1
    for (int pair = g.low.rank > 0 ? 0 : 1; pair < 2; ++pair) {  // the operands of g.low, then those of g
      const bool low = pair == 0;
      const Rows& a = low ? g.low.a : g.a;
      const ExpertOperand& b = low ? g.low.b : g.b;
      const ExpertMatrix<T> matrix(b, g.n, low ? g.low.rank : g.c, expert);
      const T *rows[2], *columns[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t slot = first + lane / 4 + 8 * i;
        const bool used = slot < slots.end && !unassigned;
        const int32_t row = !used ? -1 : a.indices != nullptr ? a.indices[slot] : slot;
        rows[i] = row >= 0 && row < a.count ? static_cast<const T*>(a.data) + row * a.stride : nullptr;
        const int32_t column = tile.column(8 * i + lane / 4);
        columns[i] = column < ends[i] && column < matrix.n_end ? matrix.data + column * b.n_stride : nullptr;
      }
      multiply_rows(sums, rows, columns, unassigned ? 0 : matrix.k_end);
      if (low && g.low.mask.drops()) mask_decoded(sums, g.low.mask, first + lane / 4, own);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t slot = first + lane / 4 + 8 * i;
      if (slot >= slots.end) continue;
      store_decoded<T>(g, unassigned ? 1.0f : scale_of(g, expert), bias, bias_end, slot, own, ends,
                       {{{sums[0][2 * i], sums[0][2 * i + 1]}, {sums[1][2 * i], sums[1][2 * i + 1]}}});
    }
  }
}

}  // namespace switchgear::cuda
