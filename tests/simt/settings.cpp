// SPDX-License-Identifier: BSD-3-Clause
#include <cstdlib>
#include <string>

#include "runtime.h"

namespace simt {
namespace {

Options options_from_environment() {
  Options options;
  const char* variable = std::getenv("SWITCHGEAR_SIMT_ORDER");
  const std::string text = variable == nullptr ? "forward" : variable;
  if (text == "forward") return options;
  if (text == "reverse") {
    options.order = Order::kReverse;
    return options;
  }
  const std::string prefix = "random:";
  char* end = nullptr;
  if (text.rfind(prefix, 0) == 0 && text.size() > prefix.size()) {
    options.order = Order::kRandom;
    options.seed = std::strtoull(text.c_str() + prefix.size(), &end, 10);
    if (*end == '\0') return options;
  }
  throw Error("SWITCHGEAR_SIMT_ORDER: expected forward, reverse or random:SEED, got " + text);
}

Device device_from_environment() {
  const char* variable = std::getenv("SWITCHGEAR_SIMT_DEVICE");
  const std::string text = variable == nullptr ? "sm_90" : variable;
  if (text == "sm_80") return sm_80();
  if (text == "sm_86") return sm_86();
  if (text == "sm_90") return sm_90();
  throw Error("SWITCHGEAR_SIMT_DEVICE: expected sm_80, sm_86 or sm_90, got " + text);
}

}  // namespace

OtherKernels other_kernels{};

Options& options() {
  static Options options = options_from_environment();
  return options;
}

Device& device() {
  static Device device = device_from_environment();
  return device;
}

Device sm_80() { return {.major = 8, .minor = 0, .multiprocessors = 4, .shared_memory_per_block = 166912}; }
Device sm_86() { return {.major = 8, .minor = 6, .multiprocessors = 4, .shared_memory_per_block = 101376}; }
Device sm_90() { return {}; }

Statistics& statistics() {
  static Statistics statistics;
  return statistics;
}

}  // namespace simt
