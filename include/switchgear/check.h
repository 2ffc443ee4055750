// SPDX-License-Identifier: BSD-3-Clause
// The two exceptions for invalid arguments. Python sees them as ValueError and TypeError.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace switchgear {

struct ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};
struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace switchgear

// SWITCHGEAR_CHECK(ValueError, condition, "argument: expected …, got ", what)
#define SWITCHGEAR_CHECK(Error, condition, ...)                                   \
  do {                                                                            \
    if (!(condition)) throw ::switchgear::Error(::switchgear::join(__VA_ARGS__)); \
  } while (false)
