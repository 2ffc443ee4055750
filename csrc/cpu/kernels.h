// SPDX-License-Identifier: BSD-3-Clause
// The table that each ISA fills: everything of the CPU backend that is written with vector instructions.
//
// kernels.inl writes these functions once, against the small vocabulary that simd_<isa>.h defines; kernels_<isa>.cpp
// compiles them with the flags of its ISA. Nothing here throws or allocates: the callers validate and own all memory.
#pragma once
#include <cstdint>

#include "switchgear/ops.h"

namespace switchgear::cpu {

// One operand of a matrix product: element (n, k) is data[n·n_stride + k·k_stride], strides in elements, one of them 1;
// with `k_rows`, element (n, k) is k_rows[k][n_begin + n] (rows gathered through pointers).
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t n_stride = 0;
  int64_t k_stride = 0;
  const void* const* k_rows = nullptr;
  int64_t n_begin = 0;
};

constexpr int kMaxPanel = 64;      // columns of the widest panel of any ISA
constexpr int64_t kMaxRows = 240;  // rows of one product: 40 tiles of 6, so that C (60 KB) and a chunk of A stay in L2
// Depth of a packed panel in 4-byte words. 64 columns · 1024 · 4 = 256 KB stay in L2, and weights are read in runs of 4 KB.
constexpr int64_t kChunkWords = 1024;

// Where the rows of a finished product go, `stride` elements apart, rounded; past the caches if they are more than those hold.
struct Sink {
  void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::kFloat32;
  bool past_caches = false;
};

// c[m, n] = Σ_k rows[m][k] · b(n, k) for m < num_rows, n < num_columns; float32, k ascending for each element whatever the
// other arguments are, so a row's result does not depend on its neighbours. Columns up to the panel's width become zero.
struct Product {
  const void* const* rows;
  DType row_dtype;
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
  Sink sink = {};              // also stores the rows here
};
constexpr int64_t kProductScratch = kChunkWords * 4 * (kMaxPanel + kMaxRows);

struct Kernels {
  const char* isa;
  int panel;  // columns per product

  void (*multiply)(const Product&);

  // out[c][s] = rows[s][c] for c < columns, s < num_rows: the transpose that the weight gradient multiplies with. `out` has
  // bfloat16 elements where dtype is bfloat16 and the ISA multiplies bfloat16, else float32; returns which.
  DType (*transpose)(void* out, int64_t out_stride, const void* const* rows, int64_t num_rows, int64_t first_column,
                     int64_t columns, DType dtype);

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

  // Probes of the machine's ceilings: runs `iterations` · 24 multiply-adds of a vector in registers, returns the flops done;
  // sums `bytes` bytes (a multiple of 512).
  double (*multiply_rate)(DType dtype, int64_t iterations);
  uint64_t (*read)(const void* data, int64_t bytes);
};

const Kernels& kernels();  // of the ISA in use

const Kernels& kernels_generic();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();

}  // namespace switchgear::cpu
