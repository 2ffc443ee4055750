// SPDX-License-Identifier: BSD-3-Clause
// Clusters: two blocks each load half of a tile for both, and their mistakes.
#include "hopper.cuh"
#include "planted.h"
#include "tensor_maps.h"

using namespace switchgear::cuda;

namespace {

constexpr int kStages = 2, kSteps = 5, kHalfRows = 8, kHalfBytes = kHalfRows * 128;

enum class Mistake {
  kNone,
  kNoFirstBarrier,
  kNoLastBarrier,
  kNoReleaseOfOther,
  kWaitOfOwnBlock,
  kOwnBlockOnly,
  kSameHalf,
  kFewBytes,
  kArriveTwice,
  kStoreWithoutArrival,
};

// Warp 0: the producer. Warp 1: sums the tile. One block also tells the other its sum.
__global__ void __launch_bounds__(64)
    halves_kernel(const __grid_constant__ CUtensorMap map, uint32_t* out, Mistake mistake) {
  SHARED_DYN(unsigned char, memory);
  uint64_t* const full = reinterpret_cast<uint64_t*>(memory + 2 * kStages * kHalfBytes);
  uint64_t *const empty = full + kStages, *const told = empty + kStages, *const value = told + 1;
  const unsigned rank = ptx::cluster_rank(), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbar_init(full + stage, 1);
      ptx::mbar_init(empty + stage, 2);
    }
    ptx::mbar_init(told, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (mistake == Mistake::kArriveTwice) ptx::cluster_arrive();
  if (mistake != Mistake::kNoFirstBarrier) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  if (threadIdx.x == 0) {
    for (int step = 0; step < kSteps; ++step) {
      const int stage = step % kStages;
      const uint32_t parity = (step / kStages + 1) % 2;
      ptx::mbar_wait(empty + stage, parity);
      ptx::mbar_expect_tx(full + stage, (mistake == Mistake::kFewBytes ? 1 : 2) * kHalfBytes);
      const int half = mistake == Mistake::kSameHalf ? 0 : static_cast<int>(rank);
      const auto blocks = static_cast<uint16_t>(mistake == Mistake::kOwnBlockOnly ? 1u << rank : 3u);
      ptx::tma_load_3d_multicast(memory + (2 * stage + half) * kHalfBytes, &map, full + stage, 0,
                                 (2 * step + half) * kHalfRows, 0, blocks);
    }
  } else if (threadIdx.x >= 32) {
    uint32_t sum = 0;
    for (int step = 0; step < kSteps; ++step) {
      const int stage = step % kStages;
      ptx::mbar_wait(full + stage, step / kStages % 2);
      const auto* const tile = reinterpret_cast<const uint16_t*>(memory + 2 * stage * kHalfBytes);
      for (unsigned i = lane; i < kHalfBytes; i += 32) sum += tile[i];
      __syncwarp();
      if (lane != 0) continue;
      ptx::mbar_arrive(empty + stage);
      if (mistake != Mistake::kNoReleaseOfOther) ptx::mbar_arrive_remote(empty + stage, rank ^ 1);
    }
    if (lane == 0 && rank == 0) {
      ptx::st_cluster(value, 1, sum);
      if (mistake != Mistake::kStoreWithoutArrival) ptx::mbar_arrive_cluster(told, 1);
    }
    if (rank == 1) {
      if (mistake == Mistake::kWaitOfOwnBlock) {
        ptx::mbar_wait(told, 0);
      } else if (mistake != Mistake::kStoreWithoutArrival) {
        ptx::mbar_wait_cluster(told, 0);
      }
      if (lane == 0) out[64] = static_cast<uint32_t>(*value);
    }
    out[32 * rank + lane] = sum;
  }
  if (mistake != Mistake::kNoLastBarrier) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

void run_halves(Mistake mistake) {
  constexpr int kRows = 2 * kSteps * kHalfRows;
  std::vector<uint16_t> x(kRows * 64);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i % 251);
  std::vector<uint32_t> out(65);
  CUtensorMap map;
  simt::planted::expect(simt::encode_map(&map, x.data(), {64, kRows, 1}, {128, 128 * kRows}, {64, kHalfRows, 1},
                                         CU_TENSOR_MAP_SWIZZLE_NONE) == CUDA_SUCCESS,
                        "the tensor map");
  const size_t bytes = 2 * kStages * kHalfBytes + (2 * kStages + 2) * 8;
  launch_clusters(2, halves_kernel, dim3(2), dim3(64), bytes, nullptr, map, out.data(), mistake);
  for (size_t lane = 0; lane < 32; ++lane) {
    uint32_t sum = 0;
    for (size_t i = lane; i < x.size(); i += 32) sum += x[i];
    simt::planted::expect(out[lane] == sum && out[32 + lane] == sum, "the sums");
  }
  simt::planted::expect(out[64] == out[0], "the sum that was told");
}

#define HALVES(name, mistake, seen) \
  PLANT(name, seen) { run_halves(planted ? Mistake::mistake : Mistake::kNone); }
HALVES(cluster_uses_a_block_that_may_not_have_started, kNoFirstBarrier, kByRace)
HALVES(cluster_uses_a_block_that_has_ended, kNoLastBarrier, kByRace)
HALVES(cluster_stage_not_released_in_the_other_block, kNoReleaseOfOther, kByBoth)
HALVES(cluster_wait_acquires_from_the_own_block_only, kWaitOfOwnBlock, kByRace)
HALVES(cluster_multicast_to_the_own_block, kOwnBlockOnly, kByBoth)
HALVES(cluster_both_blocks_load_the_same_half, kSameHalf, kByBoth)
HALVES(cluster_too_few_expected_bytes, kFewBytes, kByBoth)
HALVES(cluster_barrier_arrival_twice, kArriveTwice, kByBoth)
HALVES(cluster_store_without_arrival, kStoreWithoutArrival, kByRace)

}  // namespace
