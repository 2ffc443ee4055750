// SPDX-License-Identifier: BSD-3-Clause
// What the address sanitizer's runtime asks a program for.

// gcc before 14 does not align the frames of detect_stack_use_after_return for vectors of 64 bytes (its bug 110027), and
// newer runtimes switch it on by default: aligned stores of vectors to the stack would crash.
#if defined(__SANITIZE_ADDRESS__)
extern "C" [[gnu::visibility("default"), gnu::used]] const char* __asan_default_options() {
  return "detect_stack_use_after_return=0";
}
#endif
