// SPDX-License-Identifier: BSD-3-Clause
#include "decoded_columns.h"

#include "integers/experts.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kPanel = kDecodedColumns;

// panel[n, j] = W[n, column + j] in `dtype`, for all rows of an expert.
void decode_integers(const Context& context, void* panel, DType dtype, const Weight& weight, int64_t expert,
                     int64_t column, int64_t columns) {
  const IntegerMatrix matrix(weight, expert);
  const int64_t part_rows = matrix.part_rows(), row_bytes = kPanel * size_of(dtype);
  float block[kBlockRows * kPanel];
  for (int64_t part = 0; part < weight.parts; ++part) {
    const IntegerPanel blocks = matrix.from(part * part_rows);
    for (int64_t row = 0; row < part_rows; row += kBlockRows) {
      context.integers.dequantize(block, kPanel, blocks, row, column, columns);
      for (int64_t i = 0; i < std::min(kBlockRows, part_rows - row); ++i) {
        char* const out = static_cast<char*>(panel) + (part * part_rows + row + i) * row_bytes;
        context.kernels.store_row(out, dtype, block + i * kPanel, columns);
      }
    }
  }
}

void decode(const Context& context, void* panel, DType dtype, const Weight& weight, int64_t expert, int64_t column,
            int64_t columns) {
  if (is_integer(weight.format)) return decode_integers(context, panel, dtype, weight, expert, column, columns);
  const ExpertMatrix matrix(weight, expert, dtype);
  if (!has_parts(weight.format)) {
    return context.kernels.expand_rows(panel, kPanel, matrix.rows_from(0), weight.cols, weight.rows, column, columns);
  }
  const int64_t part_rows = weight.rows / weight.parts, row_bytes = kPanel * size_of(dtype);
  for (int64_t row = 0; row < weight.rows; row += part_rows) {
    char* const out = static_cast<char*>(panel) + row * row_bytes;
    const Matrix part = matrix.rows_from(row);
    if (is_gguf(weight.format)) {
      context.kernels.expand_rows(out, kPanel, part, weight.cols, part_rows, column, columns);
    } else {
      context.kernels.expand_minifloats(out, kPanel, dtype, part, part_rows, column, columns);
    }
  }
}

}  // namespace

Matrix columns_in_place(const Weight& weight, int64_t expert, int64_t column, DType dtype) {
  if (weight.format == Format::kPlain) return ExpertMatrix(weight, expert, dtype).columns_from(column);
  const int64_t slot = weight.slot_of(expert), groups = weight.scales.shape[2];
  Matrix whole{.dtype = dtype, .n_stride = weight.data.shape[2] * weight.data.shape[3], .format = weight.format};
  whole.scale_stride = groups * kMinifloatRows * size_of(weight.scales.dtype);
  whole.group_size = weight.group_size > 0 ? weight.group_size : std::max<int64_t>(weight.cols, 1);
  whole.data = row_of(weight.data, slot);
  whole.scales = row_of(weight.scales, slot);
  if (weight.row_scales.defined()) {
    whole.row_scales = weight.row_scales.as<const float>() + slot * weight.row_scales.stride[0];
  }
  if (weight.zeros.defined()) whole.zeros = row_of(weight.zeros, slot);
  return columns_at(whole, column, 0);
}

Matrix DecodedColumns::of(int64_t expert, int64_t column, int64_t columns, const Context& context) {
  if (in_place(weight_, dtype_, context.kernels)) return columns_in_place(weight_, expert, column, dtype_);
  if (expert != expert_ || column != column_) {
    decode(context, memory_, dtype_, weight_, expert, column, columns);
    expert_ = expert;
    column_ = column;
  }
  return {.data = memory_, .dtype = dtype_, .n_stride = 1, .k_stride = kPanel};
}

}  // namespace switchgear::cpu
