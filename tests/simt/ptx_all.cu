// SPDX-License-Identifier: BSD-3-Clause
// Every wrapper of ptx.cuh, and with -DHOPPER of hopper.cuh, in its own kernel with the wrapper's name. test_ptx.py compiles
// this file and compares the PTX with the wrapper's text.
#include "ptx.cuh"
#if defined(HOPPER)
#include "hopper.cuh"
#endif

using namespace switchgear::cuda;

#define KERNEL(name, ...) extern "C" __global__ void kernel_##name(__VA_ARGS__)

KERNEL(smem_u32, uint32_t* out) {
  SHARED_DYN(float, shared);
  *out = ptx::smem_u32(shared + threadIdx.x);
}
#define COPY(name)                                      \
  KERNEL(name, const float* global, int valid) {        \
    SHARED_DYN(float, shared);                          \
    ptx::name(shared + 4 * threadIdx.x, global, valid); \
  }
COPY(cp_async16)
COPY(cp_async8)
COPY(cp_async4)
KERNEL(cp_async16_zeros, const float* global, int valid) {
  SHARED_DYN(float, shared);
  ptx::cp_async16_zeros(shared, global, valid);
}
KERNEL(cp_async_commit) { ptx::cp_async_commit(); }
KERNEL(cp_async_wait) { ptx::cp_async_wait<2>(); }

#define LOAD_MATRIX(name, count)                   \
  KERNEL(name, uint32_t* out) {                    \
    SHARED_DYN(float, shared);                     \
    uint32_t r[count];                             \
    ptx::name(r, shared + 4 * threadIdx.x);        \
    for (int i = 0; i < count; ++i) out[i] = r[i]; \
  }
LOAD_MATRIX(ldmatrix_x4, 4)
LOAD_MATRIX(ldmatrix_x4_trans, 4)
LOAD_MATRIX(ldmatrix_x2, 2)
LOAD_MATRIX(ldmatrix_x2_trans, 2)

#define MULTIPLY(name)                                                   \
  KERNEL(name, float* d, const uint32_t* x) {                            \
    float sum[4] = {d[0], d[1], d[2], d[3]};                             \
    const uint32_t a[4] = {x[0], x[1], x[2], x[3]}, b[2] = {x[4], x[5]}; \
    ptx::name(sum, a, b);                                                \
    for (int i = 0; i < 4; ++i) d[i] = sum[i];                           \
  }
MULTIPLY(mma_bf16)
MULTIPLY(mma_f16)
MULTIPLY(mma_tf32)
KERNEL(cvt_tf32, uint32_t* out, float x) { *out = ptx::cvt_tf32(x); }
KERNEL(fma_bf16x2, uint32_t* out, uint32_t a, uint32_t b, uint32_t c) { *out = ptx::fma_bf16x2(a, b, c); }
KERNEL(fma_f16x2, uint32_t* out, uint32_t a, uint32_t b, uint32_t c) { *out = ptx::fma_f16x2(a, b, c); }

#define LOAD(name) \
  KERNEL(name, uint32_t* out, const uint32_t* p) { *out = ptx::name(p); }
#define STORE(name) \
  KERNEL(name, uint32_t* p, uint32_t value) { ptx::name(p, value); }
#define ADD(name) \
  KERNEL(name, uint32_t* out, uint32_t* p, uint32_t value) { *out = ptx::name(p, value); }
LOAD(ld_acquire_cta)
LOAD(ld_acquire_gpu)
LOAD(ld_acquire_sys)
LOAD(ld_relaxed_gpu)
LOAD(ld_relaxed_sys)
STORE(st_release_cta)
STORE(st_release_gpu)
STORE(st_release_sys)
STORE(st_relaxed_gpu)
STORE(st_relaxed_sys)
ADD(atom_add_relaxed_gpu)
ADD(atom_add_release_gpu)
ADD(atom_add_acq_rel_gpu)
ADD(atom_add_acq_rel_sys)

KERNEL(bar_sync, int id, int threads) { ptx::bar_sync(id, threads); }
KERNEL(bar_arrive, int id, int threads) { ptx::bar_arrive(id, threads); }

