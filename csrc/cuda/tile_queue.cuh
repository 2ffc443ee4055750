// SPDX-License-Identifier: BSD-3-Clause
// The order in which a persistent block of gemm_sm90.cuh takes tiles, and the queue that tells its warps.
//
// Blocks take tiles in ascending order by incrementing a counter in device memory. So no tile depends on the grid:
// blocks that start late, or never because another kernel holds their multiprocessors, leave their tiles to the others. The
// producer's thread 0 prefetches the number of the next tile, which hides the round trip to L2, and stores it in a queue of four
// entries in shared memory. An entry also has the position of the tile's first stage in the ring, since only the producer has
// counted the stages of all tiles before. A cluster takes one tile for all of its blocks: the first block increments, and stores the
// entry in the shared memory of all.
//
// The queue ends with two entries past the last tile: consumers in ping-pong read every other entry.
#pragma once
#include "gemm.h"
#include "hopper.cuh"
#include "platform.cuh"

namespace switchgear::cuda::sm90 {

template <int kCluster>
__device__ inline unsigned rank_in_cluster() {
  if constexpr (kCluster > 1) return ptx::cluster_rank();
  return 0;
}

// A barrier of all threads of the cluster.
template <int kCluster>
__device__ inline void sync_cluster() {
  if constexpr (kCluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

template <int kCluster>
struct TileSource {
  TileCounter* counter;  // null: cluster c takes tiles c, c + number of clusters, …

  // The n-th tile of this cluster.
  __device__ int32_t take(uint32_t n) const {
    if (counter != nullptr) return atomicAdd(&counter->taken, 1);
    return static_cast<int32_t>((blockIdx.x + n * gridDim.x) / kCluster);
  }
  // The last cluster that ends resets the counter for the next kernel. Its own take, and by the fence those of all others,
  // come before.
  __device__ void finish() const {
    if (counter == nullptr) return;
    __threadfence();
    if (atomicAdd(&counter->done, 1) != static_cast<int32_t>(gridDim.x) / kCluster - 1) return;
    __threadfence();
    atomicExch(&counter->taken, 0);
    atomicExch(&counter->done, 0);
  }
};

struct QueuedTile {
  int32_t tile;
  uint32_t position;  // of its first stage
};

constexpr uint32_t kQueueEntries = 4;
constexpr int kQueueBytes = kQueueEntries * 3 * sizeof(uint64_t);

template <int kCluster>
struct TileQueue {
  uint64_t* full;
  uint64_t* empty;    // that of block 0 counts the readers of all blocks
  uint64_t* entries;  // position, then tile

  __device__ explicit TileQueue(uint64_t* memory)
      : full(memory), empty(memory + kQueueEntries), entries(memory + 2 * kQueueEntries) {}

  // Per entry, the number of warps that read it in a block.
  __device__ void init(int reading_warps) const {
    for (uint32_t i = 0; i < kQueueEntries; ++i) {
      ptx::mbar_init(full + i, 1);
      ptx::mbar_init(empty + i, kCluster * reading_warps);
    }
  }
  // Called by one thread of block 0.
  __device__ void push(uint32_t n, QueuedTile tile) const {
    const uint32_t i = n % kQueueEntries;
    ptx::mbar_wait(empty + i, (n / kQueueEntries & 1) ^ 1);
    const uint64_t entry = static_cast<uint64_t>(tile.position) << 32 | static_cast<uint32_t>(tile.tile);
    entries[i] = entry;
    ptx::mbar_arrive(full + i);
#pragma unroll
    for (unsigned rank = 1; rank < kCluster; ++rank) {
      ptx::st_cluster(entries + i, rank, entry);
      ptx::mbar_arrive_cluster(full + i, rank);
    }
  }
  // A reader waits for an entry, and releases it.
  __device__ QueuedTile wait(uint32_t n) const {
    const uint32_t i = n % kQueueEntries, parity = n / kQueueEntries & 1;
    if constexpr (kCluster > 1) {
      ptx::mbar_wait_cluster(full + i, parity);
    } else {
      ptx::mbar_wait(full + i, parity);
    }
    const uint64_t entry = entries[i];
    return {static_cast<int32_t>(static_cast<uint32_t>(entry)), static_cast<uint32_t>(entry >> 32)};
  }
  // Called once by each lane of every reading warp, or by thread 0 alone if that is all that reads of its warp.
  __device__ void release(uint32_t n, bool whole_warp) const {
    if (whole_warp) __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    if constexpr (kCluster > 1) {
      ptx::mbar_arrive_remote(empty + n % kQueueEntries, 0);
    } else {
      ptx::mbar_arrive(empty + n % kQueueEntries);
    }
  }
};

// The producer's loop over tiles. `fill(tile, position)` loads the stages of a tile; `stages_of(tile)` is their number, the
// same in all blocks of the cluster. Called by all threads, or without `all` by thread 0 alone. The next tile's number is
// prefetched before this one is loaded: the ring is full meanwhile. Nothing is kept in registers, of which producers have few.
template <int kCluster, typename StagesOf, typename Fill>
__device__ inline void produce_tiles(const TileSource<kCluster>& source, const TileQueue<kCluster>& queue,
                                     int32_t num_tiles, bool all, const StagesOf& stages_of, const Fill& fill) {
  const auto leads = [] { return ptx::opaque(static_cast<int>(threadIdx.x)) == 0 && rank_in_cluster<kCluster>() == 0; };
  if (leads()) queue.push(0, {source.take(0), 0});
  uint32_t n = 0;
  for (;; ++n) {
    const QueuedTile queued = queue.wait(n);
    queue.release(n, all);
    if (queued.tile >= num_tiles) break;
    if (leads())
      queue.push(n + 1, {source.take(n + 1), queued.position + static_cast<uint32_t>(stages_of(queued.tile))});
    fill(queued.tile, queued.position);
  }
  if (threadIdx.x == 0) ptx::start_kernel_after();
  if (!leads()) return;
  queue.push(n + 1, {num_tiles, 0});
  source.finish();
}

}  // namespace switchgear::cuda::sm90
