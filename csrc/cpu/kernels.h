// SPDX-License-Identifier: BSD-3-Clause
// The table that each ISA fills: all of the CPU backend that is written with vector instructions.
//
// kernels.inl writes these functions once, against the small vocabulary of simd_<isa>.h; kernels_<isa>.cpp compiles them with
// the flags of its ISA. Nothing here throws or allocates: callers validate and own all memory.
#pragma once
#include <cstdint>

#include "switchgear/groups.h"
#include "switchgear/ops.h"

namespace switchgear::cpu {

// Where a product starts to read B.
struct Start {
  const void* data = nullptr;
  const void* scales = nullptr;
};

// One operand of a matrix product. Plain: element (n, k) is data[n·n_stride + k·k_stride]; strides are in elements and one
// is 1. Panels, compact and GGUF's: n_stride is the bytes of a row, which has as many elements as the product's depth. Minifloats
// and groups: n_stride is the bytes of a block of 16 rows. `multiply` also takes columns of integers or minifloats: element (n, k)
// is W[k, first_column + n], data and scales are those of first_column, and k starts a block.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;  // of the rows it is multiplied by
  int64_t n_stride = 0;
  int64_t k_stride = 0;
  Format format = Format::kPlain;
  int compact_bytes = 0;              // of an element of compact rows, 2 or 4
  const void* scales = nullptr;       // of minifloats and groups, of the first block
  int64_t scale_stride = 0;           // bytes from one block's scales to the next
  int64_t group_size = 0;             // columns that share a scale, a multiple of 32; more than the depth: all of them
  int first_row = 0;                  // of the first block, where n = 0; a multiple of the lanes of a vector
  int64_t first_column = 0;           // of columns of integers or minifloats
  const float* row_scales = nullptr;  // of integers and some minifloats
  const void* zeros = nullptr;  // of integers, like scales; of groups, half the bytes of their scales; may be null

  Start start() const { return {data, scales}; }

  int64_t row_bytes() const {  // from n to n + 1
    if (format == Format::kPlain) return n_stride * size_of(dtype);
    return is_decoded(format) ? n_stride / kMinifloatRows : n_stride;
  }

  // Its columns from n on; n is a multiple of 8 for minifloats and groups.
  Matrix from(int64_t n) const {
    Matrix rest = *this;
    if (is_decoded(format)) {
      const int64_t row = first_row + n, block = row / kMinifloatRows;
      rest.data = static_cast<const char*>(data) + block * n_stride;
      rest.scales = static_cast<const char*>(scales) + block * scale_stride;
      if (row_scales != nullptr) rest.row_scales = row_scales + block * kMinifloatRows;
      if (zeros != nullptr) rest.zeros = static_cast<const char*>(zeros) + block * scale_stride / 2;
      rest.first_row = static_cast<int>(row % kMinifloatRows);
    } else {
      rest.data = static_cast<const char*>(data) + n * row_bytes();
    }
    return rest;
  }
};

// The columns of a product's b from n and k on, as `multiply` takes them; n is a multiple of 8 and k of 16 unless b is plain.
inline Matrix columns_at(const Matrix& b, int64_t n, int64_t k) {
  Matrix rest = b;
  const auto moved = [](const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; };
  if (b.format == Format::kPlain) {
    rest.data = moved(b.data, (k * b.k_stride + n * b.n_stride) * size_of(b.dtype));
    return rest;
  }
  const int64_t block = k / kMinifloatRows, column = b.first_column + n;
  const int64_t groups = column / b.group_size - b.first_column / b.group_size;
  const int64_t offset = block * b.scale_stride + groups * kMinifloatRows * size_of(format_row(b.format).scales);
  rest.data = moved(b.data, block * b.n_stride + n * kMinifloatRows * bits_of(b.format) / 8);
  rest.scales = moved(b.scales, offset);
  rest.first_column = column;
  if (b.row_scales != nullptr) rest.row_scales = b.row_scales + k;
  if (b.zeros != nullptr) rest.zeros = moved(b.zeros, offset);
  return rest;
}

constexpr int kMaxPanel = 64;          // columns of the widest panel of any ISA
constexpr int kTileRows = 6;           // rows of a tile of any ISA
constexpr int64_t kMaxRows = 384;      // rows of one product of any ISA
constexpr int64_t kGatheredRows = 16;  // per block of rows that are gathered for a product
// Depth of a packed panel in 4-byte words. 64 columns · 1024 · 4 = 256 KB stay in L2, and weights are read in runs of 4 KB.
constexpr int64_t kChunkWords = 1024;

