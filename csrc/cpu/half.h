// SPDX-License-Identifier: BSD-3-Clause
// Rounding to float16 without instructions of a processor, for code that is compiled once for all of them.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace switchgear::cpu {

// The nearest float16, ties to even, widened. NaN stays NaN.
inline float round_to_half(float x) {
  const float size = std::abs(x);
  if (size >= 65520) return std::copysign(std::numeric_limits<float>::infinity(), x);
  if (!(size >= 0x1p-14f)) return std::copysign(size + 0.5f - 0.5f, x);  // multiples of 2^-24
  auto bits = std::bit_cast<uint32_t>(x);
  bits += 0xfffu + (bits >> 13 & 1u);
  return std::bit_cast<float>(bits & ~0x1fffu);
}

// The bits of a finite number that float16 holds.
inline uint16_t bits_of_half(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const float size = std::abs(x);
  const uint32_t code =
      size < 0x1p-14f ? static_cast<uint32_t>(size * 0x1p24f) : (bits >> 13 & 0x3ffffu) - (112u << 10);
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | code);
}

}  // namespace switchgear::cpu
