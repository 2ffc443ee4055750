// SPDX-License-Identifier: BSD-3-Clause
// dot_products of bfloat16 by AMX: C[m,n] = Σ_k A[m,k]·B[n,k], up to kMaxRows rows and one panel of columns. Everything else,
// float32, float16 and the backward products included, is that of avx512bf16.
//
//   work 2·M·N·K flop; traffic: B once; rows of A are pointers (gathering is free), and come from L2 or L3
//   TDPBF16PS adds products of 16 rows and 16 columns over 32 k: 16384 flop in 16 cycles, as Intel states. A step of 2 x 2 tiles of
//   sums takes two tiles of each operand, 4 loads of 8 cycles beside 64 of multiplications. Of a slice of 512 k, 32 rows of A stay
//   in L1 (32 KB of 48) for both halves of the panel: so L2 delivers 2 KB of B and half as much of A a step, 48 bytes a cycle.
//   A core does M flop for each byte of B, 1024 in a cycle: where memory delivers 4 bytes of B in a cycle it binds up to 256 rows.
//   Where B comes from L2 multiplications bind, and transposing A beside them: 64 shuffles for 16 rows and 32 k, which meet 4 tiles
//   of B in as many cycles, so that this scheme can reach half of the ceiling.
//   All this is counted: the kernels are compiled, their instructions checked in the module, and they run in emulation. They have
//   never run on a processor with AMX, and nothing of them is timed.
//
// Rows of B along k are the first operand, read where they lie. Rows of A are the second one, which has pairs of k for rows: a
// chunk of the depth of 16 rows is transposed at a time and serves the whole panel. So sums come out as Cᵀ, and are transposed
// behind the last chunk. B that runs along n, or is compact, is unpacked into the scratch, chunk by chunk, and read there. The
// last columns of a panel share a tile with some before them; rows of A that are not there and what the last 32 k lack are zeros.
//
// Order of each sum: for each 32 k, ascending, even and odd k are summed apart, from zero, by fused multiply-adds; the sum of both
// is added to C. It depends on the depth alone: not on M, N, chunks, or how B lies in memory, so a row's result does not depend on
// its neighbours. All is float32, rounded to nearest even; subnormal operands and results count as zeros.
//
// Tiles are configured and released once a product, beside reading up to 64 rows of B: a load of 64 bytes, and the end of what is
// in flight. So no tile is live in anyone else's code, and others, like torch's oneDNN, may configure their own.
#include "amx.h"

#include "compact.h"
#include "kernels.h"
#include "simd_avx512.h"

namespace switchgear::cpu {
namespace {

constexpr int kPanel = 64;
constexpr int kTile = 16;                       // columns of C, and rows of it, in a tile
constexpr int64_t kStep = 32, kStepBytes = 64;  // k of a tile, and bytes of each row of it
constexpr int64_t kTileFloats = kTile * kTile;
constexpr int64_t kChunk = 2 * kChunkWords;  // k
constexpr int64_t kSliceSteps = 512 / kStep;
constexpr int64_t kLine = 64;
static_assert(kChunk % kStep == 0 && kPanel <= kMaxPanel && kMaxRows % kTile == 0);

int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }
int64_t tiles_of(int64_t n, int64_t in_a_tile) { return (n + in_a_tile - 1) / in_a_tile; }

// The tiles: sums of rows g and columns b, g and b in {0, 1}, in 2g + b; then two of B and two of A.
template <int kG, int kB>
constexpr int kSums = 2 * kG + kB;
constexpr int kFirstB = 4, kFirstA = 6;

TileConfig shapes(int64_t columns) {
  TileConfig config;
  for (int t = 0; t < kNumTiles; ++t) {
    config.rows[t] = t < kFirstA ? static_cast<uint8_t>(columns) : kTile;
    config.row_bytes[t] = kStepBytes;
  }
  return config;
}

// body.operator()<g, b>() for each tile of sums
template <int kRows, int kColumns, typename Body>
inline void for_sums(Body&& body) {
  body.template operator()<0, 0>();
  if constexpr (kColumns > 1) body.template operator()<0, 1>();
  if constexpr (kRows > 1) body.template operator()<1, 0>();
  if constexpr (kRows > 1 && kColumns > 1) body.template operator()<1, 1>();
}

// ---- what comes next -----------------------------------------------------------------------------------------------------

// Rows of memory that are asked for, line by line.
struct Ahead {
  const char* row = nullptr;
  int64_t rows = 0, stride = 0, width = 0, at = 0;

