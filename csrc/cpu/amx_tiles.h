// SPDX-License-Identifier: BSD-3-Clause
// Packing that the products of kernels_amx.cpp share: rows of bfloat16 become tiles of the second operand.
#pragma once
#include "amx_block.h"
#include "kernels.h"
#include "simd_avx512.h"

namespace switchgear::cpu {
namespace {

constexpr int kPanel = 64;
constexpr int64_t kStep = 32;  // k of a tile
constexpr int64_t kTileFloats = kTileBytes / 4;
static_assert(kPanel <= kMaxPanel && kMaxRows % kTile == 0 && kGatheredRows == kTile);

// Transposes up to 16 rows along k, step by step, into tiles of pairs of k x rows. Missing rows and k are zeros.
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

// The same for a panel of `columns` <= 64 columns that run along memory; row(k) is the address of row k. Writes four rows of
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
