// SPDX-License-Identifier: BSD-3-Clause
// The table that each ISA fills: everything of the CPU backend that is written with vector instructions.
//
// kernels.inl writes these functions once, against the small vocabulary that simd_<isa>.h defines; kernels_<isa>.cpp
// compiles them with the flags of its ISA. Nothing here throws or allocates: the callers validate and own all memory.
#pragma once
#include <cstdint>

#include "switchgear/minifloat.h"
#include "switchgear/ops.h"

namespace switchgear::cpu {

// One operand of a matrix product: element (n, k) is data[n·n_stride + k·k_stride], strides in elements, one of them 1, if it is
// plain. In panels or compact, n_stride bytes are a row of elements, whose number is the depth of the product; of minifloats,
// n_stride bytes are a block of 16 rows.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;  // of the rows that it meets
  int64_t n_stride = 0;
  int64_t k_stride = 0;
  Format format = Format::kPlain;
  int compact_bytes = 0;         // of an element of compact rows, 2 or 4
  const void* scales = nullptr;  // of minifloats: those of the first block
  int64_t scale_stride = 0;      // bytes from a block's scales to the next
  int64_t group_size = 0;        // columns that share a scale, a multiple of 32; more than the depth: all of them
  int first_row = 0;             // of the first block, that n = 0 is; a multiple of the lanes of a vector

  int64_t row_bytes() const {  // from n to n + 1
    switch (format) {
      case Format::kPlain: return n_stride * size_of(dtype);
      case Format::kFp8:
      case Format::kMxfp4: return n_stride / kMinifloatRows;
      default: return n_stride;
    }
  }

  // Its columns from n on; of minifloats n is a multiple of 8.
  Matrix from(int64_t n) const {
    Matrix rest = *this;
    if (is_minifloat(format)) {
      const int64_t row = first_row + n, block = row / kMinifloatRows;
      rest.data = static_cast<const char*>(data) + block * n_stride;
      rest.scales = static_cast<const char*>(scales) + block * scale_stride;
      rest.first_row = static_cast<int>(row % kMinifloatRows);
    } else {
      rest.data = static_cast<const char*>(data) + n * row_bytes();
    }
    return rest;
  }
};

constexpr int kMaxPanel = 64;          // columns of the widest panel of any ISA
constexpr int kTileRows = 6;           // rows of a tile of any ISA
constexpr int64_t kMaxRows = 384;      // rows of one product of any ISA
constexpr int64_t kGatheredRows = 16;  // of a block of rows that are gathered for a product
// Depth of a packed panel in 4-byte words. 64 columns · 1024 · 4 = 256 KB stay in L2, and weights are read in runs of 4 KB.
constexpr int64_t kChunkWords = 1024;

// c[m, n] = Σ_k rows[m][k] · b(n, k) for m < num_rows, n < num_columns; float32, k ascending for each element whatever the
// other arguments are, so a row's result does not depend on its neighbours. Columns up to the panel's width become zero.
struct Product {
  const void* const*
      rows;          // of the dtype of b; as store_sorted makes them where b is in panels, unless they are gathered
  int64_t num_rows;  // <= kMaxRows
  Matrix b;
  int64_t num_columns;  // <= panel
  int64_t depth;
  float* c;                    // [num_rows, panel]
  const void* next = nullptr;  // where the caller's next product starts to read b, if known: a hint
  int64_t next_width = 0;      // bytes to ask for of each row there, where n runs along memory; 0: as many as of this b
  void* scratch;               // kProductScratch bytes, 64-byte aligned
  int64_t row_begin = 0;       // k of `rows` that meets the first k of b
  bool accumulate = false;     // adds to c
  const void* gathered = nullptr;  // the same rows as gather_rows makes them, block after block: read in their place
};
constexpr int64_t kLeftPadding = 31;
constexpr int64_t kScratchRow = kChunkWords + 16;  // words; rows a page apart would share sets of L1
constexpr int64_t kProductScratch = kScratchRow * 4 * (kMaxPanel + kMaxRows);

// out[m, n] = Σ_s left[m][s] · right[s][first_column + n] for m < num_rows, n < num_columns: a panel of columns of a block of a
// weight gradient, rounded to `dtype`. s ascends for each element, as the inner index of a Product does.
struct GradientPanel {
  const float* left;  // [num_rows, words] as `transpose` makes them
  int64_t num_rows;
  const void* const* right;  // [num_slots]
  int64_t num_slots;
  DType dtype;
  int64_t first_column, num_columns;  // <= panel
  void* out;                          // on a line of memory, and so each row of it, if past_caches
  int64_t out_stride;                 // elements
  bool past_caches;
  float* packing;  // kChunkWords · panel, 64-byte aligned
  float* carried;  // [num_rows, panel]: sums between chunks of kChunkWords words of slots; unused where one holds all
};

