// SPDX-License-Identifier: BSD-3-Clause
// A test program in one header: TEST registers a function, CHECK counts and prints failures, main runs all tests or those
// whose names contain one of the arguments. `note` is the current case, which CHECK also prints. SWITCHGEAR_FAIL_FAST=1: the
// first failure ends the program (0: it does not).
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "switchgear/check.h"

namespace switchgear::test {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline thread_local std::string note;
inline int failures = 0;
inline long checks = 0;

inline void check(bool condition, const char* file, int line, const std::string& text) {
  ++checks;
  if (condition) return;
  constexpr int kMaxPrinted = 20;
  if (++failures <= kMaxPrinted) std::printf("%s:%d: %s [%s]\n", file, line, text.c_str(), note.c_str());
  const char* const fail_fast = std::getenv("SWITCHGEAR_FAIL_FAST");
  if (fail_fast == nullptr || std::strcmp(fail_fast, "0") == 0) return;
  std::fflush(stdout);
  std::_Exit(1);
}

inline int run_tests(int argc, char** argv) {
  for (const Test& test : tests()) {
    bool selected = argc <= 1;
    for (int i = 1; i < argc; ++i) selected |= std::strstr(test.name, argv[i]) != nullptr;
    if (!selected) continue;
    note.clear();
    const int failures_before = failures;
    const long checks_before = checks;
    try {
      test.run();
    } catch (const std::exception& error) {
      check(false, test.name, 0, error.what());
    }
    std::printf("%s %s (%ld checks)\n", failures == failures_before ? "ok    " : "FAILED", test.name,
                checks - checks_before);
    std::fflush(stdout);
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace switchgear::test

// The text is the condition and what follows it; it is made only if a check fails.
#define CHECK(condition, ...)                                                                     \
  do {                                                                                            \
    const bool holds = static_cast<bool>(condition);                                              \
    ::switchgear::test::check(                                                                    \
        holds, __FILE__, __LINE__,                                                                \
        holds ? std::string() : ::switchgear::join(#condition, "; " __VA_OPT__(, ) __VA_ARGS__)); \
  } while (false)

#define TEST(name)                                                        \
  static void name();                                                     \
  static const ::switchgear::test::Register register_##name(#name, name); \
  static void name()
