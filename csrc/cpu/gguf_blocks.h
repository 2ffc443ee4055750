// SPDX-License-Identifier: BSD-3-Clause
// The blocks of GGUF's types (gguf.h) taken apart: codes as bytes, and their factors. Included after simd_<isa>.h.
//
//   Block<format>  ::unpack(codes, block, unit)   the codes of columns [unit · kUnit, + kUnit), plus kOffset, so that all but those
//                                                 of q8_0 and of tables are unsigned
//                  ::factors(block)               d, m, and for each group of kGroup columns the integers s and t
// Vectors are the compiler's, of 16 or 32 bytes.
#pragma once
#include "switchgear/gguf.h"

namespace switchgear::cpu {
namespace {

inline float half_at(const uint8_t* p) {
#if defined(__F16C__)
  uint16_t bits;
  __builtin_memcpy(&bits, p, 2);
  return _cvtsh_ss(bits);
#else
  const uint32_t bits = p[0] | p[1] << 8, magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  const float small = static_cast<float>(magnitude) * 0x1p-24f;  // zero and subnormals
  const uint32_t rebias = magnitude >= 0x7c00 ? (255 - 31) << 23 : (127 - 15) << 23;
  return __builtin_bit_cast(
      float, sign | (magnitude < 0x0400 ? __builtin_bit_cast(uint32_t, small) : (magnitude << 13) + rebias));
#endif
}

alignas(16) constexpr int8_t kMxfp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// kCount bytes as a vector. By reference: those longer than the ISA's have no place in calls.
template <int kCount>
struct Run {
  typedef uint8_t Vector __attribute__((vector_size(kCount)));
  Vector v;
  explicit Run(const uint8_t* p) { __builtin_memcpy(&v, p, sizeof v); }
};
typedef uint64_t Eights __attribute__((vector_size(16)));
template <typename Vector>
inline void store_vector(uint8_t* p, const Vector& v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Two vectors of 16 bytes, in one store where vectors are longer: a processor waits for bytes that it has just stored in parts, if
// it reads them at once.
inline void store_two(uint8_t* p, const Run<16>::Vector& first, const Run<16>::Vector& second) {
#if defined(__AVX2__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_set_m128i(reinterpret_cast<const __m128i&>(second),
                                                                      reinterpret_cast<const __m128i&>(first)));
#else
  store_vector(p, first);
  store_vector(p + 16, second);
#endif
}

// Codes of 4 bits: kRun in the lower halves of bytes, then as many in the upper ones.
template <int kRun>
inline void unpack_nibbles(uint8_t* codes, const uint8_t* p) {
  const Run<kRun> run(p);
  if constexpr (kRun == 16) {
    store_two(codes, run.v & 15, run.v >> 4);
  } else {
    store_vector(codes, run.v & 15);
    store_vector(codes + kRun, run.v >> 4);
  }
}

// The same, as entries of a table.
inline void look_up_nibbles(uint8_t* codes, const uint8_t* p, const int8_t* table) {
#if defined(__SSSE3__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
  const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  const __m128i upper = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  store_two(codes, reinterpret_cast<Run<16>::Vector>(_mm_shuffle_epi8(values, _mm_and_si128(bytes, mask))),
            reinterpret_cast<Run<16>::Vector>(_mm_shuffle_epi8(values, upper)));
#else
  for (int i = 0; i < 16; ++i) codes[i] = static_cast<uint8_t>(table[p[i] & 15]);
  for (int i = 0; i < 16; ++i) codes[16 + i] = static_cast<uint8_t>(table[p[i] >> 4]);
#endif
}

// Codes of 5 bits: nibbles as above, and the highest bit of each column in order.
inline void unpack_fives(uint8_t* codes, const uint8_t* p, const uint8_t* bits) {
  constexpr uint64_t kEach = 0x0101010101010101u, kBit = 0x8040201008040201u;  // bit j in byte j
  const Run<16> run(p);
  const auto sixteens = [&](int half) {
    const Eights set = {bits[2 * half] * kEach & kBit, bits[2 * half + 1] * kEach & kBit};
    return reinterpret_cast<Run<16>::Vector>(reinterpret_cast<const Run<16>::Vector&>(set) != 0) & 16;
  };
  store_two(codes, (run.v & 15) | sixteens(0), (run.v >> 4) | sixteens(1));
}

// The factors of a block. Where the format has no integers they are 1.
struct Factors {
  float d = 0.0f, m = 0.0f;
  int8_t s[16];
  uint8_t t[16];
};

template <Format kFormat>
struct Block;

template <int kAdded, bool kIsSigned = false>
struct NarrowBlock {
  static constexpr int kUnit = 32, kGroup = 32, kOffset = kAdded;
  static constexpr bool kHasSigns = kIsSigned, kHasMins = false;
};

template <>
struct Block<Format::kQ80> : NarrowBlock<0, true> {
  static void unpack(uint8_t* codes, const uint8_t* b, int) { __builtin_memcpy(codes, b + 2, 32); }
  static Factors factors(const uint8_t* b) { return {.d = half_at(b)}; }
};
template <>
struct Block<Format::kQ40> : NarrowBlock<8> {
  static void unpack(uint8_t* codes, const uint8_t* b, int) { unpack_nibbles<16>(codes, b + 2); }
  static Factors factors(const uint8_t* b) { return {.d = half_at(b)}; }
};
template <>
struct Block<Format::kQ41> : NarrowBlock<0> {
  static constexpr bool kHasMins = true;
  static void unpack(uint8_t* codes, const uint8_t* b, int) { unpack_nibbles<16>(codes, b + 4); }
  static Factors factors(const uint8_t* b) { return {.d = half_at(b), .m = -half_at(b + 2)}; }
};
template <>
struct Block<Format::kQ50> : NarrowBlock<16> {
  static void unpack(uint8_t* codes, const uint8_t* b, int) { unpack_fives(codes, b + 6, b + 2); }
  static Factors factors(const uint8_t* b) { return {.d = half_at(b)}; }
};
template <>
struct Block<Format::kQ51> : NarrowBlock<0> {
  static constexpr bool kHasMins = true;
  static void unpack(uint8_t* codes, const uint8_t* b, int) { unpack_fives(codes, b + 8, b + 4); }
  static Factors factors(const uint8_t* b) { return {.d = half_at(b), .m = -half_at(b + 2)}; }
};
template <>
struct Block<Format::kIq4Nl> : NarrowBlock<0, true> {
  static void unpack(uint8_t* codes, const uint8_t* b, int) { look_up_nibbles(codes, b + 2, kIq4Values); }
  static Factors factors(const uint8_t* b) { return {.d = half_at(b)}; }
};
template <>
struct Block<Format::kMxfp4Gguf> : NarrowBlock<0, true> {
  static void unpack(uint8_t* codes, const uint8_t* b, int) { look_up_nibbles(codes, b + 1, kMxfp4Values); }
  static Factors factors(const uint8_t* b) {
    const uint32_t e = b[0], bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;  // the first two are subnormal
    return {.d = __builtin_bit_cast(float, bits)};
  }
};

// Blocks of 256 columns are unpacked in halves.
template <int kColumnsOfGroup, int kAdded, bool kIsSigned = false>
struct WideBlock {
  static constexpr int kUnit = 128, kGroup = kColumnsOfGroup, kOffset = kAdded;
  static constexpr bool kHasSigns = kIsSigned, kHasMins = false;
};

// 128 codes of 2 bits in 32 bytes: bits 0 and 1 of all, then 2 and 3, …
inline void unpack_pairs(uint8_t* codes, const uint8_t* p) {
  const Run<32> run(p);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) store_vector(codes + 32 * j, run.v >> 2 * j & 3);
}

