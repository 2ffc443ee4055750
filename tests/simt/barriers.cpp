// SPDX-License-Identifier: BSD-3-Clause
// Barriers of a block, and collective instructions of a warp. Lanes arrive one by one.
#include "models.h"
#include "scheduler.h"

namespace simt {
namespace {

bool same_text(const char* a, const char* b) { return a == b || std::string_view(a) == b; }

bool same_place(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() && same_text(a.file_name(), b.file_name());
}

// Makes everything done before any arrival visible to every waiting thread.
void complete(Barrier& barrier) {
  for (Fiber* fiber : barrier.waiting) {
    // The view includes what the fiber released on arrival, so it replaces the fiber's own.
    if (race::enabled) fiber->actor.view = barrier.view;
    wake(*fiber);
  }
  barrier.waiting.clear();
  barrier.view.clear();
  barrier.arrived = 0;
}

void arrive(Barrier& barrier, unsigned id, unsigned num_threads, bool whole_block, bool waits, Location at) {
  Fiber& fiber = running_fiber();
  if (barrier.arrived > 0 && barrier.expected != num_threads) {
    fail("barrier " + std::to_string(id) + " for " + std::to_string(num_threads) + " threads, but for " +
             std::to_string(barrier.expected) + " at " + describe(barrier.first_at),
         at);
  }
  if (barrier.arrived == 0) barrier.first_at = at;
  barrier.expected = num_threads;
  barrier.whole_block = whole_block;
  if (race::enabled) race::release(fiber.actor, barrier.view);
  ++barrier.arrived;
  if (waits) barrier.waiting.push_back(&fiber);
  const bool last = barrier.arrived == num_threads;
  if (!waits) {
    if (last) complete(barrier);
    return;
  }
  fiber.state = State::kWaiting;  // so that completing wakes this one too
  if (last) complete(barrier);
  suspend(whole_block ? "__syncthreads" : "a named barrier", at);
}

void check_named(unsigned id, unsigned num_threads, Location at) {
  if (id > 15) fail("barrier: expected a number below 16, got " + std::to_string(id), at);
  if (num_threads == 0 || num_threads % 32 != 0 || num_threads > running_block().fibers.size()) {
    fail("barrier: expected a number of threads that is a multiple of 32 and not above the block's, got " +
             std::to_string(num_threads),
         at);
  }
}

}  // namespace

void block_barrier(Location at) {
  const RuntimeScope scope;
  Block& block = running_block();
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived > 0 && barrier.whole_block && !same_place(barrier.first_at, at)) {
    fail("__syncthreads in divergent code: other threads wait at " + describe(barrier.first_at), at);
  }
  if (block.live < block.fibers.size()) {
    fail("__syncthreads after " + std::to_string(block.fibers.size() - block.live) +
             " thread(s) of the block have exited",
         at);
  }
  arrive(barrier, 0, static_cast<unsigned>(block.fibers.size()), true, true, at);
}

void barrier_sync(unsigned id, unsigned num_threads, Location at) {
  const RuntimeScope scope;
  check_named(id, num_threads, at);
  arrive(running_block().barriers[id], id, num_threads, false, true, at);
}

void barrier_arrive(unsigned id, unsigned num_threads, Location at) {
  const RuntimeScope scope;
  check_named(id, num_threads, at);
  arrive(running_block().barriers[id], id, num_threads, false, false, at);
}

namespace {

// Finds the collective that the lanes of `mask` have joined, or starts one.
Collective& find_collective(Warp& warp, const char* name, uint32_t mask, Location at) {
  for (Collective& other : warp.collectives) {
    if (!(other.mask & mask)) continue;
    if (other.mask != mask || !same_text(other.name, name) || !same_place(other.at, at)) {
      char text[200];
      std::snprintf(text, sizeof text, "%s with mask 0x%08x, but lanes of it wait in %s with mask 0x%08x at %s", name,
                    mask, other.name, other.mask, describe(other.at).c_str());
      fail(text, at);
    }
    return other;
  }
  Collective& started = warp.collectives.emplace_back();
  started.name = name;
  started.mask = mask;
  started.at = at;
  return started;
}

void join_collective(const char* name, uint32_t mask, void* operands, Combine combine, bool orders_memory,
                     Location at) {
  Fiber& fiber = running_fiber();
  Warp& warp = running_warp();
  if (!(mask >> fiber.lane & 1)) fail(std::string(name) + ": the calling lane is not in the mask", at);
  Collective& collective = find_collective(warp, name, mask, at);
  collective.arrived |= 1u << fiber.lane;
  collective.operands[fiber.lane] = operands;
  collective.fibers[fiber.lane] = &fiber;
  if (collective.arrived != mask) {
    wait(name, at);
    return;
  }
  const Collective complete = collective;
  std::erase_if(warp.collectives, [&](const Collective& other) { return other.mask == mask; });
  if (combine != nullptr) combine(complete.operands.data(), mask);
  if (race::enabled && orders_memory) {
    race::View view;
    for (Fiber* lane : complete.fibers) {
      if (lane != nullptr) race::release(lane->actor, view);
    }
    for (Fiber* lane : complete.fibers) {
      if (lane != nullptr) lane->actor.view = view;
    }
  }
  for (Fiber* lane : complete.fibers) {
    if (lane != nullptr && lane != &fiber) wake(*lane);
  }
  maybe_interrupt();
}

}  // namespace

void collective(const char* name, uint32_t mask, void* operands, Combine combine, Location at) {
  const RuntimeScope scope;
  join_collective(name, mask, operands, combine, false, at);
}

void warp_barrier(uint32_t mask, Location at) {
  const RuntimeScope scope;
  join_collective("__syncwarp", mask, nullptr, nullptr, true, at);
}

int lane_index() { return static_cast<int>(running_fiber().lane); }

bool elect(Location at) {
  struct Operands {
    uint32_t choice;
    bool elected;
  } operands{static_cast<uint32_t>(options().order == Order::kRandom ? random_number() % 32 : 0), false};
  const RuntimeScope scope;
  join_collective(
      "elect.sync", 0xffffffffu, &operands,
      [](void* const* all, uint32_t) {
        const uint32_t choice = static_cast<Operands*>(all[0])->choice;
        static_cast<Operands*>(all[choice])->elected = true;
      },
      false, at);
  return operands.elected;
}

}  // namespace simt
