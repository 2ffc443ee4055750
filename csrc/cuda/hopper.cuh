// SPDX-License-Identifier: BSD-3-Clause
// PTX of sm_90a, one instruction per function as in ptx.cuh: mbarriers, TMA, wgmma. Kernels that call these are compiled for
// sm_90a only.
#pragma once
#include <cuda.h>  // CUtensorMap

#include <type_traits>

#include "ptx.cuh"
#include "wgmma_widths.h"

namespace switchgear::cuda::ptx {

// ---- mbarrier: a phase ends after the expected arrivals and the expected bytes ---------------------------------------------

PTX void mbar_init(uint64_t* bar, int arrivals PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(bar)), "r"(arrivals) : "memory");
#else
  simt::mbarrier_init(bar, static_cast<unsigned>(arrivals), at);
#endif
}

// Required before the barrier's memory is reused.
PTX void mbar_inval(uint64_t* bar PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(smem_u32(bar)) : "memory");
#else
  simt::mbarrier_invalidate(bar, at);
#endif
}

PTX void mbar_arrive(uint64_t* bar PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_u32(bar)) : "memory");
#else
  simt::mbarrier_arrive(bar, 0, at);
#endif
}

// Adds `bytes` to those expected in this phase, then arrives.
PTX void mbar_expect_tx(uint64_t* bar, uint32_t bytes PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(bar)), "r"(bytes) : "memory");
#else
  simt::mbarrier_arrive(bar, bytes, at);
#endif
}

// Arrives once all cp.async issued by this thread have landed. Counts as one of the expected arrivals. The generic proxy
// writes the data: before wgmma reads it, a thread needs fence_proxy_async after the wait.
PTX void cp_async_mbar_arrive(uint64_t* bar PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_u32(bar)) : "memory");
#else
  simt::cp_async_arrive(bar, at);
#endif
}

// Whether the phase of this parity has ended. On a new barrier phase 0 is running, and the phase of parity 1 counts as ended.
PTX bool mbar_test_wait(uint64_t* bar, uint32_t parity PTX_AND_AT) {
#if defined(__CUDACC__)
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(ended)
      : "r"(smem_u32(bar)), "r"(parity)
      : "memory");
  return ended != 0;
#else
  return simt::mbarrier_test(bar, parity, at);
#endif
}

PTX void mbar_wait(uint64_t* bar, uint32_t parity PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;\n"
      "}" ::"r"(smem_u32(bar)),
      "r"(parity)
      : "memory");
#else
  simt::mbarrier_wait(bar, parity, false, at);
#endif
}

// The same, and what other blocks of the cluster did before their arrivals is visible.
PTX void mbar_wait_cluster(uint64_t* bar, uint32_t parity PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again;\n"
      "}" ::"r"(smem_u32(bar)),
      "r"(parity)
      : "memory");
#else
  simt::mbarrier_wait(bar, parity, true, at);
#endif
}

// Makes this thread's mbar_init visible to asynchronous copies. Other threads need a block barrier after it.
PTX void fence_barrier_init() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  simt::mbarrier_init_fence();
#endif
}

// Orders ordinary accesses to shared memory with those of TMA or wgmma to the same memory.
PTX void fence_proxy_async() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  simt::proxy_fence(simt::Space::kShared);
#endif
}

// The same for global memory that the running kernel itself wrote.
PTX void fence_proxy_async_global() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.global;" ::: "memory");
#else
  simt::proxy_fence(simt::Space::kGlobal);
#endif
}

// ---- the special function unit --------------------------------------------------------------------------------------------

