// SPDX-License-Identifier: BSD-3-Clause
// The mask of dropout in adapters: element (slot, column) of a projection's input is kept or dropped by a hash of (seed,
// projection, slot, column), 32 bits, the same on every backend. python/switchgear/reference/layer.py is its definition.
// About 8 integer instructions per element.
#pragma once
#include <cstdint>

#include "gemm.h"
#include "platform.cuh"

namespace switchgear::cuda {

// A bijection of 32 bits whose every output bit depends on every input bit.
__host__ __device__ constexpr uint32_t mix_bits(uint32_t number) {
  number += 0x6A09E667u;  // 0 does not stay 0
  number = (number ^ (number >> 16)) * 0x85EBCA6Bu;
  number = (number ^ (number >> 13)) * 0xC2B2AE35u;
  return number ^ (number >> 16);
}

// The mask of one slot's row.
class DropoutRow {
 public:
  __device__ DropoutRow(const DropoutMask& mask, int32_t slot) : threshold_(mask.threshold) {
    const uint64_t seed = mask.device_seed != nullptr ? static_cast<uint64_t>(*mask.device_seed) : mask.seed;
    const uint32_t start = mix_bits(mix_bits(static_cast<uint32_t>(seed)) + static_cast<uint32_t>(seed >> 32));
    hash_ = mix_bits(start + 2 * static_cast<uint32_t>(slot) + mask.projection);
  }
  __device__ bool keeps(int32_t column) const {
    return mix_bits(hash_ + static_cast<uint32_t>(column) * 0x9E3779B9u) >= threshold_;
  }

 private:
  uint32_t hash_, threshold_;
};

constexpr uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 4294967296.0); }  // p in [0, 1)

}  // namespace switchgear::cuda
