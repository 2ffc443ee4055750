// SPDX-License-Identifier: BSD-3-Clause
// Which thread runs next: the scheduler's interface for the models of instructions. Internal.
#pragma once
#include "block.h"

namespace simt {

// Marks code of the runtime instead of the kernel; the race detector ignores its accesses.
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
// The same, but keeps the fiber's state: it may be woken already, or marked as waiting.
void suspend(const char* what, Location at);
void wake(Fiber& fiber);
// Lets all other threads run before a polling loop looks again.
void spin(Location at);
// In random order, occasionally lets another thread run first.
void maybe_interrupt();

uint64_t random_number();
// Whether an asynchronous operation is carried out at once instead of at a wait.
bool carry_out_early();
// Carries the operation out later, in any order with others: at the latest when no thread can run.
void carry_out_later(Block& block, std::function<void()> operation);
void note_progress();

std::string describe(const Fiber& fiber);
std::string describe(Location at);

}  // namespace simt