// 32 less than each byte, of at most 63.
inline uint64_t subtract_32(uint64_t bytes) {
  constexpr uint64_t kSigns = 0x8080808080808080;
  return ((bytes | kSigns) - 0x2020202020202020) ^ kSigns;
}

template <>
struct Block<Format::kQ2K> : WideBlock<16, 0> {
  static constexpr bool kHasMins = true;
  static void unpack(uint8_t* codes, const uint8_t* b, int half) { unpack_pairs(codes, b + 16 + 32 * half); }
  static Factors factors(const uint8_t* b) {
    Factors f{.d = half_at(b + 80), .m = half_at(b + 82)};
    for (int g = 0; g < 16; ++g) f.s[g] = static_cast<int8_t>(b[g] & 15);
    for (int g = 0; g < 16; ++g) f.t[g] = b[g] >> 4;
    return f;
  }
};
template <>
struct Block<Format::kQ3K> : WideBlock<16, 4> {
  static void unpack(uint8_t* codes, const uint8_t* b, int half) {
    const Run<32> low(b + 32 + 32 * half), high(b);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      store_vector(codes + 32 * j, (low.v >> 2 * j & 3) | ((high.v >> (4 * half + j) & 1) << 2));
    }
  }
  static Factors factors(const uint8_t* b) {
    Factors f{.d = half_at(b + 108)};
    uint64_t low;
    uint32_t high;
    __builtin_memcpy(&low, b + 96, 8);
    __builtin_memcpy(&high, b + 104, 4);
    const auto eight = [&](int i) {  // nibbles i of `low`, with pairs of bits 2 · i and 2 · i + 1 of `high`
      const uint64_t four = high >> 4 * i & 0x03030303, other = high >> (4 * i + 2) & 0x03030303;
      return (low >> 4 * i & 0x0f0f0f0f0f0f0f0f) | four << 4 | other << 36;
    };
    const Eights both = {eight(0), eight(1)};  // one store, since all 16 are read at once
    store_vector(reinterpret_cast<uint8_t*>(f.s), reinterpret_cast<const Run<16>::Vector&>(both) - 32);
    return f;
  }
};

