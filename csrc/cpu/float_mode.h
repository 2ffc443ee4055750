// SPDX-License-Identifier: BSD-3-Clause
// The processor's mode of float arithmetic, which each thread has for itself: whether subnormal numbers are flushed to zero
// (torch.set_flush_denormal), rounding, and traps.
#pragma once
#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace switchgear::cpu {

#if defined(__SSE__)
// MXCSR without the six flags of past exceptions.
using FloatMode = uint32_t;
constexpr FloatMode kExceptions = 0x3f;
inline FloatMode float_mode() { return _mm_getcsr() & ~kExceptions; }
inline void set_float_mode(FloatMode mode) { _mm_setcsr(mode | (_mm_getcsr() & kExceptions)); }
#elif defined(__aarch64__)
using FloatMode = uint64_t;  // FPCR; past exceptions are in FPSR
inline FloatMode float_mode() {
  FloatMode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(FloatMode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
using FloatMode = int;
inline FloatMode float_mode() { return 0; }
inline void set_float_mode(FloatMode) {}
#endif

// A mode for the lifetime of the object. Reading the mode takes a few cycles; it is only written where it differs.
class FloatModeScope {
 public:
  explicit FloatModeScope(FloatMode mode) : before_(float_mode()), differs_(mode != before_) {
    if (differs_) set_float_mode(mode);
  }
  ~FloatModeScope() {
    if (differs_) set_float_mode(before_);
  }
  FloatModeScope(const FloatModeScope&) = delete;
  FloatModeScope& operator=(const FloatModeScope&) = delete;

 private:
  FloatMode before_;
  bool differs_;
};

}  // namespace switchgear::cpu
