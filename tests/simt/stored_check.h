// SPDX-License-Identifier: BSD-3-Clause
// Runs one product with a weight of 1 to 8 bits through the op and compares it with float64, for tests of any kernel behind it.
#pragma once
#include <span>

#include "gemm_problem.h"
#include "stored_problem.h"

namespace switchgear::test {

inline constexpr Format kStoredFormats[] = {Format::kInt8, Format::kInt4,   Format::kFp8,  Format::kMxfp4,
                                            Format::kNf4,  Format::kGroups, Format::kNvfp4};
inline constexpr std::span<const Format> kWgmmaFormats = std::span(kStoredFormats).first(6);
static_assert(!has_wgmma_kernels(Format::kNvfp4));

struct StoredCase {
  Case c;  // I is N, H is C
  int64_t parts, group;
  bool zeros;
};

// What the format allows of a case's group.
inline int64_t group_of(Format format, int64_t group) {
  if (minifloat_group(format) > 0) return minifloat_group(format);
  if (is_integer(format)) return group == 128 ? 512 : group;  // more columns than a block of activations
  return group == 16 ? 96 : group;
}

struct StoredProblem {
  StoredCase c;
  Format format;
  Precision precision;
  bool transposed, gather, biased, permuted;
  Rows rows = gather ? Rows::kAligned : Rows::kAnywhere;
};

// One element of x·Wᵀ with weights of integers: sums of groups are exact.
inline void add_integers(Sum& sum, const StoredWeights& weights, const IntegerRow& row, int64_t e, int64_t n) {
  const auto columns = static_cast<int64_t>(row.values.size());
  for (int64_t first = 0; first < columns; first += weights.group_size()) {
    double group = 0.0;
    for (int64_t c = first; c < std::min(first + weights.group_size(), columns); ++c) {
      group += row.values[static_cast<size_t>(c)] * double{weights.value(e, n, c)};
    }
    const double factor = double{weights.scale(e, n, first / weights.group_size())} * weights.row_scale(e, n);
    const double term = group * factor * row.scales[static_cast<size_t>(first / row.block)];
    sum.add({term, 4 * kUnit * std::abs(term)});
  }
}

inline void check_stored(const StoredProblem& p) {
  const Case& c = p.c.c;
  const DType dtype = p.precision.dtype;
  Random random(7);
  const int64_t S = c.T * c.K, N = c.I, C = c.H, depth = p.transposed ? N : C, width = p.transposed ? C : N;
  const PlanArrays plan = reference_plan(make_ids(random, c), c.E);
  const Rows rows = p.rows;
  const Array x = random_rows(rows, random, dtype, p.gather ? c.T : S, depth);
  const Array bias = p.biased ? random_rows(rows, random, dtype, c.E, N) : Array();
  const bool has_zeros = p.c.zeros && (is_integer(p.format) || p.format == Format::kGroups);
  const StoredWeights weights(random,
                              {p.format, c.E, N, C, p.c.parts, group_of(p.format, p.c.group), has_zeros, p.permuted});
  Array got = make_rows(rows, dtype, S, width);
  run_op({&got}, [&](Execution exec) {
    exec.allow_tf32 = p.precision.tf32;
    cuda::grouped_gemm({.x = x,
                        .weight = weights.weight(),
                        .bias = bias,
                        .expert_offsets = plan.expert_offsets,
                        .token_indices = p.gather ? plan.token_indices.view() : TensorView{},
                        .out = got,
                        .transposed = p.transposed},
                       exec);
  });
  const bool integers = is_integer(p.format) && !p.transposed;
  const auto factor = [&](int64_t e, int64_t n,
                          int64_t k) -> Bounded {  // of weights that are multiplied in floating point
    if (p.transposed || dtype == DType::kFloat32) return p.precision.factor(nearest(weights.decoded(e, n, k), dtype));
    const double scale = double{weights.scale(e, n, k / weights.group_size())} * weights.row_scale(e, n);
    const double value = weights.value(e, n, k);
    const bool rounds = p.format == Format::kNf4;
    return {value * scale, rounds ? std::abs(value * scale) * std::ldexp(1.0, -mantissa_bits(dtype) - 1) : 0.0};
  };
  for (int64_t e = 0; e < c.E; ++e) {
    for (int64_t s = plan.expert_offsets.id(e); s < plan.expert_offsets.id(e + 1); ++s) {
      const int64_t row = p.gather ? plan.token_indices.id(s) : s;
      IntegerRow quantized;
      if (integers) quantized = integers_of([&](int64_t k) { return x(row, k); }, C, weights.weight().group_size);
      for (int64_t n = 0; n < width; ++n) {
        Sum sum;
        if (integers) add_integers(sum, weights, quantized, e, n);
        for (int64_t k = 0; k < depth && !integers; ++k) {
          sum.add(p.precision.factor(x(row, k)), p.transposed ? factor(e, k, n) : factor(e, n, k));
        }
        if (p.biased) sum.add({bias(e, n)});
        CHECK_CLOSE(got(s, n), rounded(sum.result(), dtype), "slot ", s, " column ", n);
      }
    }
  }
  for (int64_t s = plan.used(); s < S; ++s) {
    for (int64_t n = 0; n < width; ++n) CHECK(got(s, n) == 0.0f, "unassigned slot ", s);
  }
}

}  // namespace switchgear::test
