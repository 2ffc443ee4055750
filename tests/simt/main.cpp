// SPDX-License-Identifier: BSD-3-Clause
#include "check.h"

// Fibers change stacks so often that AddressSanitizer's second stack makes them three times slower.
extern "C" const char* __asan_default_options() { return "detect_stack_use_after_return=0"; }

int main(int argc, char** argv) { return switchgear::test::run_tests(argc, argv); }
