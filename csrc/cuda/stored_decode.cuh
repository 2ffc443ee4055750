// SPDX-License-Identifier: BSD-3-Clause
// From the bytes of a step, 16 rows x 32 columns, to numbers. A chunk is 8 columns of a row.
//
//   Pairs<format, T>   columns 2 c and 2 c + 1 of a chunk as a word of two T, for lane c of a quad: what mma.sync
//   takes. Exact for all
//                      formats but nf4, whose values are rounded to T.
//   decode_chunk       the eight numbers of a chunk in float32, for any format
//
// Numbers come without their scale; those of integers and groups relative to their zero. 16 bits decode as follows, two
// at a time: the code becomes the bits of a T (of 2^7 + q in bfloat16 and 2^10 + q in float16 for integers, of the
// value over a power of two for minifloats), then one fused multiply-add gives the value, subnormal ones too.
// Instructions for a pair: fp8 5, mxfp4 5, int4 3, int8 4, groups 4, nf4 5 and two loads.
#pragma once
#include "ptx.cuh"
#include "stored.h"
#include "switchgear/groups.h"
#include "switchgear/minifloat.h"
#include "vector.cuh"

namespace switchgear::cuda {

// A table of nf4 comes first in dynamic shared memory: static memory would count beyond the 48 KB that need no request.
constexpr int kTableBytes = 128;
constexpr int kStepRows = 16, kStepColumns = 32, kStepChunks = 4;

// Bytes of a step, at most. kGroups: 64 for each bit.
constexpr int most_step_bytes(Format format) {
  return kStepRows * kStepColumns / 8 * static_cast<int>(bits_of(format));
}

// Values of nf4 by stored code.
struct Nf4Table {
  float values[16];
};
consteval Nf4Table nf4_table() {
  Nf4Table table{};
  for (int i = 0; i < 16; ++i) table.values[i] = kNf4Values[i ^ kNf4Zero];
  return table;
}

// a · b + c in each half; each operand is two T.
template <typename T>
__device__ inline uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return ptx::fma_bf16x2(a, b, c);
  } else {
    return ptx::fma_f16x2(a, b, c);
  }
}

// v twice. For constants, and for zeros once per step.
template <typename T>
__device__ inline uint32_t pair_of(float v) {
  return bits_of(from_float<T>(v)) * 0x10001u;
}

// The same for a constant, 2^exponent.
template <typename T>
__host__ __device__ constexpr uint32_t power_pair(int exponent) {
  return (std::is_same_v<T, __nv_bfloat16> ? static_cast<uint32_t>(exponent + 127) << 7
                                           : static_cast<uint32_t>(exponent + 15) << 10) *
         0x10001u;
}

template <typename T>
inline constexpr int kIntegerBits =
    std::is_same_v<T, __nv_bfloat16> ? 7 : 10;  // of a fraction: 2^n + q is q in its lowest bits
inline constexpr uint32_t kMinusZeros = 0x80008000u;

__device__ inline uint32_t word_at(const std::byte* p) { return *reinterpret_cast<const uint32_t*>(p); }
__device__ inline uint32_t half_word_at(const std::byte* p) { return *reinterpret_cast<const uint16_t*>(p); }

// ---- pairs -----------------------------------------------------------------------------------------------------------------
// word(step, row, chunk, shift): `step` points into shared memory; row is 0 or 8, the lane's own row is lane / 4 after
// it. `shift` is zero_shift twice, in T. `fill` writes what `word` looks up, before a barrier of the block.

struct NoTable {
  __device__ static void fill(uint32_t*) {}
};

template <Format kFormat, typename T>
struct Pairs;

template <typename T>
struct Pairs<Format::kFp8, T> : NoTable {
  static constexpr int kBytes = most_step_bytes(Format::kFp8);
  int offset;

