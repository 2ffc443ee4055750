// SPDX-License-Identifier: BSD-3-Clause
// Minifloats (minifloat.h) as the words that kernels multiply: a word of depth for kLanes rows of the weight is one vector.
// Included by kernels.inl.
//
//   Decoder<format, pairs>   ::piece_at(p): a piece, of kBytes in storage; p: the bytes of kLanes rows in a vector of it, 4 per row
//                            ::word(piece, w): word w of kWords, k ascending, of float32 or of pairs of bfloat16
//   load_scales<format>(p)   float32 scales of kLanes rows
//
// Every value of fp8 and mxfp4 is exact, also a subnormal one: each is a normal bfloat16. Values of nf4 are float32. Pairs of
// bfloat16 have them rounded to nearest, an error of at most 2^-9, as if the weight were decoded to bfloat16. In AVX-512, 64
// bytes take
//   4 bits, pairs  3 shifts, 4 permutations: 16 bits hold the values of 4 k, 2 apart. vpermw reads the low 5 bits, so a
//                  table that repeats 16 values needs no mask.
//   4 bits, float  7 shifts, 8 permutations: vpermps reads the low 4 bits.
//   fp8, pairs     2 vpermi2b, which look up 7 bits in 128 bytes, for the lower and the upper byte of the bfloat16. The
//                  sign is merged into the upper one. The order in storage makes interleaving both the pairs of 16 rows.
//   fp8, float     the same and 4 shifts or masks. Without AVX512-VBMI through float16: the 7 bits of a magnitude, put
//                  below the sign of a float16, are 2^-8 times the value, also if it is subnormal. NaN becomes 480.
#pragma once
#include "minifloat_values.h"

namespace switchgear::cpu {
namespace {

template <typename T, int kCount>
struct Table {
  alignas(64) T values[kCount];
};

template <typename T, int kCount, typename Value>
consteval Table<T, kCount> make_table_of(Value value) {
  Table<T, kCount> table{};
  for (int i = 0; i < kCount; ++i) table.values[i] = static_cast<T>(value(i));
  return table;
}

constexpr uint32_t bfloat16_bits(float value) {  // rounded to nearest, ties to even
  const auto bits = __builtin_bit_cast(uint32_t, value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// ---- decoders ------------------------------------------------------------------------------------------------------------

template <Format kFormat, bool kPairs>
struct Decoder {
  static constexpr int kColumns = kFormat == Format::kFp8 ? 4 : 8;  // of a vector in storage
  static constexpr int kWords = kPairs ? kColumns / 2 : kColumns;
  static constexpr int kBytes = kLine;

  struct Piece {
    Floats words[kWords];
  };
  static Piece piece_at(const uint8_t* p) {
    Piece piece;
    decode(piece.words, p);
    return piece;
  }
  static Floats word(const Piece& piece, int w) { return piece.words[w]; }
  static void decode(Floats (&words)[kWords], const uint8_t* p);
};

#if defined(__AVX512BF16__)
// Lane i of `pairs` as two words of float32.
inline void widen_pairs(Floats& low, Floats& high, __m512i pairs) {
  low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  high = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
}

template <Format kFormat>
inline void decode_nibble_pairs(Floats (&words)[4], const uint8_t* p) {
  static constexpr auto kTable =
      make_table_of<uint16_t, 32>([](int i) { return bfloat16_bits(nibble_value<kFormat>(i % 16)); });
  const __m512i codes = _mm512_loadu_si512(p), table = _mm512_load_si512(kTable.values);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i code = j == 0 ? codes : _mm512_srli_epi16(codes, static_cast<unsigned>(4 * j));
    words[j] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(code, table));
  }
}

template <>
inline void Decoder<Format::kMxfp4, true>::decode(Floats (&words)[kWords], const uint8_t* p) {
  decode_nibble_pairs<Format::kMxfp4>(words, p);
}

template <>
inline void Decoder<Format::kNf4, true>::decode(Floats (&words)[kWords], const uint8_t* p) {
  decode_nibble_pairs<Format::kNf4>(words, p);
}

template <>
inline void Decoder<Format::kFp8, true>::decode(Floats (&words)[kWords], const uint8_t* p) {
  static constexpr auto kLower = make_table_of<uint8_t, 128>([](int i) { return bfloat16_bits(fp8_value(i)) & 0xff; });
  static constexpr auto kUpper = make_table_of<uint8_t, 128>([](int i) { return bfloat16_bits(fp8_value(i)) >> 8; });
  const auto look_up = [](__m512i codes, const uint8_t* table) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), codes, _mm512_load_si512(table + 64));
  };
  const __m512i codes = _mm512_loadu_si512(p), sign = _mm512_set1_epi8(static_cast<char>(0x80));
  const __m512i lower = look_up(codes, kLower.values);
  // sign & codes | it
  const __m512i upper = _mm512_ternarylogic_epi32(sign, codes, look_up(codes, kUpper.values), 0xea);
  words[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi8(lower, upper));
  words[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi8(lower, upper));
}

