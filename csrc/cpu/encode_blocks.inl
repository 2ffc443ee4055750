// SPDX-License-Identifier: BSD-3-Clause
// EncodeKernels::encode_blocks. A block of 256 columns, or eight of 32 whose scales are searched, is transposed, so that a loop
// goes over a column of all its groups and compilers vectorise it. A search tries 7 to 18 scales of a group:
//
//   q = clamp(round(x / scale)), then the scale (and min) that fit x best for these q; the best of all is kept
//
// These are about 17 float32 operations a weight and scale: arithmetic binds. A sum adds the halves of a group until one number
// is left, so it has the same bits in vectors of any length. Included after encode_rows.inl.
#pragma once
#include "switchgear/gguf.h"

namespace switchgear::cpu {
namespace {

constexpr int kNarrow = 32, kWide = 256;  // columns of a block

inline float inverse(float d) { return d == 0 ? 0 : 1 / d; }

// The nearest integer, ties to even, within bounds that are integers. Keeps NaN.
inline float round_within(float x, float low, float high) {
  x = x < low ? low : x;
  x = x > high ? high : x;
  return x + 0x1.8p23f - 0x1.8p23f;
}

// The float16 nearest to x, at most the largest.
inline Floats limit_half(float x) { return clamp(broadcast(x), -65504, 65504); }
inline float round_to_half(float x) { return round_to(kHalf, limit_half(x))[0]; }
inline uint8_t* put_half(uint8_t* out, float x) {
  Float16 halves[kLanes];
  store(halves, limit_half(x));
  __builtin_memcpy(out, halves, 2);
  return out + 2;
}

// The codes' bits from `shift` on, `kBits` of them, of each run of columns: a byte holds those of 8 / kBits runs.
template <int kRun, int kBits>
uint8_t* gather(uint8_t* out, const uint8_t* codes, int count, int shift) {
  constexpr int kCodes = 8 / kBits;
  for (const uint8_t* run = codes; run < codes + count; run += kRun * kCodes, out += kRun) {
    for (int j = 0; j < kRun; ++j) {
      int byte = 0;
      for (int k = 0; k < kCodes; ++k) byte |= (run[k * kRun + j] >> shift & ((1 << kBits) - 1)) << k * kBits;
      out[j] = static_cast<uint8_t>(byte);
    }
  }
  return out;
}

// The middles between kIq4Values, and the nearest of them to each integer from -128 on, of two the lower one.
struct Iq4Tables {
  float middles[15], nearest[kWide];

  consteval Iq4Tables() : middles{}, nearest{} {
    for (int i = 0; i < 15; ++i) middles[i] = static_cast<float>(kIq4Values[i] + kIq4Values[i + 1]) / 2;
    for (int i = 0; i < kWide; ++i) {
      int code = 0;
      while (code < 15 && static_cast<float>(i - 128) > middles[code]) ++code;
      nearest[i] = kIq4Values[code];
    }
  }
};
constexpr Iq4Tables kIq4Tables;

// Counts the middles below each x, all of them for NaN.
template <int kCount, int kMiddles>
void count_below(const float (&x)[kCount], const float (&middles)[kMiddles], uint8_t* codes) {
  int32_t counts[kCount] = {};
  for (const float middle : middles) {
    for (int i = 0; i < kCount; ++i) counts[i] += !(middle >= x[i]);
  }
  for (int i = 0; i < kCount; ++i) codes[i] = static_cast<uint8_t>(counts[i]);
}

// Integer factors of the groups of a block, times d.
template <int kGroups>
struct Factors {
  float d;
  float integers[kGroups];

