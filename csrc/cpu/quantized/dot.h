// SPDX-License-Identifier: BSD-3-Clause
// dot: to each int32 lane, the sum of four products of an unsigned byte (a weight) with a signed one (an activation). Included
// after simd_<isa>.h. VNNI has an instruction for it; without, bytes become 16-bit numbers, so that no product saturates.
#pragma once

namespace switchgear::cpu {
namespace {

inline Ints load_ints(const void* p) {
  Ints v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Ints broadcast_ints(int32_t value) { return Ints{} + value; }
inline int32_t word_at(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}

// kLanes bytes as numbers
#if defined(__AVX512F__)
inline Floats widen(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Floats widen(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#elif defined(__AVX2__)
inline Floats widen(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Floats widen(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#else
template <typename Byte>
inline Floats widen(const Byte* p) {
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}
#endif

#if defined(__AVX512VNNI__)

using Weights = __m512i;
using Activations = __m512i;
inline Weights as_weights(Ints bytes) { return reinterpret_cast<__m512i>(bytes); }
inline Activations as_activations(int32_t word) { return _mm512_set1_epi32(word); }
inline Ints dot(Ints sum, Weights w, Activations a) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), w, a));
}

#elif defined(__AVXVNNI__)

using Weights = __m256i;
using Activations = __m256i;
inline Weights as_weights(Ints bytes) { return reinterpret_cast<__m256i>(bytes); }
inline Activations as_activations(int32_t word) { return _mm256_set1_epi32(word); }
inline Ints dot(Ints sum, Weights w, Activations a) {
  return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum), w, a));
}

#elif defined(__AVX2__)

struct Weights {
  Ints even, odd;  // bytes 0 and 2 of each word as 16-bit numbers, and 1 and 3
};
using Activations = Weights;
inline Weights as_weights(Ints bytes) { return {bytes & 0x00ff00ff, (bytes >> 8) & 0x00ff00ff}; }
inline Activations as_activations(int32_t word) {
  const int32_t even = (word << 24 >> 24 & 0xffff) | (word << 8 >> 24) * 0x10000;
  const int32_t odd = (word << 16 >> 24 & 0xffff) | (word >> 24) * 0x10000;
  return {broadcast_ints(even), broadcast_ints(odd)};
}
inline Ints multiply_halves(Ints a, Ints b) {  // a.low·b.low + a.high·b.high
#if defined(__AVX512BW__)
  return reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
  return reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#endif
}
inline Ints dot(Ints sum, Weights w, Activations a) {
  return sum + multiply_halves(w.even, a.even) + multiply_halves(w.odd, a.odd);
}

#else

using Weights = Ints;
struct Activations {
  int32_t byte[4];
};
inline Weights as_weights(Ints bytes) { return bytes; }
inline Activations as_activations(int32_t word) {
  Activations a;
  int8_t bytes[4];
  __builtin_memcpy(bytes, &word, 4);
  for (int i = 0; i < 4; ++i) a.byte[i] = bytes[i];
  return a;
}
inline Ints dot(Ints sum, Weights w, Activations a) {
  uint8_t bytes[4 * kLanes];
  __builtin_memcpy(bytes, &w, sizeof bytes);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) sum[lane] += bytes[4 * lane + i] * a.byte[i];
  }
  return sum;
}

#endif

}  // namespace
}  // namespace switchgear::cpu
