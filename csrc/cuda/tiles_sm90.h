// SPDX-License-Identifier: BSD-3-Clause
// The tunables of the grouped GEMMs on wgmma (gemm_sm90.cuh): a row per tile, and pure functions that pick one. The launchers compile
// a kernel for every row and epilogue it takes, so to try a tile is to add a row; tools/gpu/sweep.py times variants of the rows.
// The compiler checks each row's registers here and its shared memory in gemm_sm90.cuh.
//
// No row has been timed on a GPU: sizes follow from the derivations beside them.
#pragma once
#include <cstdint>
#include <iterator>

#include "tiles_sm80.h"

namespace switchgear::cuda::sm90 {

// What a tile is compiled for, as bits: epilogues of a gemm, and weight gradients.
inline constexpr unsigned kStore = 1, kGlu = 2, kGluBackward = 4, kWgrad = 8;

// 128 rows of out x n columns; or, in rows with a limit of rows per expert, n slots x 128 columns. A stage is (128 + n) rows of 128
// bytes. The ring uses the rest of a block's 227 KB.
struct TileRow {
  int min_rows_per_expert, max_rows_per_expert;  // mean numbers for which a gemm considers it
  int n, stages;
  int cluster;       // blocks that share what they load of the weights
  bool cooperative;  // both consumers on one tile; else each on its own, in ping-pong
  unsigned takes;    // a gemm's epilogues, kWgrad
  int band = kBand;

