// SPDX-License-Identifier: BSD-3-Clause
// Small kernels, each with a mistake that can be switched on: `planted NAME clean` must pass, `planted NAME planted` must
// fail. This tests the runtime's detection, and shows its messages.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "launch.h"

namespace simt::planted {

// The builds that must detect the mistake in every order of threads. Others may detect it too.
enum class Seen { kByBoth, kByAsan, kByRace };

struct Plant {
  const char* name;
  Seen seen;
  void (*run)(bool planted);
};
inline std::vector<Plant>& plants() {
  static std::vector<Plant> all;
  return all;
}
struct Register {
  Register(const char* name, Seen seen, void (*run)(bool)) { plants().push_back({name, seen, run}); }
};

inline void expect(bool condition, const std::string& text) {
  if (!condition) throw simt::Error("wrong values: " + text);
}

}  // namespace simt::planted

#define PLANT(name, seen)                                                                       \
  static void name(bool planted);                                                               \
  static const simt::planted::Register register_##name(#name, simt::planted::Seen::seen, name); \
  static void name(bool planted)
