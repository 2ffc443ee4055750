// SPDX-License-Identifier: BSD-3-Clause
// multiply and gradient_panel with tiles: products whose inner index runs across the rows of B. Included by kernels_amx.cpp.
//
//   multiply: C[m,n] = Σ_k A[m,k]·B[k,n]      gradient_panel: out[m,n] = Σ_s left[s][m]·right[s][n]
//
// The first operand is A, or `left` as transpose_left stores it. It is read in place if its 16 rows are equally spaced and
// have 32 k each. Anything else is copied once per product: rows at other addresses, the last 1 to 15 rows, a depth that is
// no multiple of 32. The second operand is a panel of B or `right`, packed: two shuffles make 32 words of two rows.
#pragma once

namespace switchgear::cpu {
namespace {

// ---- C[m,n] = Σ_k A[m,k]·B[k,n] ------------------------------------------------------------------------------------------

class RowProduct {
 public:
  explicit RowProduct(const Product& product) : p_(product), groups_(tiles_of(product.num_rows, kTile)) {}

  void run() const {
    tile_configure(shapes(kTile));
    for (int64_t k = 0; k < p_.depth; k += kChunk) add_chunk(k, at_most(p_.depth - k, kChunk));
    tile_release();
  }

 private:
  static constexpr int64_t kChunk = kChunkWords;             // k
  static constexpr int64_t kCopiedRow = 2 * kChunk + kLine;  // bytes; rows a page apart would share sets of L1
  static constexpr int64_t kTilesBegin = kScratchRow * 4 * kMaxPanel;  // bytes into the scratch, after the packed rows
  static constexpr int64_t kCopiesBegin = kTilesBegin + kPanel * kChunk * 2;
  static constexpr int64_t kSumsBegin = kCopiesBegin + kMaxRows * kCopiedRow;
  static_assert(kSumsBegin + kTile * kPanel * 4 <= kProductScratch && kChunk % kStep == 0);

  char* scratch(int64_t byte) const { return static_cast<char*>(p_.scratch) + byte; }
  int64_t rows_of(int64_t group) const { return at_most(p_.num_rows - group * kTile, kTile); }

  // Packs four rows of tiles of the second operand, `steps` tiles each.
  void pack(float* tiles, int64_t k, int64_t depth, int64_t steps) const {
    const Matrix& b = p_.b;
    if (b.n_stride == 1) {
      const auto* const data = static_cast<const BFloat16*>(b.data) + k * b.k_stride;
      return pair_rows(tiles, steps, p_.num_columns, depth, [&](int64_t i) { return data + i * b.k_stride; });
    }
    kernels_avx512bf16().pack_chunk(p_, k, depth);
    for (int64_t n = 0; n < kPanel; n += kTile, tiles += steps * kTileFloats) {
      const void* rows[kTile];
      for (int64_t i = 0; i < kTile; ++i) rows[i] = scratch((n + i) * kScratchRow * 4);
      transpose_rows(tiles, rows, p_.num_columns - n, 0, depth);
    }
  }

  // The rows of A of a tile, in place or copied.
  struct Rows {
    const char* data;
    int64_t stride;
  };
  Rows rows_from(int64_t group, int64_t k, int64_t depth) const {
    const auto row = [&](int64_t m) {
      return static_cast<const char*>(p_.rows[group * kTile + m]) + 2 * (p_.row_begin + k);
    };
    const int64_t count = rows_of(group);
    if (count == kTile && depth % kStep == 0) {
      const int64_t stride = row(1) - row(0);
      bool even = true;
      for (int64_t m = 2; m < kTile; ++m) even &= row(m) - row(m - 1) == stride;
      if (even) return {row(0), stride};
    }
    char* const copies = scratch(kCopiesBegin + group * kTile * kCopiedRow);
    const auto bytes = static_cast<size_t>(2 * depth), whole = static_cast<size_t>(tiles_of(depth, kStep) * kStepBytes);
    for (int64_t m = 0; m < kTile; ++m) {
      char* const copy = copies + m * kCopiedRow;
      if (m < count) __builtin_memcpy(copy, row(m), bytes);
      const size_t filled = m < count ? bytes : 0;
      __builtin_memset(copy + filled, 0, whole - filled);
    }
    return {copies, kCopiedRow};
  }

  // The prefetches for the caller's next product: as many bytes as this one reads.
  Ahead ahead() const {
    if (p_.next.data == nullptr || p_.b.n_stride != 1) return {};
    const int64_t width = p_.next_width > 0 ? p_.next_width : 2 * p_.num_columns;
    return {static_cast<const char*>(p_.next.data), tiles_of(2 * p_.num_columns * p_.depth, width), 2 * p_.b.k_stride,
            width};
  }

