// SPDX-License-Identifier: BSD-3-Clause
// The order of every ranking: value descending, index ascending. It is total for values of any bits.
//
// Functions are `static`: rows.inl is compiled for each ISA, and no function of one may be merged into another.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>

namespace switchgear::cpu {

constexpr float kFloatMax = std::numeric_limits<float>::max();
constexpr int64_t kMaxInsertion = 32;  // longest list kept sorted by insertion

// NaN and -Inf become the lowest number, +Inf the highest. NaN fails the first comparison.
static inline float sanitise(float v) {
  v = v > -kFloatMax ? v : -kFloatMax;
  return v < kFloatMax ? v : kFloatMax;
}

// An integer for each float but NaN, in the same order.
static inline int32_t ordered(float value) {
  const int32_t bits = std::bit_cast<int32_t>(value + 0.0f);  // -0 becomes +0
  return bits ^ ((bits >> 31) & 0x7fffffff);                  // negative floats descend as integers: flip them
}

static inline float unordered(int32_t key) { return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff)); }

// The order as one integer: a larger key is a larger value, or the same value and a lower index.
static inline int64_t key_of(float value, int64_t index) {
  return (static_cast<int64_t>(ordered(value)) << 32) | (~index & 0xffffffff);
}
static inline float value_of(int64_t key) { return unordered(static_cast<int32_t>(key >> 32)); }
static inline int32_t index_of(int64_t key) { return static_cast<int32_t>(~key & 0xffffffff); }

// Moves the `count` largest keys to the front, largest first.
inline void select_best(int64_t* keys, int64_t num_keys, int64_t count) {
  if (count > kMaxInsertion) {
    if (count < num_keys) std::nth_element(keys, keys + count, keys + num_keys, std::greater<>());
    std::sort(keys, keys + count, std::greater<>());
    return;
  }
  int64_t size = 0;  // keys[0, size) is the sorted list, before the current key
  for (int64_t i = 0; i < num_keys; ++i) {
    const int64_t key = keys[i];
    if (size == count && key < keys[size - 1]) continue;
    int64_t at = size < count ? size++ : size - 1;
    for (; at > 0 && key > keys[at - 1]; --at) keys[at] = keys[at - 1];
    keys[at] = key;
  }
}

}  // namespace switchgear::cpu
