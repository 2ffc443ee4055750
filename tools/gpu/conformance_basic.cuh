// SPDX-License-Identifier: BSD-3-Clause
// Conformance of the instructions of ptx.cuh: cp.async, ldmatrix, mma.sync, conversions, flags and named barriers; and of groups of
// lanes with their atomics.
#pragma once
#include "conformance_case.cuh"

namespace switchgear::cuda::conformance {

// Each thread copies words to a place in shared memory that is shuffled among the threads.
#define COPY(name, words, valid)                                           \
  KERNEL(name) {                                                           \
    SHARED_DYN(uint32_t, shared);                                          \
    fill_shared(shared, 32 * (words), [](uint32_t i) { return ~mix(i); }); \
    const int place = thread() * 7 % 32 * (words);                         \
    ptx::name(shared + place, in + 4 * thread(), valid);                   \
    ptx::cp_async_commit();                                                \
    ptx::cp_async_wait<0>();                                               \
    __syncthreads();                                                       \
    put(out, shared + thread() * (words), words);                          \
  }
COPY(cp_async16, 4, thread() % 3 != 0)
COPY(cp_async8, 2, thread() % 3 != 0)
COPY(cp_async4, 1, thread() % 3 != 0)
COPY(cp_async16_zeros, 4, thread() % 17)

KERNEL(cp_async_wait) {
  SHARED_DYN(uint32_t, shared);
  fill_shared(shared, 64, [](uint32_t i) { return ~mix(i); });
  for (int group = 0; group < 2; ++group) {
    ptx::cp_async4(shared + 32 * group + thread(), in + 32 * group + thread(), true);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  out[thread()] = shared[thread()];
  ptx::cp_async_wait<0>();
  out[32 + thread()] = shared[32 + thread()];
}

#define LOAD_MATRIX(name, count)                                 \
  KERNEL(name) {                                                 \
    SHARED_DYN(uint32_t, shared);                                \
    fill_shared(shared, 128, [](uint32_t i) { return mix(i); }); \
    uint32_t r[count];                                           \
    ptx::name(r, shared + thread() * 5 % 32 * 4);                \
    put(out, r, count);                                          \
  }
LOAD_MATRIX(ldmatrix_x4, 4)
LOAD_MATRIX(ldmatrix_x4_trans, 4)
LOAD_MATRIX(ldmatrix_x2, 2)
LOAD_MATRIX(ldmatrix_x2_trans, 2)

#define MULTIPLY(name, factor)                                                                            \
  KERNEL(name) {                                                                                          \
    const uint32_t seed = static_cast<uint32_t>(thread()) * 16;                                           \
    float d[4];                                                                                           \
    uint32_t a[4], b[2], bits[4];                                                                         \
    for (uint32_t i = 0; i < 4; ++i) d[i] = as_float(small_float(seed + i)), a[i] = factor(seed + 4 + i); \
    for (uint32_t i = 0; i < 2; ++i) b[i] = factor(seed + 8 + i);                                         \
    ptx::name(d, a, b);                                                                                   \
    for (int i = 0; i < 4; ++i) bits[i] = as_bits(d[i]);                                                  \
    put(out, bits, 4);                                                                                    \
  }
__device__ inline uint32_t bf16_pair(uint32_t seed) { return small_pair(seed, true); }
__device__ inline uint32_t f16_pair(uint32_t seed) { return small_pair(seed, false); }
MULTIPLY(mma_bf16, bf16_pair)
MULTIPLY(mma_f16, f16_pair)
MULTIPLY(mma_tf32, small_float)

KERNEL(cvt_tf32) {
  for (int i = thread(); i < 4096; i += 32) {
    const uint32_t bits = in[i] & ~(i % 8 == 0 ? 0x7f800000u : 0x40000000u);  // includes subnormals; no infinities
    out[i] = ptx::cvt_tf32(as_float(bits));
  }
}

// Two codes of few bits times a power of two: subnormal factors, exact results, as the decoders of stored weights have them.
KERNEL(fma_halves) {
  for (int i = thread(); i < 1024; i += 32) {
    const uint32_t few = in[i] & 0x87f087f0u, fraction = in[i + 1024] & 0x000f000fu;
    out[4 * i] = ptx::fma_bf16x2(few, 0x7b807b80u, 0x80008000u);
    out[4 * i + 1] = ptx::fma_bf16x2(fraction | 0x43004300u, 0x3f803f80u, 0xc308c308u);
    out[4 * i + 2] = ptx::fma_f16x2(in[i] & 0xbf80bf80u, 0x5c005c00u, 0x80008000u);
    out[4 * i + 3] = ptx::fma_f16x2(fraction | 0x64006400u, 0x3c003c00u, 0xe408e408u);
  }
}

KERNEL(flags) {
  if (thread() != 0) return;
  uint32_t* p = out;
  const auto step = [&](uint32_t value) { *++p = value; };
  ptx::st_release_cta(out, in[0]), step(ptx::ld_acquire_cta(out));
  ptx::st_release_gpu(out, in[1]), step(ptx::ld_acquire_gpu(out));
  ptx::st_release_sys(out, in[2]), step(ptx::ld_acquire_sys(out));
  ptx::st_relaxed_gpu(out, in[3]), step(ptx::ld_relaxed_gpu(out));
  ptx::st_relaxed_sys(out, in[4]), step(ptx::ld_relaxed_sys(out));
  step(ptx::atom_add_relaxed_gpu(out, in[5]));
  step(ptx::atom_add_release_gpu(out, in[6]));
  step(ptx::atom_add_acq_rel_gpu(out, in[7]));
  step(ptx::atom_add_acq_rel_sys(out, in[8]));
}

KERNEL(atom_add) {  // by all threads: the sum is the same in any order
  if (thread() == 0) out[0] = 0;
  __syncthreads();
  ptx::atom_add_relaxed_gpu(out, in[thread()]);
}

KERNEL(bar) {  // the second warp waits for the first, which only arrives
  SHARED_DYN(uint32_t, shared);
  if (thread() < 32) {
    shared[thread()] = in[thread()];
    ptx::bar_arrive(1, 64);
  } else {
    ptx::bar_sync(1, 64);
    out[thread() - 32] = shared[63 - thread()];
  }
}

// Groups of lanes, and atomics on shared memory.
KERNEL(lanes) {
  SHARED_DYN(uint32_t, shared);
  fill_shared(shared, 8, [](uint32_t i) { return i == 1 ? 0xffffffffu : 0u; });
  const uint32_t value = in[thread()], few = value % 5;
  const unsigned all = 0xffffffffu;
  uint32_t r[13] = {__match_any_sync(all, few),
                    __reduce_max_sync(all, value),
                    __ballot_sync(all, few == 0),
                    static_cast<uint32_t>(__all_sync(all, few < 5)),
                    __shfl_sync(all, value, static_cast<int>(few)),
                    __shfl_sync(all, value, static_cast<int>(few), 8),
                    __shfl_xor_sync(all, value, 3),
                    __shfl_up_sync(all, value, 5),
                    static_cast<uint32_t>(__popc(value)),
                    static_cast<uint32_t>(__ffs(static_cast<int>(value))),
                    as_bits(__shfl_xor_sync(all, as_float(small_float(value)), 16)),
                    __match_any_sync(all, 7u),
                    __reduce_max_sync(all, few)};
  put(out, r, 13);
  atomicAdd(shared, value);
  atomicMin(shared + 1, value);
  atomicMax(shared + 2, value);
  atomicSub(shared + 3, few);
  __syncthreads();
  if (thread() < 4) out[64 * 13 + thread()] = shared[thread()];
}

inline void add_basic(std::vector<Case>& cases) {
  cases.insert(cases.end(), {SIMPLE(cp_async16, 32), SIMPLE(cp_async8, 32), SIMPLE(cp_async4, 32),
                             SIMPLE(cp_async16_zeros, 32), SIMPLE(cp_async_wait, 32), SIMPLE(ldmatrix_x4, 32),
                             SIMPLE(ldmatrix_x4_trans, 32), SIMPLE(ldmatrix_x2, 32), SIMPLE(ldmatrix_x2_trans, 32),
                             SIMPLE(mma_bf16, 32), SIMPLE(mma_f16, 32), SIMPLE(mma_tf32, 32), SIMPLE(cvt_tf32, 32),
                             SIMPLE(fma_halves, 32), SIMPLE(flags, 32), SIMPLE(atom_add, 32), SIMPLE(bar, 64)});
}

inline void add_lanes(std::vector<Case>& cases) { cases.push_back(SIMPLE(lanes, 64)); }

}  // namespace switchgear::cuda::conformance