// Within a unit in the last place; of subnormal numbers infinity.
PTX float reciprocal(float x) {
#if defined(__CUDACC__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// ---- dependent launches: a kernel starts before the one before it in its stream has ended (launch.h) -----------------------

// Waits until the kernels before have ended and what they wrote is visible. Before, a thread uses no global memory. All threads
// call it: a kernel that ended without would let the one after it start before the one before it has ended.
PTX void wait_for_kernel_before(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("griddepcontrol.wait;" ::: "memory");
#else
  simt::wait_for_kernel_before(at);
#endif
}

// Blocks of the kernel after this one may start where there is room, once a thread of every block of this one has called it or
// the block has ended. They see what this kernel writes only after their wait.
PTX void start_kernel_after() {
#if defined(__CUDACC__)
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- clusters: blocks that use each other's shared memory ------------------------------------------------------------------
// No block may end while another one still uses its shared memory, nor be used before it has started: a barrier at both ends.

PTX unsigned cluster_rank() {
#if defined(__CUDACC__)
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return simt::cluster_rank();
#endif
}

// The barrier of all threads of a cluster, in two steps. Accesses before the first come before those after the second.
PTX void cluster_arrive(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#else
  simt::cluster_arrive(at);
#endif
}

PTX void cluster_wait(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  simt::cluster_wait(at);
#endif
}

// Arrives at the barrier at this address in the block of that rank. Orders what this thread waited for (wgmma) or read before
// what the other block does after mbar_wait, such as copies to the same memory; not its stores, which need the form below, a
// fence of the whole device. CUTLASS's rings rely on the same.
PTX void mbar_arrive_remote(uint64_t* bar, unsigned rank PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(smem_u32(bar)),
      "r"(rank)
      : "memory");
#else
  simt::mbarrier_arrive_cluster(bar, rank, false, at);
#endif
}

// The same, and this thread's stores are visible after mbar_wait_cluster.
PTX void mbar_arrive_cluster(uint64_t* bar, unsigned rank PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(smem_u32(bar)),
      "r"(rank)
      : "memory");
#else
  simt::mbarrier_arrive_cluster(bar, rank, true, at);
#endif
}

// Stores to this address in the block of that rank.
PTX void st_cluster(uint64_t* shared, unsigned rank, uint64_t value PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "st.shared::cluster.b64 [there], %2;\n"
      "}" ::"r"(smem_u32(shared)),
      "r"(rank), "l"(value)
      : "memory");
#else
  simt::store_cluster(shared, rank, value, at);
#endif
}

// ---- TMA: boxes of a tensor, described by its map; one thread issues -------------------------------------------------------
// The tile in shared memory starts at a multiple of 128 bytes; a swizzled one at a multiple of its pattern, 1024 bytes for
// 128B. Elements outside the tensor are read as zeros, count as bytes, and are not written.

PTX void tma_load_2d(void* shared, const CUtensorMap* map, uint64_t* bar, int x, int y PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(smem_u32(shared)),
      "l"(map), "r"(smem_u32(bar)), "r"(x), "r"(y)
      : "memory");
#else
  const int coordinates[] = {x, y};
  simt::tma_load(shared, map, bar, coordinates, 2, at);
#endif
}

PTX void tma_load_3d(void* shared, const CUtensorMap* map, uint64_t* bar, int x, int y, int z PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(smem_u32(shared)),
      "l"(map), "r"(smem_u32(bar)), "r"(x), "r"(y), "r"(z)
      : "memory");
#else
  const int coordinates[] = {x, y, z};
  simt::tma_load(shared, map, bar, coordinates, 3, at);
#endif
}

// The same box to the same address in all blocks of the cluster whose bit of `blocks` is set. The bytes count at the barrier at
// the address of `bar` in each of them.
PTX void tma_load_3d_multicast(void* shared, const CUtensorMap* map, uint64_t* bar, int x, int y, int z,
                               uint16_t blocks PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, "
      "%4, %5}], [%2], %6;" ::"r"(smem_u32(shared)),
      "l"(map), "r"(smem_u32(bar)), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
#else
  const int coordinates[] = {x, y, z};
  simt::tma_load_multicast(shared, map, bar, coordinates, 3, blocks, at);
#endif
}

// Copies `bytes` contiguous bytes without a map. `bytes` and both addresses are multiples of 16.
PTX void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* bar PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem_u32(shared)),
      "l"(global), "r"(bytes), "r"(smem_u32(bar))
      : "memory");
#else
  simt::bulk_load(shared, global, bytes, bar, at);
#endif
}

// Stores form groups: commit, then wait before the tile is overwritten (wait_read) or the result is used (wait).
PTX void tma_store_2d(const CUtensorMap* map, const void* shared, int x, int y PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(smem_u32(shared)), "r"(x), "r"(y)
               : "memory");
#else
  const int coordinates[] = {x, y};
  simt::tma_store(map, shared, coordinates, 2, at);
#endif
}