  __device__ Pairs(int lane, int, const uint32_t*)
      : offset(lane % 4 / 2 * 64 + lane / 16 * 16 + lane % 4 % 2 * 8 + lane / 4 % 4 * 2) {}
  __device__ uint32_t word(const std::byte* step, int row, int chunk, uint32_t) const {
    constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
    const uint32_t w =
        __byte_perm(half_word_at(step + offset + 128 * chunk + 4 * row), 0, 0x1404);  // s eeee fff, then zeros
    const uint32_t bits = (w & 0x80008000u) | (w & 0x7f007f00u) >> (kBf16 ? 4 : 1);
    return fma_pair<T>(bits, power_pair<T>(kBf16 ? 120 : 8), kMinusZeros);  // the exponents' biases are 7 and 127 or 15
  }
};

template <typename T>
struct Pairs<Format::kMxfp4, T> : NoTable {
  static constexpr int kBytes = most_step_bytes(Format::kMxfp4);
  int offset, turn;

  __device__ Pairs(int lane, int, const uint32_t*) : offset(lane / 4 * 4), turn(lane % 4 * 4) {}
  __device__ uint32_t word(const std::byte* step, int row, int chunk, uint32_t) const {
    constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
    const uint32_t w = word_at(step + offset + 64 * chunk + 4 * row) >> turn;  // codes s ee f at bits 0 and 16
    const uint32_t bits = (w & 0x00080008u) << 12 | (w & 0x00070007u) << (kBf16 ? 6 : 9);
    return fma_pair<T>(bits, power_pair<T>(kBf16 ? 126 : 14),
                       kMinusZeros);  // the exponents' biases are 1 and 127 or 15
  }
};

template <typename T>
struct Pairs<Format::kNvfp4, T> : Pairs<Format::kMxfp4, T> {
  using Pairs<Format::kMxfp4, T>::Pairs;
};

template <typename T>
struct Pairs<Format::kNf4, T> {
  static constexpr int kBytes = most_step_bytes(Format::kNf4);
  const uint32_t* table;  // in shared memory: the bits of each code's value
  int offset, turn;

  __device__ Pairs(int lane, int, const uint32_t* values) : table(values), offset(lane / 4 * 4), turn(lane % 4 * 4) {}
  __device__ static void fill(uint32_t* values) {
    constexpr Nf4Table kTable = nf4_table();
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (static_cast<int>(threadIdx.x) == i) values[i] = bits_of(from_float<T>(kTable.values[i]));
    }
  }
  __device__ uint32_t word(const std::byte* step, int row, int chunk, uint32_t) const {
    const uint32_t w = word_at(step + offset + 64 * chunk + 4 * row) >> turn;
    return table[w & 15] | table[w >> 16 & 15] << 16;
  }
};

template <typename T>
struct Pairs<Format::kInt8, T> : NoTable {
  static constexpr int kBytes = most_step_bytes(Format::kInt8);
  int offset;

  __device__ Pairs(int lane, int, const uint32_t*) : offset(lane % 4 / 2 * 64 + lane / 4 * 4 + lane % 4 % 2 * 2) {}
  // q - 128 is (2^7 + q % 128) - (q < 128 ? 256 : 128): seven bits of fraction hold no more.
  __device__ uint32_t word(const std::byte* step, int row, int chunk, uint32_t shift) const {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "rows of int8 come in bfloat16");
    const uint32_t w = __byte_perm(half_word_at(step + offset + 128 * chunk + 4 * row), 0, 0x4140);
    const uint32_t low = (w & 0x007f007fu) | power_pair<T>(7),
                   high = (w & 0x00800080u) ^ (power_pair<T>(8) | kMinusZeros);
    const uint32_t q = fma_pair<T>(low, power_pair<T>(0), high);
    return shift == 0 ? q : fma_pair<T>(q, power_pair<T>(0), shift);
  }
};

template <typename T>
struct Pairs<Format::kInt4, T> : NoTable {
  static constexpr int kBytes = most_step_bytes(Format::kInt4);
  int offset, turn;

