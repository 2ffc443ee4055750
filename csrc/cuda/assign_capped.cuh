// SPDX-License-Identifier: BSD-3-Clause
// assign_capped: values [T,E] -> log A [T,E], the scores by which experts choose tokens if a token may have at most `cap` of them
// (csrc/cpu/assign_capped.cpp has the method).
//
//   work 2·rounds + 1 charges over T·E values, 3 to 6 passes each, one exponential per element and pass; traffic 4·T·E bytes a
//   pass, from L2 while both copies of the values fit; bound by instructions, and for few values by the grid barriers
//
//   capped_read_kernel   a thread per value: S/λ by token and by expert of a sequence, and the first charges
//   assign_capped_kernel   one cooperative launch: rounds of expert charges, a warp per (sequence, expert), or a block if sequences are long, and of token charges,
//                        a warp per token, with a barrier of the grid after each. It ends once no sequence moves, so a large
//                        `iterations` costs nothing, and no value is copied to the host.
//
// moved_in[r % 2][b] is r if round r, counted from 1, moved a token of sequence b. Rounds only grow, so nothing is cleared; and
// a round reads one half while it writes the other.
//
// Numeric contract: the bits of csrc/cpu/assign_capped.cpp. A row's sum of exponentials has 16 partial sums per 512 values, added
// in a fixed tree, by 16 lanes here; those of 512 values are added in float64 in their order. Values and charges that CUDA does
// not check are clamped; tokens with a sequence id out of range get the lowest value.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   capped_read_kernel: 32 registers
//   assign_capped_kernel: 80 registers, 128 bytes of shared memory
#pragma once
#include "../cpu/log.h"
#include "platform.cuh"
#include "ptx.cuh"
#include "score.cuh"
#include "switchgear/tensor.h"
#include "vector.cuh"

namespace switchgear::cuda {

constexpr int kCappedThreads = 256;
constexpr int kCappedWarps = kCappedThreads / 32;
constexpr int kChunk = 512, kChunkLanes = 16;  // of a sum of exponentials: sum_of_powers in csrc/cpu/rows.inl
constexpr double kTinyTotal = 0x1p-126;        // replaces a total of 0, which has no logarithm

struct AssignCappedParams {
  const void* values;
  int64_t row_stride;
  DType dtype;
  const int32_t* sequence_ids;  // or null
  const int32_t* limits;
  float* assignment;
  const int32_t* sequence_offsets;  // [B + 1], or null for a single sequence
  const int32_t* tokens;            // [T] by sequence, or null for a single sequence
  float* by_token;                  // S/λ [T,E], tokens in the order of their sequences
  float* by_expert;                 // the same: sequence b has E rows of its length from offsets[b]·E on
  float *of_expert, *of_token;      // charges [B,E], [T]
  uint32_t* moved_in;               // [2,B]
  uint32_t* last_move;              // the last round that moved any token
  uint32_t* arrived;                // blocks at the barrier, ever
  double cap, tolerance;
  int64_t iterations;
  float entropy, huge;
  int num_tokens, num_experts, num_sequences;
  bool long_rows;  // a block for each expert of a sequence, instead of a warp

