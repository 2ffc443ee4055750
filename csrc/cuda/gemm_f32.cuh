// SPDX-License-Identifier: BSD-3-Clause
// Exact float32 products for the tiles of gemm_sm80.cuh: fused multiply-adds on the ordinary cores, where tf32 is not allowed.
//
// A thread computes the same elements of a tile as with mma, so that everything around is shared. For four depths at a time it
// holds its rows of a in registers and walks the columns of b in pairs: 64 x 64 a warp are 512 multiply-adds a thread per 40
// loads of 16 bytes, all of them free of bank conflicts. Bound by the cores above about 12 rows per expert on an A100.
//
// Numeric contract: one accumulator per element, k ascending one by one, each step a fused multiply-add. All tiles and both
// layouts of b do the same, so the bits of a row depend on that row alone.
//
// Floor: 19.5 TFLOP/s on an A100, 67 on an H100.
#pragma once
#include "gemm_load.cuh"
#include "gemm_sm80.cuh"

namespace switchgear::cuda {

// Depths 4·chunk … 4·chunk + 3 of row `row` of a tile.
template <int kRows, int kDepthBytes, bool kDepthMajor>
__device__ inline void load_four(float (&v)[4], const std::byte* tile, int row, int chunk) {
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

struct FmaProduct {
  using Element = float;

  template <typename Tile, bool kADepthMajor, bool kBDepthMajor>
  static __device__ void multiply_stage(Sums<Tile>& sums, const std::byte* a_tile, const std::byte* b_tile,
                                        const WarpPlace<Tile>& at) {
    const int first_row = at.row + at.lane / 4, first_column = at.column + at.lane % 4 * 2;
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::kDepthBytes / kChunkBytes; ++chunk) {
      float a[2 * Tile::kMmaRows][4];
#pragma unroll
      for (int i = 0; i < 2 * Tile::kMmaRows; ++i) {
        load_four<Tile::kRows, Tile::kDepthBytes, kADepthMajor>(a[i], a_tile, first_row + 8 * i, chunk);
      }
#pragma unroll
      for (int j = 0; j < Tile::kMmaColumns; ++j) {
        float b[2][4];
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          load_four<Tile::kColumns, Tile::kDepthBytes, kBDepthMajor>(b[v], b_tile, first_column + 8 * j + v, chunk);
        }
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