  Factors(const float* values, float least, float most) {
    float largest = values[0];
    for (int g = 1; g < kGroups; ++g) {
      largest = __builtin_fabsf(values[g]) > __builtin_fabsf(largest) ? values[g] : largest;
    }
    d = round_to_half(largest / (least != 0 ? least : most));
    const float inverted = inverse(d);
    for (int g = 0; g < kGroups; ++g) integers[g] = round_within(values[g] * inverted, least, most);
  }
};

// A block in groups of equal size, column by column.
template <int kGroups>
struct Block {
  static constexpr int kColumns = kWide / kGroups;
  float x[kWide];
  float q[kWide];
  float terms[kWide];
  uint8_t codes[kWide];  // in order

  explicit Block(const float* numbers) {
    for (int c = 0; c < kColumns; ++c) {
      for (int g = 0; g < kGroups; ++g) x[c * kGroups + g] = numbers[g * kColumns + c];
    }
  }

  template <typename Visit>
  static void for_each(Visit&& visit) {
    for (int c = 0; c < kColumns; ++c) {
      for (int g = 0; g < kGroups; ++g) visit(c * kGroups + g, g);
    }
  }

  template <typename Term>
  void sum(float* out, Term&& term) {
    for_each([&](int i, int g) { terms[i] = term(i, g); });
    add_halves<kWide / 2>();
    for (int g = 0; g < kGroups; ++g) out[g] = terms[g];
  }
  template <int kHalf>
  void add_halves() {
    for (int i = 0; i < kHalf; ++i) terms[i] += terms[i + kHalf];
    if constexpr (kHalf > kGroups) add_halves<kHalf / 2>();
  }

  // The scale with the smallest squared error of scale · q, fitted to q = round(x / tried), for each of the tried scales: the
  // number of largest magnitude over an end.
  template <int kCount, typename Round>
  void search(const float (&ends)[kCount], float* best, Round&& round) {
    float largest[kGroups], gain[kGroups] = {}, inverted[kGroups], products[kGroups], squares[kGroups];
    for (int g = 0; g < kGroups; ++g) largest[g] = x[g], best[g] = 0;
    for_each(
        [&](int i, int g) { largest[g] = __builtin_fabsf(x[i]) > __builtin_fabsf(largest[g]) ? x[i] : largest[g]; });
    for (const float end : ends) {
      for (int g = 0; g < kGroups; ++g) inverted[g] = inverse(largest[g] / end);
      for_each([&](int i, int g) { q[i] = round(x[i] * inverted[g]); });
      sum(products, [&](int i, int) { return q[i] * x[i]; });
      sum(squares, [&](int i, int) { return q[i] * q[i]; });
      for (int g = 0; g < kGroups; ++g) {
        const float norm = squares[g] < 1 ? 1 : squares[g], removed = products[g] * products[g] / norm;
        if (removed > gain[g]) best[g] = products[g] / norm;
        if (!(removed <= gain[g])) gain[g] = gain[g] != gain[g] ? gain[g] : removed;
      }
    }
  }

  // The same for low <= q <= high.
  void search_scale(float low, float high, float* best) {
    float ends[9];
    for (int step = -4; step < 5; ++step) ends[step + 4] = static_cast<float>(double{low} - 0.2 * step);
    search(ends, best, [&](float scaled) { return round_within(scaled, low, high); });
  }

  // The same for q in kIq4Values.
  void search_table(float* best) {
    static constexpr float kEnds[] = {-139, -136, -133, -130, -127, -124, -121, -118, -115,
                                      101,  104,  107,  110,  113,  116,  119,  122,  125};
    search(kEnds, best, [](float scaled) {
      scaled = scaled != scaled ? 0 : scaled;
      return kIq4Tables.nearest[static_cast<int>(round_within(scaled, -128, 127)) + 128];
    });
  }

  // The codes of the nearest kIq4Values.
  void set_table_codes(const float* factors) {
    float inverted[kGroups];
    for (int g = 0; g < kGroups; ++g) inverted[g] = inverse(factors[g]);
    for_each([&](int i, int g) { q[i] = x[i] * inverted[g]; });
    uint8_t found[kWide];
    count_below(q, kIq4Tables.middles, found);
    for_each([&](int i, int g) { codes[g * kColumns + i / kGroups] = found[i]; });
  }

