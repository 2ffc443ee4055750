// SPDX-License-Identifier: BSD-3-Clause
#include "check.h"

// Fibers change stacks so often that AddressSanitizer's second stack makes them three times slower; and blocks come and go
// so often that walking the stack at every allocation makes them ten times slower.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "detect_stack_use_after_return=0:malloc_context_size=1";
}

int main(int argc, char** argv) { return switchgear::test::run_tests(argc, argv); }
