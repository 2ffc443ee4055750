// SPDX-License-Identifier: BSD-3-Clause
// A place in a kernel: a line of C++, or an instruction of the PTX that nvcc made of it.
#pragma once
#include <cstdint>
#include <source_location>
#include <string_view>

namespace simt {

// An instruction of PTX, and the line it comes from.
struct PtxPlace {
  const char* file = "";
  const char* kernel = "";
  std::string_view text = "";  // of the instruction
  uint32_t line = 0, column = 0, ptx_line = 0;
};

class Location {
 public:
  constexpr Location() = default;
  constexpr explicit Location(std::source_location at) : cxx_(at) {}
  constexpr explicit Location(const PtxPlace* at) : ptx_(at) {}
  static constexpr Location current(std::source_location at = std::source_location::current()) { return Location(at); }

  constexpr const char* file_name() const { return ptx_ != nullptr ? ptx_->file : cxx_.file_name(); }
  constexpr uint32_t line() const { return ptx_ != nullptr ? ptx_->line : cxx_.line(); }
  constexpr uint32_t column() const { return ptx_ != nullptr ? ptx_->column : cxx_.column(); }
  constexpr const PtxPlace* ptx() const { return ptx_; }  // null in C++

 private:
  std::source_location cxx_;
  const PtxPlace* ptx_ = nullptr;
};

}  // namespace simt
