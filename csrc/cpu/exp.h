// SPDX-License-Identifier: BSD-3-Clause
// The exponential of route, with the same bits on every backend: a fixed sequence of float32 operations, each rounded to
// nearest even, never fused. Host files that include this are compiled with -ffp-contract=off.
//
//   c = min(max(x, LOWEST), HIGHEST)
//   n = (c · LOG2E + MAGIC) - MAGIC             nearest integer
//   r = (c - n · LN2_HIGH) - n · LN2_LOW        |r| <= ln2 / 2; the first product and difference are exact
//   q = (((C6 · r + C5) · r + C4) · r + C3) · r + C2
//   p = (q · (r · r) + r) + 1
//   exp(x) = (p · 2^(i >> 1)) · 2^(i - (i >> 1)),  i = int(n);   0 where x < LOWEST
//
// C2…C6 minimise the relative error of 1 + r + r²·(C2 + … + C6·r⁴) on ±(ln2 / 2)(1 + 2^-14): a Remez exchange in 40 digits.
// They are rounded to float32 one at a time, C2 first, and the rest is fitted again; 3.2e-9 remains. With rounding the error
// is below 0.989 ulp (8.2e-8) and the result is monotone, as checked for all floats with 2^-30 <= |x| <= 89. exp(0) = 1.
// Subnormal results are 0, so flush-to-zero modes change nothing; at LOWEST the result is just above the smallest normal
// number. Past 88.7228 the last product overflows to +Inf.
#pragma once
#include <cstdint>

#include "../rounding.h"

namespace switchgear::cpu {

// x is not NaN. Branch-free, so compilers vectorise loops over it. __builtin_bit_cast: CUDA has no std::bit_cast.
SWITCHGEAR_HOST_DEVICE static inline float exp_f32(float x) {
  constexpr float kLowest = -0x1.5d589ep+6f;
  constexpr float kHighest = 89.0f;
  constexpr float kLog2E = 0x1.715476p+0f;
  constexpr float kMagic = 0x1.8p+23f;      // adding it leaves no bits for a fraction
  constexpr float kLn2High = 0x1.62e4p-1f;  // 15 bits, n has at most 8
  constexpr float kLn2Low = 0x1.7f7d1cp-20f;

  // Clamps and the last selection use the bits: gcc compiles comparisons of floats to branches, since they may trap. As
  // uint32, negative floats ascend with their magnitude and exceed all positive ones.
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  constexpr uint32_t kLowestBits = __builtin_bit_cast(uint32_t, kLowest);
  constexpr int32_t kHighestBits = __builtin_bit_cast(int32_t, kHighest);
  const uint32_t low = bits < kLowestBits ? bits : kLowestBits;
  const int32_t high = static_cast<int32_t>(low) < kHighestBits ? static_cast<int32_t>(low) : kHighestBits;
  const int32_t underflow = static_cast<int32_t>(low - bits) >> 31;  // -1 where x < kLowest, else 0
  const float c = __builtin_bit_cast(float, high);

  const float n = add(add(multiply(c, kLog2E), kMagic), -kMagic);
  const float r = add(add(c, -multiply(n, kLn2High)), -multiply(n, kLn2Low));
  float q = 0x1.6ac74ep-10f;
  q = add(multiply(q, r), 0x1.123dep-7f);
  q = add(multiply(q, r), 0x1.555858p-5f);
  q = add(multiply(q, r), 0x1.55548cp-3f);
  q = add(multiply(q, r), 0x1.fffffcp-2f);
  const float p = add(add(multiply(q, multiply(r, r)), r), 1.0f);
  const int32_t i = static_cast<int32_t>(n);
  const int32_t half = i >> 1;  // i reaches 128, one more than an exponent holds
  const float scale = __builtin_bit_cast(float, (half + 127) << 23);
  const float rest = __builtin_bit_cast(float, (i - half + 127) << 23);
  const float e = multiply(multiply(p, scale), rest);
  return __builtin_bit_cast(float, __builtin_bit_cast(int32_t, e) & ~underflow);
}

}  // namespace switchgear::cpu
