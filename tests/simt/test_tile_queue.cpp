// SPDX-License-Identifier: BSD-3-Clause
// tile_queue.cuh: every tile is taken once, in ascending order, by whichever block runs.
#include "tile_queue.cuh"

#include <numeric>
#include <vector>

#include "check.h"
#include "launch.h"
#include "runtime.h"

using namespace switchgear::cuda;
using namespace switchgear::cuda::sm90;

namespace {

constexpr int kStagesOf = 3;  // of tile t: t % 3

// 128 producers and two consumers of a warp each, in ping-pong. owner[t]: the cluster that took tile t, plus 1, once per block.
template <int kCluster>
__global__ void queue_kernel(TileCounter* counter, int32_t num_tiles, bool all, int32_t* owner, int32_t* errors) {
  SHARED_ARRAY(uint64_t, memory, kQueueBytes / 8);
  const TileQueue<kCluster> queue(memory);
  if (threadIdx.x == 0) queue.init(all ? 5 : 2);
  __syncthreads();
  sync_cluster<kCluster>();
  if (threadIdx.x < 128) {
    const auto stages = [](int32_t tile) { return tile % kStagesOf; };
    const auto fill = [](int32_t, uint32_t) {};
    if (all || threadIdx.x == 0) produce_tiles(TileSource<kCluster>{counter}, queue, num_tiles, all, stages, fill);
    return sync_cluster<kCluster>();
  }
  const auto cluster = static_cast<int32_t>(blockIdx.x) / kCluster,
             clusters = static_cast<int32_t>(gridDim.x) / kCluster;
  int32_t last = -1;
  for (uint32_t n = threadIdx.x / 32 - 4;; n += 2) {
    const QueuedTile queued = queue.wait(n);
    if (queued.tile >= num_tiles) break;
    queue.release(n, true);
    if (threadIdx.x % 32 != 0) continue;
    if (queued.tile <= last) atomicAdd(errors, 1);
    if (counter == nullptr) {  // the stages of tiles c, c + number of clusters, … before
      uint32_t before = 0;
      for (int32_t t = cluster; t < queued.tile; t += clusters) {
        before += static_cast<uint32_t>(t % kStagesOf);
      }
      if (before != queued.position) atomicAdd(errors, 1);
    }
    last = queued.tile;
    atomicAdd(owner + queued.tile, cluster + 1);
  }
  sync_cluster<kCluster>();
}

template <int kCluster>
std::vector<int32_t> owners(TileCounter* counter, int clusters, int num_tiles, bool all) {
  std::vector<int32_t> owner(static_cast<size_t>(num_tiles));
  int32_t errors = 0;
  launch_clusters(kCluster, queue_kernel<kCluster>, dim3(static_cast<unsigned>(clusters * kCluster)), dim3(192), 0,
                  nullptr, counter, num_tiles, all, owner.data(), &errors);
  CHECK(errors == 0, "tiles out of order, or at other stages");
  for (int32_t& sum : owner) {
    CHECK(sum % kCluster == 0, "a tile not taken by all blocks of a cluster");
    sum /= kCluster;
  }
  return owner;
}

template <int kCluster>
void check_owners() {
  for (const bool all : {false, true}) {
    for (const int num_tiles : {0, 1, 2, 5, 23}) {
      for (const int clusters : {1, 3}) {
        const std::vector<int32_t> fixed = owners<kCluster>(nullptr, clusters, num_tiles, all);
        for (int t = 0; t < num_tiles; ++t) CHECK(fixed[static_cast<size_t>(t)] == t % clusters + 1, "tile ", t);
        TileCounter counter{};
        for (int launches = 0; launches < 2; ++launches) {
          for (const int32_t owner : owners<kCluster>(&counter, clusters, num_tiles, all)) {
            CHECK(owner >= 1 && owner <= clusters);
          }
          CHECK(counter.taken == 0 && counter.done == 0, "the counter is not reset");
        }
      }
    }
  }
}

TEST(tile_queue_hands_out_every_tile_once) { check_owners<1>(); }
TEST(tile_queue_of_clusters_hands_out_every_tile_once) { check_owners<2>(); }

// A block that cannot start before the others end leaves nothing undone: the first block takes all.
TEST(tile_queue_leaves_no_tile_to_a_block_that_does_not_run) {
  const int before = simt::options().resident_blocks;
  simt::options().resident_blocks = 1;
  TileCounter counter{};
  const std::vector<int32_t> owner = owners<1>(&counter, 3, 17, true);
  simt::options().resident_blocks = before;
  for (const int32_t block : owner) CHECK(block == owner[0], "block ", block);
}

}  // namespace
