// SPDX-License-Identifier: BSD-3-Clause
// Programs with one bug each, to prove that a sanitizer build would report it: each is a test that passes only with the
// report. If the bug is in a call of the library, the report comes from the library's own code, which proves that its files
// are instrumented too.
#pragma once
#include <cstdio>
#include <cstring>

namespace switchgear::planted {

struct Bug {
  const char* name;
  void (*run)();
};

// Hides a value from the optimiser.
template <typename T>
[[gnu::noinline]] T opaque(T value) {
  volatile T hidden = value;
  return hidden;
}

template <typename Bugs>
int run_named(const Bugs& bugs, int argc, char** argv) {
  for (const Bug& bug : bugs) {
    if (argc == 2 && std::strcmp(argv[1], bug.name) == 0) {
      bug.run();
      std::puts("the bug went unnoticed");
      return 0;
    }
  }
  std::puts("expected the name of a planted bug");
  return 2;
}

}  // namespace switchgear::planted