// c[m, n] = Σ_k rows[m][k] · b(n, k) for m < num_rows, n < num_columns, in float32. For each element k ascends, whatever the
// other arguments are, so a row's result does not depend on its neighbours. Columns up to the panel's width become zero.
struct Product {
  const void* const* rows;  // of the dtype of b; by store_sorted for panels if they are not gathered;
                            // by GgufKernels::quantize_row for GGUF's types
  int64_t num_rows;         // <= kMaxRows
  Matrix b;
  int64_t num_columns;  // <= panel
  int64_t depth;
  float* c;                       // [num_rows, panel]
  Start next;                     // of the caller's next product, if known: a hint
  int64_t next_width = 0;         // bytes to prefetch of each row there if n runs along memory; 0: as many as of this b
  void* scratch;                  // kProductScratch bytes, 64-byte aligned
  int64_t row_begin = 0;          // k of `rows` that belongs to the first k of b
  bool accumulate = false;        // adds to c
  bool rows_are_kept = false;     // multiply: scratch has them, widened, from the call before, of the same depth
  bool sorted_rows = false;       // written by store_sorted; plain b is packed then: see packing_rows
  bool rows_are_widened = false;  // float32, though b is 16-bit: plain or compact b, not sorted or gathered
  const void* gathered = nullptr;  // the same rows from gather_rows, block after block: read instead
  // Columns of b from one stream (num_streams) to the next, each of which has an equal share of the columns of c; 0: as many
  // as a share, so that b's columns are consecutive.
  int64_t stream_columns = 0;
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
  void* out;                          // at the start of a cache line, and so is each row, if past_caches
  int64_t out_stride;                 // elements
  bool past_caches;
  float* packing;  // kChunkWords · panel, 64-byte aligned
  float* carried;  // [num_rows, panel]: sums between chunks of kChunkWords words of slots; unused if one holds all
  bool adds;       // each rounded sum to the element of `out` that is there
};

// A softmax over some scores: the largest, and Σ e^(score - max).
struct Softmax {
  float max, sum;
};

// out[i][n] += Σ_p weights[i][p] · values[p][n] for i < num_rows, n < columns; p ascends for each element.
struct WeightedRows {
  const float* weights;
  int64_t weight_stride;
  int64_t num_rows;  // <= kTileRows
  const void* values;
  DType dtype;
  int64_t value_stride;  // elements
  int64_t count, columns;
  const void* ahead;  // what is read next: as many rows are prefetched, ahead_stride bytes apart
  int64_t ahead_stride;
  float* out;
  int64_t out_stride;
};

// out[i][p] = <rows[i], keys[p]> for i < num_rows, p < count. The order of a sum depends on the depth alone.
struct ScoredRows {
  const float* rows;
  int64_t row_stride;
  int64_t num_rows;  // <= kTileRows
  const void* keys;
  DType dtype;
  int64_t key_stride;  // elements
  int64_t count, depth;
  const void* ahead;  // as those of WeightedRows
  int64_t ahead_stride;
  float* out;
  int64_t out_stride;
};

struct Kernels {
  const char* isa;
  int panel;          // columns per product
  int64_t most_rows;  // of a product, <= kMaxRows

  void (*multiply)(const Product&);      // k ascends in one accumulator; not with compact b or panels
  bool (*multiplies_stored)(DType);      // whether `multiply` takes columns of integers and minifloats
  void (*dot_products)(const Product&);  // lanes along k; without row_begin, accumulate, next_width
  // Streams in which dot_products reads plain rows of b at once for so many rows of A; 0: one after the other.
  int (*num_streams)(DType dtype, int64_t num_rows);
  // For rows that many dot_products share, in blocks of kGatheredRows. gathered_bytes: bytes per block, 0 if rows are read in
  // place. gather_rows: elements [first, first + count) of up to a block of rows; rows[m] points to element `first`, a
  // multiple of kMaxPanel. The missing rows and elements of a block become zero.
  int64_t (*gathered_bytes)(DType dtype, int64_t depth);
  void (*gather_rows)(void* block, const void* const* rows, int64_t num_rows, int64_t first, int64_t count);
  // Writes rows of b for k in [k_begin, k_begin + depth), at most kChunkWords words, into the scratch: kScratchRow words
  // apart, zeros up to a whole vector. For compact b, k_begin starts a record. Serves an ISA that only reads rows along k.
  void (*pack_chunk)(const Product&, int64_t k_begin, int64_t depth);
  // Minifloats and groups as plain rows of `dtype`: out[r·stride + c] = b(r, first + c), value · scale in float32 and then rounded, for
  // r < num_rows and c < count; first is a multiple of 32. Whole steps are fastest; `count` may end anywhere in the last one.
  void (*expand_minifloats)(void* out, int64_t stride, DType dtype, const Matrix& b, int64_t num_rows, int64_t first,
                            int64_t count);
  // The same for b compact, in panels or GGUF's blocks, with rows of `depth` elements: in the dtype of b. In panels, num_rows is a
  // multiple of a panel's rows.
  void (*expand_rows)(void* out, int64_t stride, const Matrix& b, int64_t depth, int64_t num_rows, int64_t first,
                      int64_t count);

