// SPDX-License-Identifier: BSD-3-Clause
// The vector vocabulary of kernels.inl in plain C++: 16-byte vectors of the compiler, any architecture.
#pragma once
#include <cstdint>
#include <cstring>

namespace switchgear::cpu {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kPanelVectors = 2;                 // 6 x 2 accumulators, 2 of B and 1 of A fill 16 registers
constexpr int kDotColumns = 2;                   // of a tile of dot_products
constexpr int kSumOrder[kLanes] = {0, 2, 1, 3};  // of add_sums
constexpr bool kHasPairs = false;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float to_float(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  float f;
  if (magnitude < 0x0400u) {  // zero or denormal: the integer times 2^-24
    f = static_cast<float>(magnitude) * 0x1p-24f;
  } else {
    const uint32_t rebias = magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
    const uint32_t bits = (magnitude << 13) + rebias;
    std::memcpy(&f, &bits, 4);
  }
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline Float16 to_float16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // rounds to 2^16 or more
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, 4);
    half -= 0x3f000000u;
  } else {
    half = (bits - ((127u - 15u) << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline void stream(float* p, Floats v) { store(p, v); }
inline void finish_streams() {}
inline Floats broadcast(float f) { return Floats{f, f, f, f}; }
inline Floats broadcast_word(const void* p) {
  float f;
  std::memcpy(&f, p, 4);
  return broadcast(f);
}
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

inline Floats load(const BFloat16* p) { return Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline Floats load(const Float16* p) { return Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline void store_bits16(BFloat16* p, Ints v) {
  for (int i = 0; i < kLanes; ++i) p[i].bits = static_cast<uint16_t>(v[i]);
}
inline void store(Float16* p, Floats v) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_float16(v[i]);
}

inline void transpose(Floats (&v)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float t = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = t;
    }
  }
}

// p[j] += the sum of the lanes of v[j].
inline void add_sums(float* p, const Floats (&v)[kDotColumns]) {
  for (int j = 0; j < kDotColumns; ++j) p[j] += (v[j][0] + v[j][2]) + (v[j][1] + v[j][3]);
}

}  // namespace
}  // namespace switchgear::cpu
