// SPDX-License-Identifier: BSD-3-Clause
// The vector part of weight_gradient.cpp: transposes a block of columns of `left` and multiplies it by a panel of columns of
// `right`. Included by kernels.inl after multiply.inl, whose words and packing it shares.
//
//   work 2·M·N·S flop and M·N elements written, S short: 64 slots are 32 words of bfloat16, 384 cycles of multiply-adds per
//   tile. Storing 24 accumulators to a buffer and reading it again took 250. So a finished tile is rounded in registers and
//   its rows are stored as whole lines. Tiles alone reach 93 % of the multiply-adds at 32 and at 64 slots.
//
// The order of each sum is that of multiply.inl: one accumulator, slots ascending, whatever the block and the panel.
#pragma once

namespace switchgear::cpu {
namespace {

// ---- transposing `left` --------------------------------------------------------------------------------------------------

// out[c][w] = word w of column first_column + c: slot w, or the pair of slots 2w and 2w + 1; zero after the last slot. Rows of
// `out` are `stride` words apart.
template <typename Words>
void transpose_words(float* out, int64_t stride, const void* const* rows, int64_t num_rows, int64_t first_column,
                     int64_t columns) {
  using T = Element<Words>;
  const int64_t words = (num_rows + Words::kDepth - 1) / Words::kDepth;
  for (int64_t w0 = 0; w0 < words; w0 += kLanes) {
    const int64_t count = words - w0 < kLanes ? words - w0 : kLanes;
    for (int64_t c0 = 0; c0 < columns; c0 += kLanes) {
      const int64_t valid = columns - c0 < kLanes ? columns - c0 : kLanes;
      Floats block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        if (i >= count) {
          block[i] = broadcast(0.0f);
          continue;
        }
        const int64_t slot = (w0 + i) * Words::kDepth, last = slot + Words::kDepth - 1;
        const T* const low = static_cast<const T*>(rows[slot]) + first_column + c0;
        const T* const high = last < num_rows ? static_cast<const T*>(rows[last]) + first_column + c0 : nullptr;
        block[i] = Words::load_along_n(low, high, valid);
      }
      transpose(block);
      float* target = out + c0 * stride + w0;
      for (int64_t c = 0; c < valid; ++c, target += stride) store_some(target, block[c], count);
    }
  }
}

// ---- storing a tile ------------------------------------------------------------------------------------------------------

// The row, rounded, plus the one that is there: the bits of a tensor of gradients that is added to another.
template <typename T, int kVectors>
inline void add_rounded(Floats (&row)[kVectors], const T* p, int64_t columns) {
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const int64_t count = columns - j * kLanes;
    if (count <= 0) return;
    alignas(kLine) T rounded[kLanes];
    store(rounded, row[j]);
    const Floats there = count < kLanes ? load_some(p + j * kLanes, count) : load(p + j * kLanes);
    row[j] = multiply_add(load(static_cast<const T*>(rounded)), broadcast(1.0f), there);
  }
}

// Stores a row of a tile, rounded. Whole lines that are not read soon go past the caches: a cached store first fetches the
// line that it overwrites.
template <typename T, int kVectors>
inline void store_rounded(T* p, const Floats (&row)[kVectors], int64_t columns, bool past_caches,
                          [[maybe_unused]] bool may_be_subnormal) {
  constexpr int kPerLine = kLine / sizeof(T) / kLanes;  // vectors per line
  if (past_caches && columns == kVectors * kLanes && kVectors % kPerLine == 0) {
#pragma GCC unroll 4
    for (int j = 0; j + kPerLine <= kVectors; j += kPerLine) {
      T* const target = p + j * kLanes;
      if constexpr (sizeof(T) == sizeof(float)) {
#pragma GCC unroll 4
        for (int i = 0; i < kPerLine; ++i) stream(target + i * kLanes, row[j + i]);
      } else {
#ifdef __AVX512BF16__
        if (__is_same(T, BFloat16) && !may_be_subnormal) {  // sums of vdpbf16ps are never
          stream_normals(reinterpret_cast<BFloat16*>(target), row[j], row[j + 1]);
          continue;
        }
#endif
        alignas(kLine) T line[kLine / sizeof(T)];
        for (int i = 0; i < kPerLine; ++i) store(line + i * kLanes, row[j + i]);
        constexpr int kFloats = kLine / sizeof(float);
        for (int i = 0; i < kFloats; i += kLanes) {
          stream(reinterpret_cast<float*>(target) + i, load(reinterpret_cast<const float*>(line) + i));
        }
      }
    }
    return;
  }
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const int64_t count = columns - j * kLanes;
    if (count > 0) store_some(p + j * kLanes, row[j], count < kLanes ? count : kLanes);
  }
}

// ---- tiles ---------------------------------------------------------------------------------------------------------------