#if defined(HOPPER)

KERNEL(mbar_init, int count) {
  SHARED_DYN(uint64_t, bar);
  ptx::mbar_init(bar, count);
}
#define ON_BARRIER(name)     \
  KERNEL(name) {             \
    SHARED_DYN(uint64_t, b); \
    ptx::name(b);            \
  }
ON_BARRIER(mbar_inval)
ON_BARRIER(mbar_arrive)
ON_BARRIER(cp_async_mbar_arrive)
KERNEL(mbar_expect_tx, int bytes) {
  SHARED_DYN(uint64_t, bar);
  ptx::mbar_expect_tx(bar, bytes);
}
KERNEL(mbar_test_wait, uint32_t* out, int parity) {
  SHARED_DYN(uint64_t, bar);
  *out = ptx::mbar_test_wait(bar, parity);
}
// Twice, so that its label must be local to the wrapper.
KERNEL(mbar_wait, int parity) {
  SHARED_DYN(uint64_t, bar);
  ptx::mbar_wait(bar, parity);
  ptx::mbar_wait(bar, parity ^ 1);
}
KERNEL(mbar_wait_cluster, int parity) {
  SHARED_DYN(uint64_t, bar);
  ptx::mbar_wait_cluster(bar, parity);
  ptx::mbar_wait_cluster(bar, parity ^ 1);
}
KERNEL(cluster_rank, uint32_t* out) { *out = ptx::cluster_rank(); }
KERNEL(cluster_arrive) { ptx::cluster_arrive(); }
KERNEL(cluster_wait) { ptx::cluster_wait(); }
KERNEL(mbar_arrive_cluster, int rank) {
  SHARED_DYN(uint64_t, bar);
  ptx::mbar_arrive_cluster(bar, rank);
  ptx::mbar_arrive_cluster(bar, rank ^ 1);
}
KERNEL(mbar_arrive_remote, int rank) {
  SHARED_DYN(uint64_t, bar);
  ptx::mbar_arrive_remote(bar, rank);
  ptx::mbar_arrive_remote(bar, rank ^ 1);
}
KERNEL(st_cluster, int rank, uint64_t value) {
  SHARED_DYN(uint64_t, shared);
  ptx::st_cluster(shared, rank, value);
  ptx::st_cluster(shared, rank ^ 1, value);
}
KERNEL(fence_barrier_init) { ptx::fence_barrier_init(); }
KERNEL(fence_proxy_async) { ptx::fence_proxy_async(); }
KERNEL(fence_proxy_async_global) { ptx::fence_proxy_async_global(); }

KERNEL(tma_load_2d, const __grid_constant__ CUtensorMap map, int x, int y) {
  SHARED_DYN(uint64_t, shared);
  ptx::tma_load_2d(shared + 128, &map, shared, x, y);
}
KERNEL(tma_load_3d, const __grid_constant__ CUtensorMap map, int x, int y, int z) {
  SHARED_DYN(uint64_t, shared);
  ptx::tma_load_3d(shared + 128, &map, shared, x, y, z);
}
KERNEL(tma_load_3d_multicast, const __grid_constant__ CUtensorMap map, int x, int y, int z, uint16_t blocks) {
  SHARED_DYN(uint64_t, shared);
  ptx::tma_load_3d_multicast(shared + 128, &map, shared, x, y, z, blocks);
}
KERNEL(bulk_load, const float* global, int bytes) {
  SHARED_DYN(uint64_t, shared);
  ptx::bulk_load(shared + 128, global, bytes, shared);
}
KERNEL(tma_store_2d, const __grid_constant__ CUtensorMap map, int x, int y) {
  SHARED_DYN(uint64_t, shared);
  ptx::tma_store_2d(&map, shared, x, y);
}
KERNEL(tma_store_3d, const __grid_constant__ CUtensorMap map, int x, int y, int z) {
  SHARED_DYN(uint64_t, shared);
  ptx::tma_store_3d(&map, shared, x, y, z);
}
KERNEL(tma_store_commit) { ptx::tma_store_commit(); }
KERNEL(tma_store_wait_read) { ptx::tma_store_wait_read<1>(); }
KERNEL(tma_store_wait) { ptx::tma_store_wait<0>(); }
KERNEL(prefetch_tensor_map, const __grid_constant__ CUtensorMap map) { ptx::prefetch_tensor_map(&map); }