template <>
inline void Decoder<Format::kFp8, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  Floats pairs[2];
  Decoder<Format::kFp8, true>::decode(pairs, p);
  widen_pairs(words[0], words[1], _mm512_castps_si512(pairs[0]));
  widen_pairs(words[2], words[3], _mm512_castps_si512(pairs[1]));
}
#elif defined(__AVX512BW__)
template <>
inline void Decoder<Format::kFp8, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  // of 16 rows the first two k, then the other two
  static constexpr auto kOrder = make_table_of<uint16_t, 32>([](int i) { return i % 16 / 4 * 8 + i / 16 * 4 + i % 4; });
  const __m512i codes = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder.values), _mm512_loadu_si512(p));
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const __m512i code = j == 0 ? _mm512_slli_epi16(codes, 8) : codes;
    const __m512i halves =
        _mm512_and_si512(_mm512_srai_epi16(code, 1), _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
    words[j] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves)) * broadcast(256.0f);
    words[2 + j] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)) * broadcast(256.0f);
  }
}
#endif

#if defined(__AVX512BW__)
template <Format kFormat>
inline void decode_nibbles(Floats (&words)[8], const uint8_t* p) {
  static constexpr auto kTable = make_table_of<float, 16>(nibble_value<kFormat>);
  const __m512i codes = _mm512_loadu_si512(p);
  const __m512 table = _mm512_load_ps(kTable.values);
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    const int bits = 16 * (k % 2) + 4 * (k / 2);
    const __m512i code = bits == 0 ? codes : _mm512_srli_epi32(codes, static_cast<unsigned>(bits));
    words[k] = _mm512_permutexvar_ps(code, table);
  }
}

template <>
inline void Decoder<Format::kMxfp4, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  decode_nibbles<Format::kMxfp4>(words, p);
}

template <>
inline void Decoder<Format::kNf4, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  decode_nibbles<Format::kNf4>(words, p);
}
#elif defined(__AVX2__)
template <>
inline void Decoder<Format::kMxfp4, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  static constexpr auto kLower =
      make_table_of<uint8_t, 32>([](int i) { return bfloat16_bits(mxfp4_value(i % 16)) & 0xff; });
  static constexpr auto kUpper =
      make_table_of<uint8_t, 32>([](int i) { return bfloat16_bits(mxfp4_value(i % 16)) >> 8; });
  const auto load_bytes = [](const uint8_t* q) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)); };
  const __m256i codes = load_bytes(p), first = _mm256_set1_epi16(0x00ff),
                high = _mm256_slli_epi32(_mm256_set1_epi32(-1), 16);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i code = _mm256_and_si256(half == 0 ? codes : _mm256_srli_epi16(codes, 4), _mm256_set1_epi8(0x0f));
    const __m256i lower = _mm256_shuffle_epi8(load_bytes(kLower.values), code);
    const __m256i upper = _mm256_shuffle_epi8(load_bytes(kUpper.values), code);
    const __m256i pairs[] = {_mm256_or_si256(_mm256_and_si256(first, lower), _mm256_slli_epi16(upper, 8)),
                             _mm256_or_si256(_mm256_srli_epi16(lower, 8), _mm256_andnot_si256(first, upper))};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // k = 4·j + 2·half
      words[4 * j + 2 * half] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs[j], 16));
      words[4 * j + 2 * half + 1] = _mm256_castsi256_ps(_mm256_and_si256(pairs[j], high));
    }
  }
}

