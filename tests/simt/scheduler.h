// SPDX-License-Identifier: BSD-3-Clause
// Who runs next: what the models of instructions ask of the scheduler. Internal.
#pragma once
#include "block.h"

namespace simt {

// Marks that the runtime runs, not the kernel's own code: the race detector ignores what happens inside.
class RuntimeScope {
 public:
  RuntimeScope() { race::running = nullptr; }
  ~RuntimeScope();
  RuntimeScope(const RuntimeScope&) = delete;
};

Fiber& running_fiber();
Fiber* running_fiber_or_null();
inline Block& running_block() { return *running_fiber().block; }
inline Warp& running_warp() { return running_block().warps[running_fiber().warp]; }

// Suspends the running fiber until something wakes it.
void wait(const char* what, Location at);
// The same for a fiber that is on its way: woken already, or marked as waiting.
void suspend(const char* what, Location at);
void wake(Fiber& fiber);
// Lets all others run before a loop that polls looks again.
void spin(Location at);
// In random order, now and then lets another thread go first.
void maybe_interrupt();

uint64_t random_number();
// Whether an asynchronous operation is carried out at once, rather than when someone waits for it.
bool carry_out_early();
// Carried out later, in any order with others: when no thread can run, or before.
void carry_out_later(Block& block, std::function<void()> operation);
void note_progress();

std::string describe(const Fiber& fiber);
std::string describe(Location at);

}  // namespace simt