struct Kernels {
  const char* isa;
  int panel;          // columns per product
  int64_t most_rows;  // of a product, <= kMaxRows

  void (*multiply)(const Product&);      // k ascends in one accumulator; not with compact b
  void (*dot_products)(const Product&);  // lanes along k; without row_begin, accumulate, next_width
  // Rows that many dot_products share, in blocks of kGatheredRows: bytes of a block, 0 where rows are best read where they lie, and
  // elements [first, first + count) of up to a block of rows: rows[m] is where element `first` is, a multiple of kMaxPanel. What
  // the block lacks is zero.
  int64_t (*gathered_bytes)(DType dtype, int64_t depth);
  void (*gather_rows)(void* block, const void* const* rows, int64_t num_rows, int64_t first, int64_t count);
  // Rows of b into the scratch, for k in [k_begin, k_begin + depth) and at most kChunkWords words: kScratchRow words apart, zeros
  // up to a whole vector. Compact ones from the start of a record on. For an ISA that reads rows along k alone.
  void (*pack_chunk)(const Product&, int64_t k_begin, int64_t depth);
  // Minifloats as plain rows of `dtype`: out[r·stride + c] = b(r, first + c), which is value · scale in float32 and then rounded, for
  // r < num_rows and c < count, first a multiple of 32. Whole steps are fastest; of the last one `count` may end anywhere.
  void (*expand_minifloats)(void* out, int64_t stride, DType dtype, const Matrix& b, int64_t num_rows, int64_t first,
                            int64_t count);

  // Bytes of a vector of b in panels (panels.h). Rows of A that meet them, if they are not gathered: their bytes, for `depth`
  // elements of `dtype`, and elements [first, first + n) of them, rounded to it: up to a panel, from a multiple of it on.
  int64_t (*panel_vector_bytes)(DType dtype);
  int64_t (*sorted_row_bytes)(DType dtype, int64_t depth);
  void (*store_sorted)(void* row, DType dtype, int64_t depth, int64_t first, const float* values, int64_t n);

  // out[c][w], c < columns, w < words: the transpose of `left` that gradient_panel multiplies with. A word is a slot in float32,
  // words = num_rows, or where this ISA multiplies pairs of bfloat16 two slots of them, words = ⌈num_rows/2⌉, with tiles up to a
  // multiple of 16. `out` has room for kLeftPadding more columns and slots.
  void (*transpose)(float* out, const void* const* rows, int64_t num_rows, int64_t first_column, int64_t columns,
                    DType dtype);
  void (*gradient_panel)(const GradientPanel&);

  // Rows of any float dtype, n elements each. Stores round to nearest, ties to even.
  void (*load_row)(float* out, const void* row, DType dtype, int64_t n);
  void (*store_row)(void* out, DType dtype, const float* row, int64_t n);
  void (*add_scaled_row)(float* accumulator, const void* row, DType dtype, float scale, int64_t n);
  // Σ a[i]·b[i] in float32. The order of the sum depends on n alone.
  float (*dot_rows)(const void* a, const void* b, DType dtype, int64_t n);

  // a = glu(gate, up), n elements; `up` is unused for plain experts.
  void (*glu_row)(float* a, const float* gate, const float* up, const GluOptions& options, int64_t n);
  // Also emits a, since the weight gradient of down_proj needs it. grad_a may alias a; grad_gate and grad_up may alias
  // gate and up.
  void (*glu_backward_row)(float* a, float* grad_gate, float* grad_up, const float* grad_a, const float* gate,
                           const float* up, const GluOptions& options, int64_t n);

  // Probes of the machine's ceilings: runs `iterations` · 24 multiply-adds of a vector in registers, or · 4 of tiles, returns the
  // flops done; sums `bytes` bytes (a multiple of 512).
  double (*multiply_rate)(DType dtype, int64_t iterations);
  uint64_t (*read)(const void* data, int64_t bytes);
};

const Kernels& kernels();  // of the ISA in use

// Whether this processor's own prefetching delivers a stream from memory at full speed when it is asked for a line here and there,
// or for none: AMD's does. Intel's does so beside plain loads alone, and with multiply-adds on what arrives falls behind by a tenth
// (float32) or a third (pairs of bfloat16): there every line is to be asked for.
bool follows_streams();

const Kernels& kernels_generic();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();
const Kernels& kernels_amx();
const Kernels& kernels_neon();

}  // namespace switchgear::cpu
