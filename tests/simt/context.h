// SPDX-License-Identifier: BSD-3-Clause
// Stacks, and the switch between them: twelve instructions on x86-64, ucontext elsewhere (or if SIMT_UCONTEXT is defined).
// AddressSanitizer, if linked, is notified of every switch.
#pragma once
#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif

#include <cstddef>
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

struct Stack {
  char* bottom = nullptr;
  size_t size = 0;
};
Stack take_stack();                          // with a guard page below it
void give_stack(Stack stack, bool unwound);  // unwound: frames were left without their epilogues

// A suspended computation. A context without a stack represents the calling thread.
struct Context {
  Stack stack;
#if defined(SIMT_UCONTEXT)
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// `entry` runs at the first switch to the context. It must start with arrived(nullptr) and must not return.
void prepare(Context& context, Stack stack, void (*entry)());
// `from` continues when something switches back to it, or never if `finished`.
void switch_context(Context& from, Context& to, bool finished = false);
void arrived(Context* context);

}  // namespace simt
