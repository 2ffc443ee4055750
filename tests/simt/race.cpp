// SPDX-License-Identifier: BSD-3-Clause
// What orders accesses: releases and acquires, fences and atomics. shadow.cpp records the accesses themselves.
#include "race.h"

#include <algorithm>
#include <unordered_map>

#include "shadow.h"

namespace simt::race {

bool enabled = false;
Actor* running = nullptr;

namespace {

// One release on a location, with the scope of threads that may acquire it.
struct Released {
  Scope scope;
  uint32_t device, block;
  View view;
};

std::unordered_map<uintptr_t, std::vector<Released>> locations;

// The narrowest scope that includes both threads.
Scope needed_scope(const Released& release, const Actor& actor) {
  if (release.block == actor.now.block) return Scope::kBlock;
  return release.device == actor.device ? Scope::kDevice : Scope::kSystem;
}

void add(std::vector<Released>& releases, const Actor& actor, Scope scope, const View& view) {
  if (view.empty()) return;
  for (Released& old : releases) {
    if (old.scope == scope && old.block == actor.now.block) return old.view.join(view);
  }
  releases.push_back({scope, actor.device, actor.now.block, view});
}

}  // namespace

void View::join(const View& other) {
  seen.join(other.seen);
  for (size_t i = 0; i < async.size(); ++i) async[i].join(other.async[i]);
}

void View::clear() {
  seen.clear();
  for (Clock& clock : async) clock.clear();
}

Moment moment_of(const Actor& actor, const Agent& agent) { return {actor.now.block, agent.slot, agent.time}; }

void release(Actor& actor, View& into) {
  into.join(actor.view);
  into.seen.set(actor.now);
  ++actor.now.time;
}

void fence(Actor& actor, Scope scope) {
  for (size_t i = 0; i <= static_cast<size_t>(scope); ++i) {
    actor.view.join(actor.read_before_fence[i]);
    actor.read_before_fence[i].clear();
  }
  View now = actor.view;
  now.seen.set(actor.now);
  ++actor.now.time;
  for (size_t i = 0; i <= static_cast<size_t>(scope); ++i) actor.released_by_fence[i] = now;
}

void proxy_fence(Actor& actor, Space space) {
  Clock& async = actor.view.async[static_cast<size_t>(space)];
  async.join(actor.view.seen);
  async.set(actor.now);
  ++actor.now.time;
}

void atomic(Actor& actor, const void* location, AtomicKind kind) {
  std::vector<Released>& releases = locations[reinterpret_cast<uintptr_t>(location)];
  if (kind.reads) {
    for (const Released& release : releases) {
      const Scope needed = needed_scope(release, actor);
      if (needed > release.scope || needed > kind.scope) continue;
      if (kind.acquire) {
        acquire(actor, release.view);
      } else {
        actor.read_before_fence[static_cast<size_t>(needed)].join(release.view);
      }
    }
  }
  if (!kind.writes) return;
  // A store begins a new release sequence; a read-modify-write continues the old one.
  if (!kind.reads) releases.clear();
  if (kind.release) {
    View view;
    release(actor, view);
    add(releases, actor, kind.scope, view);
  } else {
    for (size_t i = 0; i < actor.released_by_fence.size(); ++i) {
      add(releases, actor, std::min(kind.scope, static_cast<Scope>(i)), actor.released_by_fence[i]);
    }
  }
}

void begin_run() {
  shadow::clear();
  locations.clear();
}

Findings end_run() {
  Findings findings = shadow::findings();
  begin_run();
  return findings;
}

void begin_thread(Actor& actor, uint32_t block, uint32_t thread, uint32_t device) {
  actor = Actor{};
  actor.now = {block, thread, 1};
  actor.device = device;
}

void forget(const void* start, size_t size) {
  shadow::forget(reinterpret_cast<uintptr_t>(start), size);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(start);
  std::erase_if(locations, [&](const auto& entry) { return entry.first >= begin && entry.first < begin + size; });
}

}  // namespace simt::race
