// SPDX-License-Identifier: BSD-3-Clause
// Default options for the address sanitizer's runtime.

// Before version 14 gcc does not align the frames of detect_stack_use_after_return for 64-byte vectors (its bug 110027), and
// newer runtimes enable it by default: aligned stores of vectors to the stack would crash.
#if defined(__SANITIZE_ADDRESS__)
extern "C" [[gnu::visibility("default"), gnu::used]] const char* __asan_default_options() {
  return "detect_stack_use_after_return=0";
}
#endif
