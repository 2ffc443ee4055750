// SPDX-License-Identifier: BSD-3-Clause
// Conformance of a ring of stages over many phases, as in the GEMM: a producer warpgroup and two consumers, each with an m64 block.
// A stage has A [128 rows, 64 depths] and B [64 columns, 64 depths]. B comes by TMA; A by TMA or, in every other stage or always,
// by cp.async from rows that are gathered.
#pragma once
#include <utility>

#include "conformance_case.cuh"
#include "conformance_wgmma.cuh"
#include "tensor_map.h"

namespace switchgear::cuda::conformance {

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

inline void add_rings(std::vector<Case>& cases) {
  for (const auto& [name, rows] :
       {std::pair{"TMA", RowsBy::kTma}, {"cp.async", RowsBy::kCopies}, {"turns", RowsBy::kTurns}}) {
    for (const int stages : {1, 3, 37}) {
      cases.push_back(
          {std::string("ring by ") + name + ", " + std::to_string(stages) + " stages",
           [=, by = rows](uint32_t* in, uint32_t* out) {
             launch(small_factors_kernel, dim3(1), dim3(256), 0, nullptr, in, kIn);
             const RingParams params{
                 make_tensor_map(
                     {in, switchgear::DType::kBFloat16, {kRingColumns, 455, 1}, {kRingColumns, kRingColumns}, 128}),
                 make_tensor_map(
                     {in, switchgear::DType::kBFloat16, {kRingColumns, 455, 1}, {kRingColumns, kRingColumns}, 64}),
                 in,
                 out,
                 stages,
                 by};
             launch(ring_kernel, dim3(1), dim3(kRingThreads), kRingBytes, nullptr, params);
           }});
    }
  }
}

}  // namespace switchgear::cuda::conformance
