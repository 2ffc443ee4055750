// SPDX-License-Identifier: BSD-3-Clause
// Picks the tile of gemm_sm90 for a problem: a table and pure functions of what the host knows.
#pragma once
#include <cstdint>

#include "gemm.h"

namespace switchgear::cuda::sm90 {

constexpr int kMaxExperts = 1024;  // for which a block keeps the tile table

// Whether gates and ups are separate halves of b's columns: a tile then takes columns of both.
__host__ __device__ constexpr bool gate_halves(const Gemm& g) {
  return g.epilogue == Epilogue::kGlu && g.options.gated && !g.options.interleaved;
}

// A tile is 128 x n; see gemm_sm90.cuh. A stage is (128 + n) rows of 128 bytes. The ring uses the rest of a block's 227 KB.
struct ConfigRow {
  int max_rows_per_expert;  // largest mean number of rows per expert for which this row of the table is picked
  int n, stages;
};
enum class ConfigKind : uint8_t { kFewRows16, kFewRows64, kRows128, kRows192 };  // index into kConfigs

// Few rows: the weights stream through. An H100 needs about 20 KB per SM in flight, and a tile no higher than the rows copies
// no padding. From 65 rows on, a tile has 128 rows.
inline constexpr ConfigRow kConfigs[] = {
    {16, 16, 10},          // slots x 128 columns
    {64, 64, 6},           // slots x 128 columns
    {0x7fffffff, 128, 6},  // 128 slots x columns
    {0x7fffffff, 192, 5}   // 128 slots x columns
};

// Shared-memory cycles per 16 depths of a tile and per computed column, if the products take one cycle: the two m64
// instructions read 64 rows of P and n of Q each, and TMA writes both, 32 bytes per row, at 128 bytes per cycle.
// 128: 1.25, 192: 1.08.
constexpr double cycles_per_column(int n) {
  const double cycles = 32.0 * (2 * (64 + n) + 128 + n) / 128;
  return (cycles > n ? cycles : n) / n;
}

constexpr double cost_of_columns(int64_t columns, int n) {
  return static_cast<double>((columns + n - 1) / n * n) * cycles_per_column(n);
}

// 192 columns per tile if the padding costs less than the extra reads of shared memory.
constexpr bool wide_tiles(int64_t columns) { return cost_of_columns(columns, 192) < cost_of_columns(columns, 128); }

constexpr ConfigKind pick_config(const Gemm& g) {
  const int64_t rows_per_expert = (g.num_slots + g.num_experts - 1) / g.num_experts;
  const bool backward = g.epilogue == Epilogue::kGluBackward;  // its registers do not fit beside 192 accumulators
  if (!backward && rows_per_expert <= kConfigs[0].max_rows_per_expert) return ConfigKind::kFewRows16;
  if (!backward && rows_per_expert <= kConfigs[1].max_rows_per_expert) return ConfigKind::kFewRows64;
  // With n contiguous, weights come in blocks of 64 columns, which cannot be cut into 96 gates and 96 ups.
  if (backward || (gate_halves(g) && !g.b.k_contiguous()) || !wide_tiles(g.n)) return ConfigKind::kRows128;
  return ConfigKind::kRows192;
}

}  // namespace switchgear::cuda::sm90
