// SPDX-License-Identifier: BSD-3-Clause
// A grouped GEMM, described for host and kernels alike. The layer consists of two products:
//
//   Gemm    out[s,n] = Σ_k a[s,k] · b[e(s)][n,k] (+ bias[e(s),n])      rows grouped by expert: forward, input gradient
//   Wgrad   out[e][m,n] = Σ_{s of e} a[s,m] · b[s,n]                   inner dimension grouped by expert: weight gradient
//
// The inner dimension of a Gemm may be extended by a second pair of operands (LowRank), an adapter's: its products go into the
// same accumulators, before those of a and b.
//
// `gemm` and `wgrad` pick the kernel: gemm_sm90 if sm90_takes allows it, else the decode kernel, else the tiles of tiles_sm80.h.
// Everything is plain data.
//
// Order of the sums: gemm_sm80.cuh (all tiles of a dtype) and gemm_decode.cuh share one: k ascending through one float32
// accumulator per element, 16 (tf32: 8) terms per instruction. So a row's bits do not depend on the tile picked.
// gemm_sm90 has its own order, which must not depend on the tile either.
#pragma once
#include <cstddef>
#include <cstdint>

#include "platform.cuh"
#include "switchgear/ops.h"
#include "tiles_sm80.h"

namespace switchgear::cuda {

// ---- operands ----------------------------------------------------------------------------------------------------------

// One row per slot: row r(s) of `data`, with r(s) = indices[s] if given, else s. A row outside [0, count) reads as zeros.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;  // elements from row to row; columns are contiguous
  int64_t count = 0;
  const int32_t* indices = nullptr;  // [S] on the device
};

// The matrix of one expert, for experts stored separately. On the device; each product writes it first (expert_weights.h).
struct alignas(128) SeparateMatrix {
  std::byte tensor_map[128];  // gemm_sm90 only: the matrix's CUtensorMap, which tensormap.replace wants aligned so
  const void* data;
  int64_t rows;  // rows from here on are zeros and are not read
};

// The same on the host, which a product reads while it is queued.
struct SeparateList {
  const void* const* data = nullptr;  // [E]
  const int64_t* rows = nullptr;      // [E]
};

// Element (n, k) of expert e. One of the two strides is 1.
struct ExpertOperand {
  const void* data = nullptr;  // expert e at data + e * expert_stride …
  int64_t expert_stride = 0;
  SeparateMatrix* separate = nullptr;  // … or, if given, at separate[e].data; [E] on the device, for `list`
  SeparateList list;
  const int32_t* ends = nullptr;  // [E] on the device, optional: rows from here on are zeros and are not read
  bool rows_are_n = true;         // separate[e].rows and ends[e] bound n; else k
  int64_t n_stride = 0, k_stride = 1;
  bool aligned = false;  // bases and all strides that are not 1 (including expert_stride) are multiples of 16 bytes

  __host__ __device__ constexpr bool k_contiguous() const { return k_stride == 1; }
};

// ---- products ----------------------------------------------------------------------------------------------------------

enum class Epilogue : uint8_t {
  kStore,        // out [S,N]: the product plus bias
  kGlu,          // h = the product plus bias, out [S,I] = glu(h); h [S,N] is stored if given
  kGluBackward,  // g = the product (N = I): reads h and weights, writes out [S,width of h] = glu'(h, w·g) and, if given,
                 // weighted_a [S,I] = w·glu(h) and weight_parts [S, weight_parts_of(I)] = parts of <g, glu(h)>
};

// The mask of dropout of one projection; dropout.cuh has its definition.
struct DropoutMask {
  uint64_t seed = 0;
  const int64_t* device_seed = nullptr;  // instead of seed, on the device
  uint32_t projection = 0;
  uint32_t threshold = 0;  // hashes below it are dropped; 0: none

  __host__ __device__ constexpr bool drops() const { return threshold > 0; }
};

// The product becomes a·bᵀ + mask ⊙ (low.a · low.bᵀ).
struct LowRank {
  Rows a;            // [S,r] in slot order
  ExpertOperand b;   // [E][N,r]; k is contiguous if it is in the other b
  int64_t rank = 0;  // r; 0: none
  DropoutMask mask;  // of out's elements; not with kGlu
};

// Hands out tiles to blocks (tile_queue.cuh). Both are 0 before and after each kernel that uses them.
struct TileCounter {
  int32_t taken;  // tiles
  int32_t done;   // blocks that will take no more
};