  // The scale and the min, at least 0, with the smallest squared error of scale · q - min, 0 <= q <= most.
  void search_range(float most, float* best, float* lowest) {
    float low[kGroups] = {}, high[kGroups], inverted[kGroups], error[kGroups];
    float of_x[kGroups], sums[kGroups], squares[kGroups], products[kGroups], scale[kGroups], offset[kGroups],
        left[kGroups];
    for (int g = 0; g < kGroups; ++g) high[g] = x[g];
    for_each([&](int i, int g) {
      low[g] = x[i] < low[g] ? x[i] : low[g];
      high[g] = x[i] > high[g] ? x[i] : high[g];
    });
    for (int g = 0; g < kGroups; ++g) {
      high[g] += 0.0f;  // no -0
      best[g] = (high[g] - low[g]) / most, lowest[g] = 0 - low[g];
      error[g] = kInfinity;
    }
    sum(of_x, [&](int i, int) { return x[i]; });
    for (int step = -4; step < 9; step += 2) {
      const auto end = static_cast<float>(double{most} + 0.1 * step);
      for (int g = 0; g < kGroups; ++g) inverted[g] = inverse(high[g] - low[g]) * end;
      for_each([&](int i, int g) { q[i] = round_within((x[i] - low[g]) * inverted[g], 0, most); });
      sum(sums, [&](int i, int) { return q[i]; });
      sum(squares, [&](int i, int) { return q[i] * q[i]; });
      sum(products, [&](int i, int) { return q[i] * x[i]; });
      bool is_regular[kGroups];
      for (int g = 0; g < kGroups; ++g) {
        const float determinant = kColumns * squares[g] - sums[g] * sums[g];
        is_regular[g] = determinant > 0;
        const float divisor = is_regular[g] ? determinant : 1;
        const float both = (kColumns * products[g] - sums[g] * of_x[g]) / divisor;
        offset[g] = (squares[g] * of_x[g] - sums[g] * products[g]) / divisor;
        scale[g] = offset[g] > 0 ? products[g] / (squares[g] < 1 ? 1 : squares[g]) : both;
        offset[g] = offset[g] > 0 ? 0 : offset[g];
      }
      sum(left, [&](int i, int g) {
        const float difference = scale[g] * q[i] + offset[g] - x[i];
        return difference * difference;
      });
      for (int g = 0; g < kGroups; ++g) {
        if (!(left[g] < error[g] && is_regular[g] && scale[g] > 0)) continue;
        best[g] = scale[g], lowest[g] = 0 - offset[g], error[g] = left[g];
      }
    }
  }

  void set_codes(const float* factors, const float* offsets, float low, float high) {
    float inverted[kGroups];
    for (int g = 0; g < kGroups; ++g) inverted[g] = inverse(factors[g]);
    for_each([&](int i, int g) { q[i] = round_within((x[i] + offsets[g]) * inverted[g], low, high) - low; });
    for_each([&](int i, int g) { codes[g * kColumns + i / kGroups] = static_cast<uint8_t>(q[i]); });
  }
};

// ---- 32 columns ----------------------------------------------------------------------------------------------------------

// The ends of the range. Compares integers: chains of float comparisons are not vectorised.
struct Range {
  float low, high;

  explicit Range(const float* x) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int i = 0; i < kNarrow; ++i) {
      const int32_t bits = std::bit_cast<int32_t>(x[i]), key = bits ^ (bits >> 31 & 0x7fffffff);
      least = key < least ? key : least;
      most = key > most ? key : most;
    }
    low = std::bit_cast<float>(least ^ (least >> 31 & 0x7fffffff));
    high = std::bit_cast<float>(most ^ (most >> 31 & 0x7fffffff));
  }
};

