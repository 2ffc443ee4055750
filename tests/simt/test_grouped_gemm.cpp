// SPDX-License-Identifier: BSD-3-Clause
#include "bounded.h"
#include "cases.h"
#include "run_op.h"
#include "runtime.h"

namespace switchgear::test {
namespace {

// How factors are multiplied: in their dtype, or as tf32.
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

// E matrices [N,C] however they lie in memory. Separate ones have numbers of rows of their own, one of them none.
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
      matrices_ = {.packed = view(nullptr, dtype, E, N, C), .base = base_.data(), .row_count = row_count_.data()};
      matrices_.packed.stride = {0, separate_[0].view().stride[0], 1, 0};
      return;
    }
    const bool transposed = storage == Storage::kTransposed;
    const int64_t height = transposed ? C : N, width = transposed ? N : C;
    packed_ = random_rows(rows, random, dtype, E * height, width);  // [E · height, width]
    const int64_t stride = packed_.view().stride[0];
    matrices_.packed = view(packed_.view().data, dtype, E, N, C);
    matrices_.packed.stride = {height * stride, transposed ? 1 : stride, transposed ? stride : 1, 0};
  }

  const ExpertMatrices& matrices() const { return matrices_; }
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
  ExpertMatrices matrices_;
};

struct Problem {
  Case c;  // I is N, H is C
  Precision precision;
  Storage storage;
  Rows rows;
  bool gather, biased;
};

