// SPDX-License-Identifier: BSD-3-Clause
// Products of int8 activations and weights of 8 or 4 bits, once for all ISAs: included after simd_<isa>.h and dot.h.
//
// multiply: C[m,n] = s_m · s_n · Σ_g (s_ng · Σ_{k in g} a[m,k]·(q[n,k] - z)), z = 128 or 8, or z_ng if there are zeros
//   work 2·M·N·K operations; traffic: values once per 240 rows, K bytes per column at 8 bits and K/2 at 4, and the scales
//   A step loads 64 bytes of each of four blocks (16 columns x 4 of k) and broadcasts 4 bytes of each of 6 rows: 24 dot
//   instructions for 4 loads and 6 broadcasts, so the multipliers bind. 4-bit values are unpacked in registers: the low halves
//   of 64 bytes are one such load, the high halves the next.
//   Without an instruction for dots (dot.h) tiles have 4 rows and 2 vectors, for 16 registers. A word of 4 columns takes two
//   multiplications and two additions per vector of sums at 8 bits, one of each at 4.
//   The weight is the unsigned operand, so z needs no instruction: accumulators start at -z·Σ a, from quantize_row.
//   At 4 bits a group ends with conversions and multiply-adds, one per 8 dots, or two with zeros.
//   reached on one core of Zen 5: at 8 bits 92-94 % of the dots from 32 rows on, weights from memory (60-75 % with 12 to 16);
//   at 4 bits with zeros 63-66 %, where the bound is 80 %; one row at 8 bits is as fast as a plain read. Without dots, one
//   core of Zen 3, 64 rows, all from its caches: 73 % of these instructions' rate at 8 bits, 52 % at 4
// Sums inside a group are exact integers. Sums over groups are float32, ascending, so results do not depend on tiles.
#pragma once
#include "cpu/kernels.h"

namespace switchgear::cpu {
namespace {

// A tile is that many rows, and vectors of columns.
constexpr int kRowTile = kHasDot || kLanes == 16 ? 6 : 4;  // 16 registers hold no more, unless dots are one instruction
constexpr int kTileVectors8 = kPanelVectors;
constexpr int kTileVectors4 = 2;  // with several groups, sums and totals share the registers
constexpr int kBlockVectors = kBlockRows / kLanes;
constexpr int64_t kWordBytes = 4 * kBlockRows;  // of a block

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

// What kernels of 4 bits without an instruction for dots are compiled for. Short groups are one part (below): their sums need no
// memory, and nothing branches, which is 12 to 30 % faster from the caches.
enum class Groups { kAny, kShort, kShortWithZeros };

// Pointers and scales of a tile of kRows x kVectors vectors of columns. Pointers to weights are per vector.
template <int kRows, int kVectors>
struct Tile {
  const int8_t* a[kRows];
  const int32_t* corrections[kRows];
  const float* activation_scales[kRows];
  const uint8_t* values[kVectors];
  const int8_t* scales[kVectors];
  const uint8_t* zeros[kVectors];
  const float* row_scales;
  float* c;
  int64_t c_stride;

  // Starts at row m and vector `first` of the panel.
  Tile(const IntegerProduct& p, int64_t m, int64_t first)
      : row_scales(p.b.row_scales + first * kLanes), c(p.c + m * p.c_stride + first * kLanes), c_stride(p.c_stride) {
    const IntegerPanel& b = p.b;
    for (int i = 0; i < kRows; ++i) {
      const int64_t r = p.indices != nullptr ? p.indices[m + i] : m + i;
      a[i] = p.rows.values + r * p.rows.stride;
      corrections[i] = p.rows.corrections + r * b.groups;
      activation_scales[i] = p.rows.scales + r * p.rows.blocks;
    }
    for (int j = 0; j < kVectors; ++j) {
      const int64_t block = (first + j) / kBlockVectors, column = (first + j) % kBlockVectors * kLanes;
      values[j] = b.values + block * (b.words * kWordBytes * b.bits / 8) + column * 4;
      scales[j] = b.scales + block * b.groups * kBlockRows + column;
      zeros[j] = b.zeros != nullptr ? b.zeros + block * b.groups * kBlockRows + column : nullptr;
    }
  }

