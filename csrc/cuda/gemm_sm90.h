// SPDX-License-Identifier: BSD-3-Clause
// Which tile gemm_sm90 takes for a problem: a table and pure functions of what the host knows.
#pragma once
#include <cstdint>

#include "gemm.h"

namespace switchgear::cuda::sm90 {

constexpr int kMaxExperts = 1024;  // that a block keeps the tiles of

// Whether gates and ups are the halves of b's columns: a tile then takes both from two places.
__host__ __device__ constexpr bool gate_halves(const Gemm& g) {
  return g.epilogue == Epilogue::kGlu && g.options.gated && !g.options.interleaved;
}

// A tile is 128 x n; see gemm_sm90.cuh. A stage is (128 + n) rows of 128 bytes. The ring takes what a block's 227 KB leave.
struct ConfigRow {
  int max_rows_per_expert;  // up to which mean this row of the table is picked
  int n, stages;
};
enum class ConfigKind : uint8_t { kFewRows16, kFewRows64, kRows128, kRows192 };  // index into kConfigs

// Few rows: weights stream through; an H100 needs about 20 KB per SM under way, and a tile as high as its rows saves the
// copies of rows that do not exist. From 65 rows on, 128 rows a tile.
inline constexpr ConfigRow kConfigs[] = {
    {16, 16, 10},          // slots x 128 columns
    {64, 64, 6},           // slots x 128 columns
    {0x7fffffff, 128, 6},  // 128 slots x columns
    {0x7fffffff, 192, 5}   // 128 slots x columns
};

// Cycles of shared memory per 16 of the inner dimension of a tile, per column that is computed, where the products take one:
// the two m64 instructions read 64 rows of P and n of Q each, and TMA writes both, 32 bytes a row, at 128 bytes a cycle.
// 128: 1.25, 192: 1.08.
constexpr double cycles_per_column(int n) {
  const double cycles = 32.0 * (2 * (64 + n) + 128 + n) / 128;
  return (cycles > n ? cycles : n) / n;
}

constexpr double cost_of_columns(int64_t columns, int n) {
  return static_cast<double>((columns + n - 1) / n * n) * cycles_per_column(n);
}

// 192 columns a tile where the columns past the edge cost less than reading shared memory more often.
constexpr bool wide_tiles(int64_t columns) { return cost_of_columns(columns, 192) < cost_of_columns(columns, 128); }

constexpr ConfigKind pick_config(const Gemm& g) {
  const int64_t rows_per_expert = (g.num_slots + g.num_experts - 1) / g.num_experts;
  const bool backward = g.epilogue == Epilogue::kGluBackward;  // its registers do not go with 192 accumulators
  if (!backward && rows_per_expert <= kConfigs[0].max_rows_per_expert) return ConfigKind::kFewRows16;
  if (!backward && rows_per_expert <= kConfigs[1].max_rows_per_expert) return ConfigKind::kFewRows64;
  // Blocks of 64 columns of weights along n cannot be cut into 96 gates and 96 ups.
  if (backward || (gate_halves(g) && !g.b.k_contiguous()) || !wide_tiles(g.n)) return ConfigKind::kRows128;
  return ConfigKind::kRows192;
}

}  // namespace switchgear::cuda::sm90
