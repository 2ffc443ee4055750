// SPDX-License-Identifier: BSD-3-Clause
// The only place that distinguishes the two compilers of the kernels: nvcc includes the real headers, any other C++ compiler
// includes tests/simt, which implements the CUDA names on the CPU. Kernel files include this first.
//
//   SHARED_DYN(T, name)        T* name: the block's dynamic shared memory. It requests an alignment of 1024 bytes; rely on 16
//   SHARED_ARRAY(T, name, N)   T name[N]: an uninitialised shared array; T is trivial and its name has no commas
//   SHARED_VALUE(T, name)      T& name: one shared value
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define SHARED_DYN(T, name)                                                    \
  extern __shared__ __align__(1024) unsigned char switchgear_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(switchgear_dynamic_shared)
#define SHARED_ARRAY(T, name, N) __shared__ T name[N]
#define SHARED_VALUE(T, name) __shared__ T name

#else

#include "simt.h"

#endif
