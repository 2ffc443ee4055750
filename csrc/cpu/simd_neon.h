// SPDX-License-Identifier: BSD-3-Clause
// The vector vocabulary of kernels.inl for Arm's Advanced SIMD (NEON), which every AArch64 processor has.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#define SWITCHGEAR_NEON  // for dot.h: __ARM_NEON is defined for plain C++, too

namespace switchgear::cpu {
namespace {

using Floats = float32x4_t;
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kPanelVectors = 4;  // 6 x 4 accumulators, 4 of B and 1 of A: 29 of 32 registers
constexpr int kDotColumns = 4;    // of a tile of dot_products
constexpr int64_t kPackingRows = 0, kWidenedPackingRows = 0;  // see Kernels
constexpr int kSumOrder[kLanes] = {0, 1, 2, 3};               // of add_sums
constexpr bool kHasPairs = false;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Floats load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Floats v) { vst1q_f32(p, v); }
inline void stream(float* p, Floats v) { vst1q_f32(p, v); }  // caches detect writes of whole lines themselves
inline void finish_streams() {}
inline Floats broadcast(float f) { return vdupq_n_f32(f); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }

// A multiply-add can take one lane for all, so a word is loaded as a scalar: on some Arm cores a broadcasting load occupies a
// multiply-add pipe.
struct Word {
  float32x2_t lanes;
};
inline Word broadcast_word(const void* p) {
  uint32_t bits;
  std::memcpy(&bits, p, 4);
  return {vcreate_f32(bits)};
}
inline Floats multiply_add(Word a, Floats b, Floats c) { return vfmaq_lane_f32(c, b, a.lanes, 0); }

inline uint16x4_t load_bits16(const void* p) { return vld1_u16(static_cast<const uint16_t*>(p)); }
inline Floats load(const BFloat16* p) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(load_bits16(p)), 16)); }
inline Floats load(const Float16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_bits16(p))); }
inline void store_bits16(BFloat16* p, Ints v) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vmovn_u32(reinterpret_cast<uint32x4_t>(v)));
}
inline void store(Float16* p, Floats v) {  // rounds in the program's mode: to nearest, ties to even
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
}

inline void transpose(Floats (&v)[kLanes]) {
  const auto low = [](Floats a, Floats b) {
    return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
  };
  const auto high = [](Floats a, Floats b) {
    return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
  };
  const Floats even[] = {vtrn1q_f32(v[0], v[1]), vtrn1q_f32(v[2], v[3])};  // columns 0 and 2 of two rows each
  const Floats odd[] = {vtrn2q_f32(v[0], v[1]), vtrn2q_f32(v[2], v[3])};
  v[0] = low(even[0], even[1]);
  v[1] = low(odd[0], odd[1]);
  v[2] = high(even[0], even[1]);
  v[3] = high(odd[0], odd[1]);
}

// p[j] += the sum of the lanes of v[j].
inline void add_sums(float* p, const Floats (&v)[kDotColumns]) {
  const Floats sums = vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]));
  vst1q_f32(p, vaddq_f32(vld1q_f32(p), sums));
}

}  // namespace
}  // namespace switchgear::cpu
