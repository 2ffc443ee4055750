// SPDX-License-Identifier: BSD-3-Clause
#include "check.h"

// Fibers switch stacks so often that AddressSanitizer's second stack would make them 3× slower. Blocks come and go so often
// that walking the stack at every allocation would make them 10× slower.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "detect_stack_use_after_return=0:malloc_context_size=1";
}

int main(int argc, char** argv) { return switchgear::test::run_tests(argc, argv); }
