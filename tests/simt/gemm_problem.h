// SPDX-License-Identifier: BSD-3-Clause
// Runs one grouped GEMM or weight gradient through the op and compares it with float64, for tests of any kernel behind it.
#pragma once
#include "bounded.h"
#include "cases.h"
#include "race.h"
#include "run_op.h"
#include "runtime.h"

namespace switchgear::test {

// The precision of the factors: their dtype, or tf32.
struct Precision {
  const char* name;
  DType dtype;
  bool tf32;
  Bounded factor(float v) const { return {v, tf32 ? std::ldexp(std::abs(v), -11) : 0.0}; }  // rounded to 10 bits
};
constexpr Precision kPrecisions[] = {{"float32", DType::kFloat32, false},
                                     {"tf32", DType::kFloat32, true},
                                     {"bfloat16", DType::kBFloat16, false},
                                     {"float16", DType::kFloat16, false}};

enum class Storage { kPacked, kTransposed, kSeparate };
constexpr const char* kStorageNames[] = {"packed", "transposed", "separate"};

// E matrices [N,C] in any storage. If separate, each has its own number of rows, and one has none.
class Weights {
 public:
  Weights(Random& random, Rows rows, DType dtype, int64_t E, int64_t N, int64_t C, Storage storage)
      : E_(E), N_(N), C_(C), storage_(storage) {
    for (int64_t e = 0; e < E; ++e) {
      const int64_t count = storage != Storage::kSeparate ? N : e == 0 ? N : e == 1 ? 0 : random.below(N + 1);
      row_count_.push_back(count);
      if (storage == Storage::kSeparate) separate_.push_back(random_rows(rows, random, dtype, count, C));
    }
    if (storage == Storage::kSeparate) {
      for (const Array& matrix : separate_) base_.push_back(matrix.numel() > 0 ? matrix.view().data : nullptr);
      matrices_ = {.data = view(nullptr, dtype, E, N, C), .base = base_.data(), .row_count = row_count_.data()};
      matrices_.data.stride = {0, separate_[0].view().stride[0], 1, 0};
      return;
    }
    const bool transposed = storage == Storage::kTransposed;
    const int64_t height = transposed ? C : N, width = transposed ? N : C;
    packed_ = random_rows(rows, random, dtype, E * height, width);  // [E · height, width]
    const int64_t stride = packed_.view().stride[0];
    matrices_.data = view(packed_.view().data, dtype, E, N, C);
    matrices_.data.stride = {height * stride, transposed ? 1 : stride, transposed ? stride : 1, 0};
  }

  const Weight& matrices() const { return matrices_; }
  int64_t rows(int64_t e) const { return row_count_[static_cast<size_t>(e)]; }
  float operator()(int64_t e, int64_t n, int64_t c) const {
    if (storage_ == Storage::kSeparate) return separate_[static_cast<size_t>(e)](n, c);
    return storage_ == Storage::kTransposed ? packed_(e * C_ + c, n) : packed_(e * N_ + n, c);
  }

