// SPDX-License-Identifier: BSD-3-Clause
// A grouped GEMM and a weight gradient of small integers, whose sums are exact in any order, for the programs built with
// planted bugs. Each row is followed by NaN; nothing follows an array.
#pragma once
#include <cmath>
#include <vector>

#include "check.h"
#include "gemm.h"

namespace simt::planted {

using switchgear::DType;
using switchgear::cuda::Gemm;
using switchgear::cuda::Rows;
using switchgear::cuda::Wgrad;
using Bf16 = __nv_bfloat16;

inline int64_t stride_of(int64_t width) { return (width + 7) / 8 * 8; }

// [rows, width] with rows padded to whole vectors.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t width)
      : rows_(rows), width_(width), values_(static_cast<size_t>(rows * stride_of(width)), __float2bfloat16(NAN)) {}
  void fill(int seed) {
    for (int64_t i = 0; i < rows_ * width_; ++i) {
      at(i / width_, i % width_) = __float2bfloat16(static_cast<float>((i * seed + i / width_) % 5 - 2));
    }
  }
  Bf16& at(int64_t row, int64_t column) { return values_[static_cast<size_t>(row * stride_of(width_) + column)]; }
  float operator()(int64_t row, int64_t column) const {
    return __bfloat162float(values_[static_cast<size_t>(row * stride_of(width_) + column)]);
  }
  bool padding_holds() const {
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t column = width_; column < stride_of(width_); ++column) {
        if (!std::isnan((*this)(row, column))) return false;
      }
    }
    return true;
  }
  Bf16* data() { return values_.data(); }
  Rows rows(const int32_t* indices) const { return {values_.data(), stride_of(width_), rows_, indices}; }

 private:
  int64_t rows_, width_;
  std::vector<Bf16> values_;
};

// Two experts, followed by unassigned rows.
struct Product {
  Product(int64_t first, int64_t second, int64_t nobody, int64_t n, int64_t c)
      : slots(first + second + nobody),
        n(n),
        c(c),
        offsets{0, static_cast<int32_t>(first), static_cast<int32_t>(first + second)},
        indices(static_cast<size_t>(slots)),
        x(slots, c),
        weights(2 * n, c),
        out(slots, n) {
    for (size_t s = 0; s < indices.size(); ++s) indices[s] = static_cast<int32_t>((7 * s + 3) % indices.size());
    x.fill(3);
    weights.fill(4);
  }

  Gemm gemm(bool gather) {
    Gemm g{.dtype = DType::kBFloat16, .a = x.rows(gather ? indices.data() : nullptr)};
    g.b = {.data = weights.data(), .expert_stride = n * stride_of(c), .n_stride = stride_of(c), .aligned = true};
    g.expert_offsets = offsets.data();
    g.num_experts = 2;
    g.num_slots = slots;
    g.n = n;
    g.c = c;
    g.out = out.data();
    g.out_stride = stride_of(n);
    return g;
  }

  // [2 * c, n]: each expert's weights, n contiguous
  Matrix weights_along_n() const {
    Matrix result(2 * c, n);
    for (int64_t i = 0; i < 2 * c; ++i) {
      for (int64_t column = 0; column < n; ++column) {
        result.at(i, column) = __float2bfloat16(weights(i / c * n + column, i % c));
      }
    }
    return result;
  }

  void check(bool gather) const {
    for (int64_t s = 0; s < slots; ++s) {
      const int64_t expert = s < offsets[1]   ? 0
                             : s < offsets[2] ? 1
                                              : -1,
                    row = gather ? indices[static_cast<size_t>(s)] : s;
      for (int64_t column = 0; column < n; ++column) {
        float sum = 0.0f;
        for (int64_t k = 0; k < c && expert >= 0; ++k) sum += x(row, k) * weights(expert * n + column, k);
        CHECK(out(s, column) == __bfloat162float(__float2bfloat16(sum)), "slot ", s, " column ", column);
      }
    }
    CHECK(out.padding_holds(), "wrote behind a row");
  }

  int64_t slots, n, c;
  std::vector<int32_t> offsets, indices;
  Matrix x, weights, out;
};

// out[e] = Σ a[s] ⊗ b[s] over the slots of two experts.
struct Gradient {
  Gradient(int64_t first, int64_t second, int64_t nobody, int64_t m, int64_t n)
      : slots(first + second + nobody),
        m(m),
        n(n),
        offsets{0, static_cast<int32_t>(first), static_cast<int32_t>(first + second)},
        indices(static_cast<size_t>(slots)),
        a(slots, m),
        b(slots, n),
        out(2 * m, n) {
    for (size_t s = 0; s < indices.size(); ++s) indices[s] = static_cast<int32_t>((7 * s + 1) % indices.size());
    a.fill(3);
    b.fill(4);
  }

  Wgrad wgrad(bool gather) {
    Wgrad g{.dtype = DType::kBFloat16, .a = a.rows(nullptr), .b = b.rows(gather ? indices.data() : nullptr)};
    g.expert_offsets = offsets.data();
    g.num_experts = g.num_matrices = 2;
    g.num_slots = slots;
    g.m = m;
    g.n = n;
    g.out = out.data();
    g.out_stride = stride_of(n);
    g.out_expert_stride = m * stride_of(n);
    return g;
  }

  void check(bool gather) const {
    for (int64_t e = 0; e < 2; ++e) {
      for (int64_t i = 0; i < m * n; ++i) {
        float sum = 0.0f;
        for (int64_t s = offsets[static_cast<size_t>(e)]; s < offsets[static_cast<size_t>(e + 1)]; ++s) {
          sum += a(s, i / n) * b(gather ? indices[static_cast<size_t>(s)] : s, i % n);
        }
        CHECK(out(e * m + i / n, i % n) == __bfloat162float(__float2bfloat16(sum)), "expert ", e, " at ", i / n, ", ",
              i % n);
      }
    }
  }

  int64_t slots, m, n;
  std::vector<int32_t> offsets, indices;
  Matrix a, b, out;
};

}  // namespace simt::planted
