// SPDX-License-Identifier: BSD-3-Clause
// Unpacks a record of compact weights into 128 bfloat16 or float32: AVX-512, AVX2, any processor. Included by kernels.inl.
//
// An element's byte holds its sign and fraction; a code selects one of 16 exponents e. In a bfloat16 the upper byte is
// sign | e >> 1, the lower (e & 1) << 7 | fraction. Each is a lookup of the code in a table of 16 bytes, merged with a part
// of the element's byte. Interleaving lower and upper bytes within 16-byte lanes puts elements in order. The same holds for
// the halves of float32, whose upper halves form a record of bfloat16.
//
//   Words, kDType, kBytes       the words that it is multiplied as (multiply.inl), its elements, its length in memory
//   unpack(record, exponents)   unpacks all elements
//   set(i, bits)                replaces one element, or its upper half
//   words(part)                 kLanes words of part [0, kParts); widened(part): of bfloat16, as float32
#pragma once
#include "compact.h"

namespace switchgear::cpu {
namespace {

template <typename WordsOf, DType kOf>
struct RecordOf {
  using Words = WordsOf;
  static constexpr DType kDType = kOf;
  static constexpr int64_t kBytes = compact_record_bytes(kOf);
  static constexpr int kParts = kCompactRecord / (kLanes * Words::kDepth);
};
using BFloat16Record = RecordOf<BFloat16Words, DType::kBFloat16>;

#if defined(__AVX512BW__)
constexpr bool kRecordsInRegisters = true;

struct Exponents {
  __m512i upper, lower;

  explicit Exponents(const uint8_t* exponents) {
    const __m512i e = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(exponents)));
    upper = _mm512_and_si512(_mm512_srli_epi16(e, 1), _mm512_set1_epi8(0x7f));
    lower = _mm512_and_si512(_mm512_slli_epi16(e, 7), _mm512_set1_epi8(static_cast<char>(0x80)));
  }
};

struct UnpackedBFloat16 : BFloat16Record {
  __m512i quarters[4];  // in registers, once loops over them are unrolled

  void unpack(const uint8_t* record, const Exponents& exponents) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80)), low_code = _mm512_set1_epi8(0x0f);
    const __m512i codes = _mm512_loadu_si512(record + 128);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i byte = _mm512_loadu_si512(record + 64 * half);
      const __m512i code = _mm512_and_si512(half == 0 ? codes : _mm512_srli_epi16(codes, 4), low_code);
      // (sign & byte) | table and (~sign & byte) | table
      const __m512i upper = _mm512_ternarylogic_epi32(sign, byte, _mm512_shuffle_epi8(exponents.upper, code), 0xea);
      const __m512i lower = _mm512_ternarylogic_epi32(sign, byte, _mm512_shuffle_epi8(exponents.lower, code), 0xae);
      quarters[2 * half] = _mm512_unpacklo_epi8(lower, upper);
      quarters[2 * half + 1] = _mm512_unpackhi_epi8(lower, upper);
    }
  }
  void set(int64_t i, uint16_t bits) {
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const __mmask32 mask = i / 32 == q ? __mmask32{1} << i % 32 : 0;
      quarters[q] = _mm512_mask_set1_epi16(quarters[q], mask, static_cast<int16_t>(bits));
    }
  }
  Floats widened(int part) const {
    const __m256i eighth =
        part % 2 == 0 ? _mm512_castsi512_si256(quarters[part / 2]) : _mm512_extracti64x4_epi64(quarters[part / 2], 1);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(eighth), 16));
  }
  Floats words(int part) const {
#ifdef __AVX512BF16__
    return _mm512_castsi512_ps(quarters[part]);
#else
    return widened(part);
#endif
  }
};

inline Floats join_halves(const UnpackedBFloat16& upper, const uint8_t* lower, int part) {
  const __m512i low = _mm512_loadu_si512(lower + part / 2 * 64), high = upper.quarters[part / 2];
  return _mm512_castsi512_ps(part % 2 == 0 ? _mm512_unpacklo_epi16(low, high) : _mm512_unpackhi_epi16(low, high));
}

#else
constexpr bool kRecordsInRegisters = false;  // in memory instead

struct UnpackedElements : BFloat16Record {
  alignas(64) BFloat16 elements[kCompactRecord];

  void set(int64_t i, uint16_t bits) { elements[i].bits = bits; }
  Floats widened(int part) const { return load(elements + kLanes * part); }
  Floats words(int part) const { return widened(part); }
};

