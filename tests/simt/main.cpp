// SPDX-License-Identifier: BSD-3-Clause
#include <signal.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

#include "check.h"

// Fibers switch stacks so often that AddressSanitizer's second stack would make them 3× slower. Blocks come and go so often
// that walking the stack at every allocation would make them 10× slower.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "detect_stack_use_after_return=0:malloc_context_size=1";
}

namespace {

#if defined(__SANITIZE_THREAD__)
// The race detector does not see the ends of arrays. A write behind one crashes later, elsewhere.
void hint(int signal) {
  constexpr char kText[] =
      "\nA crash in the race build, perhaps by a write behind an array: the asan build names it.\n";
  [[maybe_unused]] const auto written = write(STDERR_FILENO, kText, sizeof kText - 1);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}
void add_hints() {
  static char stack[1 << 16];  // a thread of a kernel may have no room on its own
  const stack_t alternative{.ss_sp = stack, .ss_flags = 0, .ss_size = sizeof stack};
  sigaltstack(&alternative, nullptr);
  struct sigaction action{};
  action.sa_handler = hint;
  action.sa_flags = SA_ONSTACK | SA_NODEFER;
  for (const int signal : {SIGSEGV, SIGBUS, SIGABRT}) sigaction(signal, &action, nullptr);
}
#else
void add_hints() {}
#endif

}  // namespace

int main(int argc, char** argv) {
  add_hints();
  // A test takes seconds, and what follows a failure rarely adds to it. SWITCHGEAR_FAIL_FAST=0: all checks run.
  setenv("SWITCHGEAR_FAIL_FAST", "1", /*overwrite=*/0);
  return switchgear::test::run_tests(argc, argv);
}
