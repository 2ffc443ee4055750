// SPDX-License-Identifier: BSD-3-Clause
// The tunables of the grouped GEMMs on mma.sync: a row per tile, and pure functions that pick one. Every architecture from sm_80 on
// takes these rows, Hopper where gemm_sm90 does not. The compiler checks each row's shared memory and registers.
//
// No row has been timed on a GPU: sizes follow from the derivations beside them.
#pragma once
#include <cstdint>

namespace switchgear::cuda {

// Row tiles that go through all columns together (gemm_schedule.cuh). Blocks that run at the same time then share these rows of a
// and few columns of b, which fit in L2 together, and b is read once per band. 1: columns first; many: rows first.
inline constexpr int kBand = 8;

// How a product is tiled: a block of `threads` computes [rows, columns] of out. It reads depth_bytes of a and b at a time
// through a ring of `stages` in shared memory.
struct TileConfig {
  int max_rows_per_expert;  // largest mean number of rows per expert for which this row of the table is picked
  int rows, columns;
  int warps_m, warps_n;
  int depth_bytes;
  int stages;
  int blocks;  // blocks per multiprocessor that registers and an A100's shared memory allow
  int band = kBand;

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int stage_bytes() const { return (rows + columns) * depth_bytes; }
  // The ring. Later the same memory holds the float32 accumulators for the epilogue, in two passes if they do not fit.
  constexpr int shared_bytes() const { return stages * stage_bytes(); }
  constexpr int passes() const { return rows * columns * 4 <= shared_bytes() ? 1 : 2; }
  constexpr int accumulators() const { return rows * columns / threads(); }  // of a thread
};

// What a block may have on sm_86, sm_89 and sm_120, the least of all architectures from sm_80 on. A multiprocessor has one
// KB more there, of which every block takes one.
inline constexpr int kLeastSharedBytes = 99 << 10;

inline constexpr int kAnyRows = 0x7fffffff;

// Whether the accumulators, `sums` for each element of a tile, take half of a thread's registers at most: fragments read ahead,
// addresses and the epilogue need the rest. And whether the ring fits.
constexpr bool fits(const TileConfig& tile, int sums) {
  constexpr int kRegisters = 1 << 16;  // of a multiprocessor
  return 2 * sums * tile.accumulators() <= kRegisters / (tile.threads() * tile.blocks) &&
         tile.shared_bytes() <= kLeastSharedBytes;
}
template <int kSize>
constexpr bool fit(const TileConfig (&table)[kSize], int sums) {
  for (const TileConfig& tile : table) {
    if (!fits(tile, sums)) return false;
  }
  return true;
}

// ---- plain weights: gemm_sm80.cuh and gemm_f32.cuh -----------------------------------------------------------------------

// Up to 16 rows, reading the weights is the bound: deep rings, little else. With 64 rows per expert an A100's tensor cores are
// busy three quarters of the time. 128 x 128 with 64 x 64 per warp reads 4 KB of shared memory per 64 cycles of mma (half the
// limit). With two blocks per SM, the epilogue of one overlaps the products of the other.
//
// One table serves all architectures. Two blocks of the tiles that tensor cores bind fit into the 100 KB of a multiprocessor
// of sm_86, sm_89 and sm_120. Of the 16-row tile one block does; it alone keeps 54 KB of weights in flight there, where
// latency times an SM's share of the bandwidth is below 10 KB. Elsewhere two fit.
inline constexpr TileConfig kTiles[] = {
    // mean rows  tile    warps depth stages, blocks; shared memory
    {16, 16, 128, 1, 4, 128, 4, 2},        // 72 KB
    {80, 64, 128, 2, 2, 64, 4, 2},         // 48 KB
    {kAnyRows, 128, 128, 2, 2, 64, 3, 2},  // 48 KB
};
enum class TileKind : uint8_t { k16, k64, k128 };  // index into kTiles
static_assert(fit(kTiles, 1));

// The tile for a mean number of rows per expert, which is all the host knows. Few columns or a short inner dimension use the
// same tiles: the padding costs less than a second set of kernels.
constexpr TileKind pick_tile(int64_t rows_per_expert) {
  int kind = 0;
  while (rows_per_expert > kTiles[kind].max_rows_per_expert) ++kind;
  return static_cast<TileKind>(kind);
}

// ---- a few tokens: gemm_decode.cuh ---------------------------------------------------------------------------------------

inline constexpr int kDecodeSlots = 128;  // at most
inline constexpr int kDecodeWarps = 4;    // of a block
inline constexpr int kAhead = 4;          // loads in flight per column, of 64 bytes each

// ---- stored weights: stored_gemm.cuh and decoded_gemm.cuh ----------------------------------------------------------------

// A stage is eight steps: 64 columns x 64 depths for few rows, 128 x 32 for many; four if products are spread. A warp has
// all rows of the tile, so no weight is decoded twice.
inline constexpr TileConfig kStoredTiles[] = {
    // mean rows  tile   warps depth stages, blocks
    {16, 16, 64, 1, 4, 128, 4, 4},
    {kAnyRows, 64, 128, 1, 4, 64, 4, 2},
    {16, 16, 32, 1, 4, 128, 4, 4},  // if all tiles fit at once: `spreads` of stored_gemm.cuh
};
enum class StoredKind : uint8_t { kFew, kMany, kSpread };  // index into kStoredTiles
static_assert(fit(kStoredTiles, 2));                       // the sums of a group, and the total
constexpr const TileConfig& stored_tile(StoredKind kind) { return kStoredTiles[static_cast<int>(kind)]; }

// A stage is 32 depths of the dtype of a.
inline constexpr TileConfig kDecodedTiles[] = {
    {kAnyRows, 64, 128, 2, 2, 64, 4, 2},   // 16 bits
    {kAnyRows, 64, 128, 2, 2, 128, 3, 2},  // float32
};
static_assert(fit(kDecodedTiles, 1));

}  // namespace switchgear::cuda
