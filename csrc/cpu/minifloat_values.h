// SPDX-License-Identifier: BSD-3-Clause
// The values of minifloats (minifloat.h) by their definition.
#pragma once
#include "switchgear/minifloat.h"

namespace switchgear::cpu {
namespace {

constexpr float power_of_two(int exponent) {
  float value = 1.0f;
  for (; exponent > 0; --exponent) value *= 2.0f;
  for (; exponent < 0; ++exponent) value *= 0.5f;
  return value;
}

constexpr float fp8_value(int code) {  // e4m3fn: 4 bits of exponent, biased by 7, 3 of fraction; no infinities
  const int exponent = code >> 3 & 15, fraction = code & 7;
  float value = exponent == 0 ? static_cast<float>(fraction) * power_of_two(-9)
                              : static_cast<float>(8 + fraction) * power_of_two(exponent - 10);
  if ((code & 0x7f) == 0x7f) value = __builtin_nanf("");
  return (code & 0x80) != 0 ? -value : value;
}

constexpr float mxfp4_value(int code) {  // e2m1: 2 bits of exponent, biased by 1, 1 of fraction
  const int exponent = code >> 1 & 3, fraction = code & 1;
  const float value = exponent == 0 ? 0.5f * static_cast<float>(fraction)
                                    : static_cast<float>(2 + fraction) * power_of_two(exponent - 2);
  return (code & 8) != 0 ? -value : value;
}

constexpr float nf4_value(int stored) { return kNf4Values[stored ^ kNf4Zero]; }

template <Format kFormat>
constexpr float nibble_value(int stored) {
  return kFormat == Format::kNf4 ? nf4_value(stored) : mxfp4_value(stored);
}

}  // namespace
}  // namespace switchgear::cpu
