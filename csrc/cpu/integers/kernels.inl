// SPDX-License-Identifier: BSD-3-Clause
// Products of int8 activations and weights of 8 or 4 bits, once for all ISAs: included after simd_<isa>.h and dot.h.
//
// multiply: C[m,n] = s_m · s_n · Σ_g (s_ng · Σ_{k in g} a[m,k]·(q[n,k] - z)), z = 128 or 8, or z_ng if there are zeros
//   work 2·M·N·K operations; traffic: values once per 240 rows, K bytes per column at 8 bits and K/2 at 4, and the scales
//   A step loads 64 bytes of each of four blocks (16 columns x 4 of k) and broadcasts 4 bytes of each of 6 rows: 24 dot
//   instructions for 4 loads and 6 broadcasts, so the multipliers bind. 4-bit values are unpacked in registers: the low halves
//   of 64 bytes are one such load, the high halves the next.
//   The weight is the unsigned operand, so z needs no instruction: accumulators start at -z·Σ a, from quantize_row.
//   At 4 bits a group ends with conversions and multiply-adds, one per 8 dots, or two with zeros.
//   reached on one core of Zen 5: at 8 bits 92-94 % of the dots from 32 rows on, weights from memory (60-75 % with 12 to 16);
//   at 4 bits with zeros 63-66 %, where the bound is 80 %; one row at 8 bits is as fast as a plain read
// Sums inside a group are exact integers. Sums over groups are float32, ascending, so results do not depend on tiles.
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int kRowTile = 6;
constexpr int kTileVectors8 = kPanelVectors;  // per tile: 6 sums each
constexpr int kTileVectors4 = 2;              // with several groups, sums and totals share the registers
constexpr int kBlockVectors = kBlockRows / kLanes;
constexpr int64_t kWordBytes = 4 * kBlockRows;  // of a block

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

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

  // Start of a sum: -z·Σ a for symmetric weights, plus kWeightOffset·Σ a (z at 8 bits, so these cancel).
  template <int kBits>
  Ints start(int i, int64_t g) const {
    constexpr int kOffset = kBits == 8 ? kWeightOffset : 0;
    if constexpr (kOffset != 0) return broadcast_ints(zeros[0] == nullptr ? 0 : kOffset * corrections[i][g]);
    return broadcast_ints(zeros[0] == nullptr ? corrections[i][g] : 0);
  }
};

// Words of 4 columns in 64 bytes: one at 8 bits, two at 4.
template <int kBits>
constexpr int kHalves = 8 / kBits;

template <int kBits>
inline Weights weights_at(const uint8_t* bytes, int half) {
  const Ints v = load_ints(bytes);
  if constexpr (kBits == 8) return as_weights(kWeightOffset == 0 ? v : v ^ static_cast<int32_t>(0x80808080));
  return as_weights((half == 0 ? v : v >> 4) & 0x0f0f0f0f);
}

// totals += sums · scale; with zeros also -scale · zero · the sums of activations
template <int kBits, int kRows, int kVectors>
inline void end_group(const Tile<kRows, kVectors>& t, const Ints (&sum)[kRows][kVectors], int64_t g,
                      Floats (&total)[kRows][kVectors]) {
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    const Floats scale = widen(t.scales[j] + g * kBlockRows);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) total[i][j] = multiply_add(to_floats(sum[i][j]), scale, total[i][j]);
    if (t.zeros[0] != nullptr) {
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
template <int kBits, int kRows, int kVectors, int kAhead>
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
        for (int j = 0; j < kVectors; ++j) sum[i][j] = t.template start<kBits>(i, g);
      }
      const int64_t begin = g * b.group_words, end = begin + b.group_words < b.words ? begin + b.group_words : b.words;
      for (int64_t word = begin; word < end; word += kHalves<kBits>) {
        for (const uint8_t* const wanted : ahead) {
          __builtin_prefetch(wanted + word / kHalves<kBits> * kWordBytes, 0, 2);
        }
#pragma GCC unroll 2
        for (int half = 0; half < kHalves<kBits>; ++half) {
          Weights w[kVectors];
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) {
            w[j] = weights_at<kBits>(t.values[j] + word / kHalves<kBits> * kWordBytes, half);
          }
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) {
            const Activations a = as_activations(word_at(t.a[i] + 4 * (word + half)));
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) sum[i][j] = dot(sum[i][j], w[j], a);
          }
        }
      }
      end_group<kBits>(t, sum, g, total);
    }
    end_block(t, total, block, last == b.groups);
  }
}