 private:
  int64_t E_, N_, C_;
  Storage storage_;
  Array packed_;
  std::vector<Array> separate_;
  std::vector<const void*> base_;
  std::vector<int64_t> row_count_;
  Weight matrices_;
};

struct GemmProblem {
  Case c;  // I is N, H is C
  Precision precision;
  Storage storage;
  Rows rows;
  bool gather, biased;
};

// Unchecked offsets. Under the race detector they ascend: experts that share slots write the same rows, in an unspecified
// order.
template <typename Wild>
Array wild_offsets(int64_t num_experts, Wild&& wild) {
  std::vector<int32_t> values;
  for (int64_t e = 0; e <= num_experts; ++e) values.push_back(wild());
  if (simt::race::enabled) std::sort(values.begin(), values.end());
  Array offsets(DType::kInt32, {num_experts + 1});
  offsets.fill([&](int64_t e) { return values[static_cast<size_t>(e)]; });
  return offsets;
}

inline std::string describe(const GemmProblem& p) {
  return join(p.c.name, " ", p.precision.name, " ", kStorageNames[static_cast<int>(p.storage)],
              p.rows == Rows::kAligned ? " aligned" : "", p.gather ? " gathered" : "", p.biased ? " biased" : "");
}

// x·Wᵀ, or x·W if `transposed`: then without bias, over the rows that an expert has.
inline void check_product(const GemmProblem& p, bool transposed) {
  const Case& c = p.c;
  const DType dtype = p.precision.dtype;
  Random random(11);
  const int64_t S = c.T * c.K, N = c.I, C = c.H;
  const PlanArrays plan = reference_plan(make_ids(random, c), c.E);
  const int64_t depth = transposed ? N : C, width = transposed ? C : N;
  const Array x = random_rows(p.rows, random, dtype, p.gather ? c.T : S, depth);
  const Array bias = p.biased ? random_rows(p.rows, random, dtype, c.E, N) : Array();
  const Weights weights(random, p.rows, dtype, c.E, N, C, p.storage);
  Array got = make_rows(p.rows, dtype, S, width);
  run_op({&got}, [&](Execution exec) {
    exec.allow_tf32 = p.precision.tf32;
    cuda::grouped_gemm({.x = x,
                        .weight = weights.matrices(),
                        .bias = bias,
                        .expert_offsets = plan.expert_offsets,
                        .token_indices = p.gather ? plan.token_indices.view() : TensorView{},
                        .out = got,
                        .transposed = transposed},
                       exec);
  });
  for (int64_t e = 0; e < c.E; ++e) {
    for (int64_t s = plan.expert_offsets.id(e); s < plan.expert_offsets.id(e + 1); ++s) {
      const int64_t row = p.gather ? plan.token_indices.id(s) : s;
      for (int64_t column = 0; column < C && transposed; ++column) {
        Sum sum;
        for (int64_t n = 0; n < weights.rows(e); ++n) {
          sum.add(p.precision.factor(x(row, n)), p.precision.factor(weights(e, n, column)));
        }
        CHECK_CLOSE(got(s, column), rounded(sum.result(), dtype), "slot ", s, " column ", column);
      }
      for (int64_t n = 0; n < N && !transposed; ++n) {
        Sum sum;
        for (int64_t k = 0; k < C && n < weights.rows(e); ++k) {
          sum.add(p.precision.factor(x(row, k)), p.precision.factor(weights(e, n, k)));
        }
        if (p.biased && n < weights.rows(e)) sum.add({bias(e, n)});
        if (n < weights.rows(e)) {
          CHECK_CLOSE(got(s, n), rounded(sum.result(), dtype), "slot ", s, " column ", n);
        } else {
          CHECK(got(s, n) == 0.0f, "slot ", s, " column ", n);
        }
      }
    }
  }
  for (int64_t s = plan.used(); s < S; ++s) {
    for (int64_t n = 0; n < width; ++n) CHECK(got(s, n) == 0.0f, "unassigned slot ", s);
  }
}

inline void check_forward(const GemmProblem& p) { check_product(p, false); }

inline void check_wgrad(const GemmProblem& p) {
  const Case& c = p.c;
  const DType dtype = p.precision.dtype;
  Random random(12);
  const int64_t S = c.T * c.K, N = c.I, C = c.H;
  const bool transposed = p.storage == Storage::kTransposed;
  const PlanArrays plan = reference_plan(make_ids(random, c), c.E);
  const Array x = random_rows(p.rows, random, dtype, p.gather ? c.T : S, C);
  const Array grad = random_rows(p.rows, random, dtype, S, N);
  const int64_t height = transposed ? C : N;
  Array got = make_rows(p.rows, dtype, c.E * height, transposed ? N : C);
  TensorView gradient = view(got.view().data, dtype, c.E, N, C);
  const int64_t stride = got.view().stride[0];
  gradient.stride = {height * stride, transposed ? 1 : stride, transposed ? stride : 1, 0};
  run_op({&got}, [&](Execution exec) {
    exec.allow_tf32 = p.precision.tf32;
    cuda::grouped_gemm_wgrad({.grad_out = grad,
                              .x = x,
                              .expert_offsets = plan.expert_offsets,
                              .token_indices = p.gather ? plan.token_indices.view() : TensorView{},
                              .grad_weight = gradient},
                             exec);
  });
  // The gradients of some experts have the same bits.
  const Array experts = every_second(c.E);
  const int64_t count = experts.size(0);
  Array part = make_rows(p.rows, dtype, count * height, transposed ? N : C);
  TensorView some = gradient;
  some.data = part.view().data;
  some.shape[0] = count;
  OpMemory memory(0xff);
  Execution exec = memory.execution();
  exec.allow_tf32 = p.precision.tf32;
  cuda::grouped_gemm_wgrad({.grad_out = grad,
                            .x = x,
                            .expert_offsets = plan.expert_offsets,
                            .token_indices = p.gather ? plan.token_indices.view() : TensorView{},
                            .experts = experts,
                            .grad_weight = some},
                           exec);
  for (int64_t i = 0; i < count * height; ++i) {
    const int64_t row = experts.id(i / height) * height + i % height;
    for (int64_t k = 0; k < (transposed ? N : C); ++k) CHECK(part(i, k) == got(row, k), "row ", i, " of some experts");
  }
  for (int64_t e = 0; e < c.E; ++e) {
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < C; ++k) {
        Sum sum;
        for (int64_t s = plan.expert_offsets.id(e); s < plan.expert_offsets.id(e + 1); ++s) {
          const int64_t row = p.gather ? plan.token_indices.id(s) : s;
          sum.add(p.precision.factor(grad(s, n)), p.precision.factor(x(row, k)));
        }
        CHECK_CLOSE(transposed ? got(e * C + k, n) : got(e * N + n, k), rounded(sum.result(), dtype), "expert ", e,
                    " at ", n, ", ", k);
      }
    }
  }
}

}  // namespace switchgear::test
