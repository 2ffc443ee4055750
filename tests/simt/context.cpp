// SPDX-License-Identifier: BSD-3-Clause
#include "context.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <vector>

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* start, size_t size);
}

namespace simt {
namespace {

constexpr size_t kStackSize = 256 << 10;  // untouched pages cost nothing

std::vector<Stack>& free_stacks() {
  static std::vector<Stack> stacks;
  return stacks;
}

// The caller's own stack, which AddressSanitizer reports when a fiber starts.
const void* host_bottom = nullptr;
size_t host_size = 0;

}  // namespace

Stack take_stack() {
  if (!free_stacks().empty()) {
    const Stack stack = free_stacks().back();
    free_stacks().pop_back();
    return stack;
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStackSize + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
  return {static_cast<char*>(memory) + page, kStackSize};
}

void give_stack(Stack stack, bool unwound) {
  if (unwound && __asan_unpoison_memory_region) __asan_unpoison_memory_region(stack.bottom, stack.size);
  free_stacks().push_back(stack);
}

void arrived(Context* context) {
  if (!__sanitizer_finish_switch_fiber) return;
  if (context == nullptr) {
    __sanitizer_finish_switch_fiber(nullptr, &host_bottom, &host_size);
  } else {
    __sanitizer_finish_switch_fiber(context->fake_stack, nullptr, nullptr);
  }
}

namespace {

void departing(Context& from, const Context& to, bool finished) {
  if (!__sanitizer_start_switch_fiber) return;
  const bool to_host = to.stack.bottom == nullptr;
  __sanitizer_start_switch_fiber(finished ? nullptr : &from.fake_stack, to_host ? host_bottom : to.stack.bottom,
                                 to_host ? host_size : to.stack.size);
}

}  // namespace

#if defined(SIMT_UCONTEXT)

void prepare(Context& context, Stack stack, void (*entry)()) {
  context.stack = stack;
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack.bottom;
  context.state.uc_stack.ss_size = stack.size;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, Context& to, bool finished) {
  departing(from, to, finished);
  swapcontext(&from.state, &to.state);
  arrived(&from);
}

#else

// simt_switch_stack(void** save, void* load): saves the callee-saved registers on the old stack.
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden simt_switch_stack
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, .-simt_switch_stack
)");

void prepare(Context& context, Stack stack, void (*entry)()) {
  context.stack = stack;
  // From the top: an end marker for unwinders, the return address for `ret`, and the six registers. So `entry` starts with the
  // stack as after a call, 8 bytes off a multiple of 16.
  void** top = reinterpret_cast<void**>(stack.bottom + stack.size);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context.stack_pointer = top - 8;
}

void switch_context(Context& from, Context& to, bool finished) {
  departing(from, to, finished);
  simt_switch_stack(&from.stack_pointer, to.stack_pointer);
  arrived(&from);
}

#endif

}  // namespace simt