// A chunk of the slots: `words` words from `left` on, and the packed panel of `right`.
struct SlotChunk {
  const float* left;
  int64_t left_stride;
  const float* panel;
  int64_t words;
  bool is_first, is_last;
};

// kRows rows of the first kVectors vectors of the panel. Between chunks the sums are kept in `carried`.
template <int kRows, int kVectors, typename Words>
void gradient_tile(const SlotChunk& chunk, const GradientPanel& to, int64_t m) {
  using T = Element<Words>;
  const float* a[kRows];
  Floats acc[kRows][kVectors];
  float* const carried = to.carried + m * kPanel;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    a[i] = chunk.left + (m + i) * chunk.left_stride;
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) {
      acc[i][j] = chunk.is_first ? broadcast(0.0f) : load(carried + i * kPanel + j * kLanes);
    }
  }
  T* const out = static_cast<T*>(to.out) + m * to.out_stride;
  if (to.adds && chunk.is_last) {  // the rows of the next tile, which memory delivers while this one multiplies
    for (int64_t i = kRows; i < 2 * kRows && m + i < to.num_rows; ++i) {
      const char* const row = reinterpret_cast<const char*>(out + i * to.out_stride);
      for (int64_t b = 0; b < to.num_columns * static_cast<int64_t>(sizeof(T)); b += kLine) __builtin_prefetch(row + b);
    }
  }
  const float* panel = chunk.panel;
  for (int64_t p = 0; p < chunk.words; ++p, panel += kPanel) {
    Floats b[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) b[j] = load(panel + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto word = broadcast_word(a[i] + p);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) acc[i][j] = step<Words::kDepth == 2>(word, b[j], acc[i][j]);
    }
  }
  if (!chunk.is_last) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) store(carried + i * kPanel + j * kLanes, acc[i][j]);
    }
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    T* const row = out + i * to.out_stride;
    if (to.adds) add_rounded(acc[i], row, to.num_columns);
    store_rounded(row, acc[i], to.num_columns, to.past_caches, to.adds);
  }
}

// All rows of a panel of which kVectors vectors have columns. A tile of half or a quarter of a panel has twice as many rows:
// 6 rows of one vector are 6 chains of multiply-adds, and the pipes need about 8.
template <int kVectors, typename Words>
void gradient_rows(const SlotChunk& chunk, const GradientPanel& product) {
  constexpr int kRows = 2 * kVectors <= kPanelVectors ? 2 * kTileRows : kTileRows;
  int64_t m = 0;
  if constexpr (kRows > kTileRows) {
    for (; m + kRows <= product.num_rows; m += kRows) gradient_tile<kRows, kVectors, Words>(chunk, product, m);
  }
  const int64_t tiles = num_row_tiles(product.num_rows - m);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t rows = (product.num_rows - m) / (tiles - t);
    with_constant<kTileRows>(rows, [&]<int kFew>() { gradient_tile<kFew, kVectors, Words>(chunk, product, m); });
    m += rows;
  }
}

template <typename Words>
void gradient_panel_words(const GradientPanel& product) {
  const int64_t words = (product.num_slots + Words::kDepth - 1) / Words::kDepth;
  for (int64_t w = 0; w < words; w += kChunkWords) {
    const int64_t count = words - w < kChunkWords ? words - w : kChunkWords, slot = w * Words::kDepth;
    const int64_t rest = product.num_slots - slot, depth = count * Words::kDepth < rest ? count * Words::kDepth : rest;
    Ahead nothing;
    pack_along_n<Words>(product.packing, product.num_columns, depth, 0, nothing, [&](int64_t s) {
      return static_cast<const Element<Words>*>(product.right[slot + s]) + product.first_column;
    });
    const SlotChunk chunk{.left = product.left + w,
                          .left_stride = words,
                          .panel = product.packing,
                          .words = count,
                          .is_first = w == 0,
                          .is_last = w + count == words};
    if (4 * product.num_columns <= kPanel) {
      gradient_rows<kPanelVectors / 4 == 0 ? 1 : kPanelVectors / 4, Words>(chunk, product);
    } else if (2 * product.num_columns <= kPanel) {
      gradient_rows<kPanelVectors / 2, Words>(chunk, product);
    } else {
      gradient_rows<kPanelVectors, Words>(chunk, product);
    }
  }
}

// ---- entries of the table ------------------------------------------------------------------------------------------------

void transpose_rows(float* out, const void* const* rows, int64_t num_rows, int64_t first_column, int64_t columns,
                    DType dtype) {
  with_words(dtype, [&]<typename Words>() {
    const int64_t words = (num_rows + Words::kDepth - 1) / Words::kDepth;
    transpose_words<Words>(out, words, rows, num_rows, first_column, columns);
  });
}

void gradient_panel(const GradientPanel& product) {
  with_words(product.dtype, [&]<typename Words>() { gradient_panel_words<Words>(product); });
  if (product.past_caches) finish_streams();
}

}  // namespace
}  // namespace switchgear::cpu
