// SPDX-License-Identifier: BSD-3-Clause
// PTX of sm_80, one instruction per function: its asm for nvcc, and a model of it for tests/simt. Inline asm appears only here
// and in hopper.cuh.
#pragma once
#include "platform.cuh"

#if defined(__CUDACC__)
#define PTX __device__ __forceinline__
#define PTX_AT      // passes the caller's location to the model, as the only parameter
#define PTX_AND_AT  // … or as the last one
#else
#define PTX inline
#define PTX_AT ::simt::Location at = ::simt::Location::current()
#define PTX_AND_AT , PTX_AT
#endif

namespace switchgear::cuda::ptx {

// The 32-bit address of shared memory that instructions take.
PTX uint32_t smem_u32(const void* shared PTX_AND_AT) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
#else
  return simt::shared_address(shared, at);
#endif
}

// ---- cp.async: copies from global to shared memory, bypassing registers --------------------------------------------------
// Writes zeros if `valid` is false; `global` is not read then. Both addresses must be multiples of the size.

PTX void cp_async16(void* shared, const void* global, bool valid PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_u32(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  simt::cp_async(shared, global, 16, valid ? 16 : 0, at);
#endif
}

// The first `valid` bytes, followed by zeros.
PTX void cp_async16_zeros(void* shared, const void* global, int valid PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_u32(shared)), "l"(global), "r"(valid)
               : "memory");
#else
  simt::cp_async(shared, global, 16, static_cast<unsigned>(valid), at);
#endif
}

PTX void cp_async8(void* shared, const void* global, bool valid PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(smem_u32(shared)), "l"(global), "r"(valid ? 8 : 0)
               : "memory");
#else
  simt::cp_async(shared, global, 8, valid ? 8 : 0, at);
#endif
}

PTX void cp_async4(void* shared, const void* global, bool valid PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_u32(shared)), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
#else
  simt::cp_async(shared, global, 4, valid ? 4 : 0, at);
#endif
}

PTX void cp_async_commit(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simt::cp_async_commit(at);
#endif
}

// Waits until at most the N most recently committed groups are pending.
template <int N>
PTX void cp_async_wait(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  simt::cp_async_wait(N, at);
#endif
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements from shared memory into mma fragments ----------------------------------------
// Lane i gives the address of row i % 8 of matrix i / 8, a multiple of 16.

PTX void ldmatrix_x4(uint32_t (&r)[4], const void* row PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(row))
               : "memory");
#else
  simt::ldmatrix(r, 4, false, row, at);
#endif
}

PTX void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(row))
               : "memory");
#else
  simt::ldmatrix(r, 4, true, row, at);
#endif
}

PTX void ldmatrix_x2(uint32_t (&r)[2], const void* row PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_u32(row))
               : "memory");
#else
  simt::ldmatrix(r, 2, false, row, at);
#endif
}

PTX void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_u32(row))
               : "memory");
#else
  simt::ldmatrix(r, 2, true, row, at);
#endif
}

// ---- mma: d += a · b, a row-major, b column-major, d in float32 -----------------------------------------------------------

PTX void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  simt::mma(d, a, b, simt::Element::kBf16, at);
#endif
}

PTX void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  simt::mma(d, a, b, simt::Element::kF16, at);
#endif
}

// Depth 8. The low 13 bits of the operands are ignored: round with cvt_tf32 first.
PTX void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  simt::mma(d, a, b, simt::Element::kTf32, at);
#endif
}

// Rounds to the nearest tf32, ties away from zero.
PTX uint32_t cvt_tf32(float x) {
#if defined(__CUDACC__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
#endif
}

// ---- two numbers of 16 bits: a · b + c in each half, rounded once; subnormal numbers stay --------------------------------------

PTX uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return simt::fma_halves(a, b, c, simt::Element::kBf16);
#endif
}

PTX uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDACC__)
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return simt::fma_halves(a, b, c, simt::Element::kF16);
#endif
}

// ---- flags in global memory -------------------------------------------------------------------------------------------------
// If an acquire load reads a value that another thread released, everything before that release is visible after the load. The
// scope of both must include both threads: the block (cta), the device (gpu), all devices and the host (sys). Poll only with
// these: a plain load may be hoisted out of its loop, and the model runs other threads only here.

