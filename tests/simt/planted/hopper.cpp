// SPDX-License-Identifier: BSD-3-Clause
// mbarriers, TMA and wgmma: a product of two matrices by one producer warp and one consumer warpgroup, and its mistakes.
#include "hopper.cuh"
#include "planted.h"
#include "tensor_maps.h"

using namespace switchgear::cuda;

namespace {

using Bf16 = __nv_bfloat16;
constexpr int kTile = 64, kTileBytes = kTile * kTile * 2, kStages = 2, kSteps = 5;

// 168 registers a thread: one warpgroup returns some, two take more.
__global__ void __launch_bounds__(384) registers_kernel(bool planted) {
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<40>();
  } else if (planted) {
    ptx::setmaxnreg_inc<240>();
  } else {
    ptx::setmaxnreg_inc<232>();
  }
}
PLANT(more_registers_than_a_multiprocessor_has, kByBoth) { launch(registers_kernel, 1, 384, 0, nullptr, planted); }

enum class Mistake {
  kNone,
  kNoEmptyWait,
  kFewBytes,
  kEarlyRelease,
  kWrongPhase,
  kNoWgmmaFence,
  kNoInitFence,
  kDoubleInit,
  kUnalignedTile,
  kReadEarly,
  kTooManyArrivals,
  kOverwritten,
  kExitEarly,
};

