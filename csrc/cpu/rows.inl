// SPDX-License-Identifier: BSD-3-Clause
// The functions of RowKernels: plain loops that the compiler vectorises. Everything is in an anonymous namespace and calls no
// library, so no symbol compiled for one ISA can be merged into another.
#pragma once
#include "exp.h"
#include "ranking.h"
#include "rows.h"

namespace switchgear::cpu {
namespace {

void sanitise_row(float* values, int64_t n) {
  for (int64_t j = 0; j < n; ++j) values[j] = sanitise(values[j]);
}

// Compares integers in the same order: chains of float comparisons are not vectorised.
float max_of_row(const float* values, int64_t n) {
  int32_t best = ordered(values[0]);
  for (int64_t j = 1; j < n; ++j) {
    const int32_t key = ordered(values[j]);
    best = key > best ? key : best;
  }
  return unordered(best);
}

void softmax_numerators(const float* logits, float* numerators, double* sums, int64_t n, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const float max = max_of_row(logits + r * n, n);
    for (int64_t j = r * n; j < (r + 1) * n; ++j) numerators[j] = exp_f32(logits[j] - max);
  }
  for (int64_t r = 0; r < rows; ++r) sums[r] = 0.0;
  if (rows == kRowBlock) {
    double a = 0.0, b = 0.0, c = 0.0, d = 0.0;
    for (int64_t j = 0; j < n; ++j) {
      a += numerators[j];
      b += numerators[n + j];
      c += numerators[2 * n + j];
      d += numerators[3 * n + j];
    }
    sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = r * n; j < (r + 1) * n; ++j) sums[r] += numerators[j];
  }
}

void scores_of_rows(ScoreFunction function, const float* logits, float* scores, int64_t n, int64_t rows) {
  if (function == ScoreFunction::kSigmoid) {
    for (int64_t j = 0; j < rows * n; ++j) scores[j] = 1.0f / (1.0f + exp_f32(-logits[j]));
    return;
  }
  double sums[kRowBlock];
  softmax_numerators(logits, scores, sums, n, rows);
  for (int64_t r = 0; r < rows; ++r) {
    const double sum = sums[r];
    for (int64_t j = r * n; j < (r + 1) * n; ++j) scores[j] = static_cast<float>(scores[j] / sum);
  }
}

void make_row_keys(const float* values, int64_t* keys, int64_t n) {
  for (int64_t j = 0; j < n; ++j) keys[j] = key_of(values[j], j);
  for (int64_t j = n; j % kKeyLanes != 0; ++j) keys[j] = kNoKey;
}

// Lane l holds the largest of the keys l, l + 32, …. The largest lane is the best key; once it is removed, only its lane is
// recomputed.
void extract_best_keys(int64_t* keys, int64_t n, int64_t count, int32_t* indices) {
  int64_t lanes[kKeyLanes];
  for (int64_t l = 0; l < kKeyLanes; ++l) lanes[l] = keys[l];
  for (int64_t j = kKeyLanes; j < n; j += kKeyLanes) {
    for (int64_t l = 0; l < kKeyLanes; ++l) lanes[l] = keys[j + l] > lanes[l] ? keys[j + l] : lanes[l];
  }
  for (int64_t k = 0; k < count; ++k) {
    int64_t best = lanes[0];
    for (int64_t l = 1; l < kKeyLanes; ++l) best = lanes[l] > best ? lanes[l] : best;
    const int64_t index = index_of(best), lane = index % kKeyLanes;
    indices[k] = static_cast<int32_t>(index);
    keys[index] = kNoKey;
    int64_t next = kNoKey;
    for (int64_t j = lane; j < n; j += kKeyLanes) next = keys[j] > next ? keys[j] : next;
    lanes[lane] = next;
  }
}

// Uses the sign of value - bound: comparisons of floats are not vectorised.
Reaching reaching(const float* values, int64_t n, float bound) {
  int32_t below = 0, next = INT32_MIN;  // below all keys
  for (int64_t j = 0; j < n; ++j) {
    const int32_t sign = std::bit_cast<int32_t>(values[j] - bound) >> 31;  // -1 below the bound
    const int32_t key = (ordered(values[j]) & sign) | (INT32_MIN & ~sign);
    below += sign;
    next = key > next ? key : next;
  }
  return {n + below, unordered(next)};
}

double sum_of_powers(const float* values, int64_t n, float highest) {
  constexpr int64_t kBlock = 512;
  constexpr int64_t kLanes = 16;
  constexpr int32_t kNothing = std::bit_cast<int32_t>(-kFloatMax);  // exp of it is 0
  float powers[kBlock];
  double sum = 0.0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t count = n - first < kBlock ? n - first : kBlock;
    for (int64_t j = 0; j < count; ++j) {
      const int32_t bits = std::bit_cast<int32_t>(values[first + j] - highest);
      powers[j] = exp_f32(std::bit_cast<float>(bits > 0 ? kNothing : bits));
    }
    int64_t padded = count;
    for (; padded % kLanes != 0; ++padded) powers[padded] = 0.0f;
    float lanes[kLanes] = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += powers[j + l];
    }
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
    }
    sum += lanes[0];
  }
  return sum;
}

#if defined(__AVX2__)
constexpr bool kHasExtract = true;
#else
constexpr bool kHasExtract = false;
#endif

constexpr RowKernels make_table(const char*) {
  return {.sanitise = sanitise_row,
          .softmax_numerators = softmax_numerators,
          .scores = scores_of_rows,
          .make_keys = make_row_keys,
          .extract_best = extract_best_keys,
          .reaching = reaching,
          .sum_of_powers = sum_of_powers,
          .has_extract = kHasExtract};
}

}  // namespace
}  // namespace switchgear::cpu
