// SPDX-License-Identifier: BSD-3-Clause
// The vector vocabulary of kernels.inl for AVX-512 (F, BW, VL, DQ), and for AVX-512-BF16 if that is compiled in.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace switchgear::cpu {
namespace {

using Floats = __m512;
typedef int32_t Ints __attribute__((vector_size(64)));
constexpr int kLanes = 16;
constexpr int kPanelVectors = 4;  // 6 x 4 accumulators, 4 of B and 1 of A: 29 of 32 registers
constexpr int kDotColumns = 4;    // of a tile of dot_products
constexpr int64_t kPackingRows = 0, kWidenedPackingRows = 0;                               // see Kernels
constexpr int kSumOrder[kLanes] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};  // of add_sums

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline void stream(float* p, Floats v) { _mm512_stream_ps(p, v); }
inline void finish_streams() { _mm_sfence(); }
inline Floats broadcast(float f) { return _mm512_set1_ps(f); }
inline Floats broadcast_word(const void* p) {
  float f;
  std::memcpy(&f, p, 4);
  return _mm512_set1_ps(f);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

inline __m256i load_bits16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Floats load(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits16(p)), 16));
}
inline Floats load(const Float16* p) { return _mm512_cvtph_ps(load_bits16(p)); }
// The first n lanes, n <= kLanes; the others are 0, and their memory is not read.
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Floats load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline Floats load(const BFloat16* p, int64_t n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)), 16));
}
inline Floats load(const Float16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
inline void store_bits16(BFloat16* p, Ints v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
}
inline void store(Float16* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#ifdef __AVX512BF16__
// The processor's own rounding to bfloat16 treats subnormal numbers as zero.
inline bool has_subnormals(Floats v) { return _mm512_fpclass_ps_mask(v, 0x20) != 0; }
inline void store_normals(BFloat16* p, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}

inline void stream_normals(BFloat16* p, Floats low, Floats high) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

constexpr bool kHasPairs = true;
// Adds a.low·b.low and a.high·b.high of each pair of bfloat16 to a float32 lane.
inline Floats multiply_add_pairs(Floats a, Floats b, Floats c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// The first n of 2 · kLanes numbers, two per lane; the others are 0, and their memory is not read.
inline Floats load_neighbours(const BFloat16* p, int64_t n) {
  const auto mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
}
// Lane i holds the pair (low[i], high[i]).
inline Floats load_pairs(const BFloat16* low, const BFloat16* high) {
  const __m512i l = _mm512_cvtepu16_epi32(load_bits16(low));
  const __m512i h = _mm512_cvtepu16_epi32(load_bits16(high));
  return _mm512_castsi512_ps(_mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
}
// The same for 32 lanes: word i of 32 low ones beside word i of 32 high ones.
inline void load_two_pairs(Floats (&pairs)[2], const BFloat16* low, const BFloat16* high) {
  const __m512i l = _mm512_loadu_si512(low), h = _mm512_loadu_si512(high);
  const __m512i first =
      _mm512_add_epi16(_mm512_set1_epi32(0x00200000),
                       _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32(0x00010001)));
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  pairs[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(l, first, h));
  pairs[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(l, second, h));
}
#else
constexpr bool kHasPairs = false;
#endif

inline void transpose(Floats (&v)[kLanes]) {
  Floats t[16];
  for (int i = 0; i < 16; i += 2) {  // 2x2 blocks of words
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // 4x4: v[i+j] holds column j of each 4-word lane for rows i..i+3
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]);
      const __m512d b = _mm512_castps_pd(t[i + j + 2]);
      v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {  // 4x4 transpose of the 16-byte lanes
    const Floats even_low = _mm512_shuffle_f32x4(v[j], v[j + 4], 0x88);
    const Floats odd_low = _mm512_shuffle_f32x4(v[j], v[j + 4], 0xdd);
    const Floats even_high = _mm512_shuffle_f32x4(v[j + 8], v[j + 12], 0x88);
    const Floats odd_high = _mm512_shuffle_f32x4(v[j + 8], v[j + 12], 0xdd);
    t[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    t[j + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    t[j + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    t[j + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// p[j] += the sum of the lanes of v[j].
inline void add_sums(float* p, const Floats (&v)[kDotColumns]) {
  const auto add_pairs = [](Floats a, Floats b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512d low = _mm512_castps_pd(add_pairs(v[0], v[1])), high = _mm512_castps_pd(add_pairs(v[2], v[3]));
  const Floats four =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
  _mm_storeu_ps(p, _mm_add_ps(_mm_loadu_ps(p), sums));
}

}  // namespace
}  // namespace switchgear::cpu