  __device__ Pairs(int lane, int, const uint32_t*) : offset(lane / 4 * 4), turn(lane % 2 * 16 + lane % 4 / 2 * 4) {}
  __device__ uint32_t word(const std::byte* step, int row, int chunk, uint32_t shift) const {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "rows of int8 come in bfloat16");
    const uint32_t w = __byte_perm(word_at(step + offset + 64 * chunk + 4 * row) >> turn, 0, 0x4140);
    const uint32_t q = fma_pair<T>((w & 0x000f000fu) | power_pair<T>(7), power_pair<T>(0),
                                   (power_pair<T>(7) + 0x00080008u) | kMinusZeros);
    return shift == 0 ? q : fma_pair<T>(q, power_pair<T>(0), shift);
  }
};

template <typename T>
struct Pairs<Format::kGroups, T> : NoTable {
  static constexpr int kBytes = most_step_bytes(Format::kGroups);
  int offset, lane_code, bits;
  uint32_t middle;  // what 2^n + q of the middle q is, negative

  __device__ Pairs(int lane, int bits, const uint32_t*)
      : offset(lane / 4 * 4),
        lane_code(lane % 4),
        bits(bits),
        middle((power_pair<T>(kIntegerBits<T>) + (0x00010001u << (bits - 1))) | kMinusZeros) {}
  __device__ uint32_t word(const std::byte* step, int row, int chunk, uint32_t shift) const {
    const std::byte* const words = step + offset + 4 * row;
    const int code = 4 * chunk + lane_code, held = bits == 3 ? 5 : 16 / bits;  // of a half word
    const int vector = bits == 3 ? code * 13 >> 6 : code * bits >> 4;          // code / held, for code <= 15
    uint32_t q;
    if (bits == 3 && code == 15) {
      q = 0;
#pragma unroll
      for (int i = 0; i < 3; ++i) q |= (word_at(words + 64 * i) >> 15 & 0x00010001u) << i;
    } else {
      const uint32_t ones = (1u << bits) - 1;
      q = word_at(words + 64 * vector) >> (bits * (code - vector * held)) & (ones | ones << 16);
    }
    if (bits == 1) return power_pair<T>(0) | q << 15;
    q = (q ^ 0x00010001u << (bits - 1)) | power_pair<T>(kIntegerBits<T>);
    q = fma_pair<T>(q, power_pair<T>(0), middle);
    return shift == 0 ? q : fma_pair<T>(q, power_pair<T>(0), shift);
  }
};

// ---- chunks ------------------------------------------------------------------------------------------------------------------

__device__ inline void fill_nf4(float* table) {
  constexpr Nf4Table kTable = nf4_table();
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (static_cast<int>(threadIdx.x) == i) table[i] = kTable.values[i];
  }
}

__device__ inline void decode_fp8(float (&v)[8], const std::byte* step, int row, int chunk) {
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const uint32_t w = half_word_at(step + (2 * chunk + j / 4) * 64 + row / 4 * 16 + j % 4 / 2 * 8 + row % 4 * 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t code = w >> 8 * i;
      v[j + i] = __uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f;
    }
  }
}

__device__ inline void decode_four_bits(float (&v)[8], Format format, const std::byte* step, int row, int chunk,
                                        const float* nf4) {
  const uint32_t w = word_at(step + chunk * 64 + row * 4);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (format == Format::kInt4) {
      v[j] = static_cast<float>(w >> (j % 4 * 8 + j / 4 * 4) & 15) - 8.0f;
    } else {
      const uint32_t code = w >> (j % 2 * 16 + j / 2 * 4) & 15;
      v[j] = format == Format::kNf4 ? nf4[code] : __uint_as_float((code & 8) << 28 | (code & 7) << 22) * 0x1p126f;
    }
  }
}

__device__ inline void decode_group(float (&v)[8], int bits, const std::byte* step, int row, int chunk) {
  const int held = bits == 3 ? 5 : 16 / bits;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int code = 4 * chunk + j / 2, vector = bits == 3 ? code * 13 >> 6 : code * bits >> 4;
    uint32_t q = 0;
    if (bits == 3 && code == 15) {
#pragma unroll
      for (int i = 0; i < 3; ++i) q |= (word_at(step + 64 * i + 4 * row) >> (16 * (j % 2) + 15) & 1) << i;
    } else {
      q = word_at(step + 64 * vector + 4 * row) >> (16 * (j % 2) + bits * (code - vector * held)) & ((1u << bits) - 1);
    }
    v[j] = bits == 1 ? (q == 0 ? 1.0f : -1.0f)
                     : static_cast<float>(static_cast<int>(q ^ 1u << (bits - 1)) - (1 << (bits - 1)));
  }
}