PTX void tma_store_3d(const CUtensorMap* map, const void* shared, int x, int y, int z PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(smem_u32(shared)), "r"(x), "r"(y), "r"(z)
               : "memory");
#else
  const int coordinates[] = {x, y, z};
  simt::tma_store(map, shared, coordinates, 3, at);
#endif
}

PTX void tma_store_commit(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
  simt::bulk_commit(at);
#endif
}

template <int N>
PTX void tma_store_wait_read(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
#else
  simt::bulk_wait(N, true, at);
#endif
}

template <int N>
PTX void tma_store_wait(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
#else
  simt::bulk_wait(N, false, at);
#endif
}

PTX void prefetch_tensor_map([[maybe_unused]] const CUtensorMap* map) {
#if defined(__CUDACC__)
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// ---- tensor maps in device memory: written by a thread, then read by TMA through a proxy of its own ---------------------------
// The writer replaces fields of a map, a copy of an encoded one, and releases; a thread of another kernel, or after other
// synchronisation, acquires the map and may then use it.

PTX void tensor_map_replace_address(void* map, const void* address PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("tensormap.replace.tile.global_address.global.b1024.b64 [%0], %1;" ::"l"(map), "l"(address) : "memory");
#else
  simt::replace_map_address(map, address, at);
#endif
}

// The number of elements in dimension kDimension, 0 for the contiguous one; at least 1.
template <int kDimension>
PTX void tensor_map_replace_size(void* map, uint32_t size PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("tensormap.replace.tile.global_dim.global.b1024.b32 [%0], %1, %2;" ::"l"(map), "n"(kDimension), "r"(size)
               : "memory");
#else
  simt::replace_map_size(map, kDimension, size, at);
#endif
}

// What this thread wrote to maps is visible to TMA after another thread's acquire.
PTX void fence_tensor_map_release(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.tensormap::generic.release.gpu;" ::: "memory");
#else
  simt::release_maps(at);
#endif
}

PTX void fence_tensor_map_acquire(const CUtensorMap* map PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
#else
  simt::acquire_map(map, at);
#endif
}

// ---- wgmma: d += a · b by a warpgroup, d [64, N] in registers, depth 16 --------------------------------------------------------
// Accumulator i of a thread: row 16 (warp % 4) + lane / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (lane % 4) + i % 2.

// Layout of a tile of 16-bit elements in shared memory: its start, two strides in bytes, and the swizzle. With rows of 128
// bytes (64 elements) and the 128B swizzle, 8 rows form an atom of 1024 bytes:
//   K-major    rows run along K; `stride`: from 8 rows of M or N to the next 8; `leading` is unused. The next 16 depths
//              start 32 bytes later.
//   MN-major   rows run along M or N; `stride`: from 8 depths to the next 8; `leading`: from 64 of M or N to the next 64
enum class Swizzle : uint64_t { kNone = 0, k128B = 1, k64B = 2, k32B = 3 };

PTX uint64_t descriptor(uint32_t start, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(start) | field(leading) << 16 | field(stride) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// A K-major tile of consecutive rows of 128 bytes.
PTX uint64_t desc_k128(uint32_t start) { return descriptor(start, 16, 1024, Swizzle::k128B); }

// Required before the first wgmma, and before the next one after registers of an operand or accumulator were accessed.
PTX void wgmma_fence(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  simt::wgmma_fence(at);
#endif
}

PTX void wgmma_commit(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  simt::wgmma_commit(at);
#endif
}

template <int N>
PTX void wgmma_wait(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  simt::wgmma_wait(N, at);
#endif
}

// Call it after the wait. To the compiler the accumulators are results of wgmma itself; this keeps it from moving their uses
// before the wait.
template <int N>
PTX void wgmma_registers([[maybe_unused]] float (&d)[N]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

#if defined(__CUDACC__)
// The instruction text for one width and type: `a` in shared memory, then `a` in registers. The accumulators come first.
#define WGMMA_SHARED(n, type, o0, o1, o2, o3, o4, ...)                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " o2                                              \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" WGMMA_TEXT_##n \
               "}, " o0 ", " o1 ", p, 1, 1, " o3 ", " o4 ";\n}"                                    \
               : WGMMA_REGISTERS_##n                                                               \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB));
#define WGMMA_REGISTER(n, type, o0, o1, o2, o3, o4, o5, o6, ...)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " o5                                              \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" WGMMA_TEXT_##n \
               "}, {" o0 ", " o1 ", " o2 ", " o3 "}, " o4 ", p, 1, 1, " o6 ";\n}"                  \
               : WGMMA_REGISTERS_##n                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposeB));
#define WGMMA_SHARED_WIDTH(n, ...)                     \
  if constexpr (N == n && std::is_same_v<T, __half>) { \
    WGMMA_SHARED(n, "f16", __VA_ARGS__)                \
  } else if constexpr (N == n) {                       \
    WGMMA_SHARED(n, "bf16", __VA_ARGS__)               \
  }
#define WGMMA_REGISTER_WIDTH(n, ...)                   \
  if constexpr (N == n && std::is_same_v<T, __half>) { \
    WGMMA_REGISTER(n, "f16", __VA_ARGS__)              \
  } else if constexpr (N == n) {                       \
    WGMMA_REGISTER(n, "bf16", __VA_ARGS__)             \
  }
#else
template <typename T>
constexpr simt::Element element_of = std::is_same_v<T, __half> ? simt::Element::kF16 : simt::Element::kBf16;
#endif

#define WGMMA_IS(n, ...) || N == n
template <int N>
constexpr bool kIsWgmmaWidth = false WGMMA_WIDTHS(WGMMA_IS);
#undef WGMMA_IS

// T: __nv_bfloat16 or __half; N: of wgmma_widths.h; transposed: the operand is MN-major. accumulate = 0 ignores the
// old value of d. d and the tiles must not be touched until the product has been waited for.
template <typename T, int N, bool kTransposeA = false, bool kTransposeB = false>
PTX void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate PTX_AND_AT) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  static_assert(kIsWgmmaWidth<N>);
#if defined(__CUDACC__)
  WGMMA_WIDTHS(WGMMA_SHARED_WIDTH)
#else
  simt::wgmma(d, nullptr, a, b, accumulate != 0, {N, element_of<T>, kTransposeA, kTransposeB}, at);
#endif
}

// The same with `a` in registers, each warp's 16 rows as an mma fragment. They too must not change until the product is done.
template <typename T, int N, bool kTransposeB = false>
PTX void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate PTX_AND_AT) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  static_assert(kIsWgmmaWidth<N>);
#if defined(__CUDACC__)
  WGMMA_WIDTHS(WGMMA_REGISTER_WIDTH)
