// SPDX-License-Identifier: BSD-3-Clause
// A block of 2 x 2 tiles of sums, of products of bfloat16 (float) or bytes (int32_t), and the prefetches issued meanwhile.
#pragma once
#include "amx.h"

namespace switchgear::cpu {
namespace {

constexpr int kTile = 16;           // rows and columns of a tile of sums
constexpr int64_t kStepBytes = 64;  // per row of an operand's tile: 32 bfloat16 or 64 bytes
constexpr int64_t kTileBytes = kTile * kStepBytes;
constexpr int64_t kLine = 64;

inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }
inline int64_t tiles_of(int64_t n, int64_t in_a_tile) { return (n + in_a_tile - 1) / in_a_tile; }

// ---- prefetches ----------------------------------------------------------------------------------------------------------

// Rows of memory to prefetch line by line, followed by rows at another address.
struct Ahead {
  const char* row = nullptr;
  int64_t rows = 0, stride = 0, width = 0;
  const char* last = nullptr;
  int64_t last_rows = 0, last_width = 0;

  int64_t bursts() const {  // bursts left
    return rows * tiles_of(width, kBurst) + last_rows * tiles_of(last_width, kBurst) - at / kBurst;
  }
  // Makes each of the next `count` calls of prefetch_share() prefetch its share.
  void spread_over(int64_t count) {
    pace = bursts();
    calls = count;
  }
  void prefetch_share() {
    for (due += pace; due >= calls && rows > 0; due -= calls) burst();
  }
  void burst() {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kBurst; i += kLine) __builtin_prefetch(row + at + i, 0, 2);
    at += kBurst;
    if (at < width) return;
    at = 0;
    row += stride;
    if (--rows > 0) return;
    row = last, rows = last_rows, width = last_width;
    last_rows = 0;
  }

  static constexpr int64_t kBurst = 4 * kLine;
  int64_t at = 0;  // byte within the row
  int64_t pace = 0, calls = 1, due = 0;
};

// ---- a block of sums -----------------------------------------------------------------------------------------------------

// Tile 2s + f holds the sums of tile f of the first operand and tile s of the second, f and s in {0, 1}; then one of each.
template <int kF, int kS>
constexpr int kSums = 2 * kS + kF;
constexpr int kFirst = 4, kSecond = 5;

inline TileConfig shapes(int64_t rows_of_first) {
  TileConfig config;
  for (int t = 0; t < kNumTiles; ++t) {
    config.rows[t] = t != kSecond ? static_cast<uint8_t>(rows_of_first) : kTile;
    config.row_bytes[t] = kStepBytes;
  }
  return config;
}

// Calls body.operator()<f, s>() for each tile of sums.
template <int kFirsts, int kSeconds, typename Body>
inline void for_sums(Body&& body) {
  body.template operator()<0, 0>();
  if constexpr (kFirsts > 1) body.template operator()<1, 0>();
  if constexpr (kSeconds > 1) body.template operator()<0, 1>();
  if constexpr (kFirsts > 1 && kSeconds > 1) body.template operator()<1, 1>();
}

template <typename Sum, int kOfSums, int kOfFirst, int kOfSecond>
inline void multiply_tiles() {
  if constexpr (__is_same(Sum, float)) {
    tile_multiply<kOfSums, kOfFirst, kOfSecond>();
  } else {
    tile_multiply_bytes<kOfSums, kOfFirst, kOfSecond>();
  }
}

// sums[s][f] (+)= Σ over `steps` steps: tile f of the first operand, with rows along k, times tile s of the second, whose
// rows hold words of k (pairs or fours) of its columns. The next step of a tile of the second operand is kTileBytes further.
template <typename Sum>
struct Block {
  const char* first[2];
  int64_t first_stride;             // bytes from row to row
  int64_t first_step = kStepBytes;  // and from step to step
  const char* second[2];
  int64_t steps;
  Sum* sums[2][2];
  int64_t sum_stride;  // bytes
  bool adds;           // to existing sums
};

// Prefetches are spread over this many points of a step. More than the 16 lines that a core can have outstanding would stall
// tile loads.
constexpr int64_t kPointsPerStep = 4;

// One tile of each operand is in a register at a time, so a step of 2 x 2 uses six registers and five loads. Two tiles of
// each would use eight and four. Both take 29 ns at best, from L1. With another virtual machine on the core the latter takes
// 113 to 122 ns, the former 86 to 89, as if loads waited for a free register. (A step of 1 x 2 uses four registers, and two
// take 66 to 76 ns; but they load six tiles, which is slower from L2.)
template <int kFirsts, int kSeconds, typename Sum>
void add_tiles(const Block<Sum>& of_caller, Ahead& ahead_of_caller) {
  const Block<Sum> block = of_caller;  // in registers, which tile loads do not clobber
  Ahead ahead = ahead_of_caller;
  for_sums<kFirsts, kSeconds>([&]<int kF, int kS>() {
    block.adds ? tile_load<kSums<kF, kS>>(block.sums[kS][kF], block.sum_stride) : tile_zero<kSums<kF, kS>>();
  });
  int64_t first = 0, second = 0;
  for (int64_t i = 0; i < block.steps; ++i, first += block.first_step, second += kTileBytes) {
    tile_load<kFirst>(block.first[0] + first, block.first_stride);
    ahead.prefetch_share();
    tile_load<kSecond>(block.second[0] + second, kStepBytes);
    multiply_tiles<Sum, kSums<0, 0>, kFirst, kSecond>();
    ahead.prefetch_share();
    if constexpr (kSeconds > 1) {
      tile_load<kSecond>(block.second[1] + second, kStepBytes);
      multiply_tiles<Sum, kSums<0, 1>, kFirst, kSecond>();
    }
    ahead.prefetch_share();
    if constexpr (kFirsts > 1) {
      tile_load<kFirst>(block.first[1] + first, block.first_stride);
      multiply_tiles<Sum, kSums<1, kSeconds - 1>, kFirst, kSecond>();
      if constexpr (kSeconds > 1) {
        tile_load<kSecond>(block.second[0] + second, kStepBytes);
        multiply_tiles<Sum, kSums<1, 0>, kFirst, kSecond>();
      }
    }
    ahead.prefetch_share();
  }
  for_sums<kFirsts, kSeconds>(
      [&]<int kF, int kS>() { tile_store<kSums<kF, kS>>(block.sums[kS][kF], block.sum_stride); });
  ahead_of_caller = ahead;
}

template <typename Sum>
void add_block(int64_t firsts, int64_t seconds, const Block<Sum>& block, Ahead& ahead) {
  const auto add = firsts > 1 ? (seconds > 1 ? add_tiles<2, 2, Sum> : add_tiles<2, 1, Sum>)
                              : (seconds > 1 ? add_tiles<1, 2, Sum> : add_tiles<1, 1, Sum>);
  add(block, ahead);
}

}  // namespace
}  // namespace switchgear::cpu
