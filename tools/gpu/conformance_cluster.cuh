// SPDX-License-Identifier: BSD-3-Clause
// Conformance of clusters: blocks that write to and wait for each other, and boxes that reach several.
#pragma once
#include "conformance_case.cuh"
#include "hopper.cuh"
#include "tensor_map.h"

namespace switchgear::cuda::conformance {

constexpr int kBoxBytes = 1024;  // 8 rows of 128 bytes

__device__ inline void cluster_barrier() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// Each block writes its rank, twice, to the next block of the cluster: once behind an arrival that releases the store, once behind
// the barrier of the cluster and an arrival that does not.
__global__ void cluster_ring_kernel(uint32_t* out, unsigned size) {
  SHARED_VALUE(uint64_t, first);
  SHARED_VALUE(uint64_t, second);
  SHARED_VALUE(uint64_t, released);
  SHARED_VALUE(uint64_t, counted);
  const unsigned rank = ptx::cluster_rank(), next = (rank + 1) % size;
  if (thread() == 0) {
    first = second = 0;
    ptx::mbar_init(&released, 1);
    ptx::mbar_init(&counted, 1);
    ptx::fence_barrier_init();
  }
  cluster_barrier();
  if (thread() == 0) {
    ptx::st_cluster(&first, next, 100 + rank);
    ptx::mbar_arrive_cluster(&released, next);
    ptx::mbar_wait_cluster(&released, 0);
    out[4 * blockIdx.x] = static_cast<uint32_t>(first);
    ptx::st_cluster(&second, next, 200 + rank);
    ptx::mbar_arrive_remote(&counted, next);
    ptx::mbar_wait(&counted, 0);
  }
  cluster_barrier();
  if (thread() == 0) {
    out[4 * blockIdx.x + 1] = static_cast<uint32_t>(second);
    out[4 * blockIdx.x + 2] = rank;
    out[4 * blockIdx.x + 3] = size;
  }
}

// The first block loads a box for the blocks of the mask.
__global__ void multicast_kernel(const __grid_constant__ CUtensorMap map, uint32_t* out, unsigned blocks) {
  SHARED_DYN(uint64_t, shared);
  uint32_t* const tile = reinterpret_cast<uint32_t*>(shared) + 256;
  fill_shared(tile, kBoxBytes / 4, [](uint32_t i) { return ~mix(i); });
  ptx::fence_proxy_async();
  const unsigned rank = ptx::cluster_rank();
  const bool receives = blocks >> rank & 1;
  if (thread() == 0) {
    ptx::mbar_init(shared, 1);
    ptx::fence_barrier_init();
    if (receives) ptx::mbar_expect_tx(shared, kBoxBytes);
  }
  cluster_barrier();
  if (thread() == 0 && rank == 0) {
    ptx::tma_load_3d_multicast(tile, &map, shared, 0, 100, 1, static_cast<uint16_t>(blocks));
  }
  if (receives) ptx::mbar_wait(shared, 0);
  for (int i = thread(); i < kBoxBytes / 4; i += static_cast<int>(blockDim.x)) {
    out[kBoxBytes / 4 * blockIdx.x + i] = tile[i];
  }
  cluster_barrier();
}

inline void add_clusters(std::vector<Case>& cases) {
  for (const int size : {2, 4}) {
    cases.push_back({"a ring of " + std::to_string(size) + " blocks", [=](uint32_t*, uint32_t* out) {
                       launch_clusters(size, cluster_ring_kernel, dim3(8), dim3(32), 0, nullptr, out,
                                       static_cast<unsigned>(size));
                     }});
  }
  for (const unsigned blocks : {0b11u, 0b10u, 0b01u}) {
    cases.push_back(
        {"a box for the blocks " + std::to_string(blocks), [=](uint32_t* in, uint32_t* out) {
           const CUtensorMap map = make_tensor_map({in, switchgear::DType::kBFloat16, {72, 220, 2}, {72, 72 * 220}, 8});
           launch_clusters(2, multicast_kernel, dim3(4), dim3(32), size_t{4} << 10, nullptr, map, out, blocks);
         }});
  }
}

}  // namespace switchgear::cuda::conformance