void encode_q8_0(const float* x, uint8_t* out) {
  const float d = largest_magnitude(x, kNarrow) / 127, inverted = inverse(d);
  out = put_half(out, d);
  for (int i = 0; i < kNarrow; ++i) {
    const float scaled = x[i] * inverted, size = __builtin_fabsf(scaled) + 0.5f;  // halves away from zero
    const int code = static_cast<int>(size > 127 ? 127 : size);
    out[i] = static_cast<uint8_t>(scaled < 0 ? -code : code);
  }
}

// The upper bit of the codes, if they have five, and the other four.
template <int kBits>
void put_codes(uint8_t* out, const uint8_t* codes) {
  if (kBits == 5) out = gather<1, 1>(out, codes, kNarrow, 4);
  gather<16, 4>(out, codes, kNarrow, 0);
}

inline void set_narrow_codes(uint8_t* codes, const float* x, float offset, float inverted, float rounding, float most) {
  for (int i = 0; i < kNarrow; ++i) {
    float code = (x[i] + offset) * inverted + rounding;
    code = code < 0 ? 0 : code;
    codes[i] = static_cast<uint8_t>(static_cast<int>(code > most ? most : code));
  }
}

// w = d · (q - middle). The number of largest magnitude, the first of several, becomes -middle.
template <int kBits>
void encode_symmetric(const float* x, uint8_t* out) {
  constexpr float kMiddle = 1 << (kBits - 1);
  const Range range(x);
  float largest = range.high > -range.low ? range.high : range.low;
  if (range.high == -range.low) {
    for (int i = kNarrow - 1; i >= 0; --i) {
      largest = __builtin_fabsf(x[i]) == __builtin_fabsf(range.high) ? x[i] : largest;
    }
  }
  const float d = largest / -kMiddle;
  uint8_t codes[kNarrow];
  set_narrow_codes(codes, x, 0, inverse(d), kMiddle + 0.5f, 2 * kMiddle - 1);
  put_codes<kBits>(put_half(out, d), codes);
}

// w = d · q + m
template <int kBits>
void encode_between(const float* x, uint8_t* out) {
  constexpr float kMost = (1 << kBits) - 1;
  const Range range(x);
  const float low = range.low + 0.0f, d = (range.high + 0.0f - low) / kMost;  // no -0
  uint8_t codes[kNarrow];
  set_narrow_codes(codes, x, -low, inverse(d), 0.5f, kMost);
  put_codes<kBits>(put_half(put_half(out, d), low), codes);
}

void encode_mxfp4(const float* x, uint8_t* out) {
  const float largest = largest_magnitude(x, kNarrow);
  const int exponent = (std::bit_cast<int32_t>(largest) >> 23) - 2;  // the largest number is 8 to 16 times 2^(e - 128)
  const int e = exponent < 0 ? 0 : exponent;
  const float unit = std::bit_cast<float>(e < 2 ? 0x00200000 << e : (e - 1) << 23);
  float scaled[kNarrow];
  uint8_t codes[kNarrow];
  for (int i = 0; i < kNarrow; ++i) scaled[i] = __builtin_fabsf(x[i]) / unit;
  static constexpr float kMiddles[] = {0.5f, 1.5f, 2.5f, 3.5f, 5, 7, 10};
  count_below(scaled, kMiddles, codes);
  for (int i = 0; i < kNarrow; ++i) codes[i] = static_cast<uint8_t>(codes[i] | (x[i] < 0 && codes[i] > 0 ? 8 : 0));
  *out = static_cast<uint8_t>(e);
  gather<16, 4>(out + 1, codes, kNarrow, 0);
}

// ---- 256 columns ---------------------------------------------------------------------------------------------------------