  template <Groups kGroups>
  bool has_zeros() const {
    return kGroups == Groups::kAny ? zeros[0] != nullptr : kGroups == Groups::kShortWithZeros;
  }

  // Start of a sum: -z·Σ a for symmetric weights, plus kWeightOffset·Σ a (z at 8 bits, so these cancel).
  template <int kBits, Groups kGroups>
  Ints start(int i, int64_t g) const {
    constexpr int kOffset = kBits == 8 ? kWeightOffset : 0;
    if constexpr (kOffset != 0) return broadcast_ints(has_zeros<kGroups>() ? kOffset * corrections[i][g] : 0);
    return broadcast_ints(has_zeros<kGroups>() ? 0 : corrections[i][g]);
  }
};

// 64 bytes of a block, a line, are one word of 4 columns at 8 bits and two at 4. They are multiplied in steps, each by four
// bytes of a row: by a word of int8, or, if activations are wide (kHasDot is false), by bytes 0 and 2 of the word as 16-bit
// numbers and then by 1 and 3.
template <int kBits>
constexpr int kLineWords = 8 / kBits;
template <int kBits>
constexpr bool kIsWide = kBits == 8 && !kHasDot;
template <int kBits>
constexpr int kSteps = kIsWide<kBits> ? 2 : kLineWords<kBits>;

template <int kBits>
inline Weights weights_at(const uint8_t* bytes, int step) {
  const Ints v = load_ints(bytes);
  if constexpr (kIsWide<kBits>) {
    return as_weights(step == 0 ? even_bytes(v) : odd_bytes(v));
  } else if constexpr (kBits == 8) {
    return as_weights(kWeightOffset == 0 ? v : v ^ static_cast<int32_t>(0x80808080));
  } else {
    return as_weights((step == 0 ? v : v >> 4) & 0x0f0f0f0f);
  }
}

template <int kBits>
inline Activations activations_at(const int8_t* row, int64_t line, int step) {
  return as_activations(word_at(row + 4 * (line * kSteps<kBits> + step)));
}

// Sums of 4 bits without an instruction for dots are made in halves of lanes, for kPartLines lines each.
template <int kBits>
constexpr bool kInHalves = kBits == 4 && !kHasDot;
constexpr int64_t kPartLines = kNibbleSteps / kSteps<4>;

template <int kBits>
inline Ints add_dot(Ints sum, Weights w, Activations a) {
  if constexpr (kInHalves<kBits>) {
    return dot_nibbles(sum, w, a);
  } else {
    return dot(sum, w, a);
  }
}

struct Lines {
  int64_t begin, end;
};

template <int kBits>
inline Lines lines_of(const IntegerPanel& b, int64_t group) {  // the number of words is even
  const int64_t begin = group * b.group_words, end = begin + b.group_words < b.words ? begin + b.group_words : b.words;
  return {begin / kLineWords<kBits>, end / kLineWords<kBits>};
}

// totals += sums · scale; with zeros also -scale · zero · the sums of activations
template <int kBits, Groups kGroups, int kRows, int kVectors>
inline void end_group(const Tile<kRows, kVectors>& t, const Ints (&sum)[kRows][kVectors], int64_t g,
                      Floats (&total)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    const Floats scale = widen(t.scales[j] + g * kBlockRows);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) total[i][j] = multiply_add(to_floats(sum[i][j]), scale, total[i][j]);
    if (t.template has_zeros<kGroups>()) {
      constexpr float kUnit = kBits == 8 ? -1.0f : -1.0f / 16;
      const Floats offset = scale * widen(t.zeros[j] + g * kBlockRows) * broadcast(kUnit);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        total[i][j] = multiply_add(to_floats(broadcast_ints(t.corrections[i][g])), offset, total[i][j]);
      }
    }
  }
}

