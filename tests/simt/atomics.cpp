// SPDX-License-Identifier: BSD-3-Clause
#include "models.h"
#include "scheduler.h"
#include "touch.h"

namespace simt {
namespace {

// A loop of atomics may be polling, so other threads must run from time to time.
constexpr unsigned kMaxAtomicsInARow = 64;

}  // namespace

void before_atomic(const void* location, size_t size, race::AtomicKind kind, Location at) {
  const RuntimeScope scope;
  Fiber& fiber = running_fiber();
  if (reinterpret_cast<uintptr_t>(location) % size != 0) fail("atomic: misaligned address", at);
  if (++fiber.atomics_in_a_row >= kMaxAtomicsInARow) {
    spin(at);
  } else {
    maybe_interrupt();
  }
  if (!race::enabled) return;
  race::Access access;
  access.write = kind.writes;
  access.atomic = true;
  access.scope = kind.scope;
  touch(location, size, access, at);
  race::atomic(fiber.actor, location, kind);
}

void read_only_load(const void* location, size_t size, Location at) {
  const RuntimeScope scope;
  touch(location, size, {.read_only = true}, at);
}

void fence(Scope scope) {
  const RuntimeScope runtime;
  if (race::enabled) race::fence(running_fiber().actor, scope);
}

void poll(Location at) {
  const RuntimeScope scope;
  spin(at);
}

void sleep(Location at) { poll(at); }

}  // namespace simt
