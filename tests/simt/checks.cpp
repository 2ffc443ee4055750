// SPDX-License-Identifier: BSD-3-Clause
#include "checks.h"

#include "scheduler.h"

namespace simt {

void check_thread_exit(const Fiber& fiber) {
  const auto refuse = [&](const char* what) { throw Error(describe(fiber) + " exits " + what); };
  bool copies_left = false;
  for (const auto& copy : fiber.open_copies) copies_left |= !copy->awaited;
  for (const Copies& group : fiber.copy_groups) {
    for (const auto& copy : group) copies_left |= !copy->awaited;
  }
  if (copies_left) refuse("with cp.async that nobody waited for");
  bool stores_left = !fiber.open_stores.empty();
  for (const StoreGroup& group : fiber.store_groups) stores_left |= !group.stores.empty();
  if (stores_left) refuse("with bulk stores whose source nobody waited for");
  if (fiber.block->grid->dependent && !fiber.waited_for_kernel_before) {
    refuse("without griddepcontrol.wait: the kernel after this one could start before the one before it has ended");
  }
  if (fiber.arrived_at_cluster) refuse("between barrier.cluster.arrive and barrier.cluster.wait");
  const Warp& warp = fiber.block->warps[fiber.warp];
  if (!warp.open_products.empty() || !warp.product_groups.empty()) refuse("with wgmma that nobody waited for");
}

void check_barriers_after_exit(const Fiber& fiber) {
  const Barrier& barrier = fiber.block->barriers[0];
  if (barrier.arrived > 0 && barrier.whole_block) {
    throw Error(describe(fiber) + " exits while others wait in __syncthreads at " + describe(barrier.first_at));
  }
}

void check_block_exit(const Block& block) {
  for (const auto& [address, barrier] : block.mbarriers) {
    if (barrier.copies_in_flight == 0) continue;
    throw Error(describe(block.fibers[0]) +
                ": the block ends while another of its cluster copies to its shared memory");
  }
  for (size_t group = 0; group < block.warpgroup_products.size(); ++group) {
    for (size_t warp = 4 * group; warp < 4 * group + 4 && warp < block.warps.size(); ++warp) {
      if (block.warps[warp].num_products != block.warpgroup_products[group].size()) {
        throw Error(describe(block.fibers[32 * warp]) + ": its warp issued fewer wgmma than others of its warpgroup");
      }
    }
  }
  for (size_t id = 1; id < block.barriers.size(); ++id) {
    if (block.barriers[id].arrived > 0) {
      throw Error(describe(block.fibers[0]) + ": the block ends with arrivals left in barrier " + std::to_string(id) +
                  ", the first at " + describe(block.barriers[id].first_at));
    }
  }
}

}  // namespace simt
