// SPDX-License-Identifier: BSD-3-Clause
// The names that Python uses for the values of an enum.
#pragma once
#include <array>
#include <string>
#include <string_view>
#include <utility>

#include "switchgear/check.h"
#include "switchgear/tensor.h"

namespace switchgear {

template <typename Enum, size_t n>
using Names = std::array<std::pair<std::string_view, Enum>, n>;

template <typename Enum, size_t n>
Enum parse(const char* name, const Names<Enum, n>& names, std::string_view value) {
  std::string expected;
  for (const auto& [text, result] : names) {
    if (text == value) return result;
    if (!expected.empty()) expected += ", ";
    expected += text;
  }
  throw ValueError(join(name, ": expected one of ", expected, ", got ", value));
}

inline constexpr Names<DType, 3> kFloats{
    {{"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16}}};

}  // namespace switchgear
