// SPDX-License-Identifier: BSD-3-Clause
// encode_blocks. A block of 256 columns is transposed, so that a loop goes over a column of all its groups and compilers
// vectorise it. For each of 7 or 9 tried scales of a group:
//
//   q = clamp(round(x / scale)), then the scale (and min) that fit x best for these q; the best of all is kept
//
// About 17 float32 operations a weight and scale: arithmetic binds. Sums are those of a tree: halves of a group are added until
// one number is left, so they are the same in vectors of any length. This file is compiled with -ffp-contract=off.
#include "switchgear/encode.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "checks.h"
#include "half.h"
#include "threads.h"

namespace switchgear {
namespace {

constexpr int kWide = 256;

float inverse(float d) { return d == 0 ? 0 : 1 / d; }

// The nearest integer, ties to even, within bounds that are integers. NaN stays NaN.
float round_within(float x, float low, float high) {
  x = x < low ? low : x;
  x = x > high ? high : x;
  return x + 0x1.8p23f - 0x1.8p23f;
}

uint8_t* put_half(uint8_t* out, float x) {
  const uint16_t half = cpu::bits_of_half(x);
  out[0] = static_cast<uint8_t>(half), out[1] = static_cast<uint8_t>(half >> 8);
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

// Integer factors of the groups of a block, times d.
template <int kGroups>
struct Factors {
  float d;
  float integers[kGroups];

  Factors(const float* values, float least, float most) {
    float largest = values[0];
    for (int g = 1; g < kGroups; ++g) largest = std::abs(values[g]) > std::abs(largest) ? values[g] : largest;
    d = largest / (least != 0 ? least : most);
    d = cpu::round_to_half(std::clamp(d, -65504.0f, 65504.0f));
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
    std::copy_n(terms, kGroups, out);
  }
  template <int kHalf>
  void add_halves() {
    for (int i = 0; i < kHalf; ++i) terms[i] += terms[i + kHalf];
    if constexpr (kHalf > kGroups) add_halves<kHalf / 2>();
  }

  // The scale with the smallest squared error of scale · q, low <= q <= high.
  void search_scale(float low, float high, float* best) {
    float largest[kGroups], gain[kGroups] = {}, inverted[kGroups], products[kGroups], squares[kGroups];
    std::copy_n(x, kGroups, largest);
    for_each([&](int i, int g) { largest[g] = std::abs(x[i]) > std::abs(largest[g]) ? x[i] : largest[g]; });
    std::fill_n(best, kGroups, 0.0f);
    for (int step = -4; step < 5; ++step) {
      const auto end = static_cast<float>(double{low} - 0.2 * step);
      for (int g = 0; g < kGroups; ++g) inverted[g] = inverse(largest[g] / end);
      for_each([&](int i, int g) { q[i] = round_within(x[i] * inverted[g], low, high); });
      sum(products, [&](int i, int) { return q[i] * x[i]; });
      sum(squares, [&](int i, int) { return q[i] * q[i]; });
      for (int g = 0; g < kGroups; ++g) {
        const float norm = squares[g] < 1 ? 1 : squares[g], removed = products[g] * products[g] / norm;
        if (removed > gain[g]) best[g] = products[g] / norm;
        if (!(removed <= gain[g])) gain[g] = std::isnan(gain[g]) ? gain[g] : removed;
      }
    }
  }

  // The scale and the min, at least 0, with the smallest squared error of scale · q - min, 0 <= q <= most.
  void search_range(float most, float* best, float* lowest) {
    float low[kGroups] = {}, high[kGroups], inverted[kGroups], error[kGroups];
    float of_x[kGroups], sums[kGroups], squares[kGroups], products[kGroups], scale[kGroups], offset[kGroups],
        left[kGroups];
    std::copy_n(x, kGroups, high);
    for_each([&](int i, int g) {
      low[g] = x[i] < low[g] ? x[i] : low[g];
      high[g] = x[i] > high[g] ? x[i] : high[g];
    });
    for (int g = 0; g < kGroups; ++g) {
      high[g] += 0.0f;  // no -0
      best[g] = (high[g] - low[g]) / most, lowest[g] = 0 - low[g];
      error[g] = std::numeric_limits<float>::infinity();
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

// w = d · s · q - m · t
template <int kGroups>
std::pair<Factors<kGroups>, Factors<kGroups>> encode_lowered(Block<kGroups>& block, float most, float factor) {
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

struct Encoder {
  void (*encode)(const float* x, uint8_t* out);
  int64_t bytes;  // of a block
};

constexpr Encoder kEncoders[] = {
    {&encode_q2, 84},  {&encode_q3, 110}, {&encode_q4_or_q5<false>, 144}, {&encode_q4_or_q5<true>, 176},
    {&encode_q6, 210},
};

}  // namespace

void encode_blocks(const TensorView& numbers, const TensorView& blocks, BlockCode code, Execution exec) {
  check_threads(exec);
  const Encoder encoder = kEncoders[static_cast<size_t>(code)];
  SWITCHGEAR_CHECK(
      ValueError,
      numbers.ndim == 2 && numbers.contiguous() && numbers.dtype == DType::kFloat32 && numbers.shape[1] % kWide == 0,
      "numbers: expected contiguous float32 [R, C], C a multiple of ", kWide, ", got ", describe(numbers));
  const int64_t rows = numbers.shape[0], columns = numbers.shape[1], row_bytes = columns / kWide * encoder.bytes;
  SWITCHGEAR_CHECK(ValueError,
                   blocks.ndim == 2 && blocks.contiguous() && blocks.dtype == DType::kUInt8 &&
                       blocks.shape[0] == rows && blocks.shape[1] == row_bytes,
                   "blocks: expected contiguous uint8 [", rows, ", ", row_bytes, "], got ", describe(blocks));
  check_host("numbers", numbers);
  check_host("blocks", blocks);
  cpu::parallel_for_shares(cpu::resolve_threads(exec.num_threads), rows, [&](int64_t row, int) {
    const float* x = numbers.as<float>() + row * columns;
    uint8_t* out = blocks.as<uint8_t>() + row * row_bytes;
    for (int64_t c = 0; c < columns; c += kWide, x += kWide, out += encoder.bytes) encoder.encode(x, out);
  });
}

}  // namespace switchgear
