// SPDX-License-Identifier: BSD-3-Clause
#include "bounded.h"
#include "cases.h"

namespace switchgear::test {
namespace {

// How the experts' matrices [N,C] are stored.
enum class Storage { kPacked, kTransposed, kSeparate };
constexpr const char* kStorageNames[] = {" packed", " transposed", " separate"};

// E matrices with accessor (e, n, c), in any storage. Separate ones have their own numbers of rows.
class Weights {
 public:
  Weights(Random& random, DType dtype, int64_t E, int64_t N, int64_t C, Storage storage) : storage_(storage) {
    if (storage != Storage::kSeparate) {
      const bool transposed = storage == Storage::kTransposed;
      packed_ = random_array(random, dtype, {E, transposed ? C : N, transposed ? N : C}, 1.0, 1);
      matrices_.data = packed_;
      if (transposed) {
        std::swap(matrices_.data.shape[1], matrices_.data.shape[2]);
        std::swap(matrices_.data.stride[1], matrices_.data.stride[2]);
      }
      return;
    }
    for (int64_t e = 0; e < E; ++e) {
      row_count_.push_back(e == 0 ? N : random.below(N + 1));
      separate_.push_back(random_array(random, dtype, {row_count_.back(), C}, 1.0, 2));
      base_.push_back(row_count_.back() > 0 ? separate_.back().view().data : nullptr);
    }
    matrices_ = {.base = base_.data(), .row_count = row_count_.data()};
    matrices_.data = view(nullptr, dtype, E, N, C);
    matrices_.data.stride = {0, C + 2, 1, 0};
  }

  const Weight& matrices() const { return matrices_; }
  int64_t rows(int64_t e) const { return row_count_.empty() ? matrices_.data.shape[1] : row_count_[e]; }
  float operator()(int64_t e, int64_t n, int64_t c) const {
    if (storage_ == Storage::kSeparate) return separate_[e](n, c);
    return storage_ == Storage::kTransposed ? packed_(e, c, n) : packed_(e, n, c);
  }

