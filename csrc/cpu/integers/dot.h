// SPDX-License-Identifier: BSD-3-Clause
// dot: adds to each int32 lane the sum of four products of an unsigned byte (a weight) and a signed one (an activation).
// Included after simd_<isa>.h. VNNI has an instruction for it. NEON multiplies bytes of one signedness: there 128 is subtracted
// from 8-bit weights, and the sums' start compensates.
// Without such an instruction (kHasDot is false) one more step sums 16-bit products. Weights of 8 bits and their activations are
// 16-bit numbers, so dot adds two products instead of four, and no sum saturates. 4-bit weights are so small that the sums of
// eight steps fit in 16 bits: dot_nibbles adds four products, two to each half of a lane, and add_halves adds the halves.
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

typedef int16_t Halves __attribute__((vector_size(sizeof(Ints))));
typedef uint16_t UnsignedHalves __attribute__((vector_size(sizeof(Ints))));

// Bytes 0 and 2 of each lane as 16-bit numbers, and 1 and 3.
inline Ints even_bytes(Ints v) { return v & 0x00ff00ff; }
inline Ints odd_bytes(Ints v) { return reinterpret_cast<Ints>(reinterpret_cast<UnsignedHalves>(v) >> 8); }

// Of each four lanes 0, 2, 1 and 3.
inline Ints even_lanes_first(Ints v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(_mm512_shuffle_epi32(reinterpret_cast<__m512i>(v), _MM_PERM_DBCA));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(_mm256_shuffle_epi32(reinterpret_cast<__m256i>(v), _MM_SHUFFLE(3, 1, 2, 0)));
#else
  int32_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = v[i / 4 * 4 + i % 4 % 2 * 2 + i % 4 / 2];
  return load_ints(lanes);
#endif
}

// Lanes of two 16-bit numbers: sum + a.low·b.low + a.high·b.high.
inline Ints add_products(Ints sum, Ints a, Ints b) {
#if defined(__AVX512BW__)
  return sum + reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else  // each product fits in 16 bits: at most 255·127
  const Ints products = reinterpret_cast<Ints>(reinterpret_cast<Halves>(a) * reinterpret_cast<Halves>(b));
  return sum + (products << 16 >> 16) + (products >> 16);
#endif
}

// Most steps of dot_nibbles before a sum of 16 bits overflows: 8 · 2 · 15 · 127 < 2^15.
constexpr int kNibbleSteps = 8;

// Bytes of w, at most 15, and of a: each half of a lane += the sum of its two products.
template <typename W, typename A>  // both Ints: ISAs with dots have other types, and do not call it
inline Ints dot_nibbles(Ints halves, W w, A a) {
#if defined(__AVX512BW__)
  const __m512i sums = _mm512_maddubs_epi16(reinterpret_cast<__m512i>(w), reinterpret_cast<__m512i>(a));
#elif defined(__AVX2__)
  const __m256i sums = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(w), reinterpret_cast<__m256i>(a));
#else
  const auto bytes = reinterpret_cast<Halves>(w), others = reinterpret_cast<Halves>(a);
  const Halves sums = (bytes & 0xff) * (others << 8 >> 8) + (bytes >> 8) * (others >> 8);
#endif
  return reinterpret_cast<Ints>(reinterpret_cast<Halves>(halves) + reinterpret_cast<Halves>(sums));
}

inline Ints add_halves(Ints sum, Ints halves) { return add_products(sum, halves, broadcast_ints(0x00010001)); }

#if defined(__AVX512VNNI__)

constexpr bool kHasDot = true;
using Weights = __m512i;
using Activations = __m512i;
inline Weights as_weights(Ints bytes) { return reinterpret_cast<__m512i>(bytes); }
inline Activations as_activations(int32_t word) { return _mm512_set1_epi32(word); }
inline Ints dot(Ints sum, Weights w, Activations a) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), w, a));
}

#elif defined(__AVXVNNI__)

constexpr bool kHasDot = true;
using Weights = __m256i;
using Activations = __m256i;
inline Weights as_weights(Ints bytes) { return reinterpret_cast<__m256i>(bytes); }
inline Activations as_activations(int32_t word) { return _mm256_set1_epi32(word); }
inline Ints dot(Ints sum, Weights w, Activations a) {
  return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum), w, a));
}

#elif defined(SWITCHGEAR_NEON)

constexpr bool kHasDot = true;
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

constexpr bool kHasDot = false;
using Weights = Ints;
using Activations = Ints;
inline Weights as_weights(Ints words) { return words; }
inline Activations as_activations(int32_t word) { return broadcast_ints(word); }
inline Ints dot(Ints sum, Weights w, Activations a) { return add_products(sum, w, a); }

#endif

}  // namespace
}  // namespace switchgear::cpu