// The same for few rows, which are memory-bound. Bandwidth is highest with one or two long streams of loads: blocks are
// contiguous, and two sequences of blocks, such as gates and ups, are read in turns. Several sums per element hide the
// latency of dot (they are integers, so order does not matter).
template <int kRows>
constexpr int kStreams = kLanes == 16 || kRows == 1 ? 2 : 1;  // side by side

// One row of bytes is read at full bandwidth. More work per line leaves too few loads in flight, so 4 KB of values ahead are
// prefetched, and as many scales.
template <int kBits, int kRows>
constexpr bool kPrefetches = kBits == 4 || kRows >= 2;
constexpr int64_t kAheadBytes = 4096, kScalesAhead = 512;

template <int kBits, int kRows, int kSide>
void multiply_block(const Tile<kRows, kBlockVectors> (&t)[kSide], const IntegerPanel& b) {
  constexpr int kFree = 4 / (kRows * kSide * kBlockVectors), kChains = kFree > 1 ? kFree : 1;
  for (int64_t block = 0, last = 0; last < b.groups; ++block) {
    last = (block + 1) * b.block_groups < b.groups ? (block + 1) * b.block_groups : b.groups;
    Floats total[kSide][kRows][kBlockVectors] = {};
    for (int64_t g = block * b.block_groups; g < last; ++g) {
      Ints sum[kSide][kChains][kRows][kBlockVectors];
#pragma GCC unroll 8
      for (int side = 0; side < kSide; ++side) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
          for (int j = 0; j < kBlockVectors; ++j) {
            sum[side][0][i][j] = t[side].template start<kBits>(i, g);
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
          if (t[side].zeros[0] != nullptr) __builtin_prefetch(t[side].zeros[0] + at, 0, 3);
        }
      }
      const int64_t begin = g * b.group_words, end = begin + b.group_words < b.words ? begin + b.group_words : b.words;
      const auto add_word = [&](int64_t word, int half, int chain) {
        Weights w[kSide][kBlockVectors];
#pragma GCC unroll 8
        for (int side = 0; side < kSide; ++side) {
          if constexpr (kPrefetches<kBits, kRows>) {
            if (half == 0) {
              __builtin_prefetch(t[side].values[0] + word / kHalves<kBits> * kWordBytes + kAheadBytes, 0, 3);
            }
          }
#pragma GCC unroll 8
          for (int j = 0; j < kBlockVectors; ++j) {
            w[side][j] = weights_at<kBits>(t[side].values[j] + word / kHalves<kBits> * kWordBytes, half);
          }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Activations a = as_activations(word_at(t[0].a[i] + 4 * (word + half)));
#pragma GCC unroll 8
          for (int side = 0; side < kSide; ++side) {
#pragma GCC unroll 8
            for (int j = 0; j < kBlockVectors; ++j) {
              Ints& s = sum[side][chain][i][j];
              s = dot(s, w[side][j], a);
            }
          }
        }
      };
      int64_t word = begin;
      for (; word + 4 <= end; word += 4) {
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          const int half = n % kHalves<kBits>;
          add_word(word + n - half, half, n % kChains);
        }
      }
      for (; word < end; word += 2) {  // the number of words is even
        add_word(word, 0, 0);
        kBits == 8 ? add_word(word + 1, 0, 0) : add_word(word, 1, 0);
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
        end_group<kBits>(t[side], sum[side][0], g, total[side]);
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
template <int kBits, int kVectors, int kAhead>
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
        end - m, [&]<int kRows>() { multiply_tile<kBits, kRows, kVectors, kAhead>(p, m, first, ahead); });
  }
}

inline int64_t blocks_of(int64_t num_columns) { return (num_columns + kBlockRows - 1) / kBlockRows; }

template <int kBits, int kRows>
void multiply_two(const Tile<kRows, kBlockVectors>& one, const Tile<kRows, kBlockVectors>& other,
                  const IntegerPanel& b) {
  if constexpr (kStreams<kRows> == 2) {
    multiply_block<kBits, kRows, 2>({one, other}, b);
  } else {
    multiply_block<kBits, kRows, 1>({one}, b);
    multiply_block<kBits, kRows, 1>({other}, b);
  }
}

template <int kBits>
void multiply_pair_bits(const IntegerProduct& first, const IntegerProduct& second) {
  with_count<1, kFewRows>(first.num_rows, [&]<int kRows>() {
    using Block = Tile<kRows, kBlockVectors>;
    for (int64_t block = 0; block < blocks_of(first.num_columns); ++block) {
      const int64_t at = block * kBlockVectors;
      multiply_two<kBits, kRows>(Block(first, 0, at), Block(second, 0, at), first.b);
    }
  });
}

