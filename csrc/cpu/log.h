// SPDX-License-Identifier: BSD-3-Clause
// The logarithm of assign_capped, with the same bits on every backend: a fixed sequence of float64 operations, each rounded to
// nearest even, never fused. Host files that include this are compiled with -ffp-contract=off.
//
//   x = 2^k · m, m in [√½, √2)
//   s = (m - 1) / (m + 1)                                        |s| < 0.1716
//   log x = k · LN2_HIGH + (2 s + (s³ · (2/3 + 2/5 s² + … + 2/21 s¹⁸) + k · LN2_LOW))
//
// The series of 2 artanh(s) is cut after s²¹; the rest is below 2 s · s²² / 23 < 2^-58 of log m. LN2_HIGH has 28 bits, so that
// its product with k is exact. With rounding the error is below 3 ulp.
#pragma once
#include <cstdint>

#include "../rounding.h"

namespace switchgear::cpu {

// x is a positive normal number.
SWITCHGEAR_HOST_DEVICE static inline double log_f64(double x) {
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd;  // √½
  constexpr double kLn2High = 0x1.62e42fep-1, kLn2Low = 0x1.f473de6af278fp-30;
  const uint64_t bits = __builtin_bit_cast(uint64_t, x);
  const int64_t k = static_cast<int64_t>(bits - kRootHalf) >> 52;
  const double m = __builtin_bit_cast(double, bits - (static_cast<uint64_t>(k) << 52));
  const double s = divide(add(m, -1.0), add(m, 1.0)), z = multiply(s, s);
  double p = 2.0 / 21;
  p = add(multiply(p, z), 2.0 / 19);
  p = add(multiply(p, z), 2.0 / 17);
  p = add(multiply(p, z), 2.0 / 15);
  p = add(multiply(p, z), 2.0 / 13);
  p = add(multiply(p, z), 2.0 / 11);
  p = add(multiply(p, z), 2.0 / 9);
  p = add(multiply(p, z), 2.0 / 7);
  p = add(multiply(p, z), 2.0 / 5);
  p = add(multiply(p, z), 2.0 / 3);
  const double exponent = static_cast<double>(k);
  const double small = add(multiply(multiply(s, z), p), multiply(exponent, kLn2Low));
  return add(multiply(exponent, kLn2High), add(multiply(2.0, s), small));
}

}  // namespace switchgear::cpu