  void add_chunk(int64_t k, int64_t depth) const {
    const int64_t steps = tiles_of(depth, kStep);
    float* const tiles = reinterpret_cast<float*>(scratch(kTilesBegin));
    pack(tiles, k, depth, steps);
    Ahead next = k + depth < p_.depth ? Ahead{} : ahead();
    next.spread_over(kPointsPerStep * steps * tiles_of(groups_, 2) * 2);
    float* const last_sums = reinterpret_cast<float*>(scratch(kSumsBegin));  // of fewer than 16 rows
    const bool adds = p_.accumulate || k > 0;
    for (int64_t g = 0; g < groups_; g += 2) {
      const bool has_other = g + 1 < groups_;
      const Rows rows = rows_from(g, k, depth), other = has_other ? rows_from(g + 1, k, depth) : rows;
      const bool is_pair = has_other && rows.stride == other.stride;
      add_groups(g, is_pair ? 2 : 1, {rows.data, other.data}, rows.stride, steps, tiles, last_sums, adds, next);
      if (!has_other || is_pair) continue;
      add_groups(g + 1, 1, {other.data, other.data}, other.stride, steps, tiles, last_sums, adds, next);
    }
  }

  void add_groups(int64_t group, int64_t count, const char* const (&rows)[2], int64_t stride, int64_t steps,
                  const float* tiles, float* last_sums, bool adds, Ahead& next) const {
    float* c[2];
    for (int i = 0; i < 2; ++i) {
      const int64_t g = group + at_most(i, count - 1), num_rows = rows_of(g);
      c[i] = p_.c + g * kTile * kPanel;
      if (num_rows == kTile) continue;
      if (adds) __builtin_memcpy(last_sums, c[i], static_cast<size_t>(num_rows * kPanel) * 4);
      c[i] = last_sums;
    }
    const auto* const panel = reinterpret_cast<const char*>(tiles);
    for (int64_t j = 0; j < kPanel / kTile; j += 2) {
      const Block<float> block{
          .first = {rows[0], rows[1]},
          .first_stride = stride,
          .second = {panel + j * steps * kTileBytes, panel + (j + 1) * steps * kTileBytes},
          .steps = steps,
          .sums = {{c[0] + j * kTile, c[1] + j * kTile}, {c[0] + (j + 1) * kTile, c[1] + (j + 1) * kTile}},
          .sum_stride = kPanel * 4,
          .adds = adds};
      add_block(count, 2, block, next);
    }
    for (int64_t g = group; g < group + count; ++g) {
      if (rows_of(g) == kTile) continue;
      __builtin_memcpy(p_.c + g * kTile * kPanel, last_sums, static_cast<size_t>(rows_of(g) * kPanel) * 4);
    }
  }