template <>
inline void Decoder<Format::kNf4, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  // vpermps looks up 3 bits in 8 values. The fourth bit, moved to the sign, selects between two of these.
  static constexpr auto kTable = make_table_of<float, 16>(nf4_value);
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256 first = _mm256_load_ps(kTable.values), second = _mm256_load_ps(kTable.values + 8);
#pragma GCC unroll 8
  for (int k = 0; k < kWords; ++k) {
    const int bits = 16 * (k % 2) + 4 * (k / 2);
    const __m256i code = bits == 0 ? codes : _mm256_srli_epi32(codes, bits);
    const __m256 choice = _mm256_castsi256_ps(bits == 28 ? codes : _mm256_slli_epi32(codes, 28 - bits));
    words[k] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, code), _mm256_permutevar8x32_ps(second, code), choice);
  }
}

template <>
inline void Decoder<Format::kFp8, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  // of 8 rows the first two k, then the other two
  const __m256i codes =
      _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 0b11'01'10'00);
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const __m256i code = j == 0 ? _mm256_slli_epi16(codes, 8) : codes;
    const __m256i halves =
        _mm256_and_si256(_mm256_srai_epi16(code, 1), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
    words[j] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves)) * broadcast(256.0f);
    words[2 + j] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)) * broadcast(256.0f);
  }
}
#elif defined(SWITCHGEAR_NEON)
template <>
inline void Decoder<Format::kMxfp4, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  static constexpr auto kLower = make_table_of<uint8_t, 16>([](int i) { return bfloat16_bits(mxfp4_value(i)) & 0xff; });
  static constexpr auto kUpper = make_table_of<uint8_t, 16>([](int i) { return bfloat16_bits(mxfp4_value(i)) >> 8; });
  const uint8x16_t codes = vld1q_u8(p);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const uint8x16_t code = half == 0 ? vandq_u8(codes, vdupq_n_u8(0x0f)) : vshrq_n_u8(codes, 4);
    const uint8x16_t lower = vqtbl1q_u8(vld1q_u8(kLower.values), code),
                     upper = vqtbl1q_u8(vld1q_u8(kUpper.values), code);
    const uint32x4_t pairs[] = {vreinterpretq_u32_u8(vtrn1q_u8(lower, upper)),
                                vreinterpretq_u32_u8(vtrn2q_u8(lower, upper))};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // k = 4·j + 2·half
      words[4 * j + 2 * half] = vreinterpretq_f32_u32(vshlq_n_u32(pairs[j], 16));
      words[4 * j + 2 * half + 1] = vreinterpretq_f32_u32(vandq_u32(pairs[j], vdupq_n_u32(0xffff0000)));
    }
  }
}

template <>
inline void Decoder<Format::kNf4, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  // byte i of the float32 values, for the codes in their places
  static constexpr auto kBytes = make_table_of<uint8_t, 64>(
      [](int i) { return __builtin_bit_cast(uint32_t, nf4_value(i % 16)) >> 8 * (i / 16) & 0xff; });
  const uint8x16_t codes = vld1q_u8(p);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const uint8x16_t code = half == 0 ? vandq_u8(codes, vdupq_n_u8(0x0f)) : vshrq_n_u8(codes, 4);
    uint8x16_t bytes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) bytes[i] = vqtbl1q_u8(vld1q_u8(kBytes.values + 16 * i), code);
    const uint16x8_t lower[] = {vreinterpretq_u16_u8(vtrn1q_u8(bytes[0], bytes[1])),
                                vreinterpretq_u16_u8(vtrn2q_u8(bytes[0], bytes[1]))};
    const uint16x8_t upper[] = {vreinterpretq_u16_u8(vtrn1q_u8(bytes[2], bytes[3])),
                                vreinterpretq_u16_u8(vtrn2q_u8(bytes[2], bytes[3]))};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {  // k = 4·j + 2·half
      words[4 * j + 2 * half] = vreinterpretq_f32_u16(vtrn1q_u16(lower[j], upper[j]));
      words[4 * j + 2 * half + 1] = vreinterpretq_f32_u16(vtrn2q_u16(lower[j], upper[j]));
    }
  }
}

