// SPDX-License-Identifier: BSD-3-Clause
// The functions that -fsanitize=thread makes the compiler call. They replace its library: the program is compiled with the flag
// and linked without it. Accesses by the host and the runtime are ignored; those of kernels go to the race detector. Atomics
// that reach this file are the host's: those of kernels are in atomics.cpp, which knows their scope.
#include <cstring>

#include "context.h"
#include "race.h"
#include "scheduler.h"

namespace {

[[maybe_unused]] const bool enable = simt::race::enabled = true;

using simt::race::Access;

void access(const void* address, size_t size, Access kind, const void* code) {
  const simt::race::Actor* const actor = simt::race::running;
  if (actor == nullptr) return;
  // A thread's own stack models its registers and local memory; threadIdx and the like are special registers.
  const auto inside = [address](const void* start, size_t length) {
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(start) < length;
  };
  const simt::Stack& stack = simt::running_fiber().context.stack;
  if (inside(stack.bottom, stack.size) || inside(&simt::indices, sizeof simt::indices)) return;
  simt::race::running = nullptr;
  simt::race::access(*actor, actor->now, address, size, kind, simt::race::site_of(code));
  simt::race::running = const_cast<simt::race::Actor*>(actor);
}

constexpr Access kRead{};
constexpr Access kWrite{.write = true};
// A volatile access counts as a relaxed one at system scope.
constexpr Access kVolatileRead{.atomic = true};
constexpr Access kVolatileWrite{.write = true, .atomic = true};

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

#define CODE __builtin_return_address(0)
#define HOOKS(SIZE)                                                                            \
  void __tsan_read##SIZE(void* p) { access(p, SIZE, kRead, CODE); }                            \
  void __tsan_write##SIZE(void* p) { access(p, SIZE, kWrite, CODE); }                          \
  void __tsan_unaligned_read##SIZE(void* p) { access(p, SIZE, kRead, CODE); }                  \
  void __tsan_unaligned_write##SIZE(void* p) { access(p, SIZE, kWrite, CODE); }                \
  void __tsan_read_write##SIZE(void* p) { access(p, SIZE, kWrite, CODE); }                     \
  void __tsan_unaligned_read_write##SIZE(void* p) { access(p, SIZE, kWrite, CODE); }           \
  void __tsan_volatile_read##SIZE(void* p) {                                                   \
    access(p, SIZE, kVolatileRead, CODE);                                                      \
    volatile_read(p);                                                                          \
  }                                                                                            \
  void __tsan_volatile_write##SIZE(void* p) {                                                  \
    access(p, SIZE, kVolatileWrite, CODE);                                                     \
    volatile_write(p);                                                                         \
  }                                                                                            \
  void __tsan_unaligned_volatile_read##SIZE(void* p) { access(p, SIZE, kVolatileRead, CODE); } \
  void __tsan_unaligned_volatile_write##SIZE(void* p) { access(p, SIZE, kVolatileWrite, CODE); }

// With a fence before a volatile store, or after a volatile load, it synchronises.
static void volatile_access(const void* p, bool writes) {
  simt::race::Actor* const actor = simt::race::running;
  if (actor == nullptr) return;
  simt::race::running = nullptr;
  simt::race::atomic(*actor, p, {.reads = !writes, .writes = writes, .scope = simt::race::Scope::kSystem});
  simt::race::running = actor;
}
static void volatile_read(const void* p) { volatile_access(p, false); }
static void volatile_write(const void* p) { volatile_access(p, true); }

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_read_range(void* p, unsigned long size) { access(p, size, kRead, CODE); }
void __tsan_write_range(void* p, unsigned long size) { access(p, size, kWrite, CODE); }

void* __tsan_memcpy(void* to, const void* from, size_t size) {
  access(from, size, kRead, CODE);
  access(to, size, kWrite, CODE);
  return std::memcpy(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, size_t size) {
  access(from, size, kRead, CODE);
  access(to, size, kWrite, CODE);
  return std::memmove(to, from, size);
}
void* __tsan_memset(void* to, int value, size_t size) {
  access(to, size, kWrite, CODE);
  return std::memset(to, value, size);
}

void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

#define ATOMICS(BITS, TYPE)                                                                                     \
  TYPE __tsan_atomic##BITS##_load(const volatile TYPE* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##BITS##_store(volatile TYPE* p, TYPE v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); } \
  TYPE __tsan_atomic##BITS##_exchange(volatile TYPE* p, TYPE v, int) {                                          \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                             \
  TYPE __tsan_atomic##BITS##_fetch_add(volatile TYPE* p, TYPE v, int) {                                         \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                             \
  TYPE __tsan_atomic##BITS##_fetch_sub(volatile TYPE* p, TYPE v, int) {                                         \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                             \
  TYPE __tsan_atomic##BITS##_fetch_and(volatile TYPE* p, TYPE v, int) {                                         \
    return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                             \
  TYPE __tsan_atomic##BITS##_fetch_or(volatile TYPE* p, TYPE v, int) {                                          \
    return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                             \
  TYPE __tsan_atomic##BITS##_fetch_xor(volatile TYPE* p, TYPE v, int) {                                         \
    return __atomic_fetch_xor(p, v, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                             \
  int __tsan_atomic##BITS##_compare_exchange_strong(volatile TYPE* p, TYPE* expected, TYPE v, int, int) {       \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
  }                                                                                                             \
  int __tsan_atomic##BITS##_compare_exchange_weak(volatile TYPE* p, TYPE* expected, TYPE v, int, int) {         \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);              \
  }                                                                                                             \
  TYPE __tsan_atomic##BITS##_compare_exchange_val(volatile TYPE* p, TYPE expected, TYPE v, int, int) {          \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                    \
    return expected;                                                                                            \
  }

ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

}  // extern "C"