  // Rows of an expert from which its plain b is packed as panels, so these rows are sorted; 0: never. The depth is a multiple
  // of kPanelColumns.
  int64_t (*packing_rows)(DType dtype);
  // panel_vector_bytes: of a vector of b in panels (panels.h). word_bytes: of a row of A in the words that are multiplied, as
  // sorted rows are.
  // store_sorted writes its elements [first, first + n), rounded to `dtype`: first is a multiple of the panel, n at most one.
  int64_t (*panel_vector_bytes)(DType dtype);
  int64_t (*word_bytes)(DType dtype, int64_t depth);
  void (*store_sorted)(void* row, DType dtype, int64_t depth, int64_t first, const float* values, int64_t n);

  // out[c][w], c < columns, w < words: the transpose of `left` that gradient_panel multiplies. A word is one slot in float32
  // (words = num_rows), or two slots if this ISA multiplies pairs of bfloat16 (words = ⌈num_rows/2⌉, with tiles rounded up to
  // a multiple of 16). `out` has space for kLeftPadding more columns and slots.
  void (*transpose)(float* out, const void* const* rows, int64_t num_rows, int64_t first_column, int64_t columns,
                    DType dtype);
  void (*gradient_panel)(const GradientPanel&);

  // Rows of any float dtype, n elements each. Stores round to nearest, ties to even.
  void (*load_row)(float* out, const void* row, DType dtype, int64_t n);
  void (*store_row)(void* out, DType dtype, const float* row, int64_t n);
  void (*add_scaled_row)(float* accumulator, const void* row, DType dtype, float scale, int64_t n);
  // Σ a[i]·b[i] in float32. The order of the sum depends only on n.
  float (*dot_rows)(const void* a, const void* b, DType dtype, int64_t n);

  // a = glu(gate, up), n elements; `up` is unused for plain experts.
  void (*glu_row)(float* a, const float* gate, const float* up, const GluOptions& options, int64_t n);
  // Also writes a, which the weight gradient of down_proj needs. grad_a may alias a; grad_gate and grad_up may alias gate
  // and up.
  void (*glu_backward_row)(float* a, float* grad_gate, float* grad_up, const float* grad_a, const float* gate,
                           const float* up, const GluOptions& options, int64_t n);

  // Attention. softmax_weights replaces scores[i], first <= i < last, by e^(scale·scores[i] - max); it may write up to the vectors'
  // ends. The sums' order depends on the indices alone. merge_rows: row = own·row + factor·other.
  void (*score_rows)(const ScoredRows&);
  Softmax (*softmax_weights)(float* scores, int64_t first, int64_t last, float scale);
  void (*add_weighted_rows)(const WeightedRows&);
  void (*merge_rows)(float* row, float own, const float* other, float factor, int64_t n);

  // Probes of the machine's ceilings. multiply_rate: `iterations` times the multiply-adds of one tile, in registers; returns
  // the flops done. read: sums the first `bytes` bytes, less a last part of fewer than 512.
  double (*multiply_rate)(DType dtype, int64_t iterations);
  uint64_t (*read)(const void* data, int64_t bytes);
};

// Of the ISA in use, for probes and tests. An op has a Context (context.h).
const Kernels& kernels();

// Whether this processor's own prefetching streams from memory at full speed if software prefetches only a line here and
// there, or none: AMD's does. Intel's does so only beside plain loads. With multiply-adds on the data it is slower by a tenth
// (float32) or a third (pairs of bfloat16), so every line has to be prefetched.
bool follows_streams();

// How this processor reads from memory fastest where it does little with the data: a plain read, and few rows of plain weights.
// Others reach 70 to 85 % of its speed there.
enum class Reads {
  kEveryLine,  // one stream, all of it prefetched: Zen 5, Intel
  kSomeLines,  // one stream, a line here and there prefetched: Zen 4
  kStreams,    // kMostStreams streams at once, nothing prefetched: AMD before Zen 4
};
Reads fastest_reads();
void set_fastest_reads(Reads reads);  // for tests: bits do not depend on it
constexpr int kMostStreams = 4;

const Kernels& kernels_generic();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();
const Kernels& kernels_amx();
const Kernels& kernels_neon();

}  // namespace switchgear::cpu
