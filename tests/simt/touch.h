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

// An access by an engine that the running thread started: ordered after the thread's past, and before any thread that learns
// `agent`'s time.
inline void touch_as(const race::Agent& agent, const void* start, size_t size, race::Access kind, Location at) {
  if (!race::enabled) return;
  const race::Actor& actor = running_fiber().actor;
  race::access(actor, race::moment_of(actor, agent), start, size, kind, race::site_of(at));
}

// Assigns an engine its slot in clocks on first use.
inline void ensure_slot(race::Agent& agent, const std::string& name) {
  if (race::enabled && agent.slot == 0) agent.slot = race::new_slot(running_block().race_block, name);
}

// Orders the engine's accesses up to `time` before the running thread.
inline void learn(const race::Agent& agent, uint32_t time) {
  if (!race::enabled || agent.slot == 0) return;
  race::Actor& actor = running_fiber().actor;
  actor.view.seen.set({actor.now.block, agent.slot, time});
}

}  // namespace simt
