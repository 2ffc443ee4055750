// SPDX-License-Identifier: BSD-3-Clause
// Products whose B runs along n, x·W: several panels of columns at once.
//
// One panel takes 128 bytes of each row of W, and rows are a page apart. Panel by panel, each page is walked to once per
// panel, and memory delivers two lines of each row it opens. So up to 512 columns advance together through slices of the
// depth: rows are read in runs of 1 KB, and their pages stay in the TLB for all panels. Where rows of A are widened to float32,
// the first panel of a slice does it for all. The order of each sum is unchanged.
#pragma once
#include <algorithm>

#include "context.h"
#include "experts.h"

namespace switchgear::cpu {

constexpr int64_t kWideColumns = 512;
constexpr int64_t kSliceDepth = 256;

// Memory of one thread; c holds panel after panel, [num_rows, panel] each.
struct WideScratch {
  void* packing;
  float* c;

  static constexpr int64_t kBytes = kProductScratch + kMaxRows * kWideColumns * 4;
  explicit WideScratch(char* memory) : packing(memory), c(reinterpret_cast<float*>(memory + kProductScratch)) {}
};

// Columns of one wide product: fewer if there would not be enough products for the threads. Blocks of a single product are
// equally long.
inline int64_t wide_columns(int64_t width, int64_t num_products, int64_t panel, int num_threads) {
  const auto is_balanced = [&](int64_t tasks) {
    return tasks >= 4 * num_threads || (num_products == 1 && tasks % num_threads == 0);
  };
  int64_t wide = kWideColumns;
  while (wide > panel && !is_balanced(num_products * ceil_div(width, wide))) wide /= 2;
  return wide;
}

// multiply of up to kWideColumns columns.
inline void multiply_wide(const Kernels& k, const Product& product) {
  const Matrix& b = product.b;
  const int64_t panels = ceil_div(product.num_columns, k.panel), element = size_of(b.dtype);
  const bool is_plain = b.format == Format::kPlain;
  const int64_t slice = b.n_stride == 1 || !is_plain ? kSliceDepth : std::max<int64_t>(product.depth, 1);
  const auto shifted = [](const void* next, const void* from, const void* to) -> const void* {
    if (next == nullptr) return nullptr;
    return static_cast<const char*>(next) + (static_cast<const char*>(to) - static_cast<const char*>(from));
  };
  for (int64_t begin = 0; begin < product.depth || begin == 0; begin += slice) {
    for (int64_t j = 0; j < panels; ++j) {
      Product part = product;
      part.b = columns_at(b, j * k.panel, begin);
      part.num_columns = std::min<int64_t>(k.panel, product.num_columns - j * k.panel);
      part.row_begin = begin;
      part.depth = std::min(slice, product.depth - begin);
      part.accumulate = product.accumulate || begin > 0;
      part.rows_are_kept = j > 0 && is_plain && part.depth <= kChunkWords;  // one chunk: scratch has all of them
      part.c = product.c + j * product.num_rows * k.panel;
      // Each panel prefetches its share of the rows of the next slice.
      const bool is_last = begin + slice >= product.depth;
      part.next = is_last ? product.next : columns_at(b, 0, begin + slice).start();
      if (is_plain) {
        const Matrix share = columns_at(b, 0, j * slice / panels);
        part.next.data = shifted(part.next.data, b.data, share.data);
        part.next_width = product.num_columns * element;
      } else {  // a stored panel prefetches itself
        const Matrix panel = columns_at(b, j * k.panel, 0);
        part.next = {shifted(part.next.data, b.data, panel.data), shifted(part.next.scales, b.scales, panel.scales)};
      }
      k.multiply(part);
    }
  }
}

// dot_products of up to kWideColumns columns.
inline void dot_products_wide(const Context& context, const Product& product) {
  const Kernels& k = context.kernels;
  for (int64_t column = 0; column < product.num_columns; column += k.panel) {
    Product part = product;
    part.b = product.b.from(column);
    part.num_columns = std::min<int64_t>(k.panel, product.num_columns - column);
    part.c = product.c + column * product.num_rows;
    if (column + k.panel < product.num_columns) part.next = product.b.from(column + k.panel).start();
    dot_products(context, part);
  }
}

}  // namespace switchgear::cpu
