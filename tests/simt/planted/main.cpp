// SPDX-License-Identifier: BSD-3-Clause
// planted --list: one line per plant, with its name and the builds that must detect it.
#include <cstdio>
#include <cstring>

#include "planted.h"

extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "detect_stack_use_after_return=0:malloc_context_size=1";
}

int main(int argc, char** argv) {
  using simt::planted::Seen;
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const auto& plant : simt::planted::plants()) {
      const char* seen = plant.seen == Seen::kByBoth ? "asan,race" : plant.seen == Seen::kByAsan ? "asan" : "race";
      std::printf("%s %s\n", plant.name, seen);
    }
    return 0;
  }
  if (argc != 3) {
    std::fprintf(stderr, "planted NAME clean|planted, or planted --list\n");
    return 2;
  }
  for (const auto& plant : simt::planted::plants()) {
    if (std::strcmp(plant.name, argv[1]) != 0) continue;
    try {
      plant.run(std::strcmp(argv[2], "planted") == 0);
      return 0;
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      return 1;
    }
  }
  std::fprintf(stderr, "no plant named %s\n", argv[1]);
  return 2;
}
