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
constexpr int kPanelVectors = 2;  // 6 x 2 accumulators, 2 of B and 1 of A: 15 of 16 registers
constexpr int kDotColumns = 2;    // of a tile of dot_products
constexpr int64_t kPackingRows = 0, kWidenedPackingRows = 0;  // see Kernels
constexpr int kSumOrder[kLanes] = {0, 2, 1, 3};               // of add_sums
constexpr bool kHasPairs = false;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

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

inline Floats load(const BFloat16* p) {
  return reinterpret_cast<Floats>(Ints{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
}
inline Floats load(const Float16* p) {
  const Ints bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  const Ints sign = (bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  const Ints rebias = magnitude >= 0x7c00 ? Ints{} + ((255 - 31) << 23) : Ints{} + ((127 - 15) << 23);
  const Floats small = __builtin_convertvector(magnitude, Floats) * 0x1p-24f;  // zero and subnormals
  return reinterpret_cast<Floats>(sign |
                                  (magnitude < 0x0400 ? reinterpret_cast<Ints>(small) : (magnitude << 13) + rebias));
}
inline void store_bits16(BFloat16* p, Ints v) {
  for (int i = 0; i < kLanes; ++i) p[i].bits = static_cast<uint16_t>(v[i]);
}
inline void store(Float16* p, Floats v) {  // round to nearest even
  const Ints bits = reinterpret_cast<Ints>(v) & 0x7fffffff, sign = reinterpret_cast<Ints>(v) >> 16 & 0x8000;
  // below 2^-14: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits
  const Ints small = reinterpret_cast<Ints>(reinterpret_cast<Floats>(bits) + 0.5f) - 0x3f000000;
  const Ints normal = (bits - ((127 - 15) << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  const Ints finite = bits < 0x38800000 ? small : normal;
  const Ints infinite = bits > 0x7f800000 ? Ints{} + 0x7e00 : Ints{} + 0x7c00;  // or NaN
  const Ints half = sign | (bits >= 0x477ff000 ? infinite : finite);  // from there on it rounds to 2^16 or more
  for (int i = 0; i < kLanes; ++i) p[i].bits = static_cast<uint16_t>(half[i]);
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
