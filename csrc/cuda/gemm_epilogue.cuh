// SPDX-License-Identifier: BSD-3-Clause
// The epilogue of a tile of sums: bias, gate, rounding, storing. The accumulators are in shared memory as float32, for every
// kernel. A thread handles blocks of eight columns of a row, so that memory is read and written in vectors.
//
//   kStore          out = sums + bias, or scale · sums
//   kGlu            h = sums + bias (stored if requested), out = a = glu(h). The tile's columns are the gates and ups of the
//                   same columns of a: gates first and then ups, or interleaved like h itself
//   kGluBackward    g = sums: out = grad_h and, if requested, weighted_a and parts of <g, a> (weight_parts_of in gemm.h)
//
// traffic per element: what is stored, plus h for kGluBackward. Numeric contract: everything in float32, rounded once when
// stored; a is computed from the unrounded h.
#pragma once
#include "activation.cuh"
#include "gemm.h"
#include "gemm_schedule.cuh"
#include "vector.cuh"

namespace switchgear::cuda {

constexpr int kBlock = 8;  // columns per block

// ---- blocks of eight columns ---------------------------------------------------------------------------------------------

// Loads elements at `p` into values; zeros past `count`. `aligned`: p is a multiple of 16 bytes.
template <typename T>
__device__ inline void load_block(float (&values)[kBlock], const T* p, int count, bool aligned) {
  constexpr int kVector = kVectorSize<T>;
#pragma unroll
  for (int first = 0; first < kBlock; first += kVector) {
    float part[kVector];
    unpack<T>(part, load_vector(p + first, count - first, aligned && count - first >= kVector));
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[first + i] = part[i];
  }
}

template <typename T>
__device__ inline void store_block(T* p, const float (&values)[kBlock], int count, bool aligned) {
  constexpr int kVector = kVectorSize<T>;
#pragma unroll
  for (int first = 0; first < kBlock; first += kVector) {
    float part[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) part[i] = values[first + i];
    store_vector(p + first, pack<T>(part), count - first, aligned && count - first >= kVector);
  }
}

// Eight gates and their eight ups.
struct GateBlock {
  float gate[kBlock], up[kBlock];
};

__device__ inline void split(GateBlock& to, const float (&first)[kBlock], const float (&second)[kBlock]) {
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i) {
    to.gate[i] = first[2 * i];
    to.up[i] = first[2 * i + 1];
    to.gate[i + kBlock / 2] = second[2 * i];
    to.up[i + kBlock / 2] = second[2 * i + 1];
  }
}

__device__ inline void merge(float (&first)[kBlock], float (&second)[kBlock], const GateBlock& from) {
#pragma unroll
  for (int i = 0; i < kBlock / 2; ++i) {
    first[2 * i] = from.gate[i];
    first[2 * i + 1] = from.up[i];
    second[2 * i] = from.gate[i + kBlock / 2];
    second[2 * i + 1] = from.up[i + kBlock / 2];
  }
}

// Gates and ups of columns [column, column + count) of a, from a row laid out like h.
template <typename T>
__device__ inline void load_gates(GateBlock& gates, const T* row, const GluOptions& options, int64_t intermediate_size,
                                  int64_t column, int count, bool aligned) {
  if (options.gated && options.interleaved) {
    float first[kBlock], second[kBlock];
    load_block(first, row + 2 * column, 2 * count, aligned);
    load_block(second, row + 2 * column + kBlock, 2 * count - kBlock, aligned);
    split(gates, first, second);
    return;
  }
  load_block(gates.gate, row + column, count, aligned);
  if (options.gated) load_block(gates.up, row + intermediate_size + column, count, aligned);
}

template <typename T>
__device__ inline void store_gates(T* row, const GateBlock& gates, const GluOptions& options, int64_t intermediate_size,
                                   int64_t column, int count, bool aligned) {
  if (options.gated && options.interleaved) {
    float first[kBlock], second[kBlock];
    merge(first, second, gates);
    store_block(row + 2 * column, first, 2 * count, aligned);
    store_block(row + 2 * column + kBlock, second, 2 * count - kBlock, aligned);
    return;
  }
  store_block(row + column, gates.gate, count, aligned);
  if (options.gated) store_block(row + intermediate_size + column, gates.up, count, aligned);
}

