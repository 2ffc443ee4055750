// SPDX-License-Identifier: BSD-3-Clause
// Accesses that models make on a kernel's behalf, told to the race detector. Internal.
#pragma once
#include "scheduler.h"

namespace simt {

// By the running thread itself.
inline void touch(const void* start, size_t size, race::Access kind, Location at) {
  if (!race::enabled) return;
  const race::Actor& actor = running_fiber().actor;
  race::access(actor, actor.now, start, size, kind, race::site_of(at));
}

// By an engine that the running thread has started: ordered after the thread's past, and before whoever learns of
// `agent`'s time.
inline void touch_as(const race::Agent& agent, const void* start, size_t size, race::Access kind, Location at) {
  if (!race::enabled) return;
  const race::Actor& actor = running_fiber().actor;
  race::access(actor, race::moment_of(actor, agent), start, size, kind, race::site_of(at));
}

// Gives an engine its place in clocks at its first use.
inline void ensure_slot(race::Agent& agent, const std::string& name) {
  if (race::enabled && agent.slot == 0) agent.slot = race::new_slot(running_block().race_block, name);
}

// The running thread has seen what the engine did up to `time`.
inline void learn(const race::Agent& agent, uint32_t time) {
  if (!race::enabled || agent.slot == 0) return;
  race::Actor& actor = running_fiber().actor;
  actor.view.seen.set({actor.now.block, agent.slot, time});
}

}  // namespace simt
