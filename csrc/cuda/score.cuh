// SPDX-License-Identifier: BSD-3-Clause
// The numbers of route: keys that rank like logits, and scores with the bits of csrc/cpu/route.cpp, whose sums are float64 in
// the order of the experts.
//
// If a float64 sum of exponentials is exact, its order does not matter and it is computed in parallel. Multiples of 2^q have an
// exact sum below 2^(q + 53). This holds while the logits of a row span less than about 16; beyond that, the terms are added
// one by one. Every operation is rounded on its own (rounding.h).
#pragma once
#include <cfloat>

#include "../cpu/exp.h"
#include "platform.cuh"
#include "switchgear/ops.h"

namespace switchgear::cuda {

// ---- groups of lanes -----------------------------------------------------------------------------------------------------

constexpr unsigned kAllLanes = 0xffffffffu;

// Both return the same value in each of kLanes adjacent lanes; all lanes of the warp take part.
template <int kLanes>
__device__ inline uint32_t max_over(uint32_t v) {
  if constexpr (kLanes == 32) {
    v = __reduce_max_sync(kAllLanes, v);
  } else {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, v, step);
      v = other > v ? other : v;
    }
  }
  return v;
}

template <int kLanes>
__device__ inline uint32_t min_over(uint32_t v) {
  return ~max_over<kLanes>(~v);
}

template <int kLanes>
__device__ inline double sum_over(double v) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) v = add(v, __shfl_xor_sync(kAllLanes, v, step));
  return v;
}

// ---- keys ----------------------------------------------------------------------------------------------------------------

// NaN fails both comparisons of the first line.
__device__ inline float sanitise(float v) {
  v = v > -FLT_MAX ? v : -FLT_MAX;
  return v < FLT_MAX ? v : FLT_MAX;
}

// Keys ascend with the value; -0 and 0 have the same key. kTaken is below the key of every number.
constexpr uint32_t kTaken = 0;

__device__ inline uint32_t key_of(float v) {
  const uint32_t bits = __float_as_uint(add(v, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float value_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// ---- scores --------------------------------------------------------------------------------------------------------------

// Whether a float64 sum of float32 numbers is exact. `smallest_bits` are the bits of the smallest nonzero one. The numbers are
// multiples of 2^(exponent - 23), so sums below 2^(exponent + 30) are exact; half that limit leaves a margin for rounding
// errors in `sum` itself.
__device__ inline bool exact(double sum, uint32_t smallest_bits) {
  const int64_t exponent = smallest_bits >> 23;  // of a normal number, plus 127
  return sum < __builtin_bit_cast(double, (exponent - 127 + 29 + 1023) << 52);
}

// a / b, correctly rounded, without the branches of a division, for finite a and a correctly rounded reciprocal = 1 / b. The
// first correction leaves an error below one ulp, so the second remainder is exact and its correction rounds correctly
// (Markstein 1990). Needs values far from overflow and underflow, as all float32 inputs give.
__device__ inline double quotient(double a, double b, double reciprocal) {
  double q = multiply(a, reciprocal);
  q = fma(fma(-q, b, a), reciprocal, q);
  return fma(fma(-q, b, a), reciprocal, q);
}

// float32(float64(numerator) / sum). The plain product is within 3 ulp of the quotient. So float32 rounds both alike, unless
// the product is that close to a midpoint of two float32 numbers. Subnormals have other midpoints.
__device__ inline float softmax_score(float numerator, double sum, double reciprocal) {
  double q = multiply(static_cast<double>(numerator), reciprocal);
  const uint32_t low = static_cast<uint32_t>(__builtin_bit_cast(uint64_t, q)) & 0x1fffffffu;
  if (low - (0x10000000u - 4) <= 8 || q < 0x1p-126) q = quotient(static_cast<double>(numerator), sum, reciprocal);
  return static_cast<float>(q);
}

__device__ inline float sigmoid_score(float logit) { return divide(1.0f, add(1.0f, cpu::exp_f32(-logit))); }

// Turns a sanitised logit of a row into its score.
struct RowScale {
  ScoreFunction function;
  float max;
  double sum, reciprocal;

  __device__ float score(float logit) const {
    if (function == ScoreFunction::kSigmoid) return sigmoid_score(logit);
    return softmax_score(cpu::exp_f32(add(logit, -max)), sum, reciprocal);
  }
};

__device__ inline RowScale row_scale(ScoreFunction function, float max, double sum) {
  return {function, max, sum, divide(1.0, sum)};
}

// ---- sums of exponentials ------------------------------------------------------------------------------------------------

// Σ exp(logit - max) over the lanes of a token, in float64, with the bits of a sum in the order of experts.
template <int kLanes, int kPerLane>
__device__ inline double sum_of_exponentials(const float (&logits)[kPerLane], float max) {
  double sum = 0.0;
  uint32_t smallest = 0x7f800000u;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const float e = cpu::exp_f32(add(logits[i], -max));
    sum = add(sum, static_cast<double>(e));
    const uint32_t bits = e > 0.0f ? __float_as_uint(e) : 0x7f800000u;
    smallest = bits < smallest ? bits : smallest;
  }
  sum = sum_over<kLanes>(sum);
  smallest = min_over<kLanes>(smallest);
  if (__all_sync(kAllLanes, exact(sum, smallest))) return sum;
  float e[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) e[i] = cpu::exp_f32(add(logits[i], -max));
  sum = 0.0;
#pragma unroll 1
  for (int lane = 0; lane < kLanes; ++lane) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum = add(sum, static_cast<double>(__shfl_sync(kAllLanes, e[i], lane, kLanes)));
  }
  return sum;
}

// The largest of a row's sanitised logits, and the sum of its exponentials with the bits of a sum in the order of experts. One
// warp per row; logit(e) returns the sanitised logit.
template <typename Logit>
__device__ inline RowScale scale_of_row(ScoreFunction function, int num_experts, int lane, const Logit& logit) {
  if (function == ScoreFunction::kSigmoid) return {function, 0.0f, 1.0, 1.0};
  uint32_t largest = kTaken;
  for (int e = lane; e < num_experts; e += 32) {
    const uint32_t key = key_of(logit(e));
    largest = key > largest ? key : largest;
  }
  const float max = value_of(max_over<32>(largest));
  double sum = 0.0;
  uint32_t smallest = 0x7f800000u;
  for (int e = lane; e < num_experts; e += 32) {
    const float value = cpu::exp_f32(add(logit(e), -max));
    sum = add(sum, static_cast<double>(value));
    const uint32_t bits = value > 0.0f ? __float_as_uint(value) : 0x7f800000u;
    smallest = bits < smallest ? bits : smallest;
  }
  sum = sum_over<32>(sum);
  if (exact(sum, min_over<32>(smallest))) return row_scale(function, max, sum);  // the same in all lanes
  sum = 0.0;
  for (int base = 0; base < num_experts; base += 32) {
    const int e = base + lane;
    const double value = e < num_experts ? cpu::exp_f32(add(logit(e), -max)) : 0.0;
#pragma unroll 8
    for (int i = 0; i < 32; ++i) sum = add(sum, __shfl_sync(kAllLanes, value, i));
  }
  return row_scale(function, max, sum);
}

}  // namespace switchgear::cuda
