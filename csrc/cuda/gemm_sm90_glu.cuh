// SPDX-License-Identifier: BSD-3-Clause
// The gate of a cooperative tile: a = glu(h), and h if requested, from the accumulators as wgmma leaves them.
//
// A thread holds eight columns' worth of pairs of two rows. Separate halves: the first 128 of a tile's 256 columns are gates,
// the others their ups, so the up of accumulator k is accumulator k + 64. Interleaved: gate and up are neighbours, and are moved
// to k and k + 64 first. Plain experts: two halves of unrelated gates, one after the other. So one loop of 64 serves all. About
// 9 instructions per accumulator with h, 6 of them the activation's.
//
// Numeric contract: as gemm_sm90_epilogue.cuh; a is computed from the unrounded h.
#pragma once
#include "gemm_sm90_store.cuh"

namespace switchgear::cuda::sm90 {

// Interleaved gates and ups become halves.
__device__ inline void separate_pairs(float (&acc)[128]) {
  float pairs[128];
#pragma unroll
  for (int k = 0; k < 128; ++k) pairs[k] = acc[k];
#pragma unroll
  for (int k = 0; k < 64; ++k) {
    acc[k] = pairs[2 * k];
    acc[k + 64] = pairs[2 * k + 1];
  }
}

// Stages 64 columns of a from interleaved pairs: accumulator k has row k % 2 · 8 + lane / 4 and column 4 · (k / 2) + lane % 4.
template <typename T>
__device__ inline void stage_narrow(const float (&acc)[128], int pass, unsigned char* staging) {
  const int lane = this_thread() % 32;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int row = i % 2 * 8 + lane / 4, column = 4 * (i / 2) + lane % 4;
    *reinterpret_cast<T*>(staging + staged_at(row, column / 8) + column % 8 * 2) = from_float<T>(acc[32 * pass + i]);
  }
}

// The tensor maps of what an epilogue stores.
struct OutMaps {
  CUtensorMap out, h;
};

template <typename T, int kN>
__device__ inline void glu_tile(const Gemm& g, const OutMaps& maps, const RowTile& tile,
                                Accumulators<kN, 1>& accumulators, const Staging& staging) {
  static_assert(kN == 256);
  float (&acc)[128] = accumulators[0];
  const bool gated = g.options.gated, interleaved = gated && g.options.interleaved, halves = gated && !interleaved;
  const int n = static_cast<int>(g.n), first_row = first_row_of_warp<1>(0);
  // The first columns of h of both halves of the tile, and their ends.
  const int first = tile.column * (halves ? 128 : 256), second = halves ? n / 2 + first : first + 128;
  const int first_end = halves ? n / 2 : n;
  if (g.bias != nullptr) {
    const Affine<T> adjust(g, tile.expert);
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      float v[4] = {acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]};
      const int column = (j < 16 ? first : second) + j % 16 * 8;
      if (column < (j < 16 ? first_end : n)) adjust.apply(column + this_thread() % 4 * 2, v);
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[4 * j + i] = v[i];
    }
  }
  // Boxes only where all rows are the expert's, and no column of a gate is an up.
  const bool boxes = staging.lent != nullptr && first_row + 16 <= tile.rows;
  const bool boxes_of_h = boxes && (!halves || first + 128 <= first_end);
  const int slot = tile.first_row + first_row;
  const auto row_of = [&](void* start, int64_t stride) {
    return [=, &tile](int r) -> T* {
      return r < tile.rows ? static_cast<T*>(start) + int64_t{tile.first_row + r} * stride : nullptr;
    };
  };
  if (g.h != nullptr) {
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      const int column = (pass < 2 ? first : second) + pass % 2 * kStagedColumns;
      unsigned char* const staged = boxes_of_h ? staging.of(pass) : staging.own;
      stage_pass<T>(acc, pass, staged, column, AsIs{});
      if (boxes_of_h) {
        store_box(&maps.h, staged, column, slot, 0);
      } else {
        store_staged<T>(staged, first_row, column, pass < 2 ? first_end : n, row_of(g.h, g.h_stride));
      }
    }
  }
  if (interleaved) separate_pairs(acc);
  const auto row_at = row_of(g.out, g.out_stride);
#pragma unroll 1
  for (int part = 0; part < (gated ? 1 : 2); ++part) {
    const float limit = g.options.limit, alpha = g.options.alpha;
    if (limit > 0.0f) {
#pragma unroll
      for (int k = 0; k < 64; ++k) {
        acc[k] = limited_gate(acc[k], limit);
        if (gated) acc[k + 64] = limited_up(acc[k + 64], limit);
      }
    }
    with_activation_of(g, [&]<Activation kActivation>() {
#pragma unroll
      for (int k = 0; k < 64; ++k) acc[k] = rounded_gate_value<kActivation>(gated, alpha, acc[k], acc[k + 64]);
    });
    if (part == 0 && boxes_of_h) wait_for_boxes();  // of h: by now it has been read
#pragma unroll
    for (int pass = 0; pass < 2; ++pass) {
      const int column = (interleaved ? first / 2 : first + 128 * part) + pass * kStagedColumns;
      unsigned char* const staged = boxes ? staging.of(2 * part + pass) : staging.own;
      if (interleaved) {
        stage_narrow<T>(acc, pass, staged);
      } else {
        stage_pass<T>(acc, pass, staged, column, AsIs{});
      }
      if (boxes) {
        store_box(&maps.out, staged, column, slot, 0);
      } else {
        store_staged<T>(staged, first_row, column, interleaved ? n / 2 : first_end, row_at);
      }
    }
#pragma unroll
    for (int k = 0; k < 64; ++k) acc[k] = acc[k + 64];
  }
}

}  // namespace switchgear::cuda::sm90
