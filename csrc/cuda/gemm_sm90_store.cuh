// SPDX-License-Identifier: BSD-3-Clause
// From the accumulators of a wgmma to rows in memory, for tiles without a gate: products of a gemm, and weight gradients.
//
// A warp has blocks of 16 rows. It rounds 64 columns at a time and stages them in shared memory by stmatrix, four 8 x 8 matrices
// each. The staged rows have 128 bytes with the 128-byte swizzle, so neither matrices nor rows meet in a bank. They leave in one
// of two ways:
//   lines   eight lanes read a row and store its 128 bytes: a value takes 2 instructions more, and rows may be left out
//   a box   one lane has TMA store all of them. Cooperative tiles do so if all 16 rows of the warp are the expert's. TMA reads
//           them while the next columns are staged, so each 64 columns of a tile have memory of their own: 2 KB of the warp's,
//           and 6 KB of the ring's last stage, which is free once both consumers have multiplied it. The tile's last stage is
//           therefore released after the epilogue; the others are filled for the next tile meanwhile.
//
// Numeric contract: float32, rounded once when stored.
#pragma once
#include "gemm_sm90_epilogue.cuh"
#include "hopper.cuh"

namespace switchgear::cuda::sm90 {

constexpr int kStagedColumns = 64;
constexpr int kStagedPitch = 2 * kStagedColumns;  // bytes
constexpr int kStagedBytes = 16 * kStagedPitch;   // per warp; a multiple of the swizzle pattern

// Where a warp stages 64 columns of its rows.
struct Staging {
  unsigned char* own;
  unsigned char* lent;  // of the ring, for all columns after the first 64; null: none

  __device__ unsigned char* of(int pass) const { return pass == 0 ? own : lent + (pass - 1) * kStagedBytes; }
};

// The offset of 16 bytes of a staged row.
__device__ inline int staged_at(int row, int chunk) { return row * kStagedPitch + (chunk ^ row % 8) * 16; }

// Columns first and first + 1 of one row in a register.
template <typename T>
__device__ inline uint32_t pack_pair(float first, float second) {
  return bits_of(from_float<T>(first)) | bits_of(from_float<T>(second)) << 16;
}

// Nothing is done to the products before they are rounded.
struct AsIs {
  __device__ void apply(int, float (&)[4]) const {}
};

// Bias and scale of an expert.
template <typename T>
struct Affine {
  const T* bias;  // null: none
  float scale;
  int columns;

  __device__ Affine(const Gemm& g, int expert)
      : bias(g.bias == nullptr || expert == g.num_experts
                 ? nullptr
                 : static_cast<const T*>(g.bias) + static_cast<int64_t>(expert) * g.bias_stride),
        scale(g.scales == nullptr ? 1.0f : scale_of(g, expert)),
        columns(static_cast<int>(g.n)) {}

  // Columns `column` and the next, of two rows.
  __device__ void apply(int column, float (&v)[4]) const {
    if (bias != nullptr && column < columns) {  // a multiple of 8
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(bias + column);
      float values[8];
      unpack<T>(values, Words{{pair, 0, 0, 0}});
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] += values[i % 2];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] *= scale;
  }
};

// Rounds and stores columns [16 · sixteen, …) of the staged ones: eight columns of two rows, and the next eight.
template <typename T>
__device__ inline void stage_sixteen(unsigned char* staging, int sixteen, const float (&first)[4],
                                     const float (&second)[4]) {
  const int lane = this_thread() % 32;
  const uint32_t matrices[4] = {pack_pair<T>(first[0], first[1]), pack_pair<T>(first[2], first[3]),
                                pack_pair<T>(second[0], second[1]), pack_pair<T>(second[2], second[3])};
  ptx::stmatrix_x4(staging + staged_at(lane % 16, lane / 16 + 2 * sixteen), matrices);
}

// Stores the staged columns, from `column` on, of the warp's rows from `first_row` on. row_at(r): where row r of the tile
// starts, or null. All lanes have staged their values.
template <typename T, typename RowAt>
__device__ inline void store_staged(const unsigned char* staging, int first_row, int column, int columns,
                                    const RowAt& row_at) {
  const int lane = this_thread() % 32;
  __syncwarp();
  column += lane % 8 * 8;
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const int r = i + lane / 8;
    const uint4 run = *reinterpret_cast<const uint4*>(staging + staged_at(r, lane % 8));
    T* const row = row_at(first_row + r);
    if (row != nullptr && column < columns) *reinterpret_cast<uint4*>(row + column) = run;
  }
  __syncwarp();  // before the next columns are staged
}

// First row of block i of this warp in a tile of 128.
template <int kBlocks>
__device__ inline int first_row_of_warp(int i) {
  return 64 * (kBlocks == 1 ? this_thread() / 128 - 1 : i) + this_thread() % 128 / 32 * 16;
}

// Has TMA store the staged columns of 16 rows, from (column, row, plane) of a tensor on, outside which nothing is written.
__device__ inline void store_box(const CUtensorMap* map, const unsigned char* staging, int column, int row, int plane) {
  ptx::fence_proxy_async();
  __syncwarp();
  if (this_thread() % 32 != 0) return;
  ptx::tma_store_3d(map, staging, column, row, plane);
  ptx::tma_store_commit();
}

// TMA has read what the warp staged: the memory may be written again.
__device__ inline void wait_for_boxes() {
  if (this_thread() % 32 == 0) ptx::tma_store_wait_read<0>();
  __syncwarp();
}

// Rounds and stages columns 64 · pass and the next 63 of a block; `column` is the first one's in the tensor.
template <typename T, int kPerBlock, typename Adjust>
__device__ inline void stage_pass(const float (&acc)[kPerBlock], int pass, unsigned char* staging, int column,
                                  const Adjust& adjust) {
#pragma unroll
  for (int sixteen = 0; sixteen < kStagedColumns / 16; ++sixteen) {
    float v[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int eight = 2 * sixteen + half;
#pragma unroll
      for (int i = 0; i < 4; ++i) v[half][i] = acc[4 * (8 * pass + eight) + i];
      adjust.apply(column + 8 * eight + this_thread() % 4 * 2, v[half]);
    }
    stage_sixteen<T>(staging, sixteen, v[0], v[1]);
  }
}

// Stores a tile of 128 rows, of which this warpgroup has kBlocks blocks of 64, line by line.
template <typename T, int kN, int kBlocks, typename Adjust, typename RowAt>
__device__ inline void store_lines(const Accumulators<kN, kBlocks>& acc, unsigned char* staging, int first_column,
                                   int columns, const Adjust& adjust, const RowAt& row_at) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int pass = 0; pass < kN / kStagedColumns; ++pass) {
      const int column = first_column + kStagedColumns * pass;
      stage_pass<T>(acc[i], pass, staging, column, adjust);
      store_staged<T>(staging, first_row_of_warp<kBlocks>(i), column, columns, row_at);
    }
  }
}

// Stores the 16 rows of this warp of a cooperative tile as boxes, from row `row` of the tensor on.
template <typename T, int kN, typename Adjust>
__device__ inline void store_boxes(const Accumulators<kN, 1>& acc, const Staging& staging, const CUtensorMap* map,
                                   int first_column, int row, int plane, const Adjust& adjust) {
#pragma unroll
  for (int pass = 0; pass < kN / kStagedColumns; ++pass) {
    const int column = first_column + kStagedColumns * pass;
    stage_pass<T>(acc[0], pass, staging.of(pass), column, adjust);
    store_box(map, staging.of(pass), column, row, plane);
  }
}

}  // namespace switchgear::cuda::sm90
