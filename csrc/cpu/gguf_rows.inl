// SPDX-License-Identifier: BSD-3-Clause
// expand_rows of B in GGUF's blocks (gguf.h): decoded exactly and rounded to the dtype of B. Included by kernels.inl.
#pragma once
#include "gguf_blocks.h"

namespace switchgear::cpu {
namespace {

// Columns [unit · kUnit, + kUnit) of a block in float32.
template <Format kFormat>
[[gnu::noinline]] void decode_unit(float* out, const uint8_t* block, const Factors& f, int unit) {
  using B = Block<kFormat>;
  constexpr int kGroups = B::kUnit / B::kGroup;
  uint8_t codes[B::kUnit];
  B::unpack(codes, block, unit);
  for (int g = 0; g < kGroups; ++g) {
    const int of_block = unit * kGroups + g;
    const float scale = kHasIntegerFactors<kFormat> ? f.d * static_cast<float>(f.s[of_block]) : f.d;
    float min = f.m;
    if constexpr (kHasIntegerFactors<kFormat>) min = B::kHasMins ? f.m * static_cast<float>(f.t[of_block]) : 0.0f;
    for (int i = g * B::kGroup; i < (g + 1) * B::kGroup; ++i) {
      const int code = B::kHasSigns ? static_cast<int8_t>(codes[i]) : codes[i] - B::kOffset;
      out[i] = B::kHasMins ? scale * static_cast<float>(code) - min : scale * static_cast<float>(code);
    }
  }
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
      float values[kUnit];
      decode_unit<kFormat>(values, block, Block<kFormat>::factors(block), static_cast<int>(c % kColumns / kUnit));
      asm volatile("" : : "r"(values) : "memory");  // GCC 12 does not see that all are written, and warns
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