KERNEL(tensor_map_replace_address, CUtensorMap* map, const void* data) { ptx::tensor_map_replace_address(map, data); }
KERNEL(tensor_map_replace_size, CUtensorMap* map, uint32_t size) { ptx::tensor_map_replace_size<1>(map, size); }
KERNEL(fence_tensor_map_release) { ptx::fence_tensor_map_release(); }
KERNEL(fence_tensor_map_acquire, const CUtensorMap* map) { ptx::fence_tensor_map_acquire(map); }

KERNEL(desc_k128, uint64_t* out, uint32_t start) { *out = ptx::desc_k128(start); }
KERNEL(wgmma_fence) { ptx::wgmma_fence(); }
KERNEL(wgmma_commit) { ptx::wgmma_commit(); }
KERNEL(wgmma_wait) { ptx::wgmma_wait<1>(); }

template <typename T, int N, bool kTransposeA, bool kTransposeB>
__device__ void multiply_shared(float* out, uint64_t a, uint64_t b, int accumulate) {
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = out[i];
  ptx::wgmma_fence();
  ptx::wgmma<T, N, kTransposeA, kTransposeB>(d, a, b, accumulate);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[i] = d[i];
}
template <typename T, int N, bool kTransposeB>
__device__ void multiply_registers(float* out, const uint32_t* x, uint64_t b, int accumulate) {
  float d[N / 2];
  const uint32_t a[4] = {x[0], x[1], x[2], x[3]};
  for (int i = 0; i < N / 2; ++i) d[i] = out[i];
  ptx::wgmma_fence();
  ptx::wgmma<T, N, kTransposeB>(d, a, b, accumulate);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) out[i] = d[i];
}
#define WIDTH(n, ...)                                                                    \
  KERNEL(wgmma_bf16_##n, float* out, uint64_t a, uint64_t b, int accumulate) {           \
    multiply_shared<__nv_bfloat16, n, false, n % 16 == 0>(out, a, b, accumulate);        \
  }                                                                                      \
  KERNEL(wgmma_f16_##n, float* out, uint64_t a, uint64_t b, int accumulate) {            \
    multiply_shared<__half, n, n % 16 == 0, false>(out, a, b, accumulate);               \
  }                                                                                      \
  KERNEL(wgmma_rs_bf16_##n, float* out, const uint32_t* a, uint64_t b, int accumulate) { \
    multiply_registers<__nv_bfloat16, n, n % 16 == 0>(out, a, b, accumulate);            \
  }                                                                                      \
  KERNEL(wgmma_rs_f16_##n, float* out, const uint32_t* a, uint64_t b, int accumulate) {  \
    multiply_registers<__half, n, false>(out, a, b, accumulate);                         \
  }
WGMMA_WIDTHS(WIDTH)

#define STORE_MATRIX(name)                          \
  KERNEL(name, const uint32_t* x) {                 \
    SHARED_DYN(float, shared);                      \
    const uint32_t r[4] = {x[0], x[1], x[2], x[3]}; \
    ptx::name(shared + 4 * threadIdx.x, r);         \
  }
STORE_MATRIX(stmatrix_x4)
STORE_MATRIX(stmatrix_x4_trans)
KERNEL(elect_one, uint32_t* out) { *out = ptx::elect_one(); }
KERNEL(reciprocal, float* out, float x) { *out = ptx::reciprocal(x); }
KERNEL(wait_for_kernel_before) { ptx::wait_for_kernel_before(); }
KERNEL(start_kernel_after) { ptx::start_kernel_after(); }
KERNEL(setmaxnreg_dec) { ptx::setmaxnreg_dec<40>(); }
KERNEL(setmaxnreg_inc) { ptx::setmaxnreg_inc<232>(); }

#endif  // HOPPER
