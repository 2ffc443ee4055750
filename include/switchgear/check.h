// SPDX-License-Identifier: BSD-3-Clause
// The two exceptions for invalid arguments. Python sees them as ValueError and TypeError.
#pragma once
#include <initializer_list>
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

// A piece of a message. One function prints all pieces of a type, so each message adds little code.
class Part {
 public:
  Part(const char* text)
      : value_(text), print_([](std::ostream& out, const void* p) { out << static_cast<const char*>(p); }) {}
  template <typename T>
  Part(const T& value)
      : value_(&value), print_([](std::ostream& out, const void* p) { out << *static_cast<const T*>(p); }) {}
  void print(std::ostream& out) const { print_(out, value_); }

 private:
  const void* value_;
  void (*print_)(std::ostream&, const void*);
};

inline std::string join_parts(std::initializer_list<Part> parts) {
  std::ostringstream out;
  for (const Part& part : parts) part.print(out);
  return out.str();
}

template <typename... Parts>
std::string join(const Parts&... parts) {
  return join_parts({Part(parts)...});
}

}  // namespace switchgear

// SWITCHGEAR_CHECK(ValueError, condition, "argument: expected …, got ", what)
#define SWITCHGEAR_CHECK(Error, condition, ...)                                   \
  do {                                                                            \
    if (!(condition)) throw ::switchgear::Error(::switchgear::join(__VA_ARGS__)); \
  } while (false)
