// SPDX-License-Identifier: BSD-3-Clause
// CUDA's names for a plain C++ compiler; csrc/cuda/platform.cuh includes this instead of nvcc's headers.
#pragma once
#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "models.h"
#include "runtime.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __cluster_dims__
#undef __maxnreg__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...) SIMT_LAUNCH_BOUND(__VA_ARGS__, 1)
#define __grid_constant__
#define __maxnreg__(...)

// The first number is recorded as so many bytes of padding before the kernel's code, where launch_bound (attributes.cpp)
// counts them.
#if defined(__clang__)
#define SIMT_LAUNCH_BOUND(threads, ...)
#else
#define SIMT_LAUNCH_BOUND(threads, ...) __attribute__((patchable_function_entry((threads), (threads))))
#endif

inline constexpr const uint3& threadIdx = simt::indices.thread;
inline constexpr const uint3& blockIdx = simt::indices.block;
inline constexpr const dim3& blockDim = simt::indices.block_size;
inline constexpr const dim3& gridDim = simt::indices.grid_size;
inline constexpr int warpSize = 32;

// Shared arrays are created anew for every block; the address of a static variable identifies each.
#define SHARED_DYN(T, name) T* const name = static_cast<T*>(::simt::dynamic_shared())
#define SHARED_ARRAY(T, name, N)                                              \
  T(&name)                                                                    \
  [N] = *static_cast<T(*)[N]>([](::simt::Location simt_at) -> void* {         \
    static constexpr char key = 0;                                            \
    return ::simt::static_shared(&key, sizeof(T) * (N), alignof(T), simt_at); \
  }(::simt::Location::current()))
#define SHARED_VALUE(T, name)                                           \
  T& name = *static_cast<T*>([](::simt::Location simt_at) -> void* {    \
    static constexpr char key = 0;                                      \
    return ::simt::static_shared(&key, sizeof(T), alignof(T), simt_at); \
  }(::simt::Location::current()))

// The caller's location, as a last parameter.
#define SIMT_AT ::simt::Location at = ::simt::Location::current()

#include "intrinsics.h"
#include "lanes.h"
#include "memory.h"