// ---- sums in shared memory -----------------------------------------------------------------------------------------------

// [rows, columns] float32. Blocks of eight are permuted within a row so that the rows of an mma fragment hit different banks.
class StagedSums {
 public:
  __device__ StagedSums(float* data, int columns) : data_(data), columns_(columns) {}

  __device__ float2& pair(int row, int column) const {  // `column`, which is even, and the next one
    return *reinterpret_cast<float2*>(data_ + place(row, column));
  }
  __device__ void block(float (&values)[kBlock], int row, int column) const {
    const float4* const from = reinterpret_cast<const float4*>(data_ + place(row, column));
    const float4 low = from[0], high = from[1];
    const float all[kBlock] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) values[i] = all[i];
  }

 private:
  __device__ int place(int row, int column) const {
    return row * columns_ + (column ^ (row & 3) * kBlock);  // in shared memory
  }

  float* data_;
  int columns_;
};

// ---- epilogues -----------------------------------------------------------------------------------------------------------

// Whether the rows of each tensor, and the ups in them, start at multiples of 16 bytes.
struct Alignment {
  bool a = false, b = false, low_a = false, low_b = false, out = false, h = false, weighted_a = false;
};

// The factor of an expert's sums (kStore).
__device__ inline float scale_of(const Gemm& g, int32_t expert) {
  return g.scales == nullptr || expert >= g.num_experts ? 1.0f : g.scales[expert] / g.scale_divisor;
}

// The columns of b that a tile multiplies: column(j) for j below the tile's width, if below end(j). If gates and ups are I
// columns apart in b, they are the two halves of a tile.
struct TileColumns {
  int32_t first, second;  // first column of the halves
  int half;               // width of the first half
  int32_t first_end, second_end;

  __device__ int32_t column(int j) const { return j < half ? first + j : second + (j - half); }
  __device__ int32_t end(int j) const { return j < half ? first_end : second_end; }
};

__device__ inline TileColumns tile_columns(const Gemm& g, int32_t column_tile, int columns) {
  const int32_t n = static_cast<int32_t>(g.n);
  if (g.epilogue == Epilogue::kGlu && g.options.gated && !g.options.interleaved) {
    const int32_t first = column_tile * (columns / 2);
    return {first, n / 2 + first, columns / 2, n / 2, n};
  }
  return {column_tile * columns, 0, columns, n, 0};
}

// Number of columns of out that a tile of `columns` columns of b produces.
__device__ inline int out_tile_columns(const Gemm& g, int columns) {
  return g.epilogue == Epilogue::kGlu && g.options.gated ? columns / 2 : columns;
}

template <typename T>
__device__ inline void store_sums(const Gemm& g, const Alignment& aligned, const RowTile& tile, int64_t row_limit,
                                  const StagedSums& sums, int row, int block, int64_t column, int count) {
  float values[kBlock];
  sums.block(values, row, block * kBlock);
  if (g.bias != nullptr && tile.expert < g.num_experts) {
    const int used = static_cast<int>(row_limit - column < count ? row_limit - column : count);
    float bias[kBlock];
    load_block(bias, static_cast<const T*>(g.bias) + tile.expert * g.bias_stride + column, used, false);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) values[i] += bias[i];
  }
  if (g.scales != nullptr) {
    const float factor = scale_of(g, tile.expert);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) values[i] *= factor;
  }
  store_block(static_cast<T*>(g.out) + (tile.first_row + row) * g.out_stride + column, values, count, aligned.out);
}