// Numbers without their scale; integers relative to the middle of the range.
__device__ inline void decode_chunk(float (&v)[8], Format format, int bits, const std::byte* step, int row, int chunk,
                                    const float* nf4) {
  if (format == Format::kFp8) {
    decode_fp8(v, step, row, chunk);
  } else if (format == Format::kGroups) {
    decode_group(v, bits, step, row, chunk);
  } else if (format == Format::kInt8) {
    const uint32_t words[2] = {word_at(step + 2 * chunk * 64 + row * 4),
                               word_at(step + (2 * chunk + 1) * 64 + row * 4)};
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = static_cast<float>(words[j / 4] >> 8 * (j % 4) & 255) - 128.0f;
  } else {
    decode_four_bits(v, format, step, row, chunk, nf4);
  }
}

// ---- scales and zeros --------------------------------------------------------------------------------------------------------

constexpr int kMostScaleBytes = 64, kMostZeroBytes = 32;  // of a step: float32, or two groups of 16 columns

// e4m3 without a sign, by its bits: those of a float32 over 2^120.
__device__ inline float e4m3_scale(uint32_t code) { return __uint_as_float(code << 20) * 0x1p120f; }

// The scale of row `row` among those of 16 rows; without the row's own.
__device__ inline float scale_at(Format format, const std::byte* scales, int row) {
  switch (format) {
    case Format::kFp8:
    case Format::kNf4: return reinterpret_cast<const float*>(scales)[row];
    case Format::kGroups: return __half2float(reinterpret_cast<const __half*>(scales)[row]);
    case Format::kMxfp4: {
      const auto code = static_cast<uint32_t>(scales[row]);
      return __uint_as_float(code == 0 ? 1u << 22 : code << 23);  // 2^-127 is subnormal
    }
    case Format::kNvfp4: return e4m3_scale(static_cast<uint32_t>(scales[row]));
    default: return static_cast<float>(static_cast<int8_t>(scales[row]));
  }
}

// The scales of rows `first`, which is even, and first + 1.
template <Format kFormat>
__device__ inline float2 scale_pair(const std::byte* scales, int first) {
  if constexpr (kFormat == Format::kFp8 || kFormat == Format::kNf4) {
    return *reinterpret_cast<const float2*>(scales + 4 * first);
  } else if constexpr (kFormat == Format::kGroups) {
    const uint32_t w = word_at(scales + 2 * first);
    return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(w))),
                       __half2float(__ushort_as_half(static_cast<unsigned short>(w >> 16))));
  } else if constexpr (kFormat == Format::kMxfp4) {
    const uint32_t w = half_word_at(scales + first), low = (w & 255) << 23, high = w >> 8 << 23;
    return make_float2(__uint_as_float(max(low, 1u << 22)), __uint_as_float(max(high, 1u << 22)));
  } else if constexpr (kFormat == Format::kNvfp4) {
    const uint32_t w = half_word_at(scales + first);
    return make_float2(e4m3_scale(w & 255), e4m3_scale(w >> 8));
  } else {
    const uint32_t w = half_word_at(scales + first);
    return make_float2(static_cast<float>(static_cast<int8_t>(w & 255)),
                       static_cast<float>(static_cast<int8_t>(w >> 8)));
  }
}

// What a row's zero adds to its numbers, which are relative to the middle of the range. Exact in bfloat16: 8 bits.
__device__ inline float zero_shift(Format format, int bits, const std::byte* zeros, int row) {
  if (zeros == nullptr || bits == 1) return 0.0f;
  const auto zero = static_cast<float>(static_cast<uint8_t>(zeros[row]));
  return static_cast<float>(1 << (bits - 1)) - (format == Format::kInt4 ? zero * 0.0625f : zero);
}

}  // namespace switchgear::cuda