#if defined(__AVX2__)

struct Exponents {
  __m256i upper, lower;

  explicit Exponents(const uint8_t* exponents) {
    const __m256i e = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(exponents)));
    upper = _mm256_and_si256(_mm256_srli_epi16(e, 1), _mm256_set1_epi8(0x7f));
    lower = _mm256_and_si256(_mm256_slli_epi16(e, 7), _mm256_set1_epi8(static_cast<char>(0x80)));
  }
};

struct UnpackedBFloat16 : UnpackedElements {
  void unpack(const uint8_t* record, const Exponents& exponents) {
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80)), low_code = _mm256_set1_epi8(0x0f);
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {  // 32 bytes of a half: elements [0, 16) and [32, 48), or 16 later
      const int half = quarter / 2, first = quarter % 2 * 32;
      const auto load_bytes = [&](int at) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(record + at + first));
      };
      const __m256i byte = load_bytes(64 * half), codes = load_bytes(128);
      const __m256i code = _mm256_and_si256(half == 0 ? codes : _mm256_srli_epi16(codes, 4), low_code);
      const __m256i upper = _mm256_or_si256(_mm256_and_si256(sign, byte), _mm256_shuffle_epi8(exponents.upper, code));
      const __m256i lower =
          _mm256_or_si256(_mm256_andnot_si256(sign, byte), _mm256_shuffle_epi8(exponents.lower, code));
      __m256i* const target = reinterpret_cast<__m256i*>(elements + 64 * half + first / 2);
      _mm256_storeu_si256(target, _mm256_unpacklo_epi8(lower, upper));
      _mm256_storeu_si256(target + 2, _mm256_unpackhi_epi8(lower, upper));
    }
  }
};

inline Floats join_halves(const UnpackedBFloat16& upper, const uint8_t* lower, int part) {
  const int at = part / 4 * 32 + part % 2 * 16;
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower + 2 * at));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(upper.elements + at));
  return _mm256_castsi256_ps(part % 4 < 2 ? _mm256_unpacklo_epi16(low, high) : _mm256_unpackhi_epi16(low, high));
}

#else

struct Exponents {
  uint8_t of_code[16];

  explicit Exponents(const uint8_t* exponents) { __builtin_memcpy(of_code, exponents, sizeof of_code); }
};

struct UnpackedBFloat16 : UnpackedElements {
  void unpack(const uint8_t* record, const Exponents& exponents) {
    for (int i = 0; i < kCompactRecord; ++i) {
      const int half = i / 64, place = static_cast<int>(compact_place(i));
      const int byte = record[64 * half + place], code = record[128 + place] >> 4 * half & 0xf;
      elements[i].bits = static_cast<uint16_t>((byte & 0x80) << 8 | exponents.of_code[code] << 7 | (byte & 0x7f));
    }
  }
};

inline Floats join_halves(const UnpackedBFloat16& upper, const uint8_t* lower, int part) {
  uint32_t words[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const int64_t at = compact_place_of_halves(kLanes * part + i);
    uint16_t low;
    __builtin_memcpy(&low, lower + 2 * at, 2);
    words[i] = static_cast<uint32_t>(upper.elements[at].bits) << 16 | low;
  }
  Floats v;
  __builtin_memcpy(&v, words, sizeof v);
  return v;
}

#endif
#endif

// bfloat16 that is multiplied by float32.
struct WidenedBFloat16 : RecordOf<FloatWords<float>, DType::kBFloat16> {
  UnpackedBFloat16 elements;

  void unpack(const uint8_t* record, const Exponents& exponents) { elements.unpack(record, exponents); }
  void set(int64_t i, uint16_t bits) { elements.set(i, bits); }
  Floats words(int part) const { return elements.widened(part); }
};

struct UnpackedFloat : RecordOf<FloatWords<float>, DType::kFloat32> {
  UnpackedBFloat16 upper;
  const uint8_t* lower;

  void unpack(const uint8_t* record, const Exponents& exponents) {
    upper.unpack(record, exponents);
    lower = record + kLowerHalves;
  }
  void set(int64_t i, uint16_t bits) { upper.set(compact_place_of_halves(i), bits); }
  Floats words(int part) const { return join_halves(upper, lower, part); }
};
}  // namespace
}  // namespace switchgear::cpu
