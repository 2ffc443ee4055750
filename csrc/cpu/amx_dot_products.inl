// SPDX-License-Identifier: BSD-3-Clause
// dot_products with tiles: C[m,n] = Σ_k A[m,k]·B[n,k], up to kMaxRows rows, one panel of columns. Included by kernels_amx.cpp.
//
// Rows of B along k are the first operand, read in place. Rows of A are the second operand, whose tile rows hold pairs of k.
// A caller that multiplies the same rows by many panels gathers them into such tiles once (Product::gathered); otherwise they
// are transposed chunk by chunk. The sums are therefore Cᵀ and are transposed at the end. B that runs along n, or is compact,
// is unpacked into the scratch chunk by chunk. The last columns of a panel may share a tile with earlier ones. Missing rows
// of A and the missing part of the last 32 k are zeros.
//
// Panels (panels.h) of 64 rows store B as one stream of tiles: [pair of tiles of rows][step][tile of the pair][row][32 k].
#pragma once

namespace switchgear::cpu {
namespace {

int64_t gathered_bytes(DType dtype, int64_t depth) {
  return dtype == DType::kBFloat16 ? tiles_of(depth, kStep) * kTileBytes : 0;
}

void gather_rows(void* block, const void* const* rows, int64_t num_rows, int64_t first, int64_t count) {
  transpose_rows(static_cast<float*>(block) + first / kStep * kTileFloats, rows, num_rows, 0, count);
}

class DotProduct {
 public:
  explicit DotProduct(const Product& product)
      : p_(product),
        columns_(at_most(product.num_columns, kTile)),
        groups_(tiles_of(product.num_rows, kTile)),
        blocks_(tiles_of(product.num_columns, kTile)),
        in_place_(product.b.format == Format::kPanels ||
                  (product.b.format == Format::kPlain && product.b.k_stride == 1)),
        chunk_(product.b.format == Format::kCompact       ? kCompactChunk
               : in_place_ && product.gathered != nullptr ? product.depth
                                                          : kChunk),
        scratch_(static_cast<float*>(product.scratch)) {}

  void run() {
    tile_configure(shapes(columns_));
    for (int64_t k = 0; k < p_.depth; k += chunk_) add_chunk(k, at_most(p_.depth - k, chunk_));
    tile_release();
    for (int64_t g = 0; g < groups_; ++g) finish(g);
  }

 private:
  static constexpr int64_t kChunk = 2 * kChunkWords;  // k
  static constexpr int64_t kCompactChunk = 512;       // an unpacked chunk, 64 KB, is still in L2 when it is read
  static constexpr int64_t kLead = 32 << 10;          // bytes
  static_assert(kChunk % kStep == 0 && kCompactChunk % kCompactRecord == 0);

  // The scratch: [unpacked B | tiles of A | sums of the last rows]
  float* transposed() const { return scratch_ + kScratchRow * kMaxPanel; }
  static_assert(kMaxRows * kChunkWords + kTile * kPanel <= kScratchRow * kMaxRows);

  int64_t rows_of(int64_t group) const { return at_most(p_.num_rows - group * kTile, kTile); }
  // First column of tile `block`. The last tile ends with the last column, so it may overlap the one before.
  int64_t first_column(int64_t block) const { return at_most(block * kTile, p_.num_columns - columns_); }
  // 16 rows of C hold their own sums until they are finished; a group of fewer rows uses the scratch.
  float* sums_of(int64_t group) const {
    return rows_of(group) == kTile ? p_.c + group * kTile * kPanel : transposed() + kMaxRows * kChunkWords;
  }

  // Prefetches two tiles of rows further on, then the start of the caller's next product; for a B that is read chunk by
  // chunk, the chunk from k on. A panel that is read once is one stream; bandwidth is best at a short prefetch distance.
  Ahead ahead_of(int64_t k) const {
    const Matrix& b = p_.b;
    const char* data = static_cast<const char*>(b.data);
    const auto* const next = static_cast<const char*>(p_.next.data);
    if (in_place_ && chunk_ == p_.depth) {
      const int64_t pair = at_most(2 * kTile, p_.num_columns);
      if (b.format == Format::kPanels) {
        const int64_t bytes = p_.num_columns * b.n_stride,
                      lead = groups_ <= 2 ? at_most(kLead, bytes / 2) : pair * b.n_stride;
        return {data + lead, 1, 0, bytes - lead, next, next != nullptr, lead};
      }
      const int64_t stride = 2 * b.n_stride, width = 2 * p_.depth, next_rows = next != nullptr ? pair : 0;
      if (p_.num_columns == pair) return {next, next_rows, stride, width};
      return {data + pair * stride, p_.num_columns - pair, stride, width, next, next_rows, width};
    }
    if (k >= p_.depth) {
      data = next;
      k = 0;
    }
    if (data == nullptr) return {};
    const int64_t count = at_most(p_.depth - k, chunk_), rows = p_.num_columns;
    if (b.format == Format::kCompact) {
      const int64_t records = compact_header(b.n_stride, p_.depth, b.dtype) + compact_records_bytes(k, b.dtype);
      return {data + records, rows, b.n_stride, compact_records_bytes(count, b.dtype)};
    }
    if (b.format == Format::kPanels)
      return {data + k / kStep * 2 * kTileBytes, 1, 0, rows * 2 * count};  // partly the pair's next chunk
    if (b.k_stride != 1) return {};
    return {data + 2 * k, rows, 2 * b.n_stride, 2 * count};
  }

