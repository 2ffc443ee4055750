// SPDX-License-Identifier: BSD-3-Clause
#include "bounded.h"
#include "cases.h"
#include "run_op.h"

namespace switchgear::test {
namespace {

struct Sizes {
  int64_t T, E, H;
};

// Parts of tiles of both shapes, and depths around one step of a warp, 256.
constexpr Sizes kSizes[] = {{0, 3, 8},  {1, 1, 1},     {1, 5, 255},  {5, 3, 256},  {7, 9, 257},
                            {3, 8, 30}, {16, 8, 1000}, {18, 17, 40}, {603, 29, 12}};

struct Problem {
  Problem(const Sizes& s, DType dtype, DType weight_dtype, Rows rows, bool biased)
      : x(random_rows(rows, random, dtype, s.T, s.H)),
        weight(random_rows(rows, random, weight_dtype, s.E, s.H)),
        logits(make_rows(rows, weight_dtype, s.T, s.E)) {
    if (biased) bias = random_array(random, weight_dtype, {s.E});
  }

  void run() {
    run_op({&logits}, [&](Execution exec) {
      cuda::gate({.x = x, .weight = weight, .bias = bias, .router_logits = logits}, exec);
    });
  }

  Random random{1};
  Array x, weight, bias, logits;
};

template <typename Body>
void for_each_problem(Body&& body) {
  int variant = 0;
  for (const Sizes& s : kSizes) {
    for (const DType dtype : kFloatTypes) {
      for (const bool wide_weight : {false, true}) {
        for (const Rows rows : {Rows::kAnywhere, Rows::kAligned}) {
          if (!takes_variant(variant++)) continue;
          note = join("T=", s.T, " E=", s.E, " H=", s.H, " ", name_of(dtype), wide_weight ? ", float32 weight" : "");
          body(Problem(s, dtype, wide_weight ? DType::kFloat32 : dtype, rows, variant % 2 == 0));
        }
      }
    }
  }
}

TEST(gate_against_float64) {
  for_each_problem([](Problem p) {
    p.run();
    for (int64_t t = 0; t < p.x.size(0); ++t) {
      for (int64_t e = 0; e < p.weight.size(0); ++e) {
        Sum sum;
        for (int64_t k = 0; k < p.x.size(1); ++k) sum.add({p.x(t, k)}, {p.weight(e, k)});
        if (p.bias.defined()) sum.add({p.bias(e)});
        CHECK_CLOSE(p.logits(t, e), rounded(sum.result(), p.logits.view().dtype), "token ", t, " expert ", e);
      }
    }
  });
}

// A token has the same bits alone, where a warp computes one logit, as among many, where it computes a tile of 4 x 8.
TEST(gate_has_the_same_bits_in_any_batch) {
  for (const DType dtype : kFloatTypes) {
    note = name_of(dtype);
    Problem many({601, 29, 300}, dtype, dtype, Rows::kAligned, false);
    cuda::gate({.x = many.x, .weight = many.weight, .router_logits = many.logits}, {});
    for (const int64_t token : {0, 3, 299, 600}) {
      Array x(dtype, {1, 300}), logits(dtype, {1, 29});
      for (int64_t k = 0; k < 300; ++k) x.set(many.x(token, k), 0, k);
      cuda::gate({.x = x, .weight = many.weight, .router_logits = logits}, {});
      for (int64_t e = 0; e < 29; ++e) CHECK(logits(0, e) == many.logits(token, e), "token ", token, " expert ", e);
    }
  }
}

}  // namespace
}  // namespace switchgear::test