// d, m, and 8 numbers s and t of 6 bits in 12 bytes: of both, the first four are the lower bits of four bytes each, whose
// upper two belong to the last four.
inline Factors six_bit_factors(const uint8_t* b) {
  Factors f{.d = half_at(b), .m = half_at(b + 2)};
  uint32_t one, other, last;  // four bytes each
  __builtin_memcpy(&one, b + 4, 4);
  __builtin_memcpy(&other, b + 8, 4);
  __builtin_memcpy(&last, b + 12, 4);
  constexpr uint32_t kLow = 0x3f3f3f3f, kHalf = 0x0f0f0f0f, kUpper = 0x30303030;
  const uint64_t s = (one & kLow) | static_cast<uint64_t>((last & kHalf) | (one >> 2 & kUpper)) << 32;
  const uint64_t t = (other & kLow) | static_cast<uint64_t>((last >> 4 & kHalf) | (other >> 2 & kUpper)) << 32;
  __builtin_memcpy(f.s, &s, 8);
  __builtin_memcpy(f.t, &t, 8);
  return f;
}

template <>
struct Block<Format::kQ4K> : WideBlock<32, 0> {
  static constexpr bool kHasMins = true;
  static void unpack(uint8_t* codes, const uint8_t* b, int half) {
    unpack_nibbles<32>(codes, b + 16 + 64 * half);
    unpack_nibbles<32>(codes + 64, b + 48 + 64 * half);
  }
  static Factors factors(const uint8_t* b) { return six_bit_factors(b); }
};
template <>
struct Block<Format::kQ5K> : WideBlock<32, 0> {
  static constexpr bool kHasMins = true;
  static void unpack(uint8_t* codes, const uint8_t* b, int half) {
    unpack_nibbles<32>(codes, b + 48 + 64 * half);
    unpack_nibbles<32>(codes + 64, b + 80 + 64 * half);
    const Run<32> high(b + 16);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Run<32> low(codes + 32 * j);
      store_vector(codes + 32 * j, low.v | ((high.v >> (4 * half + j) & 1) << 4));
    }
  }
  static Factors factors(const uint8_t* b) { return six_bit_factors(b); }
};
template <>
struct Block<Format::kQ6K> : WideBlock<16, 32> {
  static void unpack(uint8_t* codes, const uint8_t* b, int half) {
    const Run<32> high(b + 128 + 32 * half);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Run<32> low(b + 64 * half + j % 2 * 32);
      store_vector(codes + 32 * j, (j < 2 ? low.v & 15 : low.v >> 4) | ((high.v >> 2 * j & 3) << 4));
    }
  }
  static Factors factors(const uint8_t* b) {
    Factors f{.d = half_at(b + 208)};
    __builtin_memcpy(f.s, b + 192, 16);
    return f;
  }
};
template <>
struct Block<Format::kIq4Xs> : WideBlock<32, 0, true> {
  static void unpack(uint8_t* codes, const uint8_t* b, int half) {
    for (int j = 0; j < 4; ++j) look_up_nibbles(codes + 32 * j, b + 8 + 64 * half + 16 * j, kIq4Values);
  }
  static Factors factors(const uint8_t* b) {
    Factors f{.d = half_at(b)};
    uint64_t low = 0, high = 0;
    __builtin_memcpy(&low, b + 4, 4);
    __builtin_memcpy(&high, b + 2, 2);
    low = (low | low << 16) & 0x0000ffff0000ffff;
    low = (low | low << 8) & 0x00ff00ff00ff00ff;
    low = (low | low << 4) & 0x0f0f0f0f0f0f0f0f;
    high = (high | high << 24) & 0x000000ff000000ff;
    high = (high | high << 12) & 0x000f000f000f000f;
    high = (high | high << 6) & 0x0303030303030303;
    const uint64_t s = subtract_32(low | high << 4);
    __builtin_memcpy(f.s, &s, 8);
    return f;
  }
};

template <Format kFormat>
constexpr bool kHasIntegerFactors = gguf_type(kFormat).columns > 32;

}  // namespace
}  // namespace switchgear::cpu
