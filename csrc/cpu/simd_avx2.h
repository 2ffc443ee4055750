// SPDX-License-Identifier: BSD-3-Clause
// The vector vocabulary of kernels.inl for AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace switchgear::cpu {
namespace {

using Floats = __m256;
typedef int32_t Ints __attribute__((vector_size(32)));
constexpr int kLanes = 8;
constexpr int kPanelVectors = 2;  // 6 x 2 accumulators, 2 of B and 1 of A: 15 of 16 registers
constexpr int kDotColumns = 2;    // of a tile of dot_products
constexpr int64_t kPackingRows = 24, kWidenedPackingRows = 7;  // see Kernels
constexpr int kSumOrder[kLanes] = {0, 2, 4, 6, 1, 3, 5, 7};    // of add_sums
constexpr bool kHasPairs = false;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline void stream(float* p, Floats v) { _mm256_stream_ps(p, v); }
inline void finish_streams() { _mm_sfence(); }
inline Floats broadcast(float f) { return _mm256_set1_ps(f); }
inline Floats broadcast_word(const void* p) {
  float f;
  std::memcpy(&f, p, 4);
  return _mm256_set1_ps(f);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

// The first n lanes, n <= kLanes; the others are 0, and their memory is not read.
inline Floats load(const float* p, int64_t n) {
  static constexpr int32_t kMasks[2 * kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + kLanes - n)));
}

inline __m128i load_bits16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Floats load(const BFloat16* p) {  // one shuffle; vpmovzxwd and a shift are two, and vpmovzxwd crosses lanes
  const __m256i twice = _mm256_broadcastsi128_si256(load_bits16(p));
  const __m256i to_upper_halves =
      _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  // words 0 to 3
                       -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, to_upper_halves));
}
inline Floats load(const Float16* p) { return _mm256_cvtph_ps(load_bits16(p)); }
inline void store_bits16(BFloat16* p, Ints v) {
  const __m256i words = reinterpret_cast<__m256i>(v);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store(Float16* p, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline void transpose(Floats (&v)[kLanes]) {
  Floats t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[i + j]);
      const __m256d b = _mm256_castps_pd(t[i + j + 2]);
      v[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      v[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int i = 0; i < 4; ++i) {
    const Floats a = v[i], b = v[i + 4];
    v[i] = _mm256_permute2f128_ps(a, b, 0x20);
    v[i + 4] = _mm256_permute2f128_ps(a, b, 0x31);
  }
}

// p[j] += the sum of the lanes of v[j].
inline void add_sums(float* p, const Floats (&v)[kDotColumns]) {
  const Floats two = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
  const __m128 one = _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
  const __m128 sums = _mm_add_ps(one, _mm_movehl_ps(one, one));
  p[0] += _mm_cvtss_f32(sums);
  p[1] += _mm_cvtss_f32(_mm_movehdup_ps(sums));
}

}  // namespace
}  // namespace switchgear::cpu