__global__ void __launch_bounds__(160)
    multiply_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, float* out,
                    Mistake mistake) {
  SHARED_DYN(unsigned char, memory);
  unsigned char* const tiles = memory + (mistake == Mistake::kUnalignedTile ? 128 : 0);
  uint64_t* const full = reinterpret_cast<uint64_t*>(memory + 2 * kStages * kTileBytes + 1024);
  uint64_t* const empty = full + kStages;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbar_init(full + stage, 1);
      ptx::mbar_init(empty + stage, mistake == Mistake::kTooManyArrivals ? 129 : 128);
    }
    if (mistake == Mistake::kDoubleInit) ptx::mbar_init(full, 1);
    if (mistake != Mistake::kNoInitFence) ptx::fence_barrier_init();
    if (mistake == Mistake::kOverwritten) *full = 0;
  }
  __syncthreads();
  if (warp == 4) {
    if (lane != 0) return;
    for (int step = 0; step < kSteps; ++step) {
      const int stage = step % kStages;
      if (mistake != Mistake::kNoEmptyWait) ptx::mbar_wait(empty + stage, (step / kStages + 1) % 2);
      ptx::mbar_expect_tx(full + stage, (mistake == Mistake::kFewBytes ? 1 : 2) * kTileBytes);
      unsigned char* const tile = tiles + 2 * stage * kTileBytes;
      ptx::tma_load_2d(tile, &a_map, full + stage, step * kTile, 0);
      ptx::tma_load_2d(tile + kTileBytes, &b_map, full + stage, step * kTile, 0);
    }
    return;
  }
  float d[kTile / 2];
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages;
    ptx::mbar_wait(full + stage, (step / kStages + (mistake == Mistake::kWrongPhase)) % 2);
    const uint32_t a = ptx::smem_u32(tiles + 2 * stage * kTileBytes), b = a + kTileBytes;
    if (mistake != Mistake::kNoWgmmaFence) ptx::wgmma_fence();
    for (int k = 0; k < kTile / 16; ++k) {
      ptx::wgmma<Bf16, kTile>(d, ptx::desc_k128(a + 32 * k), ptx::desc_k128(b + 32 * k), step + k > 0);
    }
    ptx::wgmma_commit();
    if (mistake == Mistake::kExitEarly && step == kSteps - 1) return;
    if (mistake != Mistake::kEarlyRelease && mistake != Mistake::kReadEarly) ptx::wgmma_wait<0>();
    ptx::mbar_arrive(empty + stage);
    if (mistake == Mistake::kReadEarly && step < kSteps - 1) ptx::wgmma_wait<0>();
  }
  if (mistake == Mistake::kEarlyRelease) ptx::wgmma_wait<0>();
  for (int i = 0; i < kTile / 2; ++i) {
    out[(16 * warp + lane / 4 + i / 2 % 2 * 8) * kTile + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
  ptx::wgmma_wait<0>();
}

void run_multiply(Mistake mistake) {
  constexpr int kDepth = kSteps * kTile;
  std::vector<Bf16> a(kTile * kDepth), b(kTile * kDepth);
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = __float2bfloat16(static_cast<float>(i % 7) - 3.0f);
    b[i] = __float2bfloat16(static_cast<float>(i % 5) - 2.0f);
  }
  std::vector<float> out(kTile * kTile);
  const auto map_of = [&](const std::vector<Bf16>& matrix) {
    return simt::matrix_map(matrix.data(), kTile, kDepth, kTile, kTile, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  launch(multiply_kernel, 1, 160, 2 * kStages * kTileBytes + 1024 + 64, nullptr, map_of(a), map_of(b), out.data(),
         mistake);
  for (int row = 0; row < kTile; ++row) {
    for (int column = 0; column < kTile; ++column) {
      float sum = 0.0f;  // of small integers: exact in any order
      for (int k = 0; k < kDepth; ++k) {
        sum += __bfloat162float(a[row * kDepth + k]) * __bfloat162float(b[column * kDepth + k]);
      }
      simt::planted::expect(out[row * kTile + column] == sum, "the product");
    }
  }
}

#define MULTIPLY(name, mistake, seen) \
  PLANT(name, seen) { run_multiply(planted ? Mistake::mistake : Mistake::kNone); }
MULTIPLY(producer_skips_the_empty_wait, kNoEmptyWait, kByBoth)
MULTIPLY(too_few_expected_bytes, kFewBytes, kByBoth)
MULTIPLY(stage_released_before_wgmma_is_done, kEarlyRelease, kByRace)
MULTIPLY(wrong_phase, kWrongPhase, kByRace)
MULTIPLY(missing_wgmma_fence, kNoWgmmaFence, kByBoth)
MULTIPLY(mbarrier_init_without_fence, kNoInitFence, kByBoth)
MULTIPLY(double_init_of_mbarrier, kDoubleInit, kByBoth)
MULTIPLY(unaligned_swizzled_tile, kUnalignedTile, kByBoth)
MULTIPLY(accumulators_read_before_the_wait, kReadEarly, kByBoth)
MULTIPLY(mbarrier_expects_an_arrival_too_many, kTooManyArrivals, kByBoth)
MULTIPLY(mbarrier_overwritten, kOverwritten, kByBoth)
MULTIPLY(exit_with_wgmma_pending, kExitEarly, kByBoth)

// ---- tiles written by ordinary stores -------------------------------------------------------------------------------------

enum class StoreMistake { kNone, kNoFence, kNoBarrier, kReusedEarly, kExitEarly };

__global__ void store_kernel(const __grid_constant__ CUtensorMap map, StoreMistake mistake) {
  SHARED_DYN(uint16_t, tile);
  for (int round = 0; round < 2; ++round) {
    for (unsigned i = threadIdx.x; i < 64 * 64; i += 128) tile[i] = static_cast<uint16_t>(i + round);
    if (mistake != StoreMistake::kNoFence) ptx::fence_proxy_async();
    if (mistake != StoreMistake::kNoBarrier) __syncthreads();
    if (threadIdx.x == 0) {
      ptx::tma_store_2d(&map, tile, 0, 64 * round);
      ptx::tma_store_commit();
      if (mistake != StoreMistake::kReusedEarly && !(mistake == StoreMistake::kExitEarly && round == 1)) {
        ptx::tma_store_wait_read<0>();
      }
    }
    __syncthreads();
  }
  if (mistake == StoreMistake::kReusedEarly && threadIdx.x == 0) ptx::tma_store_wait<0>();
}
void run_store(StoreMistake mistake) {
  std::vector<uint16_t> out(128 * 64);
  launch(store_kernel, 1, 128, 64 * 64 * 2, nullptr,
         simt::matrix_map(out.data(), 128, 64, 64, 64, CU_TENSOR_MAP_SWIZZLE_NONE), mistake);
}
#define STORE(name, mistake, seen) \
  PLANT(name, seen) { run_store(planted ? StoreMistake::mistake : StoreMistake::kNone); }
STORE(missing_proxy_fence, kNoFence, kByRace)
STORE(tma_store_without_barrier, kNoBarrier, kByRace)
STORE(tile_reused_before_it_is_stored, kReusedEarly, kByRace)
STORE(exit_with_tma_store_pending, kExitEarly, kByBoth)

// cp.async lands in the generic proxy, so wgmma's reads need the fence after the wait.
__global__ void gathered_kernel(const Bf16* x, float* out, bool planted) {
  SHARED_DYN(unsigned char, tile);
  for (unsigned i = threadIdx.x; i < 64 * 8; i += 128) {
    const unsigned row = i / 8, chunk = i % 8;
    ptx::cp_async16(tile + row * 128 + (chunk ^ row % 8) * 16, x + row * 64 + chunk * 8, true);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (!planted) ptx::fence_proxy_async();
  __syncthreads();
  float d[32];
  const uint32_t start = ptx::smem_u32(tile);
  ptx::wgmma_fence();
  ptx::wgmma<Bf16, 64>(d, ptx::desc_k128(start), ptx::desc_k128(start), 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = d[0];
}
PLANT(missing_proxy_fence_after_cp_async, kByRace) {
  std::vector<Bf16> x(64 * 64, __float2bfloat16(1.0f));
  std::vector<float> out(128);
  launch(gathered_kernel, 1, 128, 64 * 128, nullptr, x.data(), out.data(), planted);
}

}  // namespace