// c (+)= total · scale of the activations; after the last block c *= scales of the rows of weights
template <int kRows, int kVectors>
inline void end_block(const Tile<kRows, kVectors>& t, const Floats (&total)[kRows][kVectors], int64_t block,
                      bool is_last) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const Floats scale = broadcast(t.activation_scales[i][block]);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* const c = t.c + i * t.c_stride + j * kLanes;
      Floats sum = block == 0 ? total[i][j] * scale : multiply_add(total[i][j], scale, load(c));
      if (is_last) sum = sum * load(t.row_scales + j * kLanes);
      store(c, sum);
    }
  }
}

// kRows rows times kVectors vectors of columns: each load of weights is used kRows times, each of activations kVectors times.
// Prefetches the blocks at `ahead`.
template <int kBits, Groups kGroups, int kRows, int kVectors, int kAhead>
void multiply_tile(const IntegerProduct& p, int64_t m, int64_t first, const uint8_t* const (&ahead)[kAhead]) {
  const Tile<kRows, kVectors> t(p, m, first);
  const IntegerPanel& b = p.b;
  for (int64_t block = 0, last = 0; last < b.groups; ++block) {
    last = (block + 1) * b.block_groups < b.groups ? (block + 1) * b.block_groups : b.groups;
    Floats total[kRows][kVectors] = {};
    for (int64_t g = block * b.block_groups; g < last; ++g) {
      Ints sum[kRows][kVectors];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) sum[i][j] = t.template start<kBits, kGroups>(i, g);
      }
      const Lines lines = lines_of<kBits>(b, g);
      const auto add_line = [&](int64_t line, Ints(&to)[kRows][kVectors]) {
        for (const uint8_t* const wanted : ahead) __builtin_prefetch(wanted + line * kWordBytes, 0, 2);
#pragma GCC unroll 2
        for (int step = 0; step < kSteps<kBits>; ++step) {
          Weights w[kVectors];
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) w[j] = weights_at<kBits>(t.values[j] + line * kWordBytes, step);
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) {
            const Activations a = activations_at<kBits>(t.a[i], line, step);
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) to[i][j] = add_dot<kBits>(to[i][j], w[j], a);
          }
        }
      };
      const auto add_part = [&](int64_t begin, int64_t end) {
        Ints halves[kRows][kVectors] = {};
        if (kGroups != Groups::kAny || begin + kPartLines <= end) {
#pragma GCC unroll 4
          for (int n = 0; n < kPartLines; ++n) add_line(begin + n, halves);
        } else {
          for (int64_t line = begin; line < end; ++line) add_line(line, halves);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) sum[i][j] = add_halves(sum[i][j], halves[i][j]);
        }
      };
      if constexpr (kGroups != Groups::kAny) {
        add_part(lines.begin, lines.end);
      } else if constexpr (kInHalves<kBits>) {
        for (int64_t line = lines.begin; line < lines.end; line += kPartLines) add_part(line, lines.end);
      } else {
        for (int64_t line = lines.begin; line < lines.end; ++line) add_line(line, sum);
      }
      end_group<kBits, kGroups>(t, sum, g, total);
    }
    end_block(t, total, block, last == b.groups);
  }
}

// The same for few rows, which are memory-bound. Bandwidth is highest with one or two long streams of loads: blocks are
// contiguous, and two sequences of blocks, such as gates and ups, are read in turns. Several sums per element hide the
// latency of dot (they are integers, so order does not matter).
template <int kRows>
constexpr int kStreams = kLanes == 16 || kRows == 1 ? 2 : 1;  // side by side
// On processors with Reads::kStreams, one or two rows of bytes are read in kMostStreams instead. Three gain nothing, and more lose:
// their sums are more than 16 registers. 4 bits gain nothing either.
template <int kBits, int kRows>
constexpr bool kMayStream = kBits == 8 && kRows <= 2 && kLanes == 8;

