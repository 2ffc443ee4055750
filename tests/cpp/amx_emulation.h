// SPDX-License-Identifier: BSD-3-Clause
// AMX tiles in plain C++, in place of the instructions in csrc/cpu/amx.h: they compute what Intel's manual specifies, and
// refuse what a processor would. Misuse throws and so fails the test: tiles without shapes, shapes that do not fit or do not
// exist, and a thread that configures its tiles again, or ends, without releasing them.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace switchgear::cpu {
namespace {

constexpr int kMostRows = 16, kMostRowBytes = 64;

struct EmulatedTiles {
  bool configured = false;
  TileConfig config;
  alignas(64) uint8_t data[kNumTiles][kMostRows][kMostRowBytes];

  ~EmulatedTiles() {
    if (!configured) return;
    std::fprintf(stderr, "AMX: a thread ends without a release of its tiles\n");
    std::abort();
  }
};
thread_local EmulatedTiles tiles;

inline void expect(bool holds, const char* what) {
  if (!holds) throw std::logic_error(std::string("AMX: ") + what);
}

template <int... kTiles>
inline void expect_shapes() {
  static_assert(((kTiles >= 0 && kTiles < kNumTiles) && ...));
  expect(tiles.configured && ((tiles.config.rows[kTiles] > 0) && ...), "a tile without a shape is used");
}

inline void tile_configure(const TileConfig& config) {
  expect(!tiles.configured, "tiles are configured again without a release");
  expect(config.palette == 1 && config.start_row == 0, "palette 1 and start_row 0 are the ones that exist");
  for (const uint8_t byte : config.reserved) expect(byte == 0, "reserved bytes are set");
  for (int t = 0; t < 16; ++t) {
    const int rows = config.rows[t], bytes = config.row_bytes[t];
    expect((rows > 0) == (bytes > 0), "a shape has rows without bytes, or bytes without rows");
    expect(rows <= kMostRows && bytes <= kMostRowBytes && bytes % 4 == 0, "a shape is out of range");
    expect(t < kNumTiles || rows == 0, "a tile that does not exist has a shape");
  }
  tiles.config = config;
  tiles.configured = true;
  std::memset(tiles.data, 0, sizeof tiles.data);
}

inline void tile_release() { tiles.configured = false; }

template <int kTile>
inline void tile_zero() {
  expect_shapes<kTile>();
  std::memset(tiles.data[kTile], 0, sizeof tiles.data[kTile]);
}

template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  expect_shapes<kTile>();
  std::memset(tiles.data[kTile], 0, sizeof tiles.data[kTile]);
  for (int r = 0; r < tiles.config.rows[kTile]; ++r) {
    std::memcpy(tiles.data[kTile][r], static_cast<const char*>(p) + r * stride, tiles.config.row_bytes[kTile]);
  }
}

template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  expect_shapes<kTile>();
  for (int r = 0; r < tiles.config.rows[kTile]; ++r) {
    std::memcpy(static_cast<char*>(p) + r * stride, tiles.data[kTile][r], tiles.config.row_bytes[kTile]);
  }
}

// Subnormal operands and results become zeros of the same sign.
inline float flushed(float v) { return std::abs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }

// Element i of a row of bfloat16.
inline float element(const uint8_t (&row)[kMostRowBytes], int i) {
  const uint32_t bits = static_cast<uint32_t>(row[2 * i] | row[2 * i + 1] << 8) << 16;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return flushed(v);
}

template <int kC, int kA, int kB>
inline void tile_multiply() {
  static_assert(kC != kA && kC != kB && kA != kB);
  expect_shapes<kC, kA, kB>();
  const uint8_t (&rows)[16] = tiles.config.rows;
  const uint16_t (&bytes)[16] = tiles.config.row_bytes;
  expect(rows[kC] == rows[kA] && bytes[kC] == bytes[kB] && bytes[kA] == 4 * rows[kB], "shapes of a product do not fit");
  const int pairs = rows[kB], columns = bytes[kC] / 4;
  for (int m = 0; m < rows[kC]; ++m) {
    float even[kMostRows] = {}, odd[kMostRows] = {};
    for (int k = 0; k < pairs; ++k) {
      const float low = element(tiles.data[kA][m], 2 * k), high = element(tiles.data[kA][m], 2 * k + 1);
      for (int n = 0; n < columns; ++n) {
        even[n] = flushed(std::fma(low, element(tiles.data[kB][k], 2 * n), even[n]));
        odd[n] = flushed(std::fma(high, element(tiles.data[kB][k], 2 * n + 1), odd[n]));
      }
    }
    for (int n = 0; n < columns; ++n) {
      float sum;
      std::memcpy(&sum, tiles.data[kC][m] + 4 * n, sizeof sum);
      sum = flushed(flushed(sum) + flushed(even[n] + odd[n]));
      std::memcpy(tiles.data[kC][m] + 4 * n, &sum, sizeof sum);
    }
  }
}

template <int kC, int kA, int kB>
inline void tile_multiply_bytes() {
  static_assert(kC != kA && kC != kB && kA != kB);
  expect_shapes<kC, kA, kB>();
  const uint8_t (&rows)[16] = tiles.config.rows;
  const uint16_t (&bytes)[16] = tiles.config.row_bytes;
  expect(rows[kC] == rows[kA] && bytes[kC] == bytes[kB] && bytes[kA] == 4 * rows[kB], "shapes of a product do not fit");
  for (int m = 0; m < rows[kC]; ++m) {
    for (int n = 0; n < bytes[kC] / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, tiles.data[kC][m] + 4 * n, sizeof sum);
      for (int k = 0; k < bytes[kA]; ++k) {
        sum += static_cast<int8_t>(tiles.data[kA][m][k]) * static_cast<int32_t>(tiles.data[kB][k / 4][4 * n + k % 4]);
      }
      std::memcpy(tiles.data[kC][m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace
}  // namespace switchgear::cpu