 private:
  Storage storage_;
  Array packed_;
  std::vector<Array> separate_;
  std::vector<const void*> base_;
  std::vector<int64_t> row_count_;
  Weight matrices_;
};

TEST(grouped_gemm_matches_reference) {
  for_each_case([](const Case& c) {
    const std::string name = note;
    int variant = 0;
    for (const DType dtype : kFloatTypes) {
      for (const Storage storage : {Storage::kPacked, Storage::kTransposed, Storage::kSeparate}) {
        note = name + " " + name_of(dtype) + kStorageNames[static_cast<int>(storage)];
        const bool gather = variant % 2 == 0, biased = variant++ % 3 != 0;
        Random random(11);
        const int64_t S = c.T * c.K, N = c.I, C = c.H;
        const PlanArrays p = reference_plan(make_ids(random, c), c.E);
        const Array x = random_array(random, dtype, {gather ? c.T : S, C}, 1.0, 3);
        const Array bias = biased ? random_array(random, dtype, {c.E, N}, 1.0, 1) : Array();
        const Weights weights(random, dtype, c.E, N, C, storage);
        Array got(dtype, {S, N}, 2);
        const auto run = [&](Execution exec) {
          grouped_gemm({.x = x,
                        .weight = weights.matrices(),
                        .bias = bias,
                        .expert_offsets = p.expert_offsets,
                        .token_indices = gather ? p.token_indices.view() : TensorView{},
                        .out = got},
                       exec);
        };
        std::vector<Bounded> want(static_cast<size_t>(S * N));
        for (int64_t e = 0; e < c.E; ++e) {
          for (int64_t s = p.expert_offsets.id(e); s < p.expert_offsets.id(e + 1); ++s) {
            const int64_t row = gather ? p.token_indices.id(s) : s;
            for (int64_t n = 0; n < weights.rows(e); ++n) {
              Sum sum;
              for (int64_t k = 0; k < C; ++k) sum.add({x(row, k)}, {weights(e, n, k)});
              if (biased) sum.add({bias(e, n)});
              want[static_cast<size_t>(s * N + n)] = rounded(sum.result(), dtype);
            }
          }
        }
        for_each_isa({&got}, run, [&] {  // what no expert owns is exactly 0
          for (int64_t i = 0; i < S * N; ++i)
            CHECK_CLOSE(got(i / N, i % N), want[static_cast<size_t>(i)], "slot ", i / N);
        });
      }
    }
  });
}

TEST(grouped_gemm_wgrad_matches_reference) {
  for_each_case([](const Case& c) {
    const std::string name = note;
    int variant = 0;
    for (const DType dtype : kFloatTypes) {
      for (const bool transposed : {false, true}) {
        note = name + " " + name_of(dtype) + (transposed ? " transposed" : "");
        const bool gather = variant++ % 2 == 0;
        Random random(12);
        const int64_t S = c.T * c.K, N = c.I, C = c.H;
        const PlanArrays p = reference_plan(make_ids(random, c), c.E);
        const Array x = random_array(random, dtype, {gather ? c.T : S, C}, 1.0, 1);
        const Array grad_out = random_array(random, dtype, {S, N}, 1.0, 2);
        Array got(dtype, {c.E, transposed ? C : N, transposed ? N : C}, 1);
        TensorView grad_weight = got;
        if (transposed) {
          std::swap(grad_weight.shape[1], grad_weight.shape[2]);
          std::swap(grad_weight.stride[1], grad_weight.stride[2]);
        }
        const auto run = [&](Execution exec) {
          grouped_gemm_wgrad({.grad_out = grad_out,
                              .x = x,
                              .expert_offsets = p.expert_offsets,
                              .token_indices = gather ? p.token_indices.view() : TensorView{},
                              .grad_weight = grad_weight},
                             exec);
        };
        std::vector<Bounded> want;
        for (int64_t e = 0; e < c.E; ++e) {
          const int64_t begin = p.expert_offsets.id(e), end = p.expert_offsets.id(e + 1);
          for (int64_t n = 0; n < N; ++n) {
            for (int64_t k = 0; k < C; ++k) {
              Sum sum;
              for (int64_t s = begin; s < end; ++s)
                sum.add({grad_out(s, n)}, {x(gather ? p.token_indices.id(s) : s, k)});
              want.push_back(begin == end ? Bounded{} : rounded(sum.result(), dtype));
            }
          }
        }
        const Array experts = every_second(c.E);
        for_each_isa({&got}, run, [&] {
          Array part(dtype, {experts.size(0), got.size(1), got.size(2)}, 1);
          TensorView some = grad_weight;
          some.data = part.view().data;
          some.shape[0] = experts.size(0);
          some.stride[0] = part.view().stride[0];
          grouped_gemm_wgrad({.grad_out = grad_out,
                              .x = x,
                              .expert_offsets = p.expert_offsets,
                              .token_indices = gather ? p.token_indices.view() : TensorView{},
                              .experts = experts,
                              .grad_weight = some},
                             {2});
          CHECK(same_experts(got, part, experts));
          size_t i = 0;
          for (int64_t e = 0; e < c.E; ++e) {
            for (int64_t n = 0; n < N; ++n) {
              for (int64_t k = 0; k < C; ++k) {
                CHECK_CLOSE(transposed ? got(e, k, n) : got(e, n, k), want[i++], "expert ", e);
              }
            }
          }
        });
      }
    }
  });
}

// Integer values make every product and sum exact, so one missing or doubled term shows at any depth and width.
TEST(grouped_gemm_is_exact_on_integers) {
  Random random(13);
  const int64_t count = count_from("SWITCHGEAR_SLOW", 0) != 0 ? 2'000 : 150;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t C = 1 + random.below(257), N = 1 + random.below(257), E = 1 + random.below(4),
                  S = 1 + random.below(30);
    const DType dtype = kFloatTypes[i % 3];
    note = join("S=", S, " N=", N, " C=", C, " E=", E, " ", name_of(dtype));
    const auto integers = [&](std::vector<int64_t> shape) {
      Array array(dtype, std::move(shape));
      array.fill([&](int64_t) { return random.below(3) - 1; });
      return array;
    };
    const Array x = integers({S, C}), weight = integers({E, N, C});
    Array offsets(DType::kInt32, {E + 1});
    int32_t slot = 0;
    offsets.fill([&](int64_t e) { return e == 0 ? 0 : slot += static_cast<int32_t>(random.below(S - slot + 1)); });
    Array got(dtype, {S, N});
    const auto run = [&](Execution exec) {
      grouped_gemm({.x = x, .weight = {.data = weight}, .expert_offsets = offsets, .out = got}, exec);
    };
    for_each_isa({&got}, run, [&] {
      int64_t e = 0;
      for (int64_t s = 0; s < S; ++s) {
        while (e < E && s >= offsets.id(e + 1)) ++e;
        for (int64_t n = 0; n < N; ++n) {
          float want = 0.0f;  // |want| <= 257: bfloat16 rounds at 256, as the op does
          for (int64_t k = 0; e < E && k < C; ++k) want += x(s, k) * weight(e, n, k);
          CHECK(got(s, n) == round_to(want, dtype), "slot ", s);
        }
      }
    });
  }
}

// A row's result does not depend on the number of rows in its call.
void check_batch_invariance(int64_t S, int64_t C) {
  Random random(14);
  const int64_t N = 77;
  for (const DType dtype : kFloatTypes) {
    note = join("S=", S, " C=", C, " ", name_of(dtype));
    const Array weight = random_array(random, dtype, {1, N, C});
    const Array x = random_array(random, dtype, {S, C});
    Array all(dtype, {S, N});
    Array offsets(DType::kInt32, {2});
    const auto run = [&](const TensorView& rows, const TensorView& out, Execution exec) {
      offsets.fill([&](int64_t e) { return e * rows.shape[0]; });
      grouped_gemm({.x = rows, .weight = {.data = weight}, .expert_offsets = offsets, .out = out}, exec);
    };
    for_each_isa(
        {&all}, [&](Execution exec) { run(x, all, exec); },
        [&] {
          for (const int64_t count : {1, 2, 3, 4, 5, 6, 7, 239, 241}) {
            if (count > S) continue;
            for (const int64_t first : {int64_t{0}, int64_t{13}, S - count}) {
              TensorView rows = x, expected = all;
              rows.shape[0] = count;
              rows.data = rows.as<char>() + first * C * size_of(dtype);
              expected.data = expected.as<char>() + first * N * size_of(dtype);
              Array got(dtype, {count, N});
              run(rows, got, {1});
              const auto bytes = static_cast<size_t>(count * N * size_of(dtype));
              CHECK(std::memcmp(got.view().data, expected.data, bytes) == 0, count, " rows from ", first);
            }
          }
        });
  }
}

TEST(grouped_gemm_is_batch_invariant) {
  check_batch_invariance(500, 301);
  check_batch_invariance(20, 2100);  // several chunks of rows that exceed L1 from 3 rows on, or from 6
}

}  // namespace
}  // namespace switchgear::test
