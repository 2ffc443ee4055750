// SPDX-License-Identifier: BSD-3-Clause
// cp.async: copies from global to shared memory, which land either at once or only when a thread waits for them.
#include <cstring>

#include "mbarrier.h"
#include "models.h"
#include "shared_memory.h"
#include "touch.h"

namespace simt {
namespace {

void carry_out(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(copy.to + copy.valid, 0, copy.size - copy.valid);
}

void carry_out(const Copies& copies) {
  for (const auto& copy : copies) carry_out(*copy);
}

void mark_awaited(const Copies& copies) {
  for (const auto& copy : copies) copy->awaited = true;
}

}  // namespace

void cp_async(void* shared, const void* global, unsigned size, unsigned valid, Location at) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  if (reinterpret_cast<uintptr_t>(shared) % size != 0) fail("cp.async: misaligned shared address", at);
  if (valid > size) fail("cp.async: more source bytes than it copies", at);
  if (valid > 0 && reinterpret_cast<uintptr_t>(global) % size != 0) fail("cp.async: misaligned global address", at);
  shared_pointer(*fiber.block, shared_address(*fiber.block, shared, at), size, at);
  check_accessible(shared, size, "cp.async, shared memory", at);
  check_accessible(global, valid, "cp.async, global memory", at);

  ensure_slot(fiber.copy_engine, "cp.async of thread " + std::to_string(fiber.linear));
  const race::Agent agent{fiber.copy_engine.slot, fiber.copy_engine.time + 1};
  touch_as(agent, shared, size, {.write = true, .space = Space::kShared}, at);
  touch_as(agent, global, valid, {}, at);

  auto copy = std::make_shared<Copy>(static_cast<char*>(shared), static_cast<const char*>(global), size, valid);
  if (carry_out_early()) {
    carry_out(*copy);
  } else {
    std::memset(shared, 0xff, size);  // the old content is already lost
  }
  fiber.open_copies.push_back(std::move(copy));
}

void cp_async_commit(Location) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  fiber.copy_groups.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
  fiber.copy_group_times.push_back(++fiber.copy_engine.time);
}

void cp_async_wait(unsigned groups_left, Location) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  while (fiber.copy_groups.size() > groups_left) {
    carry_out(fiber.copy_groups.front());
    mark_awaited(fiber.copy_groups.front());
    learn(fiber.copy_engine, fiber.copy_group_times.front());
    fiber.copy_groups.pop_front();
    fiber.copy_group_times.pop_front();
  }
}

void cp_async_arrive(uint64_t* mbarrier, Location at) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  Block& block = *fiber.block;
  const uint32_t address = checked_mbarrier(mbarrier, at);
  Copies copies = fiber.open_copies;
  for (const Copies& group : fiber.copy_groups) copies.insert(copies.end(), group.begin(), group.end());
  mark_awaited(copies);
  const race::Moment moment{block.race_block, fiber.copy_engine.slot, ++fiber.copy_engine.time};
  auto arrive = [&block, address, copies, moment, at] {
    carry_out(copies);
    Mbarrier& barrier = block.mbarriers.at(address);
    if (race::enabled && moment.slot != 0) barrier.arriving.seen.set(moment);
    arrive_at(block, address, 0, at);
  };
  if (carry_out_early()) {
    arrive();
  } else {
    carry_out_later(block, arrive);
  }
}

}  // namespace simt
