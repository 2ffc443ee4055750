// SPDX-License-Identifier: BSD-3-Clause
// The names that Python uses for the values of an enum, and those of tensors in errors.
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

// The tensors of a weight.
struct WeightNames {
  const char *data, *scales, *row_scales, *zeros, *records, *slots;
};
inline constexpr WeightNames kWeight{"weight",       "weight_scales",  "weight_row_scales",
                                     "weight_zeros", "weight_records", "weight_slots"};
inline constexpr WeightNames kGateUpProj{"gate_up_proj",       "gate_up_proj_scales",  "gate_up_proj_row_scales",
                                         "gate_up_proj_zeros", "gate_up_proj_records", "gate_up_proj_slots"};
inline constexpr WeightNames kDownProj{"down_proj",       "down_proj_scales",  "down_proj_row_scales",
                                       "down_proj_zeros", "down_proj_records", "down_proj_slots"};

struct AdapterNames {
  const char *adapter, *a, *b, *scales, *ranks;
};
inline constexpr AdapterNames kGateUpAdapter{"gate_up_adapter", "gate_up_adapter_a", "gate_up_adapter_b",
                                             "gate_up_adapter_scales", "gate_up_adapter_ranks"};
inline constexpr AdapterNames kDownAdapter{"down_adapter", "down_adapter_a", "down_adapter_b", "down_adapter_scales",
                                           "down_adapter_ranks"};

inline constexpr Names<DType, 3> kFloats{
    {{"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16}}};

}  // namespace switchgear