#else
  simt::wgmma(d, a, 0, b, accumulate != 0, {N, element_of<T>, false, kTransposeB}, at);
#endif
}

#if defined(__CUDACC__)
#undef WGMMA_SHARED
#undef WGMMA_REGISTER
#undef WGMMA_SHARED_WIDTH
#undef WGMMA_REGISTER_WIDTH
#endif

// ---- the rest ---------------------------------------------------------------------------------------------------------------

// Stores four 8x8 matrices from fragments: the inverse of ldmatrix_x4.
PTX void stmatrix_x4(void* row, const uint32_t (&r)[4] PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_u32(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  simt::stmatrix(r, 4, false, row, at);
#endif
}

PTX void stmatrix_x4_trans(void* row, const uint32_t (&r)[4] PTX_AND_AT) {
#if defined(__CUDACC__)
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_u32(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  simt::stmatrix(r, 4, true, row, at);
#endif
}

// True in one lane of a whole warp, chosen by the hardware.
PTX bool elect_one(PTX_AT) {
#if defined(__CUDACC__)
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
#else
  return simt::elect(at);
#endif
}

// Returns `value`, hidden from the optimiser. So it cannot duplicate a loop for every case of a switch inside.
PTX int opaque(int value) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// to = from, at exactly this place in the order of instructions.
PTX void move(float& to, float from) {
#if defined(__CUDACC__)
  asm volatile("mov.f32 %0, %1;" : "=f"(to) : "f"(from));
#else
  to = from;
#endif
}

// Sets the number of registers per thread from here on, for a whole warpgroup: fewer for producers, more for consumers.
template <int N>
PTX void setmaxnreg_dec(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#else
  simt::set_max_registers(N, at);
#endif
}

template <int N>
PTX void setmaxnreg_inc(PTX_AT) {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#else
  simt::set_max_registers(N, at);
#endif
}

}  // namespace switchgear::cuda::ptx