  constexpr bool few_rows() const { return max_rows_per_expert < kAnyRows; }
};

// Of a consumer thread. Two consumers and a producer share 504 registers of a thread each.
constexpr int accumulators(int n, bool cooperative) { return (cooperative ? 1 : 2) * n / 2; }
constexpr int consumer_registers(int n, bool cooperative) {
  return accumulators(n, cooperative) > 128 ? 232 : accumulators(n, cooperative) == 128 ? 216 : 208;
}

// From this mean number of rows per expert on, tiles come in pairs: two thirds of an expert's tiles have one then.
inline constexpr int kPairs = 256;

// Few rows: the weights stream through. An H100 needs about 20 KB per SM in flight, and a tile no higher than the rows copies
// no padding. From 65 rows on, a tile has 128 rows. The gate's gradient has registers left for 128 accumulators only, as have
// the indices that a weight gradient reads ahead; a cooperative tile would not hide that epilogue.
inline constexpr TileRow kTiles[] = {
    // mean rows      n  stages cluster cooperative takes
    {0, 16, 16, 10, 1, false, kStore | kGlu},
    {0, 64, 64, 6, 1, false, kStore | kGlu},
    {0, kAnyRows, 128, 6, 1, false, kStore | kGlu | kGluBackward | kWgrad},
    {0, kAnyRows, 192, 5, 1, false, kStore | kGlu},
    {kPairs, kAnyRows, 128, 6, 2, false, kGluBackward},
    {kPairs, kAnyRows, 192, 5, 2, false, kStore},
    {kPairs, kAnyRows, 256, 4, 2, true, kStore | kGlu | kWgrad},
};

// Consumers need 40 registers or more beside their accumulators.
constexpr bool registers_suffice() {
  for (const TileRow& row : kTiles) {
    if (accumulators(row.n, row.cooperative) + 40 > consumer_registers(row.n, row.cooperative)) return false;
  }
  return true;
}
static_assert(registers_suffice());

// One row takes every product: any number of rows, any layout, nothing shared.
constexpr bool one_takes_all() {
  for (const TileRow& row : kTiles) {
    if (row.takes == (kStore | kGlu | kGluBackward | kWgrad) && row.min_rows_per_expert == 0 && !row.few_rows() &&
        row.n % 128 == 0 && row.cluster == 1) {
      return true;
    }
  }
  return false;
}
static_assert(one_takes_all());

// Stored weights (stored_sm90.cuh): 128 columns x `slots`. The ring has as many stages as fit, up to `stages`.
struct StoredRow {
  int max_rows_per_expert;
  int slots, stages;
  int band = kBand;
};
inline constexpr StoredRow kStoredTiles[] = {
    // mean rows, slots, stages
    {16, 16, 10},
    {64, 64, 10},
    {kAnyRows, 128, 10},
};

// ---- costs ---------------------------------------------------------------------------------------------------------------

// Cycles per 16 depths of a tile and per computed column, at least the one of the products. Shared memory, 128 bytes a cycle:
// two instructions of 64 rows read these rows and n of Q, 32 bytes each, and TMA writes all. L2 delivers 46 bytes a cycle to
// each of an H100's 132 multiprocessors: P, and Q or half of it.
// 128: 1.39, 192: 1.16; in pairs 128: 1.25, 192: 1.08, 256: 1.00.
constexpr double cycles_per_column(const TileRow& row) {
  const double n = row.n, shared = 32 * (2 * (64 + n) + 128 + n) / 128, l2 = 32 * (128 + n / row.cluster) / 46;
  const double cycles = shared > l2 ? shared : l2;
  return (cycles > n ? cycles : n) / n;
}

// Instructions of a cooperative tile's epilogue per accumulator, counted in the machine code.
inline constexpr int kStoreInstructions = 2, kGluInstructions = 9, kGluBackwardInstructions = 59,
                     kWgradInstructions = 2;

// The relative cost of `columns` columns with an inner dimension of `depth`. A cooperative tile also costs its epilogue: n / 2
// accumulators a thread, two warps a scheduler, against depth / 16 · n cycles of products.
constexpr double cost_of_columns(const TileRow& row, int64_t columns, int64_t depth, int instructions) {
  const double stored = row.cooperative ? 16.0 * instructions / static_cast<double>(depth > 0 ? depth : 1) : 0.0;
  return static_cast<double>((columns + row.n - 1) / row.n * row.n) * (cycles_per_column(row) + stored);
}

// ---- picking -------------------------------------------------------------------------------------------------------------

// What the host knows of a gemm, and of a weight gradient.
struct GemmSize {
  int64_t rows_per_expert, columns, depth;
  unsigned epilogue;         // kStore, kGlu or kGluBackward
  bool half_blocks = false;  // a tile's columns are two halves, in blocks of 64 columns
};

// An index into kTiles: the first row for few rows that takes it, else the one of least cost.
constexpr int pick_tile(const GemmSize& size) {
  const int instructions = size.epilogue == kGlu           ? kGluInstructions
                           : size.epilogue == kGluBackward ? kGluBackwardInstructions
                                                           : kStoreInstructions;
  int best = -1;
  double least = 0.0;
  for (int i = 0; i < static_cast<int>(std::size(kTiles)); ++i) {
    const TileRow& row = kTiles[i];
    if ((row.takes & size.epilogue) == 0 || size.rows_per_expert < row.min_rows_per_expert ||
        size.rows_per_expert > row.max_rows_per_expert) {
      continue;
    }
    if (row.few_rows()) return i;
    if (size.half_blocks && row.n % 128 != 0) continue;
    const double cost = cost_of_columns(row, size.columns, size.depth, instructions);
    if (best < 0 || cost < least) best = i, least = cost;
  }
  return best;
}

struct WgradSize {
  int64_t m, n, depth;
  bool shares_a, shares_b;  // whether a pair may share this operand: it is not gathered
};

// An index into kTiles. A pair shares b, and so has two tiles of rows, or else a, and has two of columns.
constexpr int pick_tile(const WgradSize& size) {
  const auto up = [](int64_t number, int64_t tile) { return (number + tile - 1) / tile * tile; };
  int best = -1;
  double least = 0.0;
  for (int i = 0; i < static_cast<int>(std::size(kTiles)); ++i) {
    const TileRow& row = kTiles[i];
    if ((row.takes & kWgrad) == 0 || (row.cluster > 1 && !size.shares_a && !size.shares_b)) continue;
    const int64_t m = up(size.m, size.shares_b ? 128 * row.cluster : 128);
    const int64_t n = size.shares_b ? size.n : up(size.n, row.n * row.cluster);
    const double cost = static_cast<double>(m) * cost_of_columns(row, n, size.depth, kWgradInstructions);
    if (best < 0 || cost < least) best = i, least = cost;
  }
  return best;
}

}  // namespace switchgear::cuda::sm90