#if defined(__CUDACC__)
#define PTX_LOAD(name, instruction, scope, acquires)                          \
  PTX uint32_t name(const uint32_t* p) {                                      \
    uint32_t value;                                                           \
    asm volatile(instruction " %0, [%1];" : "=r"(value) : "l"(p) : "memory"); \
    return value;                                                             \
  }
#define PTX_STORE(name, instruction, scope, releases) \
  PTX void name(uint32_t* p, uint32_t value) { asm volatile(instruction " [%0], %1;" ::"l"(p), "r"(value) : "memory"); }
#define PTX_ADD(name, instruction, scope, acquires, releases)                               \
  PTX uint32_t name(uint32_t* p, uint32_t value) {                                          \
    uint32_t old;                                                                           \
    asm volatile(instruction " %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(value) : "memory"); \
    return old;                                                                             \
  }
#else
#define PTX_LOAD(name, instruction, scope, acquires)               \
  PTX uint32_t name(const uint32_t* p, PTX_AT) {                   \
    simt::poll(at);                                                \
    return simt::atomic_load(p, acquires, simt::Scope::scope, at); \
  }
#define PTX_STORE(name, instruction, scope, releases) \
  PTX void name(uint32_t* p, uint32_t value, PTX_AT) { simt::atomic_store(p, value, releases, simt::Scope::scope, at); }
#define PTX_ADD(name, instruction, scope, acquires, releases)                                        \
  PTX uint32_t name(uint32_t* p, uint32_t value, PTX_AT) {                                           \
    return simt::atomic_update(                                                                      \
        p, [=](uint32_t old) { return old + value; }, {acquires, releases}, simt::Scope::scope, at); \
  }
#endif

PTX_LOAD(ld_acquire_cta, "ld.acquire.cta.global.u32", kBlock, true)
PTX_LOAD(ld_acquire_gpu, "ld.acquire.gpu.global.u32", kDevice, true)
PTX_LOAD(ld_acquire_sys, "ld.acquire.sys.global.u32", kSystem, true)
PTX_LOAD(ld_relaxed_gpu, "ld.relaxed.gpu.global.u32", kDevice, false)
PTX_LOAD(ld_relaxed_sys, "ld.relaxed.sys.global.u32", kSystem, false)
PTX_STORE(st_release_cta, "st.release.cta.global.u32", kBlock, true)
PTX_STORE(st_release_gpu, "st.release.gpu.global.u32", kDevice, true)
PTX_STORE(st_release_sys, "st.release.sys.global.u32", kSystem, true)
PTX_STORE(st_relaxed_gpu, "st.relaxed.gpu.global.u32", kDevice, false)
PTX_STORE(st_relaxed_sys, "st.relaxed.sys.global.u32", kSystem, false)
// These return the value before the addition.
PTX_ADD(atom_add_relaxed_gpu, "atom.relaxed.gpu.global.add.u32", kDevice, false, false)
PTX_ADD(atom_add_release_gpu, "atom.release.gpu.global.add.u32", kDevice, false, true)
PTX_ADD(atom_add_acq_rel_gpu, "atom.acq_rel.gpu.global.add.u32", kDevice, true, true)
PTX_ADD(atom_add_acq_rel_sys, "atom.acq_rel.sys.global.add.u32", kSystem, true, true)

#undef PTX_LOAD
#undef PTX_STORE
#undef PTX_ADD

// ---- barriers among some of a block's warps -----------------------------------------------------------------------------------
// Barrier 0 is __syncthreads'. `num_threads` counts the waiting threads and those that only arrive, in whole warps.

PTX void bar_sync(int id, int num_threads PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#else
  simt::barrier_sync(static_cast<unsigned>(id), static_cast<unsigned>(num_threads), at);
#endif
}

PTX void bar_arrive(int id, int num_threads PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
#else
  simt::barrier_arrive(static_cast<unsigned>(id), static_cast<unsigned>(num_threads), at);
#endif
}

}  // namespace switchgear::cuda::ptx
