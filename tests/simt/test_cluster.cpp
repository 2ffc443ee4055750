// SPDX-License-Identifier: BSD-3-Clause
// The models of clusters: ranks, their barrier, stores and arrivals in another block, multicast. planted/cluster.cpp has their
// misuses.
#include <vector>

#include "api.h"
#include "expect.h"
#include "hopper.cuh"
#include "launch.h"
#include "tensor_maps.h"

using namespace switchgear::cuda;

namespace {

// Every block stores its rank and number in the next block of its cluster.
__global__ void ring_kernel(uint32_t* ranks, uint64_t* got, unsigned size) {
  SHARED_VALUE(uint64_t, value);
  SHARED_VALUE(uint64_t, bar);
  const unsigned rank = ptx::cluster_rank();
  value = 0;
  if (threadIdx.x == 0) {
    ptx::mbar_init(&bar, 1);
    ptx::fence_barrier_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x == 0) {
    ptx::st_cluster(&value, (rank + 1) % size, 100 * blockIdx.x + rank);
    ptx::mbar_arrive_cluster(&bar, (rank + 1) % size);
    ptx::mbar_wait_cluster(&bar, 0);
    ranks[blockIdx.x] = rank;
    got[blockIdx.x] = value;
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
}
TEST(blocks_of_a_cluster_reach_each_other) {
  for (const unsigned size : {1u, 2u, 4u}) {
    std::vector<uint32_t> ranks(12);
    std::vector<uint64_t> got(12);
    launch_clusters(static_cast<int>(size), ring_kernel, dim3(12), dim3(1), 0, nullptr, ranks.data(), got.data(), size);
    for (unsigned block = 0; block < 12; ++block) {
      const unsigned first = block / size * size, from = first + (block - first + size - 1) % size;
      CHECK(ranks[block] == block - first, "block ", block);
      CHECK(got[block] == 100 * from + (from - first), "block ", block);
    }
  }
}

// One block loads for all. The bytes come from memory once.
__global__ void broadcast_kernel(const __grid_constant__ CUtensorMap map, uint16_t* out, uint16_t blocks) {
  SHARED_DYN(unsigned char, memory);
  uint64_t* const bar = reinterpret_cast<uint64_t*>(memory + 1024);
  const unsigned rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbar_init(bar, 1);
    ptx::fence_barrier_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  const bool receives = blocks >> rank & 1;
  if (threadIdx.x == 0 && receives) ptx::mbar_expect_tx(bar, 1024);
  if (threadIdx.x == 0 && rank == 0) ptx::tma_load_3d_multicast(memory, &map, bar, 0, 0, 0, blocks);
  if (receives) {
    ptx::mbar_wait(bar, 0);
    for (unsigned i = threadIdx.x; i < 512; i += 32) out[512 * blockIdx.x + i] = reinterpret_cast<uint16_t*>(memory)[i];
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
}
TEST(multicast_reads_once_and_writes_to_the_blocks_of_the_mask) {
  std::vector<uint16_t> x(512);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i + 1);
  CUtensorMap map;
  CHECK(simt::encode_map(&map, x.data(), {64, 8, 1}, {128, 1024}, {64, 8, 1}, CU_TENSOR_MAP_SWIZZLE_NONE) ==
        CUDA_SUCCESS);
  for (const unsigned blocks : {0b1111u, 0b1010u, 0b0001u}) {
    std::vector<uint16_t> out(4 * 512);
    const uint64_t before = simt::tma_bytes();
    launch_clusters(4, broadcast_kernel, dim3(4), dim3(32), 1024 + 8, nullptr, map, out.data(),
                    static_cast<uint16_t>(blocks));
    CHECK(simt::tma_bytes() - before == 1024);
    for (size_t i = 0; i < out.size(); ++i) {
      CHECK(out[i] == (blocks >> i / 512 & 1 ? x[i % 512] : 0), "mask ", blocks, " element ", i);
    }
  }
}

__global__ void nothing_kernel() {}
__global__ void beyond_kernel() {
  SHARED_VALUE(uint64_t, value);
  value = 0;
  ptx::st_cluster(&value, 2, 1);
}
TEST(clusters_that_a_device_refuses) {
  CHECK_FAILS("InvalidClusterSize", launch_clusters(2, nothing_kernel, dim3(3), dim3(1), 0, nullptr));
  CHECK_FAILS("InvalidClusterSize", launch_clusters(16, nothing_kernel, dim3(16), dim3(1), 0, nullptr));
  CHECK_FAILS("block 2 of a cluster of 2", launch_clusters(2, beyond_kernel, dim3(2), dim3(1), 0, nullptr));
  simt::device() = simt::sm_80();
  CHECK_FAILS("InvalidClusterSize", launch_clusters(2, nothing_kernel, dim3(2), dim3(1), 0, nullptr));
  simt::device() = simt::sm_90();
}

}  // namespace
