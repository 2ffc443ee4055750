// SPDX-License-Identifier: BSD-3-Clause
// Reference arithmetic in float64 that also tracks how far a float32 computation may deviate. The bounds follow from the
// dtypes and the lengths of the sums: no test has a tolerance of its own.
#pragma once
#include "support.h"

namespace switchgear::test {

constexpr double kUnit = 0x1p-24;  // of float32: one rounding is within kUnit · |value|

struct Bounded {
  double value = 0.0;
  double error = 0.0;
};

// The same value rounded once to a dtype: half a spacing if it is subnormal.
inline Bounded rounded(Bounded v, DType dtype) {
  const double unit = std::ldexp(1.0, -mantissa_bits(dtype) - 1);
  const double smallest = std::ldexp(1.0, min_exponent(dtype) - mantissa_bits(dtype) - 1);
  return {v.value, v.error + std::max(unit * (std::abs(v.value) + v.error), smallest)};
}

// A sum of products in float32, in any order: n terms give at most n + 1 roundings of partial sums and products, each within
// kUnit · Σ|a·b|, to first order.
class Sum {
 public:
  void add(Bounded a, Bounded b = {1.0, 0.0}) {
    const double product = a.value * b.value;
    value_ += product;
    magnitude_ += std::abs(product);
    error_ += std::abs(a.value) * b.error + std::abs(b.value) * a.error + a.error * b.error;
    ++count_;
  }
  Bounded result() const {
    // 1.01: second-order terms, with sums below 10^5; 2^-126: products that an instruction may flush to zero
    return {value_, error_ + 1.01 * static_cast<double>(count_ + 1) * (kUnit * (magnitude_ + error_) + 0x1p-126)};
  }

 private:
  double value_ = 0.0, magnitude_ = 0.0, error_ = 0.0;
  int64_t count_ = 0;
};

inline bool close(float got, Bounded want) { return std::abs(got - want.value) <= want.error; }

#define CHECK_CLOSE(got, want, ...)                                                                                    \
  do {                                                                                                                 \
    const float got_value = (got);                                                                                     \
    const ::switchgear::test::Bounded want_value = (want);                                                             \
    CHECK(::switchgear::test::close(got_value, want_value), "got ", got_value, ", expected ", want_value.value, " ± ", \
          want_value.error __VA_OPT__(, ) __VA_ARGS__);                                                                \
  } while (false)

}  // namespace switchgear::test