  const Product& p_;
  const int64_t groups_;  // of 16 rows
};

void multiply(const Product& product) {
  if (product.b.dtype != DType::kBFloat16 || product.depth == 0 || product.num_columns == 0)
    return kernels_avx512bf16().multiply(product);
  RowProduct(product).run();
}

// ---- out[m,n] = Σ_s left[s][m]·right[s][n] -------------------------------------------------------------------------------

int64_t words_of(int64_t slots) { return tiles_of(slots, kStep) * kTile; }  // per row of `left`, padded to whole tiles

// out[c] = column first_column + c of the rows: pairs of slots, padded with zeros to `words_of(num_rows)` words.
void transpose_left(float* out, const void* const* rows, int64_t num_rows, int64_t first_column, int64_t columns,
                    DType dtype) {
  if (dtype != DType::kBFloat16) {
    return kernels_avx512bf16().transpose(out, rows, num_rows, first_column, columns, dtype);
  }
  const int64_t words = words_of(num_rows);
  const auto row = [&](int64_t s) { return static_cast<const BFloat16*>(rows[s]) + first_column; };
  for (int64_t w0 = 0; w0 < words; w0 += kTile) {
    for (int64_t c0 = 0; c0 < columns; c0 += kTile) {
      const int64_t valid = at_most(columns - c0, kTile);
      Floats block[kTile];
#pragma GCC unroll 16
      for (int i = 0; i < kTile; ++i) {
        BFloat16 padded[2][kTile];
        const BFloat16* halves[2];
        for (int h = 0; h < 2; ++h) {
          const int64_t slot = 2 * (w0 + i) + h;
          halves[h] = padded[h];
          if (slot < num_rows && valid == kTile) {
            halves[h] = row(slot) + c0;
            continue;
          }
          __builtin_memset(padded[h], 0, sizeof padded[h]);
          if (slot < num_rows) __builtin_memcpy(padded[h], row(slot) + c0, static_cast<size_t>(valid) * 2);
        }
        block[i] = load_pairs(halves[0], halves[1]);
      }
      transpose(block);
      for (int64_t c = 0; c < valid; ++c) store(out + (c0 + c) * words + w0, block[c]);
    }
  }
}

// Stores 32 sums of a row as bfloat16. Tile sums are never subnormal, as the processor's own rounding requires.
void store_rounded(BFloat16* out, const float* sums, int64_t columns, bool past_caches) {
  const Floats low = load(sums), high = load(sums + kLanes);
  if (past_caches && columns >= 2 * kLanes) return stream_normals(out, low, high);
  alignas(kLine) BFloat16 line[2 * kLanes];
  store_normals(line, low);
  store_normals(line + kLanes, high);
  __builtin_memcpy(out, line, static_cast<size_t>(at_most(columns, 2 * kLanes)) * 2);
}

// Adds 32 sums of a row, rounded, to the bfloat16 that are there. Their sums may be subnormal.
void add_rounded(BFloat16* out, const float* sums, int64_t columns) {
  const Kernels& k = kernels_avx512bf16();
  const int64_t count = at_most(columns, 2 * kLanes);
  float total[2 * kLanes];
  BFloat16 rounded[2 * kLanes];
  store_normals(rounded, load(sums));
  store_normals(rounded + kLanes, load(sums + kLanes));
  k.load_row(total, out, DType::kBFloat16, count);
  k.add_scaled_row(total, rounded, DType::kBFloat16, 1.0f, count);
  k.store_row(out, DType::kBFloat16, total, count);
}

void gradient_panel(const GradientPanel& product) {
  if (product.dtype != DType::kBFloat16) return kernels_avx512bf16().gradient_panel(product);
  constexpr int64_t kChunk = 2 * kChunkWords;  // slots
  const int64_t words = words_of(product.num_slots), slots = product.num_slots, rows = product.num_rows;
  const auto* const panel = reinterpret_cast<const char*>(product.packing);
  alignas(kLine) float block_sums[4 * kTileFloats];  // 32 x 32 sums of a single chunk; see `carried`
  Ahead nothing;
  tile_configure(shapes(kTile));
  for (int64_t slot = 0; slot < slots; slot += kChunk) {
    const int64_t depth = at_most(slots - slot, kChunk), steps = tiles_of(depth, kStep);
    const bool is_last = slot + depth == slots;
    pair_rows(product.packing, steps, product.num_columns, depth,
              [&](int64_t s) { return static_cast<const BFloat16*>(product.right[slot + s]) + product.first_column; });
    for (int64_t m = 0; m < rows; m += 2 * kTile) {
      const int64_t tiles = tiles_of(at_most(rows - m, 2 * kTile), kTile);
      const char* const left = reinterpret_cast<const char*>(product.left + m * words + slot / 2);
      for (int64_t n = 0; n < product.num_columns; n += 2 * kTile) {
        const int64_t j = n / kTile;
        // Rows m … m + 31, columns n … n + 31. Between chunks the four tiles of sums of such a block are contiguous.
        const bool waits = slot > 0 || !is_last;
        float* const sums = waits ? product.carried + (m * kPanel + n * 2 * kTile) : block_sums;
        const int64_t stride = 2 * kTile;  // floats
        const Block<float> block{.first = {left, left + kTile * words * 4},
                                 .first_stride = words * 4,
                                 .second = {panel + j * steps * kTileBytes, panel + (j + 1) * steps * kTileBytes},
                                 .steps = steps,
                                 .sums = {{sums, sums + kTile * stride}, {sums + kTile, sums + kTile * stride + kTile}},
                                 .sum_stride = stride * 4,
                                 .adds = slot > 0};
        add_block(tiles, 2, block, nothing);
        if (!is_last) continue;
        for (int64_t i = 0; i < at_most(rows - m, 2 * kTile); ++i) {
          BFloat16* const out = static_cast<BFloat16*>(product.out) + (m + i) * product.out_stride + n;
          if (product.adds) {
            add_rounded(out, sums + i * stride, product.num_columns - n);
          } else {
            store_rounded(out, sums + i * stride, product.num_columns - n, product.past_caches);
          }
        }
      }
    }
  }
  tile_release();
  if (product.past_caches) finish_streams();
}

}  // namespace
}  // namespace switchgear::cpu