template <>
inline void Decoder<Format::kFp8, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  const uint16x8_t codes = vreinterpretq_u16_u8(vld1q_u8(p));
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    const int16x8_t code = vreinterpretq_s16_u16(j == 0 ? vshlq_n_u16(codes, 8) : codes);
    const uint16x8_t halves = vandq_u16(vreinterpretq_u16_s16(vshrq_n_s16(code, 1)), vdupq_n_u16(0xbf80));
    words[j] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves))) * broadcast(256.0f);
    words[2 + j] = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(halves))) * broadcast(256.0f);
  }
}
#else
template <Format kFormat>
inline void decode_nibbles(Floats (&words)[8], const uint8_t* p) {
  static constexpr auto kTable = make_table_of<float, 16>(nibble_value<kFormat>);
  for (int k = 0; k < 8; ++k) {
    float lanes[kLanes];
    for (int r = 0; r < kLanes; ++r) lanes[r] = kTable.values[p[4 * r + 2 * (k % 2) + k / 4] >> 4 * (k / 2 % 2) & 15];
    words[k] = load(lanes);
  }
}

template <>
inline void Decoder<Format::kMxfp4, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  decode_nibbles<Format::kMxfp4>(words, p);
}

template <>
inline void Decoder<Format::kNf4, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  decode_nibbles<Format::kNf4>(words, p);
}

template <>
inline void Decoder<Format::kFp8, false>::decode(Floats (&words)[kWords], const uint8_t* p) {
  static constexpr auto kTable = make_table_of<float, 256>(fp8_value);
  static_assert(kLanes == 4);
  for (int k = 0; k < kWords; ++k) {
    float lanes[kLanes];
    for (int r = 0; r < kLanes; ++r) lanes[r] = kTable.values[p[8 * (k / 2) + 2 * r + k % 2]];
    words[k] = load(lanes);
  }
}
#endif

// nvfp4 differs from mxfp4 in its scales.
template <bool kPairs>
struct Decoder<Format::kNvfp4, kPairs> : Decoder<Format::kMxfp4, kPairs> {};

// ---- scales --------------------------------------------------------------------------------------------------------------

template <Format kFormat>
constexpr int64_t kScaleBytes = size_of(format_row(kFormat).scales);

inline Ints load_bytes(const uint8_t* p) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Ints bytes;
  int32_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = p[i];
  __builtin_memcpy(&bytes, lanes, sizeof bytes);
  return bytes;
#endif
}

// e4m3 without a sign: the bits of a float32 over 2^120, but subnormal numbers as multiples of 2^-9, since the processor may
// take subnormal float32 for zero.
inline Floats load_e4m3(const uint8_t* p) {
  const Ints codes = load_bytes(p);
  const Floats normal = from_bits((codes << 20) + (120 << 23));
  return codes < 8 ? __builtin_convertvector(codes, Floats) * broadcast(power_of_two(-9)) : normal;
}

template <Format kFormat>
inline Floats load_scales(const uint8_t* p) {
  if constexpr (kFormat == Format::kNvfp4) return load_e4m3(p);
  if constexpr (format_row(kFormat).scales == DType::kFloat16) return load(reinterpret_cast<const Float16*>(p));
  if constexpr (format_row(kFormat).scales == DType::kFloat32) return load(reinterpret_cast<const float*>(p));
  const Ints bits = load_bytes(p) << 23, smallest = Ints{} + 0x00400000;  // 2^-127 is subnormal
  const Floats scales = from_bits(bits > smallest ? bits : smallest);
  return multiply_add(scales, broadcast(0.0f), scales);  // code 255, infinity so far, becomes NaN
}

}  // namespace
}  // namespace switchgear::cpu
