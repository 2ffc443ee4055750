// SPDX-License-Identifier: BSD-3-Clause
// Values of the element types of tensor cores. Internal.
#pragma once
#include <bit>
#include <cstdint>

#include "models.h"

namespace simt {

inline float bf16_value(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline float f16_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 0) {  // zero and subnormal numbers: multiples of 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide_exponent = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | wide_exponent << 23 | fraction << 13);
}

inline float half_value(uint32_t bits, Element element) {
  const uint16_t low = static_cast<uint16_t>(bits);
  return element == Element::kBf16 ? bf16_value(low) : f16_value(low);
}

// Tensor cores ignore the low 13 bits.
inline float tf32_value(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

}  // namespace simt