  __device__ int32_t begin(int b) const { return sequence_offsets != nullptr ? sequence_offsets[b] : 0; }
  __device__ int32_t size(int b) const {
    return sequence_offsets != nullptr ? sequence_offsets[b + 1] - sequence_offsets[b] : num_tokens;
  }
  __device__ int32_t num_listed() const {
    return sequence_offsets != nullptr ? sequence_offsets[num_sequences] : num_tokens;
  }
  __device__ int32_t token(int32_t i) const { return tokens != nullptr ? tokens[i] : i; }
  __device__ int sequence(int32_t i) const { return sequence_ids != nullptr ? sequence_ids[token(i)] : 0; }
  __device__ float worth(int64_t token, int e) const {
    const float v = divide(sanitise(load_float(values, dtype, token * row_stride + e)), entropy);
    return v < -huge ? -huge : huge < v ? huge : v;
  }
  __device__ uint32_t* moved(int b, int64_t round) const { return moved_in + round % 2 * num_sequences + b; }
  // Whether round `round` moved a token of sequence b. Before the first round all move.
  __device__ bool moves(int b, int64_t round) const {
    return round == 0 || *moved(b, round) == static_cast<uint32_t>(round);
  }
};

__global__ void __launch_bounds__(kCappedThreads) capped_read_kernel(AssignCappedParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kCappedThreads + threadIdx.x;
  if (at < static_cast<int64_t>(p.num_sequences) * p.num_experts) p.of_expert[at] = INFINITY;  // unknown
  if (at < 2 * p.num_sequences) p.moved_in[at] = 0;
  if (at < p.num_tokens) p.of_token[at] = 0.0f;
  if (at == 0) *p.last_move = *p.arrived = 0;
  if (at >= static_cast<int64_t>(p.num_tokens) * p.num_experts) return;
  const int32_t t = static_cast<int32_t>(at / p.num_experts);
  const int e = static_cast<int>(at % p.num_experts);
  if (p.sequence_ids != nullptr && (p.sequence_ids[t] < 0 || p.sequence_ids[t] >= p.num_sequences)) {
    p.assignment[at] = -p.huge;
  }
  if (t >= p.num_listed()) return;
  const float v = p.worth(p.token(t), e);
  p.by_token[at] = v;
  const int b = p.sequence(t);
  const int64_t begin = p.begin(b);
  p.by_expert[begin * p.num_experts + static_cast<int64_t>(e) * p.size(b) + (t - begin)] = v;
}

// ---- teams: the threads that compute one charge together ------------------------------------------------------------------

struct CappedScratch {  // of a block
  int32_t counts[kCappedWarps];
  uint32_t keys[kCappedWarps];
  float chunks[2 * kCappedWarps];
};

__device__ inline int32_t sum_over_warp(int32_t v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

struct WarpTeam {
  static constexpr int kThreads = 32;
  __device__ void sync() const { __syncwarp(); }
  __device__ int thread() const { return static_cast<int>(threadIdx.x % 32); }
  __device__ void combine(int32_t& count, uint32_t& key) const {
    count = sum_over_warp(count);
    key = max_over<32>(key);
  }
  // The sums of the team's chunks, each from a group of 16 lanes, in every thread.
  __device__ void gather(float sum, float (&chunks)[2]) const {
    chunks[0] = __shfl_sync(kAllLanes, sum, 0);
    chunks[1] = __shfl_sync(kAllLanes, sum, kChunkLanes);
  }
};

struct BlockTeam {
  static constexpr int kThreads = kCappedThreads;
  CappedScratch& scratch;
  __device__ void sync() const { __syncthreads(); }
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ void combine(int32_t& count, uint32_t& key) const {
    const int warp = thread() / 32;
    count = sum_over_warp(count);
    key = max_over<32>(key);
    if (thread() % 32 == 0) scratch.counts[warp] = count, scratch.keys[warp] = key;
    __syncthreads();
    count = 0, key = 0;
    for (int w = 0; w < kCappedWarps; ++w) count += scratch.counts[w], key = max(key, scratch.keys[w]);
    __syncthreads();  // the scratch may be reused
  }
  __device__ void gather(float sum, float (&chunks)[2 * kCappedWarps]) const {
    if (thread() % kChunkLanes == 0) scratch.chunks[thread() / kChunkLanes] = sum;
    __syncthreads();
    for (int c = 0; c < 2 * kCappedWarps; ++c) chunks[c] = scratch.chunks[c];
    __syncthreads();
  }
};

// ---- a charge -------------------------------------------------------------------------------------------------------------
// The functions of csrc/cpu/assign_capped.cpp and rows.inl, for values that `value(i)` computes. All threads of a team call them
// and get the same result.

struct CappedReaching {
  int32_t count;
  float next;
};

template <typename Team, typename Value>
__device__ inline CappedReaching reaching(const Team& team, int32_t n, const Value& value, float bound) {
  int32_t count = 0;
  uint32_t key = 0;
  for (int32_t i = team.thread(); i < n; i += Team::kThreads) {
    const float v = value(i);
    const bool reaches = !(__float_as_uint(add(v, -bound)) >> 31);
    if (reaches) {
      ++count;
    } else {
      key = max(key, key_of(v));
    }
  }
  team.combine(count, key);
  return {count, value_of(key)};
}

template <typename Team, typename Value>
__device__ inline double sum_of_powers(const Team& team, int32_t n, const Value& value, float highest) {
  constexpr int kGroups = Team::kThreads / kChunkLanes;
  const int group = team.thread() / kChunkLanes, lane = team.thread() % kChunkLanes;
  double sum = 0.0;
  for (int64_t base = 0; base < n; base += kGroups * kChunk) {
    const int64_t first = base + group * kChunk, end = min(static_cast<int64_t>(n), first + kChunk);
    float own = 0.0f;
    for (int64_t i = first + lane; i < end; i += kChunkLanes) {
      const float distance = add(value(static_cast<int32_t>(i)), -highest);
      own = add(own, cpu::exp_f32(static_cast<int32_t>(__float_as_uint(distance)) > 0 ? -FLT_MAX : distance));
    }
#pragma unroll
    for (int step = kChunkLanes / 2; step > 0; step /= 2) own = add(own, __shfl_xor_sync(kAllLanes, own, step));
    float chunks[kGroups];
    team.gather(own, chunks);
    for (int c = 0; c < kGroups; ++c) {
      if (base + c * kChunk < n) sum = add(sum, static_cast<double>(chunks[c]));
    }
  }
  return sum;
}

__device__ inline float next_above(float v) {
  const uint32_t bits = __float_as_uint(add(v, 0.0f));  // -0 as 0
  return __uint_as_float(bits >> 31 ? bits - 1 : bits + 1);
}

template <typename Team, typename Value>
__device__ inline float first_charge(const Team& team, int32_t n, const Value& value, double total, float low,
                                     float high) {
  while (add(high, -low) > 1.0f) {
    const float middle = add(low, multiply(add(high, -low), 0.5f));
    if (middle <= low || middle >= high) break;
    if (reaching(team, n, value, middle).count < total) {
      high = middle;
    } else {
      low = middle;
    }
  }
  return high;
}

template <typename Team, typename Value>
__device__ inline float charge_of(const Team& team, int32_t n, const Value& value, double total, float lowest,
                                  float start) {
  float charge = start;
  if (start == INFINITY) {
    uint32_t high = 0, low = 0;  // low: of the complements
    for (int32_t i = team.thread(); i < n; i += Team::kThreads) {
      const uint32_t key = key_of(value(i));
      high = max(high, key);
      low = max(low, ~key);
    }
    int32_t none = 0;
    team.combine(none, high);
    team.combine(none, low);
    charge = first_charge(team, n, value, total, value_of(~low), next_above(value_of(high)));
  } else if (reaching(team, n, value, start).count >= total) {
    float low = start, step = 1.0f;
    for (; reaching(team, n, value, charge).count >= total; step = multiply(step, 2.0f)) {
      low = charge;
      charge = add(charge, step);
    }
    charge = first_charge(team, n, value, total, low, charge);
  }
  CappedReaching at = reaching(team, n, value, charge);
  for (float last = INFINITY;; last = charge) {
    const double above = add(static_cast<double>(at.next), cpu::log_f64(sum_of_powers(team, n, value, at.next)));
    charge = static_cast<float>(add(above, -cpu::log_f64(add(total, -static_cast<double>(at.count)))));
    if (charge > last) return last;
    if (charge <= lowest) return lowest;
    const CappedReaching next = reaching(team, n, value, charge);
    if (next.count == at.count || next.count >= total) return charge;
    at = next;
  }
}

// ---- the rounds -------------------------------------------------------------------------------------------------------------

// All blocks wait for each other: what they wrote before is visible after.
__device__ inline void grid_barrier(uint32_t* arrived, uint32_t& target) {
  __syncthreads();
  target += gridDim.x;
  if (threadIdx.x == 0) {
    ptx::atom_add_acq_rel_gpu(arrived, 1);
    while (static_cast<int32_t>(ptx::ld_acquire_gpu(arrived) - target) < 0) {
    }
  }
  __syncthreads();
}

// The charge of row `row` of [B,E].
template <typename Team>
__device__ inline void charge_expert(const AssignCappedParams& p, const Team& team, int64_t row, int64_t round) {
  const int b = static_cast<int>(row / p.num_experts), e = static_cast<int>(row % p.num_experts);
  const int32_t n = p.size(b);
  if (n == 0 || (round < p.iterations && !p.moves(b, round))) return;
  const int64_t begin = p.begin(b);
  const float* const values = p.by_expert + begin * p.num_experts + static_cast<int64_t>(e) * n;
  const float* const charges = p.of_token + begin;
  const double limit = max(0, min(p.limits[b], n)), total = limit > kTinyTotal ? limit : kTinyTotal;
  const float before = p.of_expert[row];
  team.sync();  // all have read it
  const float charge =
      charge_of(team, n, [&](int32_t i) { return add(values[i], -charges[i]); }, total, -INFINITY, before);
  if (team.thread() == 0) p.of_expert[row] = charge;
}

// In the last round, after the others, all sequences are charged.
__device__ inline void charge_experts(const AssignCappedParams& p, CappedScratch& scratch, int64_t round) {
  const int64_t num_rows = static_cast<int64_t>(p.num_sequences) * p.num_experts;
  if (!p.long_rows) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * kCappedThreads + threadIdx.x) / 32;
    for (int64_t row = first; row < num_rows; row += static_cast<int64_t>(gridDim.x) * kCappedWarps) {
      charge_expert(p, WarpTeam{}, row, round);
    }
    return;
  }
  for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) charge_expert(p, BlockTeam{scratch}, row, round);
}

