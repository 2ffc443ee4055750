// SPDX-License-Identifier: BSD-3-Clause
// The tensor map that TMA reads: fields of this runtime in the 128 opaque bytes of a CUtensorMap. Internal.
#pragma once
#include <cstdint>

#include "location.h"

namespace simt {

constexpr int kMaxTensorRank = 5;

struct TensorMap {
  uint64_t mark;
  char* start;
  uint64_t size[kMaxTensorRank];        // in elements, the innermost dimension first
  uint64_t stride[kMaxTensorRank - 1];  // in bytes, of the dimensions after the innermost
  uint16_t box[kMaxTensorRank];
  uint8_t rank, element_size, swizzle_bits, nan_fill;
};
static_assert(sizeof(TensorMap) <= 128);
constexpr uint64_t kTensorMapMark = 0x7377'6974'6368'6d61;

// Shared addresses of swizzled tiles: `bits` of the 16-byte column are XORed with those of the 128-byte row.
inline uint32_t swizzled(uint32_t address, int bits) {
  const uint32_t mask = (1u << bits) - 1;
  return address ^ (address >> 7 & mask) << 4;
}

// Fails if a kernel wrote this map and the running thread has not acquired it (device_maps.cpp).
void check_acquired(const void* map, Location at);

}  // namespace simt
