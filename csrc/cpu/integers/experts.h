// SPDX-License-Identifier: BSD-3-Clause
// Position of the blocks of integer weights, and the activations that they are multiplied by.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/context.h"
#include "cpu/experts.h"
#include "cpu/integers/kernels.h"
#include "cpu/workspace.h"

namespace switchgear::cpu {

// Columns that share a scale of the weights, and of the activations: one or more groups.
inline int64_t group_columns(const Weight& m) { return m.group_size == 0 ? m.cols : m.group_size; }
inline int64_t block_columns(const Weight& m) {
  return m.group_size == 0 ? m.cols : std::max(m.group_size, kActivationBlock);
}

// The matrix of expert e.
class IntegerMatrix {
 public:
  IntegerMatrix(const Weight& m, int64_t e) : m_(m), slot_(m.slot_of(e)) {}

  int64_t part_rows() const { return m_.rows / m_.parts; }

  // The blocks from row `row` on, which starts a block: `row % part_rows() % 16 == 0`.
  IntegerPanel from(int64_t row) const {
    const int64_t part = row / part_rows(), blocks = m_.data.shape[1] / m_.parts;
    const int64_t block = part * blocks + row % part_rows() / kBlockRows;
    const int64_t words = m_.data.shape[2] * 8 / bits_of(m_.format), groups = m_.scales.shape[2];
    return {.values = of<uint8_t>(m_.data) + block * m_.data.shape[2] * m_.data.shape[3],
            .scales = of<int8_t>(m_.scales) + block * groups * kBlockRows,
            .row_scales = of<float>(m_.row_scales) + block * kBlockRows,
            .zeros = m_.zeros.defined() ? of<uint8_t>(m_.zeros) + block * groups * kBlockRows : nullptr,
            .words = words,
            .group_words = groups == 1 ? words : m_.group_size / 4,
            .groups = groups,
            .block_groups = block_columns(m_) / group_columns(m_),
            .bits = static_cast<int>(bits_of(m_.format))};
  }

 private:
  template <typename T>  // the expert's part
  const T* of(const TensorView& field) const {
    return field.as<const T>() + slot_ * field.stride[0];
  }

  const Weight& m_;
  int64_t slot_;
};

// Rows in int8 for products with `weight`: whether they are wide (IntegerRows), their stride, and their bytes of a workspace.
inline bool rows_are_wide(const Weight& weight, const IntegerKernels& kernels) {
  return !kernels.has_dot && bits_of(weight.format) == 8;
}
inline int64_t integer_stride(const Weight& weight, const IntegerKernels& kernels) {
  return Workspace::padded(ceil_div(weight.cols, 8) * 8 * (rows_are_wide(weight, kernels) ? 2 : 1));
}
inline int64_t integer_bytes(int64_t num_rows, const Weight& weight, const IntegerKernels& kernels) {
  return Workspace::padded(num_rows * integer_stride(weight, kernels)) +
         Workspace::padded(num_rows * ceil_div(weight.cols, block_columns(weight)) * 4) +
         Workspace::padded(num_rows * weight.scales.shape[2] * 4);
}

// Quantises `num_rows` rows; rows[r] is at data + r · row_bytes.
IntegerRows quantize_rows(Workspace& workspace, const void* data, int64_t row_bytes, DType dtype, int64_t num_rows,
                          const Weight& weight, const Context& context);

}  // namespace switchgear::cpu