// Eight blocks of iq4_nl.
void encode_iq4_nl(const float* x, uint8_t* out) {
  Block<8> blocks(x);
  float found[8];
  blocks.search_table(found);
  for (float& d : found) d = round_to_half(d);
  blocks.set_table_codes(found);
  for (int g = 0; g < 8; ++g) out = gather<16, 4>(put_half(out, found[g]), blocks.codes + g * kNarrow, kNarrow, 0);
}

void encode_iq4_xs(const float* x, uint8_t* out) {
  Block<8> block(x);
  float found[8], factors[8];
  block.search_table(found);
  const Factors<8> scales(found, -32, 31);
  uint8_t stored[8];
  for (int g = 0; g < 8; ++g) {
    factors[g] = scales.d * scales.integers[g];
    stored[g] = static_cast<uint8_t>(scales.integers[g] + 32);
  }
  block.set_table_codes(factors);
  out = gather<1, 4>(gather<1, 2>(put_half(out, scales.d), stored, 8, 4), stored, 8, 0);
  gather<16, 4>(out, block.codes, kWide, 0);
}

// w = d · s · q
template <int kGroups>
Factors<kGroups> encode_scaled(Block<kGroups>& block, float low, float high, float least, float most) {
  float found[kGroups], factors[kGroups], none[kGroups] = {};
  block.search_scale(low, high, found);
  const Factors<kGroups> scales(found, least, most);
  for (int g = 0; g < kGroups; ++g) factors[g] = scales.d * scales.integers[g];
  block.set_codes(factors, none, low, high);
  return scales;
}

template <int kGroups>
struct Lowered {
  Factors<kGroups> scales, mins;
};

// w = d · s · q - m · t
template <int kGroups>
Lowered<kGroups> encode_lowered(Block<kGroups>& block, float most, float factor) {
  float found[kGroups], lowest[kGroups], factors[kGroups], offsets[kGroups];
  block.search_range(most, found, lowest);
  const Factors<kGroups> scales(found, 0, factor), mins(lowest, 0, factor);
  for (int g = 0; g < kGroups; ++g) {
    factors[g] = scales.d * scales.integers[g];
    offsets[g] = mins.d * mins.integers[g];
  }
  block.set_codes(factors, offsets, 0, most);
  return {scales, mins};
}

void encode_q2(const float* x, uint8_t* out) {
  Block<16> block(x);
  const auto [scales, mins] = encode_lowered(block, 3, 15);
  for (int g = 0; g < 16; ++g) {
    *out++ = static_cast<uint8_t>(static_cast<int>(scales.integers[g]) | static_cast<int>(mins.integers[g]) << 4);
  }
  put_half(put_half(gather<32, 2>(out, block.codes, kWide, 0), scales.d), mins.d);
}

void encode_q3(const float* x, uint8_t* out) {
  Block<16> block(x);
  const auto scales = encode_scaled(block, -4, 3, -32, 31);
  uint8_t stored[16];
  for (int g = 0; g < 16; ++g) stored[g] = static_cast<uint8_t>(scales.integers[g] + 32);
  out = gather<32, 2>(gather<32, 1>(out, block.codes, kWide, 2), block.codes, kWide, 0);
  put_half(gather<4, 2>(gather<8, 4>(out, stored, 16, 0), stored, 16, 4), scales.d);
}

// kHigh: whether codes have a fifth bit.
template <bool kHigh>
void encode_q4_or_q5(const float* x, uint8_t* out) {
  Block<8> block(x);
  const auto [scales, mins] = encode_lowered(block, kHigh ? 31 : 15, 63);
  out = put_half(put_half(out, scales.d), mins.d);
  for (int g = 0; g < 4; ++g, ++out) {
    const int scale = static_cast<int>(scales.integers[g + 4]), min = static_cast<int>(mins.integers[g + 4]);
    out[0] = static_cast<uint8_t>(static_cast<int>(scales.integers[g]) | scale >> 4 << 6);
    out[4] = static_cast<uint8_t>(static_cast<int>(mins.integers[g]) | min >> 4 << 6);
    out[8] = static_cast<uint8_t>((scale & 15) | (min & 15) << 4);
  }
  out += 8;
  if (kHigh) out = gather<32, 1>(out, block.codes, kWide, 4);
  gather<32, 4>(out, block.codes, kWide, 0);
}

