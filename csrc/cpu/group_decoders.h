// SPDX-License-Identifier: BSD-3-Clause
// Integers of 1 to 4 bits (groups.h) as the words that kernels multiply; Decoder of minifloat_decoders.h has the interface.
// Included by kernels.inl after it.
//
// Every value is a small integer, exact in bfloat16. Words are decoded where they are multiplied, since a piece of 3 bits or 1
// has more words than there are registers.
//
// The floor: 3 bits with a float16 scale for 128 columns are 3/8 + 2/128 = 0.39 bytes a weight, 200 bytes for a step of
// 512 weights. A core of Zen 5 that reads 6 to 9 bytes a cycle has 22 to 33 cycles for it. Decoding and multiplying take 13
// cycles if all four vector pipes are busy (52 instructions: shifts run on pipes 2 and 3, permutations on 1 and 2,
// multiply-adds on 0 and 1), and 19 as measured from L2. So memory binds down to 3 bits, instructions at 1 bit.
// Vector instructions per step in AVX-512, besides the multiply-adds (16 for pairs of bfloat16, 32 for float32, per row):
//   4 bits, pairs  12 shifts, 16 permutations         float  28 and 32
//   3 bits, pairs  15 shifts, 16 permutations, 2 merges of the three spare bits; vpermw reads 5 bits, of which a table of
//                  repeated values ignores two        float  32, 32 and 2
//   2 bits, pairs  14 shifts, 16 permutations         float  30 and 32
//   1 bit, pairs   15 shifts, 16 merges of the sign with 1.0   float  31 and 32
// Other ISAs shift a code to the top of 32 bits, back with its sign, and convert it.
#pragma once
#include "switchgear/groups.h"

