// SPDX-License-Identifier: BSD-3-Clause
// Exact float32 products for the tiles of gemm_sm80.cuh: fused multiply-adds on the CUDA cores, if tf32 is not allowed.
//
// A thread computes the same elements of a tile as with mma, so all surrounding code is shared. For four depths at a time it
// keeps its rows of a in registers and reads the columns of b in pairs: 32 x 64 per warp are 256 multiply-adds per thread for
// 20 loads of 16 bytes, all free of bank conflicts. 64 rows are the largest tile, since twice as many sums would leave no
// registers for loads in flight. Bound by the cores above about 25 rows per expert on an A100, 40 on an H100.
//
// Numeric contract: one accumulator per element, k ascending one by one, each step a fused multiply-add. All tiles and both
// layouts of b do the same, so the bits of a row depend only on that row.
//
// Floor: 19.5 TFLOP/s on an A100, 67 on an H100.
#pragma once
#include "gemm_load.cuh"
#include "gemm_sm80.cuh"

namespace switchgear::cuda {

// Depths 4·chunk … 4·chunk + 3 of row `row` of a tile.
template <int kRows, int kDepthBytes, bool kDepthMajor>
__device__ inline void load_row(float (&v)[4], const std::byte* tile, int row, int chunk) {
  if constexpr (kDepthMajor) {
    const float4 all = *reinterpret_cast<const float4*>(tile + depth_major_offset<kDepthBytes>(row, chunk));
    v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int offset = row_major_offset<float, kRows>(4 * chunk + i, row / 4) + row % 4 * 4;
      v[i] = *reinterpret_cast<const float*>(tile + offset);
    }
  }
}

// The same for two rows: `row`, which is even, and the next.
template <int kRows, int kDepthBytes, bool kDepthMajor>
__device__ inline void load_rows(float (&v)[2][4], const std::byte* tile, int row, int chunk) {
  if constexpr (kDepthMajor) {
    load_row<kRows, kDepthBytes, true>(v[0], tile, row, chunk);
    load_row<kRows, kDepthBytes, true>(v[1], tile, row + 1, chunk);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int offset = row_major_offset<float, kRows>(4 * chunk + i, row / 4) + row % 4 * 4;
      const float2 pair = *reinterpret_cast<const float2*>(tile + offset);
      v[0][i] = pair.x, v[1][i] = pair.y;
    }
  }
}

struct FmaProduct {
  using Element = float;
  static constexpr TileKind kLargest = TileKind::k64;

  template <typename Tile, bool kADepthMajor, bool kBDepthMajor>
  using Reader = StageReader<FmaProduct, Tile, kADepthMajor, kBDepthMajor>;

  template <typename Tile, bool kADepthMajor, bool kBDepthMajor>
  static __device__ void multiply_stage(Sums<Tile>& sums, const std::byte* a_tile, const std::byte* b_tile,
                                        const WarpPlace<Tile>& at) {
    const int first_row = at.row + at.lane / 4, first_column = at.column + at.lane % 4 * 2;
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::kDepthBytes / kChunkBytes; ++chunk) {
      float a[2 * Tile::kMmaRows][4];
#pragma unroll
      for (int i = 0; i < 2 * Tile::kMmaRows; ++i) {
        load_row<Tile::kRows, Tile::kDepthBytes, kADepthMajor>(a[i], a_tile, first_row + 8 * i, chunk);
      }
#pragma unroll
      for (int j = 0; j < Tile::kMmaColumns; ++j) {
        float b[2][4];
        load_rows<Tile::kColumns, Tile::kDepthBytes, kBDepthMajor>(b, b_tile, first_column + 8 * j, chunk);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int i = 0; i < Tile::kMmaRows; ++i) {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              sums.v[i][j][v] = fmaf(a[2 * i + v / 2][k], b[v % 2][k], sums.v[i][j][v]);
            }
          }
        }
      }
    }
  }
};

}  // namespace switchgear::cuda
