// SPDX-License-Identifier: BSD-3-Clause
// Rows in vectors of 16 bytes, for the memory-bound kernels: permute, combine, glu.
//
// A row is cut into vectors from its first element on, whatever its address; a thread handles one vector. If all rows start
// at a multiple of 16 bytes, a whole vector is one load. Otherwise, and at the end of a row, elements are read one by one.
// The work and its order per thread are the same in both cases, so alignment changes no result.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "platform.cuh"
#include "switchgear/tensor.h"

namespace switchgear::cuda {

template <typename T>
constexpr int kVectorSize = 16 / sizeof(T);  // elements

// ---- elements ------------------------------------------------------------------------------------------------------------

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ inline T from_float(float v) {  // to nearest even
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return v;
  }
}

__device__ inline float load_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::kFloat16: return __half2float(static_cast<const __half*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

__device__ inline void store_float(void* data, DType dtype, int64_t i, float v) {
  switch (dtype) {
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(v); return;
    case DType::kFloat16: static_cast<__half*>(data)[i] = __float2half_rn(v); return;
    default: static_cast<float*>(data)[i] = v; return;
  }
}

// ---- vectors -------------------------------------------------------------------------------------------------------------

// The 16 bytes of a vector as words: element i is in word i · sizeof(T) / 4, the first one in the low bits.
struct Words {
  uint32_t w[4];
};

template <typename T>
__device__ inline void unpack(float (&values)[kVectorSize<T>], const Words& words) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(words.w[i]);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      values[2 * i] = __uint_as_float(words.w[i] << 16);
      values[2 * i + 1] = __uint_as_float(words.w[i] & 0xffff0000u);
    } else {
      values[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words.w[i] & 0xffffu)));
      values[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words.w[i] >> 16)));
    }
  }
}

__device__ inline uint32_t bits_of(float v) { return __float_as_uint(v); }
__device__ inline uint32_t bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
__device__ inline uint32_t bits_of(__half v) { return __half_as_ushort(v); }

template <typename T>
__device__ inline Words pack(const float (&values)[kVectorSize<T>]) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words.w[i] = bits_of(values[i]);
    } else {
      words.w[i] = bits_of(from_float<T>(values[2 * i])) | bits_of(from_float<T>(values[2 * i + 1])) << 16;
    }
  }
  return words;
}

// `whole`: a vector of kVectorSize elements at a multiple of 16 bytes; else `count` elements, followed by zeros.
template <typename T>
__device__ inline Words load_vector(const T* p, int count, bool whole) {
  if (whole) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    return {{v.x, v.y, v.z, v.w}};
  }
  Words words{};
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) {
    if (i < count) words.w[i * sizeof(T) / 4] |= bits_of(p[i]) << (8 * sizeof(T) * i % 32);
  }
  return words;
}

template <typename T>
__device__ inline void store_vector(T* p, const Words& words, int count, bool whole) {
  if (whole) {
    *reinterpret_cast<uint4*>(p) = make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVectorSize<T>; ++i) {
    const uint32_t bits = words.w[i * sizeof(T) / 4] >> (8 * sizeof(T) * i % 32);
    if (i >= count) continue;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      p[i] = __ushort_as_bfloat16(static_cast<unsigned short>(bits & 0xffffu));
    } else if constexpr (std::is_same_v<T, __half>) {
      p[i] = __ushort_as_half(static_cast<unsigned short>(bits & 0xffffu));
    } else {
      p[i] = __uint_as_float(bits);
    }
  }
}

// ---- threads -------------------------------------------------------------------------------------------------------------

// A block is threadIdx.x vectors wide and threadIdx.y rows high; blockIdx.x counts rows, blockIdx.y blocks of columns.
constexpr int kRowThreads = 256;

struct RowBlocks {
  dim3 grid, block;
};

inline RowBlocks row_blocks(int64_t num_rows, int64_t num_vectors) {
  const int64_t columns = std::min<int64_t>((num_vectors + kRowThreads - 1) / kRowThreads, 65535);
  const int64_t width = std::min<int64_t>((num_vectors + columns - 1) / columns, kRowThreads);
  const int64_t height = kRowThreads / width;
  return {dim3(static_cast<unsigned>((num_rows + height - 1) / height), static_cast<unsigned>(columns)),
          dim3(static_cast<unsigned>(width), static_cast<unsigned>(height))};
}

template <typename T>
int64_t vectors_of(int64_t columns) {
  return (columns + kVectorSize<T> - 1) / kVectorSize<T>;
}

// Whether every row starts at a multiple of 16 bytes.
inline bool rows_aligned(const TensorView& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride[0] * size_of(t.dtype) % 16 == 0;
}

// Calls function.template operator()<T>() for the element type of a dtype.
template <typename Function>
void with_element_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32: return function.template operator()<float>();
    case DType::kBFloat16: return function.template operator()<__nv_bfloat16>();
    case DType::kFloat16: return function.template operator()<__half>();
    default: throw std::logic_error("with_element_type: not a floating dtype");
  }
}

}  // namespace switchgear::cuda
