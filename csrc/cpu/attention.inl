// SPDX-License-Identifier: BSD-3-Clause
// The vector code of attend (attention.cpp): scores, weights, sums of values. Included by kernels.inl.
#pragma once

namespace switchgear::cpu {
namespace {

constexpr int64_t kAttentionLine = 64;

// The part of a step's prefetches that belongs to elements [n, n + count) of the rows that come next.
template <typename T>
inline void prefetch_part(const char* row, int64_t n, int64_t count) {
  constexpr int64_t kElement = sizeof(T);
  for (int64_t i = n * kElement; i < (n + count) * kElement; i += kAttentionLine) __builtin_prefetch(row + i, 0, 2);
}

// kRows rows times kColumns keys; lanes run along the depth. Prefetches as many rows as keys, one line for each line of keys.
template <int kRows, int kColumns, typename T>
void score_tile(const ScoredRows& s, const T* keys, const char* ahead, float* out) {
  constexpr int64_t kSteps = kAttentionLine / (kLanes * sizeof(T)) > 0 ? kAttentionLine / (kLanes * sizeof(T)) : 1;
  static_assert(kColumns % kDotColumns == 0);
  Floats acc[kRows][kColumns];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) acc[i][j] = broadcast(0.0f);
  }
  const float* const rows = s.rows;
  const auto advance = [&](int64_t k, auto&& load_row, auto&& load_key) {
    Floats key[kColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) key[j] = load_key(keys + j * s.key_stride + k);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Floats row = load_row(rows + i * s.row_stride + k);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) acc[i][j] = multiply_add(row, key[j], acc[i][j]);
    }
  };
  const auto whole = [](const auto* p) { return load(p); };
  int64_t k = 0;
  for (; k + kSteps * kLanes <= s.depth; k += kSteps * kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) prefetch_part<T>(ahead + j * s.ahead_stride, k, 1);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kSteps; ++i) advance(k + i * kLanes, whole, whole);
  }
  for (; k + kLanes <= s.depth; k += kLanes) advance(k, whole, whole);
  if (k < s.depth) {
    const auto rest = [&](const auto* p) { return load_some(p, s.depth - k); };
    advance(k, rest, rest);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; j += kDotColumns) {
      Floats some[kDotColumns];
#pragma GCC unroll 8
      for (int n = 0; n < kDotColumns; ++n) some[n] = acc[i][j + n];
      float sums[kDotColumns] = {};
      add_sums(sums, some);
      __builtin_memcpy(out + i * s.out_stride + j, sums, sizeof sums);
    }
  }
}

// Columns of a tile: a sum waits for the one before it, so there are at least 8 side by side if registers hold them.
constexpr int scored_columns(int rows) {
  if (kDotColumns >= 4) return rows == 1 ? 8 : 4;
  return rows == 1 ? 8 : rows <= 3 ? 4 : 2;
}

template <int kRows, typename T>
void score_rows_of(const ScoredRows& s) {
  constexpr int kColumns = scored_columns(kRows);
  const T* keys = static_cast<const T*>(s.keys);
  const char* ahead = static_cast<const char*>(s.ahead);
  int64_t n = 0;
  for (; n + kColumns <= s.count; n += kColumns) {
    score_tile<kRows, kColumns>(s, keys + n * s.key_stride, ahead + n * s.ahead_stride, s.out + n);
  }
  for (; n < s.count; ++n) {  // a key at a time: kDotColumns equal ones
    float sums[kRows * kDotColumns];
    ScoredRows one = s;
    one.key_stride = one.ahead_stride = 0;
    one.out_stride = kDotColumns;
    score_tile<kRows, kDotColumns>(one, keys + n * s.key_stride, ahead + n * s.ahead_stride, sums);
    for (int i = 0; i < kRows; ++i) s.out[i * s.out_stride + n] = sums[i * kDotColumns];
  }
}

void score_rows(const ScoredRows& s) {
  with_type(s.dtype, [&]<typename T>(const T*) {
    with_constant<kTileRows>(s.num_rows, [&]<int kRows>() { score_rows_of<kRows, T>(s); });
  });
}

