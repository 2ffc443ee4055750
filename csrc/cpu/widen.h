// SPDX-License-Identifier: BSD-3-Clause
// Loads of bytes as vectors of integers or float32. Included after simd_<isa>.h.
#pragma once

namespace switchgear::cpu {
namespace {

inline Ints load_ints(const void* p) {
  Ints v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline int32_t word_at(const int8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}

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
#elif defined(SWITCHGEAR_NEON)
inline Floats widen(const int8_t* p) {
  const int8x8_t bytes = vcreate_s8(static_cast<uint32_t>(word_at(p)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
inline Floats widen(const uint8_t* p) {
  const uint8x8_t bytes = vcreate_u8(static_cast<uint32_t>(word_at(reinterpret_cast<const int8_t*>(p))));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}
#else
template <typename Byte>
inline Floats widen(const Byte* p) {
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}
#endif

}  // namespace
}  // namespace switchgear::cpu
