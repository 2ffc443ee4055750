// SPDX-License-Identifier: BSD-3-Clause
// The epilogues of gemm_sm90.cuh: from the accumulators of a wgmma to rows in memory, for sizes and strides that are
// multiples of 8 elements. gemm.h defines what they compute, ops.h the formats of h.
//
// Tiles without a gate, and cooperative ones, are stored by gemm_sm90_store.cuh and gemm_sm90_glu.cuh instead.
//
// A thread handles runs of eight adjacent columns: 16 bytes of a row, 64 bytes per quad. The lanes of a quad hold two columns
// each of every block of eight; four shuffles per block turn these into runs. About 1 shuffle and 3 selects per element, hidden
// behind the products of the other consumer; every store fills whole sectors.
//
// Numeric contract: float32, rounded once when stored; a is computed from the unrounded h.
#pragma once
#include "gemm_epilogue.cuh"
#include "gemm_sm90.h"
#include "gemm_sm90_gate.cuh"
#include "hopper.cuh"

namespace switchgear::cuda::sm90 {

// Of kBlocks blocks of 64 rows: rows 64·i + 16·warp + lane/4 (+ 8), columns 8·j + 2·(lane % 4) (+ 1) are element
// [i][4·j (+ 2) (+ 1)].
template <int kN, int kBlocks>
using Accumulators = float[kBlocks][kN / 2];

// threadIdx.x, opaque so that nothing derived from it is kept: with 192 accumulators a thread has 40 other registers.
__device__ inline int this_thread() { return ptx::opaque(static_cast<int>(threadIdx.x)); }

// Row i of the rows of this thread in a tile of 128: four, or two if each consumer has one block of the tile.
template <int kBlocks>
__device__ inline int row_of_thread(int i) {
  const int thread = this_thread() % 128, block = kBlocks == 1 ? this_thread() / 128 - 1 : i / 2;
  return 64 * block + 16 * (thread / 32) + thread % 32 / 4 + 8 * (i % 2);
}

// First column of this thread's first run.
__device__ inline int lane_column() { return this_thread() % 4 * 8; }

// The runs of a thread: columns 32·g + 8·(lane % 4) of one row of its tile, one at a time, since registers are scarce.

// Runs of the first row of accumulators. Input: a pair of columns per lane of each of four blocks of eight; output: one block
// per lane. Lane i passes its pair of block j to lane j, where it becomes columns 2i and 2i + 1. All lanes of a warp call it.
//
// A run is read once: get then moves the accumulators of the thread's next row into its place. Registers cannot be indexed at
// run time, and an epilogue unrolled over the rows is four times as long.
template <int kN, int kBlocks>
struct QuadRuns {
  static constexpr int kRuns = kN / 32;
  Accumulators<kN, kBlocks>& rows;

  __device__ void get(int g, float (&run)[8]) const {
    float (&acc)[kN / 2] = rows[0];
    const int thread = this_thread();
    const bool odd = thread & 1, high = thread & 2;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = acc[4 * (4 * g + j) + c];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {  // transposes the 2 x 2 blocks of a 4 x 4 matrix
        const float other = __shfl_xor_sync(0xffffffffu, odd ? v[j] : v[j + 1], 1);
        v[j] = odd ? other : v[j];
        v[j + 1] = odd ? v[j + 1] : other;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // and exchanges the blocks off its diagonal
        const float other = __shfl_xor_sync(0xffffffffu, high ? v[j] : v[j + 2], 2);
        v[j] = high ? other : v[j];
        v[j + 2] = high ? v[j + 2] : other;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) run[2 * j + c] = v[j];
    }
#pragma unroll
    for (int j = 16 * g; j < 16 * g + 16; j += 4) {  // one by one, else the compiler holds both rows for a while
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        ptx::move(rows[0][j + c], rows[0][j + 2 + c]);
        if constexpr (kBlocks == 2) {
          ptx::move(rows[0][j + 2 + c], rows[1][j + c]);
          ptx::move(rows[1][j + c], rows[1][j + 2 + c]);
        }
      }
    }
  }
};

// Runs of a row of 128 columns in shared memory, at a multiple of 16 bytes.
struct SharedRuns {
  static constexpr int kRuns = 4;
  const float* row;

  __device__ void get(int g, float (&run)[8]) const {
    const float4* const from = reinterpret_cast<const float4*>(row + 32 * g + lane_column());
    const float4 low = from[0], high = from[1];
    const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) run[i] = all[i];
  }
};