namespace switchgear::cpu {
namespace {

constexpr int group_value(int bits, int stored) {
  if (bits == 1) return stored == 0 ? 1 : -1;
  return stored < 1 << (bits - 1) ? stored : stored - (1 << bits);
}

// Word w of a piece as 16 bits of each half of a vector: where it is.
template <int kBits>
struct CodePlace {
  static constexpr int kPerVector = 16 / kBits;  // of a half
  int vector, shift;
  constexpr explicit CodePlace(int i) : vector(i / kPerVector), shift(kBits * (i % kPerVector)) {}
};
constexpr int kSplitCode = 15;  // of 3 bits: bit 15 of each of three vectors

#if defined(__AVX512BW__)
typedef __m512i Codes;
inline Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
// mask & a | b
inline Codes merge(Codes mask, Codes a, Codes b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xea); }

inline Codes split_codes(const Codes (&v)[3]) {
  const Codes low = _mm512_srli_epi16(v[0], 15);
  const Codes middle = merge(_mm512_set1_epi16(2), _mm512_srli_epi16(v[1], 14), low);
  return merge(_mm512_set1_epi16(4), _mm512_srli_epi16(v[2], 13), middle);
}

// Lanes of 32 bits, of which the lowest bits are a code, as float32.
template <int kBits>
inline Floats values_of(Codes codes, int shift) {
  if constexpr (kBits == 1) {  // the sign of 1.0
    const Codes signs = shift == 31 ? codes : _mm512_slli_epi32(codes, static_cast<unsigned>(31 - shift));
    return _mm512_castsi512_ps(merge(_mm512_set1_epi32(INT32_MIN), signs, _mm512_castps_si512(_mm512_set1_ps(1.0f))));
  } else {
    static constexpr auto kTable = make_table_of<float, 16>([](int i) { return group_value(kBits, i % (1 << kBits)); });
    const Codes index = shift == 0 ? codes : _mm512_srli_epi32(codes, static_cast<unsigned>(shift));
    return _mm512_permutexvar_ps(index, _mm512_load_ps(kTable.values));
  }
}
#elif defined(__AVX2__)
typedef Ints Codes;
inline Codes load_codes(const uint8_t* p) {
  Codes v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <int kBits>
inline Floats values_of(Codes codes, int shift) {
  if constexpr (kBits == 4) return __builtin_convertvector(codes << (28 - shift) >> 28, Floats);
  static constexpr auto kTable = make_table_of<float, 8>([](int i) { return group_value(kBits, i % (1 << kBits)); });
  return _mm256_permutevar8x32_ps(_mm256_load_ps(kTable.values), reinterpret_cast<__m256i>(codes >> shift));
}
#else
typedef Ints Codes;
inline Codes load_codes(const uint8_t* p) {
  Codes v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <int kBits>
inline Floats values_of(Codes codes, int shift) {
  const Ints values = codes << (32 - kBits - shift) >> (32 - kBits);
  return __builtin_convertvector(kBits == 1 ? values * 2 + 1 : values, Floats);
}
#endif

#if !defined(__AVX512BW__)
inline Codes split_codes(const Codes (&v)[3]) {  // of both halves
  constexpr int kOnes = 0x00010001;
  return (v[0] >> 15 & kOnes) | (v[1] >> 14 & 2 * kOnes) | (v[2] >> 13 & 4 * kOnes);
}
#endif

// A piece is what decode reads at once: a vector of 64 bytes for 16 rows, or for 3 bits all three of a step.
template <int kBits, bool kPairs>
struct GroupDecoder {
  static constexpr int kVectors = kBits == 3 ? 3 : 1;
  static constexpr int kBytes = kVectors * kLine;
  static constexpr int kColumns = kBytes * 8 / kBits / kMinifloatRows;
  static constexpr int kWords = kPairs ? kColumns / 2 : kColumns;

  struct Piece {
    Codes v[kVectors];
  };
  static Piece piece_at(const uint8_t* p) {
    Piece piece;
#pragma GCC unroll 3
    for (int q = 0; q < kVectors; ++q) piece.v[q] = load_codes(p + q * kLine);
    return piece;
  }
  static Floats word(const Piece& piece, int w) {
#if defined(__AVX512BF16__)
    if constexpr (kPairs) return pair(piece, w);
#endif
    const int i = w / 2, half = w % 2 * 16;
    if constexpr (kBits == 3) {
      if (i == kSplitCode) return values_of<kBits>(split_codes(piece.v), half);
    }
    const CodePlace<kBits> place(i);
    return values_of<kBits>(piece.v[place.vector], half + place.shift);
  }

#if defined(__AVX512BF16__)
  static Floats pair(const Piece& piece, int w) {
    static constexpr auto kTable = make_table_of<uint16_t, 32>(
        [](int i) { return bfloat16_bits(static_cast<float>(group_value(kBits, i % (1 << kBits)))); });
    const CodePlace<kBits> place(w);
    if constexpr (kBits == 1) {
      const Codes signs = w == 15 ? piece.v[0] : _mm512_slli_epi16(piece.v[0], static_cast<unsigned>(15 - w));
      return _mm512_castsi512_ps(merge(_mm512_set1_epi16(INT16_MIN), signs, _mm512_set1_epi16(0x3f80)));
    } else {
      const Codes table = _mm512_load_si512(kTable.values);
      if constexpr (kBits == 3) {
        if (w == kSplitCode) return _mm512_castsi512_ps(_mm512_permutexvar_epi16(split_codes(piece.v), table));
      }
      const Codes codes = piece.v[place.vector];
      const Codes index = place.shift == 0 ? codes : _mm512_srli_epi16(codes, static_cast<unsigned>(place.shift));
      return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, table));
    }
  }
#endif
};

template <bool kPairs>
struct Decoder<Format::kBits1, kPairs> : GroupDecoder<1, kPairs> {};
template <bool kPairs>
struct Decoder<Format::kBits2, kPairs> : GroupDecoder<2, kPairs> {};
template <bool kPairs>
struct Decoder<Format::kBits3, kPairs> : GroupDecoder<3, kPairs> {};
template <bool kPairs>
struct Decoder<Format::kBits4, kPairs> : GroupDecoder<4, kPairs> {};

}  // namespace
}  // namespace switchgear::cpu
