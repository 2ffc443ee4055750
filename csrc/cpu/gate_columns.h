// SPDX-License-Identifier: BSD-3-Clause
// Position of gate and up in the N columns of the first projection: side by side (all gates, then all ups), interleaved
// (gpt-oss), or gate only (plain experts). A block of `count` columns of `a` needs up to two panels of columns of h.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "switchgear/ops.h"

namespace switchgear::cpu {

struct GateColumns {
  int64_t begin[2];
  int64_t count[2];
};

inline GateColumns gate_columns(const GluOptions& options, int64_t intermediate_size, int64_t column, int64_t count,
                                int64_t panel) {
  if (!options.gated) return {{column, 0}, {count, 0}};
  if (!options.interleaved) return {{column, intermediate_size + column}, {count, count}};
  const int64_t first = std::min(panel, 2 * count);
  return {{2 * column, 2 * column + first}, {first, 2 * count - first}};
}

struct GateRow {
  float gate[kMaxPanel], up[kMaxPanel];
};

struct GateUp {
  float *gate, *up;
};

// Splits one row of h into gate and up: the parts themselves, or shuffled into `row` if they are interleaved.
inline GateUp split_gate(GateRow& row, float* part0, float* part1, const GluOptions& options,
                         const GateColumns& columns, int64_t count) {
  if (!options.gated || !options.interleaved) return {part0, part1};
  const auto element = [&](int64_t i) { return i < columns.count[0] ? part0[i] : part1[i - columns.count[0]]; };
  for (int64_t j = 0; j < count; ++j) {
    row.gate[j] = element(2 * j);
    row.up[j] = element(2 * j + 1);
  }
  return {row.gate, row.up};
}

// The inverse, after gate and up were overwritten in place.
inline void merge_gate(float* part0, float* part1, const GateRow& row, const GluOptions& options,
                       const GateColumns& columns, int64_t count) {
  if (!options.gated || !options.interleaved) return;
  const auto element = [&](int64_t i) -> float& {
    return i < columns.count[0] ? part0[i] : part1[i - columns.count[0]];
  };
  for (int64_t j = 0; j < count; ++j) {
    element(2 * j) = row.gate[j];
    element(2 * j + 1) = row.up[j];
  }
}

}  // namespace switchgear::cpu