  int64_t lines() const { return rows * tiles_of(width, kLine); }
  void ask(int64_t count) {
    for (; count > 0 && rows > 0; --count) {
      __builtin_prefetch(row + at, 0, 2);
      at += kLine;
      if (at < width) continue;
      at = 0;
      row += stride;
      --rows;
    }
  }
};

// The chunk of B from k on, or the first one of the caller's next product.
Ahead ahead_of(const Product& product, int64_t k) {
  const Matrix& b = product.b;
  const char* data = static_cast<const char*>(b.data);
  if (k >= product.depth) {
    data = static_cast<const char*>(product.next);
    k = 0;
  }
  if (data == nullptr) return {};
  const int64_t count = at_most(product.depth - k, kChunk), rows = product.num_columns;
  if (b.compact_bytes > 0) {
    const int64_t records = compact_header(b.n_stride, product.depth, b.dtype) + compact_records_bytes(k, b.dtype);
    return {data + records, rows, b.n_stride, compact_records_bytes(count, b.dtype)};
  }
  if (b.k_stride != 1) return {};
  return {data + 2 * k, rows, 2 * b.n_stride, 2 * count};
}

// ---- a chunk -------------------------------------------------------------------------------------------------------------

// Some steps of all rows of B, and where they are in tiles of A: [groups of 16 rows][all steps of the chunk].
struct Steps {
  const char* b;
  int64_t stride, count, first;
  bool adds;  // to sums that are there
};

// a[s] = pairs of k x rows of A, of k from k_begin + 32 s on; zeros for rows and k that are not there.
void transpose_rows(float* a, const void* const* rows, int64_t num_rows, int64_t k_begin, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kStep, a += kTileFloats) {
    const int64_t bytes = 2 * at_most(depth - k, kStep);
    Floats words[kTile];
#pragma GCC unroll 16
    for (int m = 0; m < kTile; ++m) {
      words[m] = broadcast(0.0f);
      if (m >= num_rows) continue;
      const char* const row = static_cast<const char*>(rows[m]) + 2 * (k_begin + k);
      if (bytes == kStepBytes) {
        words[m] = load(reinterpret_cast<const float*>(row));
        continue;
      }
      float padded[kTile] = {};
      __builtin_memcpy(padded, row, static_cast<size_t>(bytes));
      words[m] = load(padded);
    }
    transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) store(a + i * kTile, words[i]);
  }
}

// Sums of kRows tiles of rows of A and kColumns of rows of B += products. sums[g] is where those of tile g of rows are, tile beside
// tile in rows of a panel; a[g] its tiles of A; columns[b] the first row of B in a tile. Asks for `lines` lines a step.
template <int kRows, int kColumns>
void add_tiles(float* const (&sums)[2], const float* const (&a)[2], const int64_t (&columns)[2], const Steps& steps,
               Ahead& ahead, int64_t lines) {
  constexpr int64_t kSumStride = kPanel * 4;
  for_sums<kRows, kColumns>([&]<int kG, int kB>() {
    steps.adds ? tile_load<kSums<kG, kB>>(sums[kG] + kB * kTile, kSumStride) : tile_zero<kSums<kG, kB>>();
  });
  const int64_t stride = steps.stride;
  const char* const b[2] = {steps.b + columns[0] * stride, steps.b + columns[1] * stride};
  for (int64_t i = 0; i < steps.count; ++i) {
    tile_load<kFirstB>(b[0] + i * kStepBytes, stride);
    if (kColumns > 1) tile_load<kFirstB + 1>(b[1] + i * kStepBytes, stride);
    tile_load<kFirstA>(a[0] + (steps.first + i) * kTileFloats, kStepBytes);
    if (kRows > 1) tile_load<kFirstA + 1>(a[1] + (steps.first + i) * kTileFloats, kStepBytes);
    for_sums<kRows, kColumns>([&]<int kG, int kB>() { tile_multiply<kSums<kG, kB>, kFirstB + kB, kFirstA + kG>(); });
    ahead.ask(lines);
  }
  for_sums<kRows, kColumns>([&]<int kG, int kB>() { tile_store<kSums<kG, kB>>(sums[kG] + kB * kTile, kSumStride); });
}

// ---- the whole -----------------------------------------------------------------------------------------------------------

class TileProduct {
 public:
  explicit TileProduct(const Product& product)
      : p_(product),
        columns_(at_most(product.num_columns, kTile)),
        groups_(tiles_of(product.num_rows, kTile)),
        blocks_(tiles_of(product.num_columns, kTile)),
        scratch_(static_cast<float*>(product.scratch)) {}

  void run() {
    tile_configure(shapes(columns_));
    for (int64_t k = 0; k < p_.depth; k += kChunk) add_chunk(k, at_most(p_.depth - k, kChunk));
    tile_release();
    for (int64_t g = 0; g < groups_; ++g) finish(g);
  }

