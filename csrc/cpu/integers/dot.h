// SPDX-License-Identifier: BSD-3-Clause
// dot: adds to each int32 lane the sum of four products of an unsigned byte (a weight) and a signed one (an activation).
// Included after simd_<isa>.h. VNNI has an instruction for it; without it bytes become 16-bit numbers, so no product saturates.
// NEON multiplies bytes of one signedness: there 128 is subtracted from 8-bit weights, and the sums' start compensates.
#pragma once
#include "cpu/widen.h"

namespace switchgear::cpu {
namespace {

inline Ints broadcast_ints(int32_t value) { return Ints{} + value; }

// What as_weights expects to have been subtracted from 8-bit weights.
#if defined(SWITCHGEAR_NEON)
constexpr int kWeightOffset = 128;
#else
constexpr int kWeightOffset = 0;
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

#elif defined(SWITCHGEAR_NEON)

using Weights = int8x16_t;
inline Weights as_weights(Ints bytes) { return reinterpret_cast<int8x16_t>(bytes); }

#if defined(__ARM_FEATURE_DOTPROD)
using Activations = int8x8_t;  // only the first four count
inline Activations as_activations(int32_t word) { return vcreate_s8(static_cast<uint32_t>(word)); }
inline Ints dot(Ints sum, Weights w, Activations a) {
  return reinterpret_cast<Ints>(vdotq_lane_s32(reinterpret_cast<int32x4_t>(sum), w, a, 0));
}
#else
using Activations = int8x16_t;
inline Activations as_activations(int32_t word) { return vreinterpretq_s8_s32(vdupq_n_s32(word)); }
inline Ints dot(Ints sum, Weights w, Activations a) {  // products are at most 128·127: two of them fit into 16 bits
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(a)), high = vmull_high_s8(w, a);
  return reinterpret_cast<Ints>(vpadalq_s16(reinterpret_cast<int32x4_t>(sum), vpaddq_s16(low, high)));
}
#endif

#else

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
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  typedef int16_t Halves __attribute__((vector_size(sizeof(Ints))));  // hold each product, at most 255·127
  const Ints products = reinterpret_cast<Ints>(reinterpret_cast<Halves>(a) * reinterpret_cast<Halves>(b));
  return (products << 16 >> 16) + (products >> 16);
#endif
}
inline Ints dot(Ints sum, Weights w, Activations a) {
  return sum + multiply_halves(w.even, a.even) + multiply_halves(w.odd, a.odd);
}

#endif

}  // namespace
}  // namespace switchgear::cpu