// One row of bytes is read at full bandwidth, and so are kMostStreams streams. Else more work per line leaves too few loads in
// flight, so 4 KB of values ahead are prefetched, and as many scales.
template <int kBits, int kRows, int kSide>
constexpr bool kPrefetches = kSide < kMostStreams && (kBits == 4 || kRows >= 2);
constexpr int64_t kAheadBytes = 4096, kScalesAhead = 512;

template <int kBits, Groups kGroups, int kRows, int kSide>
void multiply_block(const Tile<kRows, kBlockVectors> (&t)[kSide], const IntegerPanel& b) {
  constexpr int kFree = kHasDot ? 4 / (kRows * kSide * kBlockVectors) : 1, kChains = kFree > 1 ? kFree : 1;
  for (int64_t block = 0, last = 0; last < b.groups; ++block) {
    last = (block + 1) * b.block_groups < b.groups ? (block + 1) * b.block_groups : b.groups;
    Floats total[kSide][kRows][kBlockVectors] = {};
    for (int64_t g = block * b.block_groups; g < last; ++g) {
      using Sums = Ints[kSide][kChains][kRows][kBlockVectors];
      Sums sum;
#pragma GCC unroll 8
      for (int side = 0; side < kSide; ++side) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
          for (int j = 0; j < kBlockVectors; ++j) {
            sum[side][0][i][j] = t[side].template start<kBits, kGroups>(i, g);
#pragma GCC unroll 8
            for (int chain = 1; chain < kChains; ++chain) sum[side][chain][i][j] = Ints{};
          }
        }
      }
      if constexpr (kBits == 4) {
#pragma GCC unroll 8
        for (int side = 0; side < kSide; ++side) {
          const int64_t at = g * kBlockRows + kScalesAhead;
          __builtin_prefetch(t[side].scales[0] + at, 0, 3);
          if (t[side].template has_zeros<kGroups>()) __builtin_prefetch(t[side].zeros[0] + at, 0, 3);
        }
      }
      const auto add_step = [&](int64_t line, int step, int chain, Sums& to) {
        Weights w[kSide][kBlockVectors];
#pragma GCC unroll 8
        for (int side = 0; side < kSide; ++side) {
          const uint8_t* const at = t[side].values[0] + line * kWordBytes;
          if constexpr (kPrefetches<kBits, kRows, kSide>) {
            if (step == 0) __builtin_prefetch(at + kAheadBytes, 0, 3);
          }
#pragma GCC unroll 8
          for (int j = 0; j < kBlockVectors; ++j) w[side][j] = weights_at<kBits>(at + 4 * j * kLanes, step);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Activations a = activations_at<kBits>(t[0].a[i], line, step);
#pragma GCC unroll 8
          for (int side = 0; side < kSide; ++side) {
#pragma GCC unroll 8
            for (int j = 0; j < kBlockVectors; ++j) {
              Ints& s = to[side][chain][i][j];
              s = add_dot<kBits>(s, w[side][j], a);
            }
          }
        }
      };
      // Both steps of a line, vector by vector, so that each is loaded once.
      const auto add_line = [&](int64_t line, Sums& to) {
        Activations a[kRows][kSteps<kBits>];
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
          for (int step = 0; step < kSteps<kBits>; ++step) a[i][step] = activations_at<kBits>(t[0].a[i], line, step);
        }
#pragma GCC unroll 8
        for (int side = 0; side < kSide; ++side) {
          const uint8_t* const at = t[side].values[0] + line * kWordBytes;
          if constexpr (kPrefetches<kBits, kRows, kSide>) __builtin_prefetch(at + kAheadBytes, 0, 3);
#pragma GCC unroll 8
          for (int j = 0; j < kBlockVectors; ++j) {
#pragma GCC unroll 2
            for (int step = 0; step < kSteps<kBits>; ++step) {
              const Weights w = weights_at<kBits>(at + 4 * j * kLanes, step);
#pragma GCC unroll 8
              for (int i = 0; i < kRows; ++i) {
                Ints& s = to[side][0][i][j];
                s = add_dot<kBits>(s, w, a[i][step]);
              }
            }
          }
        }
      };
      const auto add_lines = [&](int64_t begin, int64_t end, Sums& to) {
        constexpr int kUnrolled = 4 / kSteps<kBits>;  // lines
        int64_t line = begin;
        for (; line + kUnrolled <= end; line += kUnrolled) {
#pragma GCC unroll 4
          for (int n = 0; n < 4; ++n) add_step(line + n / kSteps<kBits>, n % kSteps<kBits>, n % kChains, to);
        }
        for (; line < end; ++line) {
#pragma GCC unroll 2
          for (int step = 0; step < kSteps<kBits>; ++step) add_step(line, step, 0, to);
        }
      };
      const Lines lines = lines_of<kBits>(b, g);
      if constexpr (kInHalves<kBits>) {
        const auto add_part = [&](const Sums& halves) {
#pragma GCC unroll 8
          for (int side = 0; side < kSide; ++side) {
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
              for (int j = 0; j < kBlockVectors; ++j) {
                sum[side][0][i][j] = add_halves(sum[side][0][i][j], halves[side][0][i][j]);
              }
            }
          }
        };
        const auto add_whole_part = [&](int64_t line) {
          Sums halves = {};
#pragma GCC unroll 4
          for (int n = 0; n < kPartLines; ++n) add_line(line + n, halves);
          add_part(halves);
        };
        if constexpr (kGroups != Groups::kAny) {
          add_whole_part(lines.begin);
        } else {
          int64_t line = lines.begin;
          for (; line + kPartLines <= lines.end; line += kPartLines) add_whole_part(line);
          if (line < lines.end) {
            Sums halves = {};
            for (; line < lines.end; ++line) add_line(line, halves);
            add_part(halves);
          }
        }
      } else {
        add_lines(lines.begin, lines.end, sum);
      }