void check_forward(const Problem& p) {
  const Case& c = p.c;
  const DType dtype = p.precision.dtype;
  Random random(11);
  const int64_t S = c.T * c.K, N = c.I, C = c.H;
  const PlanArrays plan = reference_plan(make_ids(random, c), c.E);
  const Array x = random_rows(p.rows, random, dtype, p.gather ? c.T : S, C);
  const Array bias = p.biased ? random_rows(p.rows, random, dtype, c.E, N) : Array();
  const Weights weights(random, p.rows, dtype, c.E, N, C, p.storage);
  Array got = make_rows(p.rows, dtype, S, N);
  run_op({&got}, [&](Execution exec) {
    exec.allow_tf32 = p.precision.tf32;
    cuda::grouped_gemm({.x = x,
                        .weight = weights.matrices(),
                        .bias = bias,
                        .expert_offsets = plan.expert_offsets,
                        .token_indices = p.gather ? plan.token_indices.view() : TensorView{},
                        .out = got},
                       exec);
  });
  for (int64_t e = 0; e < c.E; ++e) {
    for (int64_t s = plan.expert_offsets.id(e); s < plan.expert_offsets.id(e + 1); ++s) {
      const int64_t row = p.gather ? plan.token_indices.id(s) : s;
      for (int64_t n = 0; n < N; ++n) {
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
    for (int64_t n = 0; n < N; ++n) CHECK(got(s, n) == 0.0f, "slot ", s, " of nobody");
  }
}

void check_wgrad(const Problem& p) {
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

// What the tiles distinguish: rows per expert of all kinds, sizes below, at and above a tile, a ring that wraps.
constexpr Case kTileCases[] = {
    {"16 rows", 30, 72, 136, 2, 1},
    {"16 rows, one tile each", 16, 64, 128, 1, 1},
    {"64 rows", 70, 200, 130, 2, 2, Ids::kDuplicates},
    {"64 rows, a whole tile", 64, 32, 128, 1, 1},
    {"128 rows", 129, 80, 129, 1, 1},
    {"128 rows, several bands", 1300, 8, 264, 1, 1},
    {"128 rows, some empty", 220, 24, 40, 2, 1, Ids::kLastExpert},
    {"128 rows, holes", 150, 40, 72, 2, 3, Ids::kEmptySlots},
};

// Each case once with every precision and storage, while the rest alternates.
template <typename Body>
void for_each_problem(Body&& body) {
  simt::device() = simt::sm_80();
  int variant = 0;
  const auto run = [&](const Case& c) {
    for (const Precision& precision : kPrecisions) {
      for (const Storage storage : {Storage::kPacked, Storage::kTransposed, Storage::kSeparate}) {
        const Problem p{c,
                        precision,
                        storage,
                        variant % 3 == 0 ? Rows::kAnywhere : Rows::kAligned,
                        variant % 2 == 0,
                        variant % 5 < 3};
        ++variant;
        note = join(c.name, " ", precision.name, " ", kStorageNames[static_cast<int>(storage)],
                    p.rows == Rows::kAligned ? " aligned" : "", p.gather ? " gathered" : "", p.biased ? " biased" : "");
        body(p);
      }
    }
    ++variant;
  };
  for (const Case& c : kCases) run(c);
  for (const Case& c : kTileCases) run(c);
}

TEST(grouped_gemm_matches_reference) { for_each_problem(check_forward); }

TEST(grouped_gemm_wgrad_matches_reference) {
  for_each_problem([](Problem p) {
    if (p.storage != Storage::kSeparate) check_wgrad(p);
  });
}

TEST(grouped_gemm_reads_shared_memory_without_conflicts) {
  simt::device() = simt::sm_80();
  const auto before = simt::statistics().bank_conflicts;
  const auto matrices = simt::statistics().ldmatrix;
  for (const Case& c : kTileCases) {
    for (const Storage storage : {Storage::kPacked, Storage::kTransposed}) {
      note = join(c.name, " ", kStorageNames[static_cast<int>(storage)]);
      check_forward({c, kPrecisions[2], storage, Rows::kAligned, true, false});
    }
  }
  check_wgrad({kTileCases[4], kPrecisions[2], Storage::kPacked, Rows::kAligned, true, false});
  CHECK(simt::statistics().ldmatrix > matrices);
  CHECK(simt::statistics().bank_conflicts == before, simt::statistics().bank_conflicts - before, " extra cycles");
}

// A row's bits do not depend on the rows beside it, nor on the kernel that their number asks for.
TEST(grouped_gemm_rows_do_not_depend_on_their_number) {
  simt::device() = simt::sm_80();
  const int64_t N = 136, C = 328;
  for (const Precision& precision : kPrecisions) {
    for (const Storage storage : {Storage::kPacked, Storage::kTransposed}) {
      Random random(5);
      const Weights weights(random, Rows::kAligned, precision.dtype, 1, N, C, storage);
      const Array all = random_rows(Rows::kAligned, random, precision.dtype, 200, C);
      Array first;
      for (const int64_t S : {200, 90, 40, 17, 16, 3, 1}) {
        note = join(precision.name, " ", kStorageNames[static_cast<int>(storage)], " ", S, " rows");
        TensorView x = all;
        x.shape[0] = S;
        Array offsets(DType::kInt32, {2});
        offsets.fill([&](int64_t i) { return i * S; });
        Array got = make_rows(Rows::kAligned, precision.dtype, S, N);
        run_op({&got}, [&](Execution exec) {
          exec.allow_tf32 = precision.tf32;
          cuda::grouped_gemm({.x = x, .weight = weights.matrices(), .expert_offsets = offsets, .out = got}, exec);
        });
        if (!first.defined()) first = got;
        for (int64_t s = 0; s < S; ++s) {
          for (int64_t n = 0; n < N; ++n) CHECK(got(s, n) == first(s, n), "row ", s, " column ", n);
        }
      }
    }
  }
}

// Offsets and indices are values in device memory, which nobody checks: whatever they are, no access is out of range.
TEST(grouped_gemm_survives_any_plan) {
  simt::device() = simt::sm_80();
  for (int64_t seed = 0; seed < 30; ++seed) {
    note = join("seed ", seed);
    Random random(static_cast<uint64_t>(seed));
    const int64_t T = 9, S = 20, E = 3, N = 24, C = 40;
    const auto wild = [&](int64_t n) {
      return random.below(3) == 0 ? static_cast<int32_t>(random.bits()) : static_cast<int32_t>(random.below(n + 1));
    };
    Array offsets(DType::kInt32, {E + 1}), indices(DType::kInt32, {S});
    offsets.fill([&](int64_t) { return wild(S); });
    indices.fill([&](int64_t) { return wild(T); });
    const Array x = random_rows(Rows::kAligned, random, DType::kBFloat16, T, C);
    const Array grad = random_rows(Rows::kAligned, random, DType::kBFloat16, S, N);
    const Weights weights(random, Rows::kAligned, DType::kBFloat16, E, N, C, Storage::kPacked);
    Array got = make_rows(Rows::kAligned, DType::kBFloat16, S, N), gradient(DType::kBFloat16, {E, N, C});
    OpMemory memory(0xff);
    cuda::grouped_gemm(
        {.x = x, .weight = weights.matrices(), .expert_offsets = offsets, .token_indices = indices, .out = got},
        memory.execution());
    cuda::grouped_gemm_wgrad(
        {.grad_out = grad, .x = x, .expert_offsets = offsets, .token_indices = indices, .grad_weight = gradient},
        memory.execution());
    for (int64_t i = 0; i < E * N * C; ++i) CHECK(std::isfinite(gradient(i / (N * C), i / C % N, i % C)));
  }
}

}  // namespace
}  // namespace switchgear::test
