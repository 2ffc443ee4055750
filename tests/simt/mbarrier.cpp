// SPDX-License-Identifier: BSD-3-Clause
// mbarrier: a phase ends after all expected arrivals, when no bytes are outstanding; then the next one begins.
// The state is kept outside shared memory. The barrier's eight bytes hold a mark, which shows if something overwrites them.
#include "mbarrier.h"

#include <cstring>

#include "cluster.h"
#include "models.h"
#include "shared_memory.h"
#include "touch.h"

namespace simt {
namespace {

constexpr unsigned kMaxCount = (1u << 20) - 1;

uint64_t mark(uint32_t address) { return 0x6d626172'00000000u | address; }

uint32_t address_of(const Block& block, uint64_t* mbarrier, Location at) {
  if (reinterpret_cast<uintptr_t>(mbarrier) % 8 != 0) fail("mbarrier: expected an address that is a multiple of 8", at);
  const uint32_t address = shared_address(block, mbarrier, at);
  shared_pointer(block, address, 8, at);
  return address;
}

void touch_mbarrier(uint64_t* mbarrier, bool initialises, Location at) {
  const Scope scope = running_block().grid->cluster > 1 ? Scope::kDevice : Scope::kBlock;
  touch(mbarrier, 8, {.write = true, .atomic = !initialises, .scope = scope, .space = Space::kShared}, at);
}

// Ends the phase if it is complete.
void advance(Block& block, uint32_t address, Location at) {
  Mbarrier& barrier = block.mbarriers.at(address);
  if (barrier.pending > 0 || barrier.transactions != 0) return;
  if (barrier.copies_in_flight > 0) {
    fail("mbarrier: the phase ends with " + std::to_string(barrier.copies_in_flight) +
             " copies in flight: fewer bytes were expected than they bring",
         at);
  }
  barrier.completed[barrier.phase % 2] = std::move(barrier.arriving);
  barrier.arriving.clear();
  barrier.completed_from_others[barrier.phase % 2] = std::move(barrier.arriving_from_others);
  barrier.arriving_from_others.clear();
  barrier.pending = barrier.expected;
  ++barrier.phase;
  for (Fiber* fiber : barrier.waiting) wake(*fiber);
  barrier.waiting.clear();
}

}  // namespace

uint32_t checked_mbarrier(uint64_t* mbarrier, Location at) { return checked_mbarrier(running_block(), mbarrier, at); }

uint32_t checked_mbarrier(const Block& block, uint64_t* mbarrier, Location at) {
  const uint32_t address = address_of(block, mbarrier, at);
  if (block.mbarriers.count(address) == 0) fail("mbarrier: not initialised", at);
  uint64_t stored;
  std::memcpy(&stored, mbarrier, 8);
  if (stored != mark(address)) fail("mbarrier: something was stored over it", at);
  touch_mbarrier(mbarrier, false, at);
  return address;
}

void arrive_at(Block& block, uint32_t address, int64_t bytes, Location at) {
  Mbarrier& barrier = block.mbarriers.at(address);
  if (barrier.pending == 0) fail("mbarrier: more arrivals than it expects in a phase", at);
  barrier.transactions += bytes;
  --barrier.pending;
  advance(block, address, at);
}

race::Agent start_tracked_copy(Block& block, uint32_t address, Location at) {
  Mbarrier& barrier = block.mbarriers.at(address);
  if (!barrier.visible_to_copies) {
    fail("mbarrier: initialised without fence.mbarrier_init or fence.proxy.async before a copy uses it", at);
  }
  ensure_slot(block, barrier.copies, "copy tracked by the mbarrier at shared address " + std::to_string(address));
  ++barrier.copies_in_flight;
  ++barrier.copies.time;
  return barrier.copies;
}

void complete_tracked_copy(Block& block, uint32_t address, uint32_t time, int64_t bytes, Location at) {
  Mbarrier& barrier = block.mbarriers.at(address);
  --barrier.copies_in_flight;
  barrier.transactions -= bytes;
  if (race::enabled) barrier.arriving.seen.set({block.race_block, barrier.copies.slot, time});
  advance(block, address, at);
}

// ---- what kernels call --------------------------------------------------------------------------------------------------

void mbarrier_init(uint64_t* mbarrier, unsigned count, Location at) {
  const RuntimeScope scope;
  Block& block = running_block();
  const uint32_t address = address_of(block, mbarrier, at);
  if (count == 0 || count > kMaxCount) fail("mbarrier: expected a count of 1 to 2^20 - 1", at);
  if (block.mbarriers.count(address) != 0) fail("mbarrier: initialised twice without mbarrier.inval", at);
  touch_mbarrier(mbarrier, true, at);
  Mbarrier& barrier = block.mbarriers[address];
  barrier.expected = barrier.pending = count;
  barrier.initialised_by = &running_fiber();
  const uint64_t stored = mark(address);
  std::memcpy(mbarrier, &stored, 8);
}

void mbarrier_invalidate(uint64_t* mbarrier, Location at) {
  const RuntimeScope scope;
  const uint32_t address = checked_mbarrier(mbarrier, at);
  const Mbarrier& barrier = running_block().mbarriers.at(address);
  if (!barrier.waiting.empty() || barrier.copies_in_flight > 0) fail("mbarrier: invalidated while in use", at);
  running_block().mbarriers.erase(address);
}

void mbarrier_arrive(uint64_t* mbarrier, unsigned bytes, Location at) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  if (bytes > kMaxCount) fail("mbarrier: expects more than 2^20 - 1 bytes", at);
  const uint32_t address = checked_mbarrier(mbarrier, at);
  if (race::enabled) race::release(fiber.actor, fiber.block->mbarriers.at(address).arriving);
  arrive_at(*fiber.block, address, bytes, at);
  maybe_interrupt();
}

void mbarrier_expect(uint64_t* mbarrier, unsigned bytes, Location at) {
  const RuntimeScope scope;
  if (bytes > kMaxCount) fail("mbarrier: expects more than 2^20 - 1 bytes", at);
  running_block().mbarriers.at(checked_mbarrier(mbarrier, at)).transactions += bytes;
}

bool mbarrier_test(uint64_t* mbarrier, unsigned parity, Location at) {
  const RuntimeScope scope;
  spin(at);
  Mbarrier& barrier = running_block().mbarriers.at(checked_mbarrier(mbarrier, at));
  if (barrier.phase % 2 == parity % 2) return false;
  if (race::enabled) race::acquire(running_fiber().actor, barrier.completed[parity % 2]);
  return true;
}

void mbarrier_arrive_cluster(uint64_t* mbarrier, unsigned rank, bool cluster, Location at) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  Block& target = block_of_cluster(rank, at);
  note_use(target);
  const uint32_t address = checked_mbarrier(target, reinterpret_cast<uint64_t*>(shared_in(target, mbarrier, at)), at);
  Mbarrier& barrier = target.mbarriers.at(address);
  if (race::enabled) {
    race::release(fiber.actor, &target == fiber.block || !cluster ? barrier.arriving : barrier.arriving_from_others);
  }
  arrive_at(target, address, 0, at);
  maybe_interrupt();
}

void mbarrier_wait(uint64_t* mbarrier, unsigned parity, bool cluster, Location at) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  if (parity > 1) fail("mbarrier: expected a parity of 0 or 1", at);
  Mbarrier& barrier = fiber.block->mbarriers.at(checked_mbarrier(mbarrier, at));
  while (barrier.phase % 2 == parity) {
    barrier.waiting.push_back(&fiber);
    wait("mbarrier.try_wait", at);
  }
  if (race::enabled) race::acquire(fiber.actor, barrier.completed[parity]);
  if (race::enabled && cluster) race::acquire(fiber.actor, barrier.completed_from_others[parity]);
}

void mbarrier_init_fence() {
  const RuntimeScope scope;
  for (auto& [address, barrier] : running_block().mbarriers) {
    if (barrier.initialised_by == &running_fiber()) barrier.visible_to_copies = true;
  }
}

void proxy_fence(Space space) {
  if (space == Space::kShared) mbarrier_init_fence();
  const RuntimeScope scope;
  if (race::enabled) race::proxy_fence(running_fiber().actor, space);
}

}  // namespace simt
