// SPDX-License-Identifier: BSD-3-Clause
// Kernels of conformance for what a grouped GEMM of sm_90 relies on beyond single instructions: boxes of its own tensor maps, all
// K-steps of a stage, both m64 blocks, shared memory past 48 KB, a ring of stages over many phases, and the order of sums.
#pragma once
#include "conformance_data.cuh"
#include "hopper.cuh"

namespace switchgear::cuda::conformance {

constexpr int kBlockBytes = 8192;  // 64 rows of 128 bytes: what the 128B swizzle repeats in

// Loads one box of a map of tensor_map.h, and writes it to out.
__global__ void box_kernel(const __grid_constant__ CUtensorMap map, uint32_t* out, int bytes, int x, int y, int z) {
  SHARED_DYN(uint64_t, shared);
  uint32_t* const tile = reinterpret_cast<uint32_t*>(shared) + 256;
  fill_shared(tile, bytes / 4, [](uint32_t i) { return ~mix(i); });
  if (thread() == 0) {
    ptx::mbar_init(shared, 1);
    ptx::fence_barrier_init();
    ptx::fence_proxy_async();
  }
  __syncthreads();
  if (thread() == 0) {
    ptx::mbar_expect_tx(shared, static_cast<uint32_t>(bytes));
    ptx::tma_load_3d(tile, &map, shared, x, y, z);
  }
  ptx::mbar_wait(shared, 0);
  for (int i = thread(); i < bytes / 4; i += static_cast<int>(blockDim.x)) out[i] = tile[i];
}

// The second m64 block of A [128 rows, 64 depths] times B [N,64], all four K-steps, from byte `at` of shared memory on.
template <typename T, int N, bool kTransposeA, bool kTransposeB>
__global__ void far_kernel(uint32_t* out, int at) {
  SHARED_DYN(unsigned char, shared);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr int kABytes = 2 * kBlockBytes, kBBytes = (N + 63) / 64 * kBlockBytes;
  fill_shared(reinterpret_cast<uint32_t*>(shared + at), (kABytes + kBBytes) / 4,
              [](uint32_t i) { return small_pair(i, kBf16); });
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t start = ptx::smem_u32(shared + at);
  const auto operand = [](uint32_t from, bool along, int step) {
    return along ? ptx::descriptor(from + 16 * 128 * step, kBlockBytes, 1024, ptx::Swizzle::k128B)
                 : ptx::desc_k128(from + 32 * step);
  };
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = as_float(small_float(thread() * 256 + i));
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    ptx::wgmma<T, N, kTransposeA, kTransposeB>(d, operand(start + kBlockBytes, kTransposeA, step),
                                               operand(start + kABytes, kTransposeB, step), 1);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_registers(d);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out[thread() * (N / 2) + i] = as_bits(d[i]);
}

// ---- a ring ---------------------------------------------------------------------------------------------------------------
// A producer warpgroup and two consumers, each with an m64 block, as in the GEMM. A stage has A [128 rows, 64 depths] and B [64
// columns, 64 depths]. B comes by TMA; A by TMA or, in every other stage or always, by cp.async from rows that are gathered.

constexpr int kRingStages = 4, kRingThreads = 384, kRingA = 2 * kBlockBytes, kRingStage = 3 * kBlockBytes;
constexpr int kRingBytes = kRingStages * kRingStage + 256;
constexpr int kRingColumns = 72;  // of the matrix of A and B in `in`, in elements; 144 bytes

enum class RowsBy : int { kTma, kCopies, kTurns };

// Makes pseudo-random words pairs of small factors.
__global__ void small_factors_kernel(uint32_t* words, int count) {
  for (int i = thread(); i < count; i += static_cast<int>(blockDim.x)) words[i] = small_pair(words[i], true);
}

struct RingParams {
  CUtensorMap a, b;  // boxes of 128 and 64 rows
  const uint32_t* in;
  uint32_t* out;
  int num_stages;  // in total: many phases of the ring
  RowsBy rows;
};

__device__ inline bool by_tma(RowsBy rows, int stage) {
  return rows == RowsBy::kTma || (rows == RowsBy::kTurns && stage % 2 == 0);
}
// Where a stage starts in the matrix.
__device__ inline int ring_row(int stage) { return stage * 5 % 64; }

__device__ inline void ring_produce(const RingParams& p, unsigned char* ring, uint64_t* full, uint64_t* empty) {
  for (int stage = 0; stage < p.num_stages; ++stage) {
    const int slot = stage % kRingStages, row = ring_row(stage);
    unsigned char* const a = ring + slot * kRingStage;
    const bool tma = by_tma(p.rows, stage);
    if (stage >= kRingStages) ptx::mbar_wait(empty + slot, (stage / kRingStages - 1) % 2);
    if (thread() == 0) {
      ptx::mbar_expect_tx(full + slot, static_cast<uint32_t>(tma ? kRingStage : kBlockBytes));
      if (tma) ptx::tma_load_3d(a, &p.a, full + slot, 0, row, 0);
      ptx::tma_load_3d(a + kRingA, &p.b, full + slot, 0, row + 100, 0);
    }
    if (!tma) {  // a thread copies a row of 128 bytes
      const auto* const from = reinterpret_cast<const unsigned char*>(p.in) + (row + thread()) * kRingColumns * 2;
      for (int chunk = 0; chunk < 8; ++chunk) {
        ptx::cp_async16(a + thread() * 128 + (chunk ^ thread() % 8) * 16, from + chunk * 16, true);
      }
    }
    ptx::cp_async_mbar_arrive(full + slot);
  }
  // The producer leaves while its last copies are under way.
}

__device__ inline void ring_consume(const RingParams& p, unsigned char* ring, uint64_t* full, uint64_t* empty) {
  const int consumer = thread() / 128 - 1;
  float d[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) d[i] = 0.0f;
  for (int stage = 0; stage < p.num_stages; ++stage) {
    const int slot = stage % kRingStages;
    const uint32_t start = ptx::smem_u32(ring + slot * kRingStage);
    ptx::mbar_wait(full + slot, stage / kRingStages % 2);
    ptx::fence_proxy_async();  // cp.async wrote through the generic proxy
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ptx::wgmma<__nv_bfloat16, 64>(d, ptx::desc_k128(start + consumer * kBlockBytes + 32 * step),
                                    ptx::desc_k128(start + kRingA + 32 * step), 1);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the stage before has been read
    if (stage > 0) ptx::mbar_arrive(empty + (stage - 1) % kRingStages);
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_registers(d);
#pragma unroll
  for (int i = 0; i < 32; ++i) p.out[(thread() - 128) * 32 + i] = as_bits(d[i]);
}

__global__ void __launch_bounds__(kRingThreads, 1) ring_kernel(const __grid_constant__ RingParams p) {
  SHARED_DYN(unsigned char, ring);
  uint64_t* const full = reinterpret_cast<uint64_t*>(ring + kRingStages * kRingStage);
  uint64_t* const empty = full + kRingStages;
  if (thread() == 0) {
    for (int slot = 0; slot < kRingStages; ++slot) {
      ptx::mbar_init(full + slot,
                     1 + 128);  // expect_tx arrives once, and each producer thread when its copies are done
      ptx::mbar_init(empty + slot, 256);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (thread() < 128) {
    ptx::setmaxnreg_dec<40>();
    ring_produce(p, ring, full, empty);
  } else {
    ptx::setmaxnreg_inc<232>();
    ring_consume(p, ring, full, empty);
  }
}

// ---- the order of sums ----------------------------------------------------------------------------------------------------

// bfloat16 of any sign and mantissa, with exponents of 2^-6 to 2^6, so that sums are rounded.
__host__ __device__ constexpr uint32_t any_half(uint32_t seed) {
  const uint32_t bits = mix(seed);
  return (bits & 0x8000u) | ((121 + (bits >> 16) % 13) << 7) | (bits & 0x7fu);
}

constexpr int kOrderWords = 16 * 16;

// The product of the first 16 of 64 rows with the first 16 of N columns, in instructions of N columns; kSwapped: of the columns
// as rows and the rows as columns. All of them give the same sums, so the same bits if an instruction adds in one order.
template <int N, bool kSwapped>
__global__ void order_kernel(uint32_t* out) {
  SHARED_DYN(uint32_t, tiles);
  constexpr int kTiles = 4;  // of 64 rows: rows, then up to 192 columns
  fill_shared(tiles, kTiles * kBlockBytes / 4, [](uint32_t i) { return any_half(2 * i) | any_half(2 * i + 1) << 16; });
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t rows = ptx::smem_u32(tiles), columns = rows + kBlockBytes;
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    ptx::wgmma<__nv_bfloat16, N>(d, ptx::desc_k128((kSwapped ? columns : rows) + 32 * step),
                                 ptx::desc_k128((kSwapped ? rows : columns) + 32 * step), 1);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_registers(d);
  if (thread() >= 32) return;  // rows 0 to 15 are in the first warp
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = thread() / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread() % 4 * 2 + i % 2;
    out[kSwapped ? column * 16 + row : row * 16 + column] = as_bits(d[i]);
  }
}

}  // namespace switchgear::cuda::conformance