void encode_q6(const float* x, uint8_t* out) {
  Block<16> block(x);
  const auto scales = encode_scaled(block, -32, 31, -128, 127);
  out = gather<32, 2>(gather<64, 4>(out, block.codes, kWide, 0), block.codes, kWide, 4);
  for (const float scale : scales.integers) *out++ = static_cast<uint8_t>(static_cast<int>(scale));
  put_half(out, scales.d);
}

// ---- rows ----------------------------------------------------------------------------------------------------------------

template <Format kFormat>
constexpr auto find_encoder() {
  using enum Format;
  if constexpr (kFormat == kQ80) return &encode_q8_0;
  if constexpr (kFormat == kQ40) return &encode_symmetric<4>;
  if constexpr (kFormat == kQ41) return &encode_between<4>;
  if constexpr (kFormat == kQ50) return &encode_symmetric<5>;
  if constexpr (kFormat == kQ51) return &encode_between<5>;
  if constexpr (kFormat == kIq4Nl) return &encode_iq4_nl;
  if constexpr (kFormat == kMxfp4Gguf) return &encode_mxfp4;
  if constexpr (kFormat == kQ2K) return &encode_q2;
  if constexpr (kFormat == kQ3K) return &encode_q3;
  if constexpr (kFormat == kQ4K) return &encode_q4_or_q5<false>;
  if constexpr (kFormat == kQ5K) return &encode_q4_or_q5<true>;
  if constexpr (kFormat == kQ6K) return &encode_q6;
  if constexpr (kFormat == kIq4Xs) return &encode_iq4_xs;
}

constexpr bool takes_blocks(Format format) { return is_gguf(format); }

template <typename T>
bool encode_typed_blocks(Format format, const T* from, int64_t columns, uint8_t* out) {
  bool is_finite = true;
  with_format<takes_blocks>(format, [&]<Format kFormat>() {
    constexpr int64_t kColumns = gguf_type(kFormat).columns, kBytes = gguf_type(kFormat).bytes;
    constexpr int64_t kAtOnce = kFormat == Format::kIq4Nl ? kWide : kColumns;
    for (int64_t begin = 0; begin < columns; begin += kWide) {
      const int64_t count = columns - begin < kWide ? columns - begin : kWide;
      float x[kWide] = {};
      for (int64_t c = 0; c < count; c += kLanes) store(x + c, load(from + begin + c));
      is_finite = is_finite && largest_magnitude(x, count) < kInfinity;
      uint8_t last[kWide / kColumns * kBytes];  // blocks past the last column
      uint8_t* const blocks = count % kAtOnce == 0 ? out + begin / kColumns * kBytes : last;
      for (int64_t c = 0; c < count; c += kAtOnce) find_encoder<kFormat>()(x + c, blocks + c / kColumns * kBytes);
      if (blocks == last) __builtin_memcpy(out + begin / kColumns * kBytes, last, count / kColumns * kBytes);
    }
  });
  return is_finite;
}

bool encode_blocks(Format format, DType dtype, const void* numbers, int64_t columns, uint8_t* out) {
  return with_numbers(dtype, numbers, [&](const auto* row) { return encode_typed_blocks(format, row, columns, out); });
}

float find_largest(DType dtype, const void* numbers, int64_t count) {
  return with_numbers(dtype, numbers, [&](const auto* row) { return largest_magnitude(row, count); });
}

constexpr EncodeKernels make_table(const char*) {
  return {.encode_rows = encode_rows, .encode_blocks = encode_blocks, .find_largest = find_largest};
}

}  // namespace
}  // namespace switchgear::cpu