// Lane l sums the elements l, l + kLanes, …, counted from scores[0]: with elements outside [first, last) as zeros, whatever
// these are.
Softmax softmax_weights(float* scores, int64_t first, int64_t last, float scale) {
  const int64_t begin = first / kLanes * kLanes, end = (last + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = begin; i < first; ++i) scores[i] = -__builtin_inff();
  for (int64_t i = last; i < end; ++i) scores[i] = -__builtin_inff();
  const Floats factor = broadcast(scale);
  Floats highest = broadcast(-__builtin_inff());
  for (int64_t i = begin; i < end; i += kLanes) {
    const Floats s = load(scores + i) * factor;
    store(scores + i, s);
    highest = max(s, highest);
  }
  float lanes[kLanes];
  store(lanes, highest);
  for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  const Floats shift = broadcast(lanes[0] == -__builtin_inff() ? 0.0f : lanes[0]);
  Floats total = broadcast(0.0f);
  for (int64_t i = begin; i < end; i += kLanes) {
    const Floats x = load(scores + i) - shift;
    const Power power = exp(x);
    const Floats weight = select(x != x, x, power.value * power.scale);
    store(scores + i, weight);
    total += weight;
  }
  return {lanes[0], sum(total)};
}

// kRows rows and kVectors vectors of columns. Each element has one accumulator.
template <int kRows, int kVectors, typename T>
void add_weighted_tile(const WeightedRows& w, const T* values, const char* ahead, float* out) {
  Floats acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[i][j] = load(out + i * w.out_stride + j * kLanes);
  }
  for (int64_t p = 0; p < w.count; ++p, values += w.value_stride, ahead += w.ahead_stride) {
    prefetch_part<T>(ahead, 0, kVectors * kLanes);
    Floats v[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) v[j] = load(values + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Floats weight = broadcast(w.weights[i * w.weight_stride + p]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[i][j] = multiply_add(weight, v[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(out + i * w.out_stride + j * kLanes, acc[i][j]);
  }
}

// Fewer rows take more columns: a sum waits for the one before it, so there are at least 8 side by side.
constexpr int weighted_vectors(int rows) {
  if (rows == 1) return 8;
  return rows <= 3 && kPanelVectors < 4 ? 4 : kPanelVectors;
}

template <int kRows, typename T>
void add_weighted_rows_of(const WeightedRows& w) {
  constexpr int kVectors = weighted_vectors(kRows);
  const T* const values = static_cast<const T*>(w.values);
  const T* const ahead = static_cast<const T*>(w.ahead);
  const auto part = [&]<int kCount>(int64_t n) {
    add_weighted_tile<kRows, kCount>(w, values + n, reinterpret_cast<const char*>(ahead + n), w.out + n);
  };
  int64_t n = 0;
  for (; n + kVectors * kLanes <= w.columns; n += kVectors * kLanes) part.template operator()<kVectors>(n);
  for (; n + kLanes <= w.columns; n += kLanes) part.template operator()<1>(n);
  if (n == w.columns) return;
  const int64_t rest = w.columns - n;
  for (int i = 0; i < kRows; ++i) {
    float* const out = w.out + i * w.out_stride + n;
    Floats acc = load_some(out, rest);
    for (int64_t p = 0; p < w.count; ++p) {
      const Floats v = load_some(values + p * w.value_stride + n, rest);
      acc = multiply_add(broadcast(w.weights[i * w.weight_stride + p]), v, acc);
    }
    store_some(out, acc, rest);
  }
}

void add_weighted_rows(const WeightedRows& w) {
  with_type(w.dtype, [&]<typename T>(const T*) {
    with_constant<kTileRows>(w.num_rows, [&]<int kRows>() { add_weighted_rows_of<kRows, T>(w); });
  });
}

void merge_rows(float* row, float own, const float* other, float factor, int64_t n) {
  for_vectors(n, [&](int64_t i, int64_t count) {
    const Floats part = broadcast(factor) * load_some(other + i, count);
    store_some(row + i, multiply_add(broadcast(own), load_some(row + i, count), part), count);
  });
}

}  // namespace
}  // namespace switchgear::cpu
