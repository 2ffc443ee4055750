// SPDX-License-Identifier: BSD-3-Clause
// What the products of kernels_amx.cpp share: a block of 2 x 2 tiles of sums, and rows as tiles of its second operand.
#pragma once
#include "amx.h"
#include "kernels.h"
#include "simd_avx512.h"

namespace switchgear::cpu {
namespace {

constexpr int kPanel = 64;
constexpr int kTile = 16;                       // rows and columns of a tile of sums
constexpr int64_t kStep = 32, kStepBytes = 64;  // k of a tile, and bytes of each row of it
constexpr int64_t kTileFloats = kTile * kTile, kTileBytes = 4 * kTileFloats;
constexpr int64_t kLine = 64;
static_assert(kPanel <= kMaxPanel && kMaxRows % kTile == 0 && kGatheredRows == kTile);

inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }
inline int64_t tiles_of(int64_t n, int64_t in_a_tile) { return (n + in_a_tile - 1) / in_a_tile; }

// ---- what comes next -----------------------------------------------------------------------------------------------------

// Rows of memory that are asked for, line by line, and then one row elsewhere.
struct Ahead {
  const char* row = nullptr;
  int64_t rows = 0, stride = 0, width = 0;
  const char* last = nullptr;
  int64_t last_width = 0;
  int64_t at = 0;

  int64_t lines() const { return rows * tiles_of(width, kLine) + tiles_of(last_width, kLine); }
  void ask(int64_t count) {
    for (; count > 0 && rows > 0; --count) {
      __builtin_prefetch(row + at, 0, 2);
      at += kLine;
      if (at < width) continue;
      at = 0;
      row += stride;
      if (--rows > 0 || last == nullptr) continue;
      row = last, rows = 1, width = last_width;
      last = nullptr;
    }
  }
};

// ---- a block of sums -----------------------------------------------------------------------------------------------------

// The tiles: sums of tile f of the first operand and s of the second, f and s in {0, 1}, in 2s + f; then two of each operand.
template <int kF, int kS>
constexpr int kSums = 2 * kS + kF;
constexpr int kFirst = 4, kSecond = 6;

inline TileConfig shapes(int64_t rows_of_first) {
  TileConfig config;
  for (int t = 0; t < kNumTiles; ++t) {
    config.rows[t] = t < kSecond ? static_cast<uint8_t>(rows_of_first) : kTile;
    config.row_bytes[t] = kStepBytes;
  }
  return config;
}

// body.operator()<f, s>() for each tile of sums
template <int kFirsts, int kSeconds, typename Body>
inline void for_sums(Body&& body) {
  body.template operator()<0, 0>();
  if constexpr (kFirsts > 1) body.template operator()<1, 0>();
  if constexpr (kSeconds > 1) body.template operator()<0, 1>();
  if constexpr (kFirsts > 1 && kSeconds > 1) body.template operator()<1, 1>();
}

// sums[s][f] (+)= Σ over `steps` steps of 32 k: rows of tile f of the first operand, k along memory, times tile s of the second,
// pairs of k x columns. The next step of a tile of the second operand lies kTileBytes on.
struct Block {
  const char* first[2];
  int64_t first_stride;             // bytes from row to row
  int64_t first_step = kStepBytes;  // and from step to step
  const char* second[2];
  int64_t steps;
  float* sums[2][2];
  int64_t sum_stride;  // bytes
  bool adds;           // to sums that are there
};

// Asks for `lines` lines a step, a few at a time: more than the 16 that a core may wait for would hold up the loads of tiles.
template <int kFirsts, int kSeconds>
void add_tiles(const Block& block, Ahead& ahead, int64_t lines) {
  for_sums<kFirsts, kSeconds>([&]<int kF, int kS>() {
    block.adds ? tile_load<kSums<kF, kS>>(block.sums[kS][kF], block.sum_stride) : tile_zero<kSums<kF, kS>>();
  });
  const int64_t part = tiles_of(lines, 4);
  for (int64_t i = 0; i < block.steps; ++i) {
    tile_load<kSecond>(block.second[0] + i * kTileBytes, kStepBytes);
    if (kSeconds > 1) tile_load<kSecond + 1>(block.second[1] + i * kTileBytes, kStepBytes);
    ahead.ask(part);
    tile_load<kFirst>(block.first[0] + i * block.first_step, block.first_stride);
    ahead.ask(part);
    if (kFirsts > 1) tile_load<kFirst + 1>(block.first[1] + i * block.first_step, block.first_stride);
    ahead.ask(part);
    for_sums<kFirsts, kSeconds>([&]<int kF, int kS>() { tile_multiply<kSums<kF, kS>, kFirst + kF, kSecond + kS>(); });
    ahead.ask(part);
  }
  for_sums<kFirsts, kSeconds>(
      [&]<int kF, int kS>() { tile_store<kSums<kF, kS>>(block.sums[kS][kF], block.sum_stride); });
}

inline void add_block(int64_t firsts, int64_t seconds, const Block& block, Ahead& ahead, int64_t lines) {
  const auto add = firsts > 1 ? (seconds > 1 ? add_tiles<2, 2> : add_tiles<2, 1>)
                              : (seconds > 1 ? add_tiles<1, 2> : add_tiles<1, 1>);
  add(block, ahead, lines);
}

// ---- tiles of the second operand -----------------------------------------------------------------------------------------

// Step after step of up to 16 rows that run along k: pairs of k x rows. Zeros for rows and k that are not there.
inline void transpose_rows(float* tiles, const void* const* rows, int64_t num_rows, int64_t k_begin, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kStep, tiles += kTileFloats) {
    const int64_t bytes = 2 * at_most(depth - k, kStep);
    Floats words[kTile];
#pragma GCC unroll 16
    for (int m = 0; m < kTile; ++m) {
      words[m] = broadcast(0.0f);
      if (m >= num_rows) continue;
      const char* const row = static_cast<const char*>(rows[m]) + 2 * (k_begin + k);
      if (bytes == kStepBytes) {
        words[m] = load(reinterpret_cast<const float*>(row));
        continue;
      }
      float padded[kTile] = {};
      __builtin_memcpy(padded, row, static_cast<size_t>(bytes));
      words[m] = load(padded);
    }
    transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) store(tiles + i * kTile, words[i]);
  }
}

// The same for a panel of `columns` <= 64 columns that run along memory, row(k) being where those of k start: four rows of
// tiles, `steps` tiles each.
template <typename Row>
void pair_rows(float* tiles, int64_t steps, int64_t columns, int64_t depth, Row&& row) {
  for (int64_t pair = 0; pair < steps * kTile; ++pair) {
    const int64_t k = 2 * pair;
    BFloat16 padded[2][kPanel];
    const BFloat16* halves[2];
    for (int i = 0; i < 2; ++i) {
      halves[i] = padded[i];
      if (k + i < depth && columns == kPanel) {
        halves[i] = row(k + i);
        continue;
      }
      __builtin_memset(padded[i], 0, sizeof padded[i]);
      if (k + i < depth) __builtin_memcpy(padded[i], row(k + i), static_cast<size_t>(columns) * 2);
    }
    float* const target = tiles + pair * kTile;
#pragma GCC unroll 2
    for (int j = 0; j < kPanel / kTile; j += 2) {
      Floats words[2];
      load_two_pairs(words, halves[0] + j * kTile, halves[1] + j * kTile);
      store(target + j * steps * kTileFloats, words[0]);
      store(target + (j + 1) * steps * kTileFloats, words[1]);
    }
  }
}

}  // namespace
}  // namespace switchgear::cpu