  void add_chunk(int64_t k, int64_t depth) const {
    const Matrix& b = p_.b;
    const int64_t steps = tiles_of(depth, kStep),
                  whole = in_place_ ? depth / kStep : 0;  // steps whose B is read in place
    Ahead ahead = ahead_of(k + depth);
    if (b.format == Format::kCompact) {
      unpack(k, depth, ahead);
    } else if (whole < steps) {
      kernels_avx512bf16().pack_chunk(p_, k + whole * kStep, depth - whole * kStep);
    }
    if (p_.gathered == nullptr) {
      for (int64_t g = 0; g < groups_; ++g) {
        transpose_rows(transposed() + g * steps * kTileFloats, p_.rows + g * kTile, rows_of(g), k, depth);
      }
    }
    ahead.spread_over(kPointsPerStep * steps * tiles_of(groups_, 2) * tiles_of(blocks_, 2));
    const auto tiles = [&](int64_t group, int64_t step) {
      return p_.gathered != nullptr ? static_cast<const char*>(p_.gathered) +
                                          group * gathered_bytes(b.dtype, p_.depth) + (k / kStep + step) * kTileBytes
                                    : reinterpret_cast<const char*>(transposed()) + (group * steps + step) * kTileBytes;
    };
    for (int64_t s = 0, count; s < steps; s += count) {
      const bool reads_in_place = s < whole;
      count = (reads_in_place ? whole : steps) - s;
      const char* const rows =
          reads_in_place ? static_cast<const char*>(b.data) + 2 * k : reinterpret_cast<const char*>(scratch_);
      const int64_t stride = reads_in_place ? 2 * b.n_stride : kScratchRow * 4;
      for (int64_t j = 0; j < blocks_; j += 2) {
        const int64_t j1 = at_most(j + 1, blocks_ - 1);
        for (int64_t g = 0; g < groups_; g += 2) {
          const int64_t g1 = at_most(g + 1, groups_ - 1);
          float *const c = sums_of(g), *const c1 = sums_of(g1);
          Block<float> block{.first = {rows + first_column(j) * stride, rows + first_column(j1) * stride},
                             .first_stride = stride,
                             .second = {tiles(g, s), tiles(g1, s)},
                             .steps = count,
                             .sums = {{c + j * kTile, c + j1 * kTile}, {c1 + j * kTile, c1 + j1 * kTile}},
                             .sum_stride = kPanel * 4,
                             .adds = k + s > 0};
          if (b.format == Format::kPanels) {
            const char* const pair =
                static_cast<const char*>(b.data) + j * kTile * b.n_stride + k / kStep * 2 * kTileBytes;
            block.first[0] = pair, block.first[1] = pair + kTileBytes;
            block.first_stride = kStepBytes, block.first_step = 2 * kTileBytes;
          }
          add_block(blocks_ - j, groups_ - g, block, ahead);
        }
      }
    }
  }

  // Unpacks a chunk of compact rows into the scratch. That takes 2× as long as multiplying it by few rows, so two thirds of
  // the prefetches are issued here.
  void unpack(int64_t k, int64_t depth, Ahead& ahead) const {
    const int64_t bursts = ahead.bursts() * 2 / 3 / blocks_;
    for (int64_t n = 0; n < p_.num_columns; n += kTile) {
      Product part = p_;
      part.b.data = static_cast<const char*>(p_.b.data) + n * p_.b.n_stride;
      part.num_columns = at_most(p_.num_columns - n, kTile);
      part.scratch = scratch_ + n * kScratchRow;
      kernels_avx512bf16().pack_chunk(part, k, depth);
      for (int64_t i = 0; i < bursts; ++i) ahead.burst();
    }
  }

  // Writes rows of C from the sums, whose tiles are Cᵀ. If both share memory, a tile is written only after it has been read.
  void finish(int64_t group) const {
    const float* const sums = sums_of(group);
    float* const c = p_.c + group * kTile * kPanel;
    for (int64_t j = 0; j < blocks_; ++j) {
      Floats tile[kTile];
#pragma GCC unroll 16
      for (int n = 0; n < kTile; ++n) tile[n] = n < columns_ ? load(sums + n * kPanel + j * kTile) : broadcast(0.0f);
      transpose(tile);
      for (int64_t m = 0; m < rows_of(group); ++m) store(c + m * kPanel + first_column(j), tile[m]);
    }
    const auto rest = static_cast<size_t>(kPanel - p_.num_columns) * 4;
    for (int64_t m = 0; m < rows_of(group); ++m) __builtin_memset(c + m * kPanel + p_.num_columns, 0, rest);
  }

  const Product& p_;
  const int64_t columns_, groups_, blocks_;  // columns of a tile; tiles of rows; tiles of columns
  const bool in_place_;
  const int64_t chunk_;  // k
  float* const scratch_;
};

void dot_products(const Product& product) {
  if (product.b.dtype != DType::kBFloat16 || is_decoded(product.b.format) || product.depth == 0 ||
      product.num_columns == 0)
    return kernels_avx512bf16().dot_products(product);
  DotProduct(product).run();
}

}  // namespace
}  // namespace switchgear::cpu
