// SPDX-License-Identifier: BSD-3-Clause
// The data of conformance: pseudo-random words, and small integers as factors, whose products and sums are exact.
#pragma once
#include "ptx.cuh"

// Elsewhere the kernels run on the CPU: as C++ models, or as interpreted PTX (make simt KIND=ptx).
#if defined(__CUDACC__) && !defined(INTERPRETED)
#define ON_DEVICE
#endif

namespace switchgear::cuda::conformance {

__host__ __device__ constexpr uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// -3 … 3 as the bits of a float.
__host__ __device__ constexpr uint32_t small_float(uint32_t seed) {
  constexpr uint32_t kBits[7] = {0xc0400000, 0xc0000000, 0xbf800000, 0, 0x3f800000, 0x40000000, 0x40400000};
  return kBits[mix(seed) % 7];
}
// The same in 16 bits: bfloat16 is the upper half of a float.
__host__ __device__ constexpr uint32_t small_half(uint32_t seed, bool bf16) {
  constexpr uint32_t kBits[7] = {0xc200, 0xc000, 0xbc00, 0, 0x3c00, 0x4000, 0x4200};
  return bf16 ? small_float(seed) >> 16 : kBits[mix(seed) % 7];
}
__host__ __device__ constexpr uint32_t small_pair(uint32_t seed, bool bf16) {
  return small_half(2 * seed, bf16) | small_half(2 * seed + 1, bf16) << 16;
}

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t as_bits(float value) { return __float_as_uint(value); }

template <typename Fill>
__device__ inline void fill_shared(uint32_t* shared, int words, const Fill& fill) {
  for (int i = thread(); i < words; i += static_cast<int>(blockDim.x)) shared[i] = fill(static_cast<uint32_t>(i));
  __syncthreads();
}

__device__ inline void put(uint32_t* out, const uint32_t* values, int count) {
  for (int i = 0; i < count; ++i) out[thread() * count + i] = values[i];
}

}  // namespace switchgear::cuda::conformance