#pragma GCC unroll 8
      for (int side = 0; side < kSide; ++side) {
#pragma GCC unroll 8
        for (int chain = 1; chain < kChains; ++chain) {
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < kBlockVectors; ++j) sum[side][0][i][j] += sum[side][chain][i][j];
          }
        }
        end_group<kBits, kGroups>(t[side], sum[side][0], g, total[side]);
      }
    }
#pragma GCC unroll 8
    for (int side = 0; side < kSide; ++side) end_block(t[side], total[side], block, last == b.groups);
  }
}

// Calls function<n>() for n = count, kLeast <= count <= kMost.
template <int kLeast, int kMost, typename Function>
inline void with_count(int64_t count, Function&& function) {
  if (kLeast == kMost || count == kMost) {
    function.template operator()<kMost>();
  } else if constexpr (kLeast < kMost) {
    with_count<kLeast, kMost - 1>(count, static_cast<Function&&>(function));
  }
}

// More than kFewRows rows, from vector `first` of the panel on, in tiles of nearly equal height: a low tile has too few sums
// to hide the latency of dot. Each pass over the words prefetches kAhead blocks of the next product, until it has all.
template <int kBits, Groups kGroups, int kVectors, int kAhead>
void multiply_rows(const IntegerProduct& p, int64_t first, int64_t blocks) {
  const int64_t tiles = (p.num_rows + kRowTile - 1) / kRowTile, block_bytes = p.b.words * kWordBytes * kBits / 8;
  for (int64_t i = 0; i < tiles; ++i) {
    const uint8_t* ahead[kAhead];
    for (int n = 0; n < kAhead; ++n) {
      const int64_t block = (first / kVectors * tiles + i) * kAhead + n;
      ahead[n] = p.next != nullptr && block < blocks ? p.next + block * block_bytes : p.b.values;
    }
    const int64_t m = p.num_rows * i / tiles, end = p.num_rows * (i + 1) / tiles;
    with_count<kRowTile / 2, kRowTile>(
        end - m, [&]<int kRows>() { multiply_tile<kBits, kGroups, kRows, kVectors, kAhead>(p, m, first, ahead); });
  }
}

