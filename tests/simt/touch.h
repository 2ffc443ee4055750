// SPDX-License-Identifier: BSD-3-Clause
// Reports to the race detector the accesses that models make for a kernel. Internal.
#pragma once
#include "scheduler.h"

namespace simt {

// An access by the running thread itself.
inline void touch(const void* start, size_t size, race::Access kind, Location at) {
  if (!race::enabled) return;
  const race::Actor& actor = running_fiber().actor;
  race::access(actor, actor.now, start, size, kind, race::site_of(at));
}

// An access by an engine of a block that the running thread started: ordered after the thread's past, and before any thread
// that learns `agent`'s time.
inline void touch_as(const Block& block, const race::Agent& agent, const void* start, size_t size, race::Access kind,
                     Location at) {
  if (!race::enabled) return;
  const race::Moment moment{block.race_block, agent.slot, agent.time};
  race::access(running_fiber().actor, moment, start, size, kind, race::site_of(at));
}
inline void touch_as(const race::Agent& agent, const void* start, size_t size, race::Access kind, Location at) {
  touch_as(running_block(), agent, start, size, kind, at);
}

// Assigns an engine its slot in clocks on first use.
inline void ensure_slot(const Block& block, race::Agent& agent, const std::string& name) {
  if (race::enabled && agent.slot == 0) agent.slot = race::new_slot(block.race_block, name);
}
inline void ensure_slot(race::Agent& agent, const std::string& name) { ensure_slot(running_block(), agent, name); }

// Orders the engine's accesses up to `time` before the running thread.
inline void learn(const race::Agent& agent, uint32_t time) {
  if (!race::enabled || agent.slot == 0) return;
  race::Actor& actor = running_fiber().actor;
  actor.view.seen.set({actor.now.block, agent.slot, time});
}

}  // namespace simt
