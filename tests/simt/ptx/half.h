// SPDX-License-Identifier: BSD-3-Clause
// 16-bit floats, by their bits. Narrowing rounds to nearest even; NaN becomes 0x7fff, as on the device.
#pragma once
#include <bit>
#include <cstdint>

namespace simt::ptx {

inline float bfloat_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
inline float half_to_float(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline uint16_t float_to_bfloat(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float_to_half(float value) {
  return value != value ? uint16_t{0x7fff} : std::bit_cast<uint16_t>(static_cast<_Float16>(value));
}

}  // namespace simt::ptx
