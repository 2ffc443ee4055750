// SPDX-License-Identifier: BSD-3-Clause
// dot_products with B in GGUF's blocks (gguf.h). Included by kernels.inl after dot_products.inl.
//
//   work 2·M·N·K flop, and decoding each weight once per product; traffic: weights once, rows of A from L1 or L2
//   A chunk of some rows of B is decoded to float32 in the scratch and multiplied from there: few at a time if A has few rows, so
//   that they stay in L1.
// Values are exact and rows of A are not rounded. Sums have the order of dot_products in float32.
#pragma once
#include "gguf_blocks.h"

namespace switchgear::cpu {
namespace {

// Columns [first, first + count) of a row of B in float32; `first` starts a block. Writes up to the end of a unit.
template <Format kFormat>
void decode_columns(float* out, const uint8_t* row, int64_t first, int64_t count) {
  constexpr int64_t kColumns = gguf_type(kFormat).columns, kUnit = Block<kFormat>::kUnit;
  const uint8_t* block = row + first / kColumns * gguf_type(kFormat).bytes;
  for (int64_t c = 0; c < count; block += gguf_type(kFormat).bytes) {
    const Factors f = Block<kFormat>::factors(block);
    for (int unit = 0; unit < kColumns / kUnit && c < count; ++unit, c += kUnit, out += kUnit) {
      decode_unit<kFormat>(out, block, f, unit);
    }
  }
}

template <Format kFormat>
void gguf_products_of(const Product& product) {
  using Words = FloatWords<float>;
  constexpr int64_t kFewColumns = 4;  // 16 KB
  const int64_t depth = product.depth, num_columns = product.num_columns, stride = product.b.n_stride;
  const auto* const b = static_cast<const uint8_t*>(product.b.data);
  float* const decoded = static_cast<float*>(product.scratch);
  const void* widened_rows[kMaxRows];
  __builtin_memset(product.c, 0, sizeof(float) * kPanel * static_cast<size_t>(product.num_rows));
  const int64_t at_once = product.num_rows <= kTileRows ? kFewColumns : num_columns;
  for (int64_t k = 0; k < depth; k += kChunkWords) {
    const int64_t count = depth - k < kChunkWords ? depth - k : kChunkWords;
    const Rows rows = rows_from(product, product.b.dtype, false, k, count, widened_rows);
    for (int64_t n = 0; n < num_columns; n += at_once) {
      Product part = product;
      part.c = product.c + n;
      const int64_t columns = num_columns - n < at_once ? num_columns - n : at_once;
      for (int64_t j = 0; j < columns; ++j) {
        decode_columns<kFormat>(decoded + j * kScratchRow, b + (n + j) * stride, k, count);
      }
      add_dot_chunk<Words>(part, rows, {decoded, kScratchRow, columns, count}, nullptr, 0);
    }
  }
}

void gguf_products(const Product& product) {
  with_format<is_gguf>(product.b.format, [&]<Format kFormat>() { gguf_products_of<kFormat>(product); });
}

// See Kernels::expand_rows.
template <Format kFormat>
void expand_gguf_rows_of(void* out, int64_t stride, const Matrix& b, int64_t num_rows, int64_t first, int64_t count) {
  constexpr int64_t kColumns = gguf_type(kFormat).columns;
  constexpr int kUnit = Block<kFormat>::kUnit;
  for (int64_t n = 0; n < num_rows; ++n) {
    const auto* const row = static_cast<const uint8_t*>(b.data) + n * b.n_stride;
    for (int64_t c = first, length; c < first + count; c += length) {
      const int64_t begin = c % kUnit;
      length = kUnit - begin < first + count - c ? kUnit - begin : first + count - c;
      const uint8_t* const block = row + c / kColumns * gguf_type(kFormat).bytes;
      float values[kUnit] = {};  // GCC 12 does not see that all are written
      decode_unit<kFormat>(values, block, Block<kFormat>::factors(block), static_cast<int>(c % kColumns / kUnit));
      store_row(static_cast<char*>(out) + (n * stride + c - first) * size_of(b.dtype), b.dtype, values + begin, length);
    }
  }
}

void expand_gguf_rows(void* out, int64_t stride, const Matrix& b, int64_t num_rows, int64_t first, int64_t count) {
  with_format<is_gguf>(b.format,
                       [&]<Format kFormat>() { expand_gguf_rows_of<kFormat>(out, stride, b, num_rows, first, count); });
}

}  // namespace
}  // namespace switchgear::cpu