template <int kBits>
void multiply_few(const IntegerProduct& p) {  // as the pair of its halves
  with_count<1, kFewRows>(p.num_rows, [&]<int kRows>() {
    using Block = Tile<kRows, kBlockVectors>;
    const int64_t blocks = blocks_of(p.num_columns), half = blocks / 2;
    for (int64_t block = 0; block < half; ++block) {
      multiply_two<kBits, kRows>(Block(p, 0, block * kBlockVectors), Block(p, 0, (half + block) * kBlockVectors), p.b);
    }
    if (blocks % 2 != 0) multiply_block<kBits, kRows, 1>({Block(p, 0, (blocks - 1) * kBlockVectors)}, p.b);
  });
}

template <int kBits>
void multiply_bits(const IntegerProduct& p) {
  if (p.num_rows <= kFewRows) return multiply_few<kBits>(p);
  constexpr int kVectors = kBits == 8 ? kTileVectors8 : kTileVectors4;
  const int64_t blocks = blocks_of(p.num_columns), vectors = blocks * kBlockVectors;
  const bool few_passes = p.num_rows * (vectors / kVectors) <= (blocks - 1) * kRowTile;
  int64_t first = 0;
  for (; first + kVectors <= vectors; first += kVectors) {
    few_passes ? multiply_rows<kBits, kVectors, 2>(p, first, blocks)
               : multiply_rows<kBits, kVectors, 1>(p, first, blocks);
  }
  for (; first < vectors; ++first) multiply_rows<kBits, 1, 1>(p, first, blocks);
}

void multiply(const IntegerProduct& p) { p.b.bits == 8 ? multiply_bits<8>(p) : multiply_bits<4>(p); }

void multiply_pair(const IntegerProduct& first, const IntegerProduct& second) {
  first.b.bits == 8 ? multiply_pair_bits<8>(first, second) : multiply_pair_bits<4>(first, second);
}

// ---- rows ----------------------------------------------------------------------------------------------------------------

template <typename T>
inline Floats load_some(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}

template <typename T>
void quantize_values(const IntegerRows& out, int64_t r, const T* row, int64_t n, int64_t block) {
  int8_t* const values = out.values + r * out.stride;
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
      int8_t bytes[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) bytes[lane] = static_cast<int8_t>(rounded[lane]);
      __builtin_memcpy(values + i, bytes, kLanes);
    }
  }
  const int64_t written = (n + kLanes - 1) / kLanes * kLanes;
  if (written < out.stride) __builtin_memset(values + written, 0, static_cast<size_t>(out.stride - written));
}

void quantize_row(const IntegerRows& out, int64_t r, const void* row, DType dtype, int64_t n, int64_t block,
                  int64_t group, int32_t factor) {
  switch (dtype) {
    case DType::kBFloat16: quantize_values(out, r, static_cast<const BFloat16*>(row), n, block); break;
    case DType::kFloat16: quantize_values(out, r, static_cast<const Float16*>(row), n, block); break;
    default: quantize_values(out, r, static_cast<const float*>(row), n, block);
  }
  const int8_t* const values = out.values + r * out.stride;
  for (int64_t g = 0; g < out.groups; ++g) {
    const int64_t end = (g + 1) * group < n ? (g + 1) * group : n;
    int32_t sum = 0;
    for (int64_t k = g * group; k < end; ++k) sum += factor * values[k];
    out.corrections[r * out.groups + g] = sum;
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

double multiply_rate(int64_t iterations) {
  constexpr int kSums = kRowTile * kTileVectors8;
  volatile int32_t one = 0x01010101;
  const Weights w = as_weights(broadcast_ints(one));
  const Activations a = as_activations(one);
  Ints sum[kSums];
#pragma GCC unroll 32
  for (int j = 0; j < kSums; ++j) sum[j] = broadcast_ints(one + j);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < kSums; ++j) sum[j] = dot(sum[j], w, a);
  }
  volatile int32_t sink = 0;
#pragma GCC unroll 32
  for (int j = 0; j < kSums; ++j) sink = sink + sum[j][0];
  return static_cast<double>(iterations) * kSums * kLanes * 8;
}

constexpr IntegerKernels kTable = {
    .multiply = multiply,
    .multiply_pair = multiply_pair,
    .quantize_row = quantize_row,
    .dequantize = dequantize,
    .multiply_rate = multiply_rate,
};

}  // namespace
}  // namespace switchgear::cpu
