// SPDX-License-Identifier: BSD-3-Clause
// Atomics, fences, and loads and stores with names. Everything runs on one CPU thread, so an atomic is a plain operation.
// Before it, the race detector records what it means to other GPU threads.
#pragma once
#include <cstdint>
#include <type_traits>

#include "models.h"

#define SIMT_AT ::simt::Location at = ::simt::Location::current()

namespace simt {

template <typename T>
SIMT_UNTRACKED T atomic_load(const T* location, bool acquire, Scope scope, Location at) {
  before_atomic(location, sizeof(T), {.reads = true, .acquire = acquire, .scope = scope}, at);
  return *location;
}

template <typename T>
SIMT_UNTRACKED void atomic_store(T* location, T value, bool release, Scope scope, Location at) {
  before_atomic(location, sizeof(T), {.writes = true, .release = release, .scope = scope}, at);
  *location = value;
}

struct Ordering {
  bool acquire = false, release = false;
};
template <typename T, typename Update>
SIMT_UNTRACKED T atomic_update(T* location, Update update, Ordering ordering, Scope scope, Location at) {
  before_atomic(
      location, sizeof(T),
      {.reads = true, .writes = true, .acquire = ordering.acquire, .release = ordering.release, .scope = scope}, at);
  const T old = *location;
  *location = update(old);
  return old;
}

// Sums wrap, as on the device.
template <typename T>
T wrapping_sum(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(a) + static_cast<U>(b));
  } else {
    return a + b;
  }
}

}  // namespace simt

// Three forms of each atomic: at device, block and system scope. All are relaxed.
#define SIMT_ATOMIC(name, update)                                                                                \
  template <typename T>                                                                                          \
  T name(T* location, std::type_identity_t<T> value, SIMT_AT) {                                                  \
    return simt::atomic_update(                                                                                  \
        location, [=]([[maybe_unused]] T old) { return static_cast<T>(update); }, {}, simt::Scope::kDevice, at); \
  }                                                                                                              \
  template <typename T>                                                                                          \
  T name##_block(T* location, std::type_identity_t<T> value, SIMT_AT) {                                          \
    return simt::atomic_update(                                                                                  \
        location, [=]([[maybe_unused]] T old) { return static_cast<T>(update); }, {}, simt::Scope::kBlock, at);  \
  }                                                                                                              \
  template <typename T>                                                                                          \
  T name##_system(T* location, std::type_identity_t<T> value, SIMT_AT) {                                         \
    return simt::atomic_update(                                                                                  \
        location, [=]([[maybe_unused]] T old) { return static_cast<T>(update); }, {}, simt::Scope::kSystem, at); \
  }
SIMT_ATOMIC(atomicAdd, simt::wrapping_sum(old, value))
SIMT_ATOMIC(atomicSub, old - value)
SIMT_ATOMIC(atomicMax, old < value ? value : old)
SIMT_ATOMIC(atomicMin, value < old ? value : old)
SIMT_ATOMIC(atomicExch, value)
SIMT_ATOMIC(atomicAnd, old& value)
SIMT_ATOMIC(atomicOr, old | value)
SIMT_ATOMIC(atomicXor, old ^ value)
SIMT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef SIMT_ATOMIC

template <typename T>
T atomicCAS(T* location, std::type_identity_t<T> expected, std::type_identity_t<T> value, SIMT_AT) {
  return simt::atomic_update(
      location, [=](T old) { return old == expected ? value : old; }, {}, simt::Scope::kDevice, at);
}

inline void __threadfence_block() { simt::fence(simt::Scope::kBlock); }
inline void __threadfence() { simt::fence(simt::Scope::kDevice); }
inline void __threadfence_system() { simt::fence(simt::Scope::kSystem); }

// Through the read-only cache, which does not see what this kernel writes.
template <typename T>
SIMT_UNTRACKED T __ldg(const T* p, SIMT_AT) {
  simt::read_only_load(p, sizeof(T), at);
  return *p;
}

// Cache hints.
template <typename T>
T __ldca(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldlu(const T* p) {
  return *p;
}
template <typename T>
void __stwb(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <typename T>
void __stcg(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <typename T>
void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}