template <typename T>
__device__ inline void store_glu(const Gemm& g, const Alignment& aligned, const RowTile& tile, const StagedSums& sums,
                                 int row, int block, int tile_columns, int64_t column, int count) {
  const int64_t intermediate_size = out_columns(g), slot = tile.first_row + row;
  GateBlock gates{};
  if (g.options.gated && g.options.interleaved) {
    float first[kBlock], second[kBlock];
    sums.block(first, row, 2 * block * kBlock);
    sums.block(second, row, (2 * block + 1) * kBlock);
    split(gates, first, second);
  } else {
    sums.block(gates.gate, row, block * kBlock);
    if (g.options.gated) sums.block(gates.up, row, tile_columns / 2 + block * kBlock);
  }
  if (g.bias != nullptr && tile.expert < g.num_experts) {
    GateBlock bias{};
    load_gates(bias, static_cast<const T*>(g.bias) + tile.expert * g.bias_stride, g.options, intermediate_size, column,
               count, false);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      gates.gate[i] += bias.gate[i];
      gates.up[i] += bias.up[i];
    }
  }
  if (g.h != nullptr) {
    store_gates(static_cast<T*>(g.h) + slot * g.h_stride, gates, g.options, intermediate_size, column, count,
                aligned.h);
  }
  float a[kBlock];
  with_activation(g.options.activation, [&]<Activation kActivation>() {
#pragma unroll
    for (int i = 0; i < kBlock; ++i) a[i] = gate_value<kActivation>(g.options, gates.gate[i], gates.up[i]);
  });
  store_block(static_cast<T*>(g.out) + slot * g.out_stride + column, a, count, aligned.out);
}

// Called by all lanes of a warp together, with count <= 0 if there is nothing to do; four consecutive lanes share 32 columns.
template <typename T>
__device__ inline void store_glu_backward(const Gemm& g, const Alignment& aligned, const RowTile& tile,
                                          const StagedSums& sums, int row, int block, int64_t column, int count) {
  const int64_t slot = tile.first_row + row;
  float dot = 0.0f;
  if (count > 0) {
    float product[kBlock];
    sums.block(product, row, block * kBlock);
    GateBlock gates{};
    load_gates(gates, static_cast<const T*>(g.h) + slot * g.h_stride, g.options, g.n, column, count, aligned.h);
    const float weight = g.slot_weights[slot];
    float weighted_a[kBlock];
    with_activation(g.options.activation, [&]<Activation kActivation>() {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const GateGradient d = gate_gradient<kActivation>(g.options, gates.gate[i], gates.up[i]);
        const float grad_a = weight * product[i];
        gates.gate[i] = grad_a * d.per_gate;
        gates.up[i] = grad_a * d.per_up;
        weighted_a[i] = weight * d.a;
        if (i < count) dot = fmaf(product[i], d.a, dot);
      }
    });
    store_gates(static_cast<T*>(g.out) + slot * g.out_stride, gates, g.options, g.n, column, count, aligned.out);
    if (g.weighted_a != nullptr) {
      store_block(static_cast<T*>(g.weighted_a) + slot * g.weighted_a_stride + column, weighted_a, count,
                  aligned.weighted_a);
    }
  }
  dot += __shfl_xor_sync(0xffffffffu, dot, 1);
  dot += __shfl_xor_sync(0xffffffffu, dot, 2);
  if (count > 0 && g.weight_parts != nullptr && column % kWeightPart == 0) {
    g.weight_parts[slot * weight_parts_of(g.n) + column / kWeightPart] = dot;
  }
}

// Stores a whole tile with `threads` threads. Columns of b from `row_limit` on have no weights (kStore).
template <typename T>
__device__ inline void run_epilogue(const Gemm& g, const Alignment& aligned, const RowTile& tile, int64_t row_limit,
                                    const StagedSums& sums, int tile_rows, int tile_columns, int thread, int threads) {
  const int width = out_tile_columns(g, tile_columns), blocks = width / kBlock;
  const int64_t first_column = tile.column * width, columns = out_columns(g);
  const bool unassigned = tile.expert == g.num_experts;
  if (unassigned && g.epilogue == Epilogue::kGluBackward) return;
  for (int i = thread; i < tile_rows * blocks; i += threads) {
    const int row = i / blocks, block = i % blocks;
    const int64_t column = first_column + block * kBlock, left = columns - column;
    const int count = row < tile.rows ? static_cast<int>(left < kBlock ? left : kBlock) : 0;
    if (g.epilogue == Epilogue::kGluBackward) {
      store_glu_backward<T>(g, aligned, tile, sums, row, block, column, count);
    } else if (count > 0 && g.epilogue == Epilogue::kGlu) {
      store_glu<T>(g, aligned, tile, sums, row, block, tile_columns, column, count);
    } else if (count > 0) {
      store_sums<T>(g, aligned, tile, row_limit, sums, row, block, column, count);
    }
  }
}

}  // namespace switchgear::cuda