template <typename T>
__device__ inline void load_run(float (&values)[8], const T* from) {
  unpack<T>(values, load_vector(from, 8, true));
}

template <typename T>
__device__ inline void store_run(T* to, const float (&values)[8]) {
  store_vector(to, pack<T>(values), 8, true);
}

template <typename T>
__device__ inline void add_bias(float (&values)[8], const Gemm& g, int expert, int column) {
  if (g.bias == nullptr || expert == g.num_experts) return;
  float bias[8];
  load_run(bias, static_cast<const T*>(g.bias) + static_cast<int64_t>(expert) * g.bias_stride + column);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] += bias[i];
}

// ---- one row -------------------------------------------------------------------------------------------------------------
// Called by all lanes of a warp. Lanes with `stored` false have no row and only take part in shuffles.

// Switches the activation for each run. If the compiler knew it to be the same for all runs, it would copy the whole epilogue
// per activation.
template <typename Body>
__device__ inline void with_activation_of(const Gemm& g, const Body& body) {
  with_activation(static_cast<Activation>(ptx::opaque(static_cast<int>(g.options.activation))), body);
}

template <typename T, typename Runs>
__device__ inline void store_row(const Gemm& g, const RowTile& tile, int32_t slot, bool stored, const Runs& runs) {
  T* const out = static_cast<T*>(g.out) + slot * g.out_stride;
#pragma unroll
  for (int r = 0; r < Runs::kRuns; ++r) {
    float values[8];
    runs.get(r, values);
    const int column = tile.column * (32 * Runs::kRuns) + 32 * r + lane_column();
    if (!stored || column >= static_cast<int>(g.n)) continue;
    add_bias<T>(values, g, tile.expert, column);
    if (g.scales != nullptr) {
      const float factor = scale_of(g, tile.expert);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= factor;
    }
    store_run(out + column, values);
  }
}

// a = glu(h), and h if requested. Runs r and r + kRuns / 2 of a row are handled together. Separate halves: eight gates and
// their ups, since the first half of such a tile's columns are gates. Interleaved: four pairs each. Plain experts: unrelated
// gates.
template <typename T, typename Runs>
__device__ inline void glu_row(const Gemm& g, const RowTile& tile, int32_t slot, bool stored, const Runs& runs) {
  constexpr int kPairs = Runs::kRuns / 2;
#pragma unroll
  for (int r = 0; r < kPairs; ++r) {
    // `opaque`: computed again for each run, not kept in registers.
    const bool gated = ptx::opaque(g.options.gated), interleaved = gated && g.options.interleaved;
    const bool halves = gated && !interleaved;
    const int n = ptx::opaque(static_cast<int>(g.n));
    const int tile_width = (halves ? 32 : 64) * kPairs;  // columns of the first projection per tile
    const int apart = halves ? n / 2 : 32 * kPairs;      // from the first run to the second
    float first[8], second[8];
    runs.get(r, first);
    runs.get(r + kPairs, second);
    const int column = tile.column * tile_width + 32 * r + lane_column();
    const bool has_first = stored && column < (halves ? apart : n), has_second = stored && column + apart < n;
    if (has_first) add_bias<T>(first, g, tile.expert, column);
    if (has_second) add_bias<T>(second, g, tile.expert, column + apart);
    if (g.h != nullptr) {
      T* const h = static_cast<T*>(g.h) + int64_t{ptx::opaque(slot)} * g.h_stride + column;
      if (has_first) store_run(h, first);
      if (has_second) store_run(h + apart, second);
    }
    GateBlock gates;
    if (interleaved) {
      split(gates, first, second);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        gates.gate[i] = first[i];
        gates.up[i] = second[i];
      }
    }
#pragma unroll 1
    for (int part = 0; part < (gated ? 1 : 2); ++part) {
      const float limit = g.options.limit, alpha = g.options.alpha;
      if (limit > 0.0f) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          gates.gate[i] = limited_gate(gates.gate[i], limit);
          if (gated) gates.up[i] = limited_up(gates.up[i], limit);
        }
      }
      with_activation_of(g, [&]<Activation kActivation>() {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          gates.gate[i] = rounded_gate_value<kActivation>(gated, alpha, gates.gate[i], gates.up[i]);
        }
      });
      T* const out = static_cast<T*>(g.out) + int64_t{ptx::opaque(slot)} * g.out_stride;
      if (!interleaved) {
        if (part == 0 ? has_first : has_second) store_run(out + column + part * apart, gates.gate);
      } else {
        const Words words = pack<T>(gates.gate);  // four of a each
        if (has_first) *reinterpret_cast<uint2*>(out + column / 2) = make_uint2(words.w[0], words.w[1]);
        if (has_second) *reinterpret_cast<uint2*>(out + (column + apart) / 2) = make_uint2(words.w[2], words.w[3]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) gates.gate[i] = gates.up[i];
    }
  }
}

