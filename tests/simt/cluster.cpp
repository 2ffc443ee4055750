// SPDX-License-Identifier: BSD-3-Clause
// Clusters: the barrier of their threads, and stores to the shared memory of another block.
#include "cluster.h"

#include <cstring>

#include "models.h"
#include "shared_memory.h"
#include "touch.h"

namespace simt {

Block& block_of_cluster(unsigned rank, Location at) {
  const Cluster& cluster = *running_block().cluster;
  if (rank >= cluster.blocks.size()) {
    fail("block " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster.blocks.size()), at);
  }
  Block* const block = cluster.blocks[rank];
  if (block == nullptr)
    fail("the shared memory of block " + std::to_string(rank) + " of the cluster, which has ended", at);
  return *block;
}

char* shared_in(const Block& target, const void* shared, Location at) {
  const Block& own = running_block();
  const uint32_t address = shared_address(own, shared, at);
  for (const SharedArray& array : own.shared) {
    if (address < array.address || address >= array.address + array.size) continue;
    for (const SharedArray& other : target.shared) {
      if (other.key == array.key) return other.memory + (address - array.address);
    }
  }
  fail("the other block of the cluster has no array at this shared address yet", at);
}

void note_use(Block& target) {
  const Fiber& fiber = running_fiber();
  if (!race::enabled || &target == fiber.block) return;
  const race::Moment& now = fiber.actor.now;
  target.used_by_others[{now.block, now.slot}] = now;
}

void check_uses(const Block& block) {
  if (block.used_by_others.empty()) return;
  race::Clock seen;
  for (const Fiber& fiber : block.fibers) seen.join(fiber.actor.view.seen);
  for (const auto& [thread, moment] : block.used_by_others) {
    if (!seen.covers(moment)) {
      throw Error(describe(block.fibers[0]) + ": the block may end before another of its cluster has used its memory");
    }
  }
}

void advance_cluster(Cluster& cluster) {
  unsigned live = 0;
  for (const Block* block : cluster.blocks) live += block == nullptr ? 0 : block->live;
  if (cluster.arrived == 0 || cluster.arrived < live) return;
  cluster.arrived = 0;
  ++cluster.phase;
  cluster.completed = std::move(cluster.arriving);
  cluster.arriving.clear();
  for (Fiber* fiber : cluster.waiting) wake(*fiber);
  cluster.waiting.clear();
}

// ---- what kernels call --------------------------------------------------------------------------------------------------

unsigned cluster_rank() { return running_block().cluster_rank; }

void cluster_arrive(Location at) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  Cluster& cluster = *fiber.block->cluster;
  if (fiber.arrived_at_cluster) fail("barrier.cluster.arrive twice without barrier.cluster.wait between", at);
  if (race::enabled) race::release(fiber.actor, cluster.arriving);
  fiber.arrived_at_cluster = true;
  fiber.cluster_phase = cluster.phase;
  ++cluster.arrived;
  advance_cluster(cluster);
  maybe_interrupt();
}

void cluster_wait(Location at) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  Cluster& cluster = *fiber.block->cluster;
  if (!fiber.arrived_at_cluster) fail("barrier.cluster.wait without barrier.cluster.arrive before", at);
  while (cluster.phase == fiber.cluster_phase) {
    cluster.waiting.push_back(&fiber);
    wait("barrier.cluster.wait", at);
  }
  fiber.arrived_at_cluster = false;
  if (race::enabled) race::acquire(fiber.actor, cluster.completed);
}

void store_cluster(uint64_t* shared, unsigned rank, uint64_t value, Location at) {
  const RuntimeScope scope;
  if (reinterpret_cast<uintptr_t>(shared) % 8 != 0) fail("st.shared::cluster: misaligned address", at);
  Block& target = block_of_cluster(rank, at);
  char* const to = shared_in(target, shared, at);
  note_use(target);
  check_accessible(to, 8, "st.shared::cluster", at);
  touch(to, 8, {.write = true, .space = Space::kShared}, at);
  std::memcpy(to, &value, 8);
}

}  // namespace simt
