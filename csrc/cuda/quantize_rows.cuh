// SPDX-License-Identifier: BSD-3-Clause
// Rows of activations rounded to int8, with a scale for each block of columns: x ≈ scale · v, |v| <= 127 (integers.h).
//
//   x [R,C] float   values [R,C] bfloat16   scales [R,B] float32
//   traffic: x read once from memory and once from L1, 2 bytes written per element; bound by memory
//
// A warp per row and block. Integers up to 127 are exact in bfloat16, which is what mma.sync multiplies by decoded
// weights.
//
// Numeric contract: that of quantize_rows in reference/integers.py, bit for bit: scale = max / 127, v = x · (127 / max)
// rounded half to even; a block whose largest magnitude is below 2^-100 is zero; an infinity or a NaN makes the scale
// NaN and the values zero.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   quantize_rows_kernel: 32 registers
#pragma once
#include "gemm.h"
#include "vector.cuh"

namespace switchgear::cuda {

constexpr int kQuantizeWarps = 4;

template <typename T>
struct QuantizeParams {
  const T* x;
  int64_t x_stride;
  __nv_bfloat16* values;
  int64_t values_stride;  // a multiple of 8
  float* scales;
  int64_t num_rows;
  int32_t columns, block, num_blocks;
  bool aligned;  // rows and blocks of x start at multiples of 16 bytes
};

template <typename T>
__device__ inline void load_eight(float (&v)[8], const T* p, int count, bool aligned) {
#pragma unroll
  for (int first = 0; first < 8; first += kVectorSize<T>) {
    float part[kVectorSize<T>];
    unpack<T>(part, load_vector(p + first, count - first, aligned && count - first >= kVectorSize<T>));
#pragma unroll
    for (int i = 0; i < kVectorSize<T>; ++i) v[first + i] = part[i];
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kQuantizeWarps)
    quantize_rows_kernel(const __grid_constant__ QuantizeParams<T> p) {
  constexpr float kSmallest = 0x1p-100f;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kQuantizeWarps + threadIdx.x / 32;
  if (item >= p.num_rows * p.num_blocks) return;
  const int64_t row = item / p.num_blocks;
  const auto block = static_cast<int32_t>(item % p.num_blocks);
  const int32_t begin = block * p.block, end = p.columns - begin < p.block ? p.columns : begin + p.block;
  const T* const x = p.x + row * p.x_stride;
  const int32_t own = begin + static_cast<int32_t>(threadIdx.x) % 32 * 8;
  uint32_t most = 0;  // bits of magnitudes: in order, NaN above all
  for (int32_t column = own; column < end; column += 256) {
    float v[8];
    load_eight(v, x + column, end - column, p.aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
  }
  most = __reduce_max_sync(0xffffffffu, most);
  const float largest = __uint_as_float(most);
  const bool finite = most < 0x7f800000u;
  const float inverse = finite && largest >= kSmallest ? __fdiv_rn(127.0f, largest) : 0.0f;
  if (threadIdx.x % 32 == 0) {
    const float scale = largest < kSmallest ? 0.0f : __fdiv_rn(largest, 127.0f);
    p.scales[item] = finite ? scale : __uint_as_float(0x7fc00000u);
  }
  for (int32_t column = own; column < end; column += 256) {
    float v[8];
    load_eight(v, x + column, end - column, p.aligned);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = finite ? rintf(__fmul_rn(v[i], inverse)) : 0.0f;
    store_vector(p.values + row * p.values_stride + column, pack<__nv_bfloat16>(v), end - column, end - column >= 8);
  }
}

}  // namespace switchgear::cuda