inline int64_t blocks_of(int64_t num_columns) { return (num_columns + kBlockRows - 1) / kBlockRows; }

// The first `count` blocks of a product, and those of a product of the same rows from block `from` on.
template <int kBits, Groups kGroups, int kRows>
void multiply_blocks(const IntegerProduct& one, const IntegerProduct& other, int64_t from, int64_t count) {
  const auto block_of = [](const IntegerProduct& p, int64_t block) {
    return Tile<kRows, kBlockVectors>(p, 0, block * kBlockVectors);
  };
  int64_t block = 0;
  if constexpr (kMayStream<kBits, kRows>) {
    if (fastest_reads() == Reads::kStreams) {
      for (const int64_t half = count / 2; block < half; ++block) {
        const int64_t second = half + block;
        multiply_block<kBits, kGroups, kRows, kMostStreams>(
            {block_of(one, block), block_of(one, second), block_of(other, from + block),
             block_of(other, from + second)},
            one.b);
      }
      block = count / 2 * 2;
    }
  }
  for (; block < count; ++block) {
    const Tile<kRows, kBlockVectors> a = block_of(one, block), b = block_of(other, from + block);
    if constexpr (kStreams<kRows> == 2) {
      multiply_block<kBits, kGroups, kRows, 2>({a, b}, one.b);
    } else {
      multiply_block<kBits, kGroups, kRows, 1>({a}, one.b);
      multiply_block<kBits, kGroups, kRows, 1>({b}, one.b);
    }
  }
}

template <int kBits, Groups kGroups>
void multiply_pair_bits(const IntegerProduct& first, const IntegerProduct& second) {
  with_count<1, kFewRows>(first.num_rows, [&]<int kRows>() {
    multiply_blocks<kBits, kGroups, kRows>(first, second, 0, blocks_of(first.num_columns));
  });
}

template <int kBits, Groups kGroups>
void multiply_few(const IntegerProduct& p) {  // as the pair of its halves
  with_count<1, kFewRows>(p.num_rows, [&]<int kRows>() {
    const int64_t blocks = blocks_of(p.num_columns), half = blocks / 2;
    multiply_blocks<kBits, kGroups, kRows>(p, p, half, half);
    if (blocks % 2 != 0) {
      multiply_block<kBits, kGroups, kRows, 1>({Tile<kRows, kBlockVectors>(p, 0, (blocks - 1) * kBlockVectors)}, p.b);
    }
  });
}

template <int kBits, Groups kGroups>
void multiply_bits(const IntegerProduct& p) {
  if (p.num_rows <= kFewRows) return multiply_few<kBits, kGroups>(p);
  constexpr int kVectors = kBits == 8 ? kTileVectors8 : kTileVectors4;
  const int64_t blocks = blocks_of(p.num_columns), vectors = blocks * kBlockVectors;
  const bool few_passes = p.num_rows * (vectors / kVectors) <= (blocks - 1) * kRowTile;
  int64_t first = 0;
  for (; first + kVectors <= vectors; first += kVectors) {
    few_passes ? multiply_rows<kBits, kGroups, kVectors, 2>(p, first, blocks)
               : multiply_rows<kBits, kGroups, kVectors, 1>(p, first, blocks);
  }
  for (; first < vectors; ++first) multiply_rows<kBits, kGroups, 1, 1>(p, first, blocks);
}

// Calls function<bits, groups>().
template <typename Function>
inline void with_kernel_of(const IntegerPanel& b, Function&& function) {
  constexpr int64_t kWords = kPartLines * kLineWords<4>;
  if (b.bits == 8) return function.template operator()<8, Groups::kAny>();
  if constexpr (kInHalves<4>) {
    if (b.group_words == kWords && b.words % kWords == 0) {
      return b.zeros == nullptr ? function.template operator()<4, Groups::kShort>()
                                : function.template operator()<4, Groups::kShortWithZeros>();
    }
  }
  function.template operator()<4, Groups::kAny>();
}

