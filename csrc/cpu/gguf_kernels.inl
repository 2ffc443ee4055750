// SPDX-License-Identifier: BSD-3-Clause
// Products of int8 activations and GGUF's blocks: included after simd_<isa>.h and gguf_blocks.h. gguf_dots.inl has them for an
// ISA that adds four products of bytes at once, gguf_lanes.inl for all others.
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int kPanel = kPanelVectors * kLanes;
constexpr int64_t kWide = 256, kNarrow = 32;  // columns of a block
#if defined(__AVX512VNNI__)
constexpr bool kHasDots = true;
constexpr int64_t kPaddedColumns = 512;  // values of a row of activations are padded to a multiple, with zeros
#else
constexpr bool kHasDots = false;
constexpr int64_t kPaddedColumns = 64;
#endif

inline void prefetch_lines(const uint8_t* p, int64_t bytes) {
  constexpr int64_t kAheadBytes = 8192;
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(p + line + kAheadBytes, 0, 2);  // into L2
}

// Calls function.operator()<n>() for n = count, 1 <= count <= kMost.
template <int kMost, typename Function>
inline void with_count(int64_t count, Function&& function) {
  if (count == kMost) return function.template operator()<kMost>();
  if constexpr (kMost > 1) with_count<kMost - 1>(count, function);
}

}  // namespace
}  // namespace switchgear::cpu

#if defined(__AVX512VNNI__)
#include "cpu/gguf_dots.inl"
#else
#include "cpu/gguf_lanes.inl"
#endif

namespace switchgear::cpu {
namespace {

void multiply(const Product& p) {
  with_format<is_gguf>(p.b.format, [&]<Format kFormat>() { multiply_of<kFormat>(p); });
  if (p.num_columns == kPanel) return;
  for (int64_t m = 0; m < p.num_rows; ++m) {
    __builtin_memset(p.c + m * kPanel + p.num_columns, 0, static_cast<size_t>(kPanel - p.num_columns) * 4);
  }
}

// ---- activations ---------------------------------------------------------------------------------------------------------

// Where the values of a block's columns [16 · half, + 16) are. gguf_dots.inl reads those of 16 blocks of 32 columns as four vectors of
// first and four of last columns, of each fourth block.
constexpr int64_t value_at(int64_t k, int64_t group) {
  if (!kHasDots || group != kNarrow) return k;
  const int64_t block = k / kNarrow % 16;
  return k / 512 * 512 + block % 4 * 128 + k % kNarrow / 16 * 64 + block / 4 * 16 + k % 16;
}

template <typename T>
void quantize_elements(char* out, const T* elements, int64_t columns, int64_t group) {
  const GgufRow row(columns);
  auto* const values = reinterpret_cast<int8_t*>(out);
  auto* const sums = reinterpret_cast<int16_t*>(out + row.sums);
  auto* const block_sums = reinterpret_cast<int32_t*>(out + row.sums);
  auto* const scales = reinterpret_cast<float*>(out + row.scales);
  auto* const offsets = reinterpret_cast<float*>(out + row.offsets);
  const bool has_block_sums = kHasDots && group == kNarrow;
  const int64_t groups = columns / group, padded = (columns + kPaddedColumns - 1) / kPaddedColumns * kPaddedColumns;
  if (padded > columns) __builtin_memset(values + padded - kPaddedColumns, 0, kPaddedColumns);
  for (int64_t k = 0, b = 0; k < columns; k += group, ++b) {
    Ints largest = {};  // bits of magnitudes, which order as the numbers do, NaN last
    for (int64_t i = k; i < k + group; i += kLanes) {
      const Ints bits = reinterpret_cast<Ints>(load(elements + i)) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    int32_t bits = 0;
    for (int l = 0; l < kLanes; ++l) bits = largest[l] > bits ? largest[l] : bits;
    const float magnitude = __builtin_bit_cast(float, bits);
    const bool is_finite = bits < 0x7f800000, is_zero = !is_finite || magnitude < 0x1p-100f;
    scales[b] = is_finite ? (is_zero ? 0.0f : magnitude / 127.0f) : __builtin_nanf("");
    const Floats inverse = broadcast(is_zero ? 0.0f : 127.0f / magnitude), shift = broadcast(0x1.8p23f);
    for (int64_t i = k; i < k + group; i += kLanes) {
      const Floats x = is_finite ? load(elements + i) : broadcast(0.0f);
      const Ints rounded = reinterpret_cast<Ints>(x * inverse + shift) - reinterpret_cast<Ints>(shift);
      typedef int8_t Numbers __attribute__((vector_size(kLanes)));
      const auto numbers = __builtin_convertvector(rounded, Numbers);
      __builtin_memcpy(values + value_at(i, group), &numbers, sizeof numbers);
    }
    int32_t whole = 0;
    for (int64_t i = k; i < k + group; i += 16) {
      const int8_t* const sixteen = values + value_at(i, group);
      int32_t sum = 0;
      for (int l = 0; l < 16; ++l) sum += sixteen[l];
      if (!has_block_sums) sums[i / 16] = static_cast<int16_t>(sum);
      whole += sum;
    }
    if (has_block_sums) block_sums[b] = -128 * whole;
    offsets[b] = scales[b] * static_cast<float>(whole);
  }
  for (int64_t b = groups; b < (groups + 15) / 16 * 16; ++b) {
    scales[b] = offsets[b] = 0.0f;
    if (has_block_sums) block_sums[b] = 0;
  }
}

void quantize_row(void* out, const void* row, DType dtype, int64_t columns, int64_t group) {
  auto* const bytes = static_cast<char*>(out);
  switch (dtype) {
    case DType::kBFloat16: return quantize_elements(bytes, static_cast<const BFloat16*>(row), columns, group);
    case DType::kFloat16: return quantize_elements(bytes, static_cast<const Float16*>(row), columns, group);
    default: return quantize_elements(bytes, static_cast<const float*>(row), columns, group);
  }
}

constexpr GgufKernels make_table(const char*) { return {.multiply = multiply, .quantize_row = quantize_row}; }

}  // namespace
}  // namespace switchgear::cpu
