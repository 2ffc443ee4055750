// SPDX-License-Identifier: BSD-3-Clause
// The race detector: happens-before by vector clocks, exact to the byte. Two accesses, of which one writes, must be ordered by
// a synchronisation, or both be atomic at scopes that include each other. A read through the read-only cache conflicts with
// every write of the same kernel, ordered or not. Before the asynchronous proxy (TMA, wgmma) accesses
// what ordinary code wrote, a fence.proxy.async is needed. Works in programs linked with race_hooks.cpp and compiled with
// -fsanitize=thread; elsewhere `enabled` stays false and nothing here is called.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "clock.h"
#include "location.h"

namespace simt::race {

extern bool enabled;

enum class Scope : uint8_t { kBlock, kDevice, kSystem };
enum class Space : uint8_t { kShared, kGlobal };

// What happened before: for threads, and for the asynchronous proxy in each space.
struct View {
  Clock seen;
  std::array<Clock, 2> async;
  void join(const View& other);
  void clear();
  bool empty() const { return seen.empty(); }
};

// The actor of an access: a thread of a kernel.
struct Actor {
  Moment now{0, 0, 1};
  uint32_t device = 0;
  View view;
  std::array<View, 3> released_by_fence;  // by scope: what a relaxed store passes on
  std::array<View, 3> read_before_fence;  // by scope: what relaxed loads saw, for a later fence
};

// An asynchronous engine of a block: its accesses are ordered only after a thread waits for them.
struct Agent {
  uint32_t slot = 0, time = 0;  // slot 0 before first use: a block's slot 0 is a thread's
};

// A place in the program: an address of code, or a file and line.
using Site = uint64_t;
Site site_of(Location at);
inline Site site_of(const void* code) { return reinterpret_cast<uint64_t>(code); }

struct Access {
  bool write = false, atomic = false, async = false, read_only = false;
  Scope scope = Scope::kSystem;  // of atomics
  Space space = Space::kGlobal;
};

// ---- a run and its blocks -----------------------------------------------------------------------------------------------

void begin_run();
// The number of conflicts, and the text of the first few.
struct Findings {
  int count = 0;
  std::string text;
};
Findings end_run();

// `name` and the block's shape appear in reports.
uint32_t begin_block(const std::string& name, uint32_t size_x, uint32_t size_y, uint32_t num_threads, uint32_t device);
void begin_thread(Actor& actor, uint32_t block, uint32_t thread, uint32_t device);
uint32_t new_slot(uint32_t block, const std::string& name);  // for an engine
void forget(const void* start, size_t size);                 // memory returned to the heap

// The kernel before a dependent one may still write any global memory: its end, which griddepcontrol.wait acquires.
void begin_kernel_before();
void acquire_kernel_before(Actor& actor);

std::string describe_site(Site site);

// ---- accesses -----------------------------------------------------------------------------------------------------------

// The thread whose instrumented code is running; null while the runtime or the host is running.
extern Actor* running;

void access(const Actor& actor, Moment as, const void* start, size_t size, Access kind, Site site);

// ---- what orders --------------------------------------------------------------------------------------------------------

Moment moment_of(const Actor& actor, const Agent& agent);
void release(Actor& actor, View& into);
inline void acquire(Actor& actor, const View& from) { actor.view.join(from); }
void fence(Actor& actor, Scope scope);
void proxy_fence(Actor& actor, Space space);

// An atomic operation on a location, after access(): acquires and releases views.
struct AtomicKind {
  bool reads = false, writes = false, acquire = false, release = false;
  Scope scope = Scope::kDevice;
};
void atomic(Actor& actor, const void* location, AtomicKind kind);

}  // namespace simt::race