void multiply(const IntegerProduct& p) {
  with_kernel_of(p.b, [&]<int kBits, Groups kGroups>() { multiply_bits<kBits, kGroups>(p); });
}

void multiply_pair(const IntegerProduct& first, const IntegerProduct& second) {
  with_kernel_of(first.b, [&]<int kBits, Groups kGroups>() { multiply_pair_bits<kBits, kGroups>(first, second); });
}

// ---- rows ----------------------------------------------------------------------------------------------------------------

template <typename T>
inline Floats load_some(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

// Number: int8_t, or int16_t for wide rows, whose words are of numbers 0 and 2, and of 1 and 3.
template <typename Number, typename T>
void quantize_numbers(const IntegerRows& out, int64_t r, const T* row, int64_t n, int64_t block, int64_t group,
                      int32_t factor) {
  auto* const values = reinterpret_cast<Number*>(out.values + r * out.stride);
  for (int64_t first = 0, b = 0; first < n; first += block, ++b) {
    const int64_t end = first + block < n ? first + block : n;
    Ints largest = {};  // bits of magnitudes, which order as the numbers do, NaN last
    for (int64_t i = first; i < end; i += kLanes) {
      const Ints bits = reinterpret_cast<Ints>(load_some(row + i, end - i)) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    int32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits = largest[i] > bits ? largest[i] : bits;
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    const bool finite = bits < 0x7f800000, zero = magnitude < 0x1p-100f || !finite;
    out.scales[r * out.blocks + b] = finite ? (zero ? 0.0f : magnitude / 127.0f) : __builtin_nanf("");

    const Floats inverse = broadcast(zero ? 0.0f : 127.0f / magnitude);
    const Floats shift = broadcast(0x1.8p23f);  // rounds to an integer in the low bits
    for (int64_t i = first; i < end; i += kLanes) {
      Floats x = load_some(row + i, end - i);
      if (!finite) x = broadcast(0.0f);
      const Ints rounded = reinterpret_cast<Ints>(x * inverse + shift) - reinterpret_cast<Ints>(shift);
      typedef Number Numbers __attribute__((vector_size(kLanes * sizeof(Number))));
      const auto numbers = __builtin_convertvector(sizeof(Number) == 2 ? even_lanes_first(rounded) : rounded, Numbers);
      __builtin_memcpy(values + i, &numbers, sizeof numbers);
    }
  }
  const int64_t written = (n + kLanes - 1) / kLanes * kLanes, all = out.stride / static_cast<int64_t>(sizeof(Number));
  for (int64_t i = written; i < all; ++i) values[i] = 0;

  for (int64_t g = 0; g < out.groups; ++g) {  // groups are of whole words, the last one up to zeros
    const int64_t end = g + 1 < out.groups ? (g + 1) * group : written;
    int32_t sum = 0;
    for (int64_t k = g * group; k < end; ++k) sum += factor * values[k];
    out.corrections[r * out.groups + g] = sum;
  }
}

void quantize_row(const IntegerRows& out, int64_t r, const void* row, DType dtype, int64_t n, int64_t block,
                  int64_t group, int32_t factor) {
  const auto quantize = [&]<typename T>(const T* elements) {
    if constexpr (!kHasDot) {
      if (out.wide) return quantize_numbers<int16_t>(out, r, elements, n, block, group, factor);
    }
    quantize_numbers<int8_t>(out, r, elements, n, block, group, factor);
  };
  switch (dtype) {
    case DType::kBFloat16: return quantize(static_cast<const BFloat16*>(row));
    case DType::kFloat16: return quantize(static_cast<const Float16*>(row));
    default: return quantize(static_cast<const float*>(row));
  }
}

// ---- dequantize ----------------------------------------------------------------------------------------------------------

template <int kBits>
void dequantize_bits(float* out, int64_t out_stride, const IntegerPanel& b, int64_t first_row, int64_t first_column,
                     int64_t columns) {
  const int64_t block = first_row / kBlockRows, group = b.group_words * 4;
  const uint8_t* const values = b.values + block * (b.words * kWordBytes * kBits / 8);
  for (int64_t row = 0; row < kBlockRows; ++row) {
    float* const target = out + row * out_stride;
    for (int64_t begin = 0, end; begin < columns; begin = end) {  // the columns of one group, at most 64
      const int64_t g = (first_column + begin) / group;
      end = (g + 1) * group - first_column < columns ? (g + 1) * group - first_column : columns;
      uint8_t q[kIntegerPanel];
      for (int64_t i = begin; i < end; i += 4) {  // word by word
        const int64_t word = (first_column + i) / 4;
        const uint8_t* const p = values + (kBits == 8 ? word : word / 2) * kWordBytes + row * 4;
        for (int j = 0; j < 4; ++j) {
          q[i - begin + j] = kBits == 8 ? p[j] : static_cast<uint8_t>(word % 2 == 0 ? p[j] & 15 : p[j] >> 4);
        }
      }
      const int64_t at = (block * b.groups + g) * kBlockRows + row;
      const float scale = b.row_scales[first_row + row] * static_cast<float>(b.scales[at]);
      const float zero = static_cast<float>(b.zeros == nullptr ? 128 : b.zeros[at]) * (kBits == 8 ? 1.0f : 1.0f / 16);
      for (int64_t i = begin; i < end; ++i) target[i] = (static_cast<float>(q[i - begin]) - zero) * scale;
    }
  }
}

void dequantize(float* out, int64_t out_stride, const IntegerPanel& b, int64_t first_row, int64_t first_column,
                int64_t columns) {
  if (b.bits == 8) {
    dequantize_bits<8>(out, out_stride, b, first_row, first_column, columns);
  } else {
    dequantize_bits<4>(out, out_stride, b, first_row, first_column, columns);
  }
}

// ---- probe ---------------------------------------------------------------------------------------------------------------

// The dots of a tile, of bytes that the compiler has to take for new each time: else it would multiply once and only add.
template <int kBits>
double dot_rate(int64_t iterations) {
  constexpr int32_t kOne = 0x01010101;
  int8_t rows[4 * kRowTile] = {};
  Weights w[kTileVectors8];
  Ints sum[kRowTile][kTileVectors8];
#pragma GCC unroll 8
  for (int j = 0; j < kTileVectors8; ++j) {
    w[j] = as_weights(broadcast_ints(kOne + j));
#pragma GCC unroll 8
    for (int i = 0; i < kRowTile; ++i) sum[i][j] = broadcast_ints(kOne + i);
  }
  for (int64_t n = 0; n < iterations; ++n) {
    asm volatile("" : : "r"(rows) : "memory");
#pragma GCC unroll 8
    for (int i = 0; i < kRowTile; ++i) {
      const Activations a = as_activations(word_at(rows + 4 * i));
#pragma GCC unroll 8
      for (int j = 0; j < kTileVectors8; ++j) sum[i][j] = add_dot<kBits>(sum[i][j], w[j], a);
    }
  }
  volatile int32_t sink = 0;
#pragma GCC unroll 8
  for (int i = 0; i < kRowTile; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kTileVectors8; ++j) sink = sink ^ sum[i][j][0];
  }
  constexpr int kOperations = kIsWide<kBits> ? 4 : 8;  // of a lane
  return static_cast<double>(iterations) * kRowTile * kTileVectors8 * kLanes * kOperations;
}

double multiply_rate(int bits, int64_t iterations) {
  return bits == 8 ? dot_rate<8>(iterations) : dot_rate<4>(iterations);
}

constexpr IntegerKernels make_table(const char*) {
  return {.has_dot = kHasDot,
          .multiply = multiply,
          .multiply_pair = multiply_pair,
          .quantize_row = quantize_row,
          .dequantize = dequantize,
          .multiply_rate = multiply_rate};
}

}  // namespace
}  // namespace switchgear::cpu