// grad_h, w·a and parts of <g, a> from the runs of g, one slot's gradient of a before its weight.
template <typename T, typename Runs>
__device__ inline void glu_backward_row(const Gemm& g, const RowTile& tile, int32_t slot, bool stored,
                                        const Runs& runs) {
  const bool gated = g.options.gated, interleaved = gated && g.options.interleaved;
  const int step = interleaved ? 2 : 1;  // columns of h per column of a
  const int n = static_cast<int>(g.n),
            second = interleaved ? 8 : n;  // offset of the second eight columns of h
  const int first_column = tile.column * (32 * Runs::kRuns) + lane_column();
  const T* const h = static_cast<const T*>(g.h) + slot * g.h_stride + step * first_column;
  T* const grad_h = static_cast<T*>(g.out) + slot * g.out_stride + step * first_column;
  Words packed[Runs::kRuns][2] = {};
#pragma unroll
  for (int r = 0; r < Runs::kRuns; ++r) {  // all loads before the first use
    if (!stored || first_column + 32 * r >= n) continue;
    packed[r][0] = load_vector(h + step * 32 * r, 8, true);
    if (gated) packed[r][1] = load_vector(h + step * 32 * r + second, 8, true);
  }
  const float weight = stored ? g.slot_weights[slot] : 0.0f;
#pragma unroll
  for (int r = 0; r < Runs::kRuns; ++r) {
    const int column = first_column + 32 * r;
    const bool used = stored && column < n;
    float product[8], part = 0.0f;
    GateBlock gates;
    runs.get(r, product);
    unpack<T>(gates.gate, packed[r][0]);
    unpack<T>(gates.up, packed[r][1]);
    if (interleaved) {
      const GateBlock pairs = gates;
      split(gates, pairs.gate, pairs.up);
    }
    with_activation_of(g, [&]<Activation kActivation>() {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const GateGradient d = gate_gradient<kActivation>(g.options, gates.gate[i], gates.up[i]);
        part = fmaf(product[i], d.a, part);
        gates.gate[i] = weight * product[i] * d.per_gate;
        gates.up[i] = weight * product[i] * d.per_up;
        product[i] = weight * d.a;
      }
    });
    part = used ? part : 0.0f;
    part += __shfl_xor_sync(0xffffffffu, part, 1);
    part += __shfl_xor_sync(0xffffffffu, part, 2);
    if (!used) continue;
    if (interleaved) {
      const GateBlock parts = gates;
      merge(gates.gate, gates.up, parts);
    }
    store_run(grad_h + step * 32 * r, gates.gate);
    if (gated) store_run(grad_h + step * 32 * r + second, gates.up);
    if (g.weighted_a != nullptr) {
      store_run(static_cast<T*>(g.weighted_a) + slot * g.weighted_a_stride + column, product);
    }
    if (g.weight_parts != nullptr && threadIdx.x % 4 == 0) {
      g.weight_parts[slot * weight_parts_of(g.n) + column / kWeightPart] = part;
    }
  }
}

// Finishes row `r` of a gemm tile. Rows past the expert's last one are not stored.
template <Epilogue kEpilogue, typename T, typename Runs>
__device__ inline void finish_row(const Gemm& g, const RowTile& tile, int r, const Runs& runs) {
  const int32_t slot = tile.first_row + r;
  const bool stored = r < tile.rows;
  if constexpr (kEpilogue == Epilogue::kStore) {
    store_row<T>(g, tile, slot, stored, runs);
  } else if constexpr (kEpilogue == Epilogue::kGlu) {
    glu_row<T>(g, tile, slot, stored, runs);
  } else {
    glu_backward_row<T>(g, tile, slot, stored && tile.expert < g.num_experts, runs);
  }
}

}  // namespace switchgear::cuda::sm90
