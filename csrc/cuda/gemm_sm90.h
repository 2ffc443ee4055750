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
  int cluster;       // blocks that share what they load of the weights
  bool cooperative;  // both consumers on one tile; else each on its own
};
enum class ConfigKind : uint8_t { kFewRows16, kFewRows64, kRows128, kRows192, kPairs128, kPairs192, kPairs256 };

// Few rows: the weights stream through. An H100 needs about 20 KB per SM in flight, and a tile no higher than the rows copies
// no padding. From 65 rows on, a tile has 128 rows.
inline constexpr ConfigRow kConfigs[] = {
    {16, 16, 10, 1, false},          // slots x 128 columns
    {64, 64, 6, 1, false},           // slots x 128 columns
    {0x7fffffff, 128, 6, 1, false},  // 128 slots x columns
    {0x7fffffff, 192, 5, 1, false},  // 128 slots x columns
    {0x7fffffff, 128, 6, 2, false},  // in pairs
    {0x7fffffff, 192, 5, 2, false},  // in pairs
    {0x7fffffff, 256, 4, 2, true}    // in pairs
};

// From this mean number of rows per expert on, tiles come in pairs: two thirds of an expert's tiles have one then.
constexpr int64_t kMinRowsOfPairs = 256;

// Cycles per 16 depths of a tile and per computed column, at least the one of the products. Shared memory, 128 bytes a cycle:
// two instructions of 64 rows read these rows and n of Q, 32 bytes each, and TMA writes all. L2 delivers 46 bytes a cycle to
// each of an H100's 132 multiprocessors: P, and Q or half of it.
// 128: 1.39, 192: 1.16; in pairs 128: 1.25, 192: 1.08, 256: 1.00.
constexpr double cycles_per_column(const ConfigRow& c) {
  const double n = c.n, shared = 32 * (2 * (64 + n) + 128 + n) / 128, l2 = 32 * (128 + n / c.cluster) / 46;
  const double cycles = shared > l2 ? shared : l2;
  return (cycles > n ? cycles : n) / n;
}

// Instructions of an epilogue per accumulator, counted in the machine code.
constexpr int kStoreInstructions = 2, kGluInstructions = 9, kWgradInstructions = 2;

// The relative cost of `columns` columns with an inner dimension of `depth`. A cooperative tile also costs its epilogue: n / 2
// accumulators a thread, two warps a scheduler, against depth / 16 · n cycles of products.
constexpr double cost_of_columns(ConfigKind kind, int64_t columns, int64_t depth, int instructions) {
  const ConfigRow& c = kConfigs[static_cast<int>(kind)];
  const double stored = c.cooperative ? 16.0 * instructions / static_cast<double>(depth > 0 ? depth : 1) : 0.0;
  return static_cast<double>((columns + c.n - 1) / c.n * c.n) * (cycles_per_column(c) + stored);
}

constexpr ConfigKind pick_config(const Gemm& g) {
  const int64_t rows_per_expert = (g.num_slots + g.num_experts - 1) / g.num_experts;
  const bool pairs = rows_per_expert >= kMinRowsOfPairs;
  // The registers of this epilogue do not fit beside more accumulators.
  if (g.epilogue == Epilogue::kGluBackward) return pairs ? ConfigKind::kPairs128 : ConfigKind::kRows128;
  if (rows_per_expert <= kConfigs[0].max_rows_per_expert) return ConfigKind::kFewRows16;
  if (rows_per_expert <= kConfigs[1].max_rows_per_expert) return ConfigKind::kFewRows64;
  const int instructions = g.epilogue == Epilogue::kGlu ? kGluInstructions : kStoreInstructions;
  ConfigKind best = ConfigKind::kRows128;
  const auto consider = [&](ConfigKind kind) {
    const double cost = cost_of_columns(kind, g.n, g.c, instructions);
    if (cost < cost_of_columns(best, g.n, g.c, instructions)) best = kind;
  };
  // With n contiguous, weights come in blocks of 64 columns, which cannot be cut into 96 gates and 96 ups.
  if (!gate_halves(g) || g.b.k_contiguous()) consider(ConfigKind::kRows192);
  if (pairs && g.epilogue == Epilogue::kStore) consider(ConfigKind::kPairs192);
  if (pairs) consider(ConfigKind::kPairs256);
  return best;
}

// A pair shares an operand that is not gathered: b, or else a. Indices read ahead leave no registers for 192 columns.
constexpr ConfigKind pick_config(const Wgrad& g) {
  const int64_t depth = g.num_slots / (g.num_experts > 0 ? g.num_experts : 1);
  const auto up = [](int64_t size, int64_t tile) { return (size + tile - 1) / tile * tile; };
  const auto cost = [&](ConfigKind kind, int64_t m, int64_t n) {
    return static_cast<double>(m) * cost_of_columns(kind, n, depth, kWgradInstructions);
  };
  const int64_t m = up(g.m, 128);
  const bool shares_b = g.b.indices == nullptr;
  if (!shares_b && g.a.indices != nullptr) return ConfigKind::kRows128;
  const double paired = cost(ConfigKind::kPairs256, shares_b ? up(g.m, 256) : m, shares_b ? g.n : up(g.n, 512));
  return paired < cost(ConfigKind::kRows128, m, g.n) ? ConfigKind::kPairs256 : ConfigKind::kRows128;
}

}  // namespace switchgear::cuda::sm90