__device__ inline void charge_tokens(const AssignCappedParams& p, int64_t round) {
  const WarpTeam team;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kCappedThreads + threadIdx.x) / 32;
  for (int64_t i = warp; i < p.num_listed(); i += static_cast<int64_t>(gridDim.x) * kCappedWarps) {
    const int b = p.sequence(static_cast<int32_t>(i));
    if (!p.moves(b, round)) continue;
    const float* const values = p.by_token + i * p.num_experts;
    const float* const charges = p.of_expert + static_cast<int64_t>(b) * p.num_experts;
    const float before = p.of_token[i];
    team.sync();  // all have read it
    const float charge =
        charge_of(team, p.num_experts, [&](int32_t e) { return add(values[e], -charges[e]); }, p.cap, 0.0f, before);
    if (team.thread() != 0) continue;
    p.of_token[i] = charge;
    if (static_cast<double>(fabsf(add(charge, -before))) <= p.tolerance) continue;
    const auto now = static_cast<uint32_t>(round + 1);
    atomicMax(p.moved(b, round + 1), now);
    atomicMax(p.last_move, now);
  }
}

__global__ void __launch_bounds__(kCappedThreads) assign_capped_kernel(AssignCappedParams p) {
  SHARED_VALUE(CappedScratch, scratch);
  uint32_t target = 0;
  for (int64_t round = 0; round < p.iterations && (round == 0 || *p.last_move == static_cast<uint32_t>(round));
       ++round) {
    charge_experts(p, scratch, round);
    grid_barrier(p.arrived, target);
    charge_tokens(p, round);
    grid_barrier(p.arrived, target);
  }
  if (p.cap < p.num_experts) {
    charge_experts(p, scratch, p.iterations);
    grid_barrier(p.arrived, target);
  }
  const int64_t count = static_cast<int64_t>(p.num_listed()) * p.num_experts;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kCappedThreads + threadIdx.x; at < count;
       at += static_cast<int64_t>(gridDim.x) * kCappedThreads) {
    const auto i = static_cast<int32_t>(at / p.num_experts);
    const int e = static_cast<int>(at % p.num_experts);
    const int64_t expert = static_cast<int64_t>(p.sequence(i)) * p.num_experts + e;
    const float price = p.cap < p.num_experts ? p.of_expert[expert] : 0.0f;
    p.assignment[static_cast<int64_t>(p.token(i)) * p.num_experts + e] =
        add(add(p.by_token[at], -price), -p.of_token[i]);
  }
}

}  // namespace switchgear::cuda
