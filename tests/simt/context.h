// SPDX-License-Identifier: BSD-3-Clause
// Stacks, and the switch from one to another: twelve instructions on x86-64, ucontext elsewhere (or with
// SIMT_UCONTEXT defined). AddressSanitizer is told of every switch where it is linked.
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
Stack take_stack();                          // with a page below it that must not be touched
void give_stack(Stack stack, bool unwound);  // unwound: frames were left without their epilogues

// A suspended computation. One without a stack of its own stands for the thread that called.
struct Context {
  Stack stack;
#if defined(SIMT_UCONTEXT)
  ucontext_t state;
#else
  void* stack_pointer = nullptr;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// `entry` runs at the first switch to the context, must begin with arrived(nullptr) and must not return.
void prepare(Context& context, Stack stack, void (*entry)());
// `from` goes on when something switches back to it, or never where it is `finished`.
void switch_context(Context& from, Context& to, bool finished = false);
void arrived(Context* context);

}  // namespace simt
