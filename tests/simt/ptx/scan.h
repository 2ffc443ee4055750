// SPDX-License-Identifier: BSD-3-Clause
// Reads PTX word by word.
#pragma once
#include <cctype>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

namespace simt::ptx {

class Scanner {
 public:
  Scanner(std::string_view text, uint32_t line) : at_(text.data()), end_(text.data() + text.size()), line_(line) {}

  uint32_t line() const { return line_; }
  const char* position() const { return at_; }

  [[noreturn]] void error(const std::string& what) const {
    const std::string near(at_, std::min<size_t>(60, static_cast<size_t>(end_ - at_)));
    throw std::runtime_error("PTX line " + std::to_string(line_) + ": " + what + ", at: " + near);
  }

  // The next character after white space and comments; '\0' at the end.
  char peek() {
    while (at_ < end_) {
      if (*at_ == '\n') ++line_;
      if (std::isspace(static_cast<unsigned char>(*at_)) != 0) {
        ++at_;
      } else if (*at_ == '/' && at_ + 1 < end_ && at_[1] == '/') {
        skip_line();
      } else {
        return *at_;
      }
    }
    return '\0';
  }
  bool accept(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) error(std::string("expected ") + c);
  }

  // A name, number, directive or opcode: with its dots, and with the double colons of state spaces.
  std::string_view word() {
    peek();
    const char* const start = at_;
    while (at_ < end_) {
      if (at_ + 1 < end_ && at_[0] == ':' && at_[1] == ':') {
        at_ += 2;
      } else if (is_word(*at_)) {
        ++at_;
      } else {
        break;
      }
    }
    if (at_ == start) error("expected a word");
    return {start, static_cast<size_t>(at_ - start)};
  }
  int64_t number() { return std::stoll(std::string(word()), nullptr, 0); }

  std::string_view rest_of_line() {
    const char* const start = at_;
    skip_line();
    return {start, static_cast<size_t>(at_ - start)};
  }
  // Moves behind the character.
  void skip_past(char c) {
    while (at_ < end_ && *at_ != c) line_ += *at_++ == '\n';
    if (at_ < end_) ++at_;
  }
  // Moves behind the brace that matches one already read.
  void skip_braces() {
    for (int depth = 1; depth > 0;) {
      switch (peek()) {
        case '\0': error("a brace is missing");
        case '{': ++depth; break;
        case '}': --depth; break;
        default: break;
      }
      ++at_;
    }
  }

 private:
  static bool is_word(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '$' || c == '%' || c == '.' || c == '-';
  }
  void skip_line() {
    const void* found = std::memchr(at_, '\n', static_cast<size_t>(end_ - at_));
    at_ = found == nullptr ? end_ : static_cast<const char*>(found);
  }

  const char* at_;
  const char* end_;
  uint32_t line_;
};

}  // namespace simt::ptx