// Which blocks compute a product.
struct Schedule {
  TileCounter* counter = nullptr;    // on the device, optional
  int reserved_multiprocessors = 0;  // left to kernels of other streams
  bool follows_kernel = false;  // a kernel precedes it in the stream: on sm_90 it may start before that one has ended
};

struct Gemm {
  DType dtype = DType::kFloat32;
  bool allow_tf32 = false;
  Rows a;           // [S,C], gathered or in slot order
  ExpertOperand b;  // [E][N,C]
  LowRank low;
  Schedule schedule;
  const void* bias = nullptr;
  int64_t bias_stride = 0;                  // [E,N]
  const float* scales = nullptr;            // kStore, without bias: [E], factors of the product; optional
  float scale_divisor = 1.0f;               // … divided by this
  const int32_t* expert_offsets = nullptr;  // [E+1] on the device
  int64_t num_experts = 0;
  int64_t num_slots =
      0;  // S, the host's bound on expert_offsets[E]. Rows past expert_offsets[E] are zeroed in out and h
  int64_t n = 0, c = 0;  // N and C

  Epilogue epilogue = Epilogue::kStore;
  void* out = nullptr;
  int64_t out_stride = 0;
  GluOptions options;  // for the two epilogues with a gate; n is N for kGlu, I for kGluBackward
  void* h = nullptr;   // kGlu: out, optional. kGluBackward: in
  int64_t h_stride = 0;
  const float* slot_weights = nullptr;  // kGluBackward: [S]
  void* weighted_a = nullptr;           // kGluBackward: [S,I], optional
  int64_t weighted_a_stride = 0;
  float* weight_parts = nullptr;  // kGluBackward: [S, weight_parts_of(I)], optional
};

// Partial sums over 32 columns, aligned to 32: eight columns in order, then ((0 + 1) + (2 + 3)) over the four eights. This
// grouping is part of the contract: it makes the gradient of topk_weights independent of the tile.
constexpr int64_t kWeightPart = 32;
__host__ __device__ constexpr int64_t weight_parts_of(int64_t intermediate_size) {
  return (intermediate_size + kWeightPart - 1) / kWeightPart;
}

// a and b in slot order or gathered, of each expert or of a list of them; an s outside [0, S) is never dereferenced. Experts without rows get zeros.
struct Wgrad {
  DType dtype = DType::kFloat32;
  bool allow_tf32 = false;
  Rows a, b;
  const int32_t* expert_offsets = nullptr;
  const int32_t* experts = nullptr;  // [num_matrices] on the device: the expert of each matrix of out; all if null
  int64_t num_experts = 0, num_slots = 0, num_matrices = 0;
  int64_t m = 0, n = 0;  // widths of a and b
  void* out = nullptr;   // [num_matrices,m,n], columns contiguous; if stored transposed, a and b are swapped
  int64_t out_expert_stride = 0, out_stride = 0;
  Schedule schedule;
};

// The width of `a`: I for kGlu, N otherwise.
__host__ __device__ constexpr int64_t out_columns(const Gemm& g) {
  return g.epilogue == Epilogue::kGlu && g.options.gated ? g.n / 2 : g.n;
}

// ---- launchers ---------------------------------------------------------------------------------------------------------

void gemm(const Gemm& g, void* stream);
void wgrad(const Wgrad& g, void* stream);

// Those of gemm_sm80.cuh, one source file per dtype, so that the slow compilations run in parallel.
void gemm_bf16(const Gemm& g, void* stream);
void gemm_f16(const Gemm& g, void* stream);
void gemm_tf32(const Gemm& g, void* stream);
void gemm_f32(const Gemm& g, void* stream);
void wgrad_bf16(const Wgrad& g, void* stream);
void wgrad_f16(const Wgrad& g, void* stream);
void wgrad_tf32(const Wgrad& g, void* stream);
void wgrad_f32(const Wgrad& g, void* stream);

// Whether products run on the kernels of sm_80, which every device runs, and not on those of the device's generation: for
// comparisons, and for a device on which the newer kernels fail. SWITCHGEAR_CUDA_KERNELS, read at first use, until
// set_cuda_kernels (switchgear/backend.h) changes it.
bool only_sm80();

bool on_hopper();                // the current device, unless only_sm80()
bool sm90_takes(const Gemm& g);  // on the current device
void gemm_sm90(const Gemm& g, void* stream);
bool sm90_takes(const Wgrad& g);
void wgrad_sm90(const Wgrad& g, void* stream);

}  // namespace switchgear::cuda