 private:
  // [packed B | tiles of A | sums of the last rows]
  float* a() const { return scratch_ + kScratchRow * kMaxPanel; }
  static_assert(kMaxRows * kChunkWords + kTile * kPanel <= kScratchRow * kMaxRows);

  int64_t rows_of(int64_t group) const { return at_most(p_.num_rows - group * kTile, kTile); }
  // Where tile `block` of columns starts. The last one ends with the columns, and so shares some with the one before.
  int64_t first_column(int64_t block) const { return at_most(block * kTile, p_.num_columns - columns_); }
  // 16 rows of C hold the sums of these rows until they are finished; fewer do not, and have room of their own.
  float* sums_of(int64_t group) const {
    return rows_of(group) == kTile ? p_.c + group * kTile * kPanel : a() + kMaxRows * kChunkWords;
  }

  void add_chunk(int64_t k, int64_t depth) const {
    const Matrix& b = p_.b;
    const bool in_place = b.compact_bytes == 0 && b.k_stride == 1;
    const int64_t steps = tiles_of(depth, kStep),
                  whole = in_place ? depth / kStep : 0;  // of which B is read where it lies
    if (whole < steps) kernels_avx512bf16().pack_chunk(p_, k + whole * kStep, depth - whole * kStep);
    for (int64_t g = 0; g < groups_; ++g) {
      transpose_rows(a() + g * steps * kTileFloats, p_.rows + g * kTile, rows_of(g), k, depth);
    }
    Ahead ahead = ahead_of(p_, k + kChunk);
    const int64_t lines = tiles_of(ahead.lines(), steps * tiles_of(groups_, 2) * tiles_of(blocks_, 2));
    for (int64_t s = 0, count; s < steps; s += count) {
      count = at_most((s < whole ? whole : steps) - s, kSliceSteps);
      const char* const rows = s < whole ? static_cast<const char*>(b.data) + 2 * k + s * kStepBytes
                                         : reinterpret_cast<const char*>(scratch_) + (s - whole) * kStepBytes;
      const Steps slice{rows, s < whole ? 2 * b.n_stride : kScratchRow * 4, count, s, k + s > 0};
      for (int64_t g = 0; g < groups_; g += 2) add_rows(g, steps, slice, ahead, lines);
    }
  }

  // Two tiles of rows, or one where there is no other, times all columns.
  void add_rows(int64_t group, int64_t chunk_steps, const Steps& steps, Ahead& ahead, int64_t lines) const {
    const bool two_rows = groups_ - group > 1;
    const int64_t other = two_rows ? group + 1 : group;
    const float* const tiles[2] = {a() + group * chunk_steps * kTileFloats, a() + other * chunk_steps * kTileFloats};
    for (int64_t j = 0; j < blocks_; j += 2) {
      const bool two_columns = blocks_ - j > 1;
      float* const sums[2] = {sums_of(group) + j * kTile, sums_of(other) + j * kTile};
      const int64_t columns[2] = {first_column(j), first_column(j + 1)};
      const auto add = two_rows ? (two_columns ? add_tiles<2, 2> : add_tiles<2, 1>)
                                : (two_columns ? add_tiles<1, 2> : add_tiles<1, 1>);
      add(sums, tiles, columns, steps, ahead, lines);
    }
  }

  // Rows of C from the sums, whose tiles are Cᵀ. Where both are the same memory, no tile is written before it has been read.
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
  const int64_t columns_, groups_, blocks_;  // of a tile; tiles of rows, tiles of columns
  float* const scratch_;
};

void dot_products(const Product& product) {
  if (product.b.dtype != DType::kBFloat16 || product.depth == 0 || product.num_columns == 0)
    return kernels_avx512bf16().dot_products(product);
  TileProduct(product).run();
}

// As many flop in registers as 16 x 16 sums take in four tiles.
double multiply_rate(DType dtype, int64_t iterations) {
  if (dtype != DType::kBFloat16) return kernels_avx512bf16().multiply_rate(dtype, iterations);
  tile_configure(shapes(kTile));  // of zeros
  for (int64_t i = 0; i < iterations; ++i) {
    for_sums<2, 2>([]<int kG, int kB>() { tile_multiply<kSums<kG, kB>, kFirstB + kB, kFirstA + kG>(); });
  }
  tile_release();
  return static_cast<double>(iterations) * 4 * kTile * kTile * kStep * 2;
}

}  // namespace

const Kernels& kernels_amx() {
  static const Kernels table = [] {
    Kernels own = kernels_avx512bf16();
    own.isa = "amx";
    own.dot_products = dot_products;
    own.panel_vector_bytes = [](DType) -> int64_t { return 0; };
    own.multiply_rate = multiply_rate;
    return own;
  }();
  return table;
}

}  // namespace switchgear::cpu
