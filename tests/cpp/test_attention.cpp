// SPDX-License-Identifier: BSD-3-Clause
#include "bounded.h"

namespace switchgear::test {
namespace {

struct Sizes {
  int64_t B, T, N, J, D, V, length;
  int64_t window = 0;
  std::vector<int64_t> starts = {};
  bool has_sinks = false;
};

// Blocks have 128 positions. For 5 threads, the last two have fewer tiles than twice the threads.
const Sizes kSizes[] = {
    {2, 7, 6, 2, 9, 5, 140, 0, {3, 138}, true},
    {1, 30, 3, 3, 20, 36, 150, 40, {-90}},
    {1, 60, 2, 1, 5, 70, 60, 1},
    {3, 2, 2, 1, 16, 17, 20, 0, {0, 20, 19}},
    {1, 1, 1, 1, 40, 33, 700, 500},
    {1, 1, 14, 2, 33, 20, 300, 0, {}, true},
};
constexpr int64_t kSpare = 3;  // positions that are not filled

// A tensor of four dimensions over an array of rows.
TensorView heads(const Array& rows, int64_t a, int64_t b, int64_t c) {
  const TensorView& r = rows;
  TensorView v = r;
  v.ndim = 4;
  v.shape = {a, b, c, r.shape[1]};
  v.stride = {b * c * r.stride[0], c * r.stride[0], r.stride[0], r.stride[1]};
  return v;
}

struct Problem {
  Problem(const Sizes& s, DType dtype)
      : s(s),
        capacity(s.length + kSpare),
        q(random_array(random, dtype, {s.B * s.T * s.N, s.D}, 1.0, 3)),
        keys(random_array(random, dtype, {s.B * s.J * capacity, s.D}, 1.0, 1)),
        values(random_array(random, dtype, {s.B * s.J * capacity, s.V}, 1.0, 2)),
        out(dtype, {s.B * s.T * s.N, s.V}, 1) {
    if (!s.starts.empty()) {
      starts = Array(DType::kInt32, {s.B});
      starts.fill([&](int64_t b) { return s.starts[static_cast<size_t>(b)]; });
    }
    if (s.has_sinks) sinks = random_array(random, DType::kFloat32, {s.N});
  }

  AttendArgs args() {
    return {.q = heads(q, s.B, s.T, s.N),
            .keys = heads(keys, s.B, s.J, capacity),
            .values = heads(values, s.B, s.J, capacity),
            .starts = starts.defined() ? starts.view() : TensorView{},
            .sinks = sinks.defined() ? sinks.view() : TensorView{},
            .length = s.length,
            .scale = 0.5f,
            .window = s.window,
            .out = heads(out, s.B, s.T, s.N)};
  }

  // Element v of a row: weights relative to the largest have the errors of two scores and of an exponential, once per block.
  Bounded expected(int64_t b, int64_t t, int64_t n, int64_t v) const {
    const int64_t own = s.length - s.T + t, head = (b * s.J + n / (s.N / s.J)) * capacity;
    int64_t first = std::max<int64_t>(starts.defined() ? starts.id(b) : 0, 0);
    if (s.window > 0) first = std::max(first, own - s.window + 1);
    if (first > own) return {};
    std::vector<Bounded> scores;
    double highest = s.has_sinks ? static_cast<double>(sinks(n)) : -1e30;
    for (int64_t p = first; p <= own; ++p) {
      Sum sum;
      for (int64_t d = 0; d < s.D; ++d) sum.add({q((b * s.T + t) * s.N + n, d)}, {keys(head + p, d)});
      const Bounded score = sum.result();
      scores.push_back({0.5 * score.value, 0.5 * score.error + kUnit * std::abs(score.value)});
      highest = std::max(highest, scores.back().value);
    }
    const double blocks = static_cast<double>(s.length) / 128 + 2;
    double total = s.has_sinks ? std::exp(static_cast<double>(sinks(n)) - highest) : 0.0, result = 0.0, size = 0.0,
           worst = 0.0;
    for (int64_t p = first; p <= own; ++p) {
      const Bounded& score = scores[static_cast<size_t>(p - first)];
      const double weight = std::exp(score.value - highest), value = values(head + p, v);
      total += weight;
      result += weight * value;
      size += weight * std::abs(value);
      worst = std::max(worst, score.error);
    }
    const double relative = std::expm1(4 * worst) + 2 * kUnit * (static_cast<double>(s.length) + 16 + 8 * blocks);
    return {result / total, 2 * relative * size / total};
  }

  Sizes s;
  int64_t capacity;
  Random random{5};
  Array q, keys, values, out, starts, sinks;
};

TEST(attend_matches_reference) {
  for (const Sizes& s : kSizes) {
    for (const DType dtype : kFloatTypes) {
      note = join("T=", s.T, " N=", s.N, " length=", s.length, " ", name_of(dtype));
      Problem p(s, dtype);
      for_each_isa(
          {&p.out}, [&](Execution exec) { attend(p.args(), exec); },
          [&] {
            for (int64_t i = 0; i < s.B * s.T * s.N; ++i) {
              for (int64_t v = 0; v < s.V; ++v) {
                const Bounded want = p.expected(i / (s.T * s.N), i / s.N % s.T, i % s.N, v);
                CHECK_CLOSE(p.out(i, v), rounded(want, dtype), "row ", i, " column ", v);
              }
            }
          });
    }
  }
}

TEST(rms_norm_matches_reference) {
  for (const int64_t width : {1, 17, 300}) {
    for (const DType dtype : kFloatTypes) {
      note = join("H=", width, " ", name_of(dtype));
      Random random{3};
      const Array x = random_array(random, dtype, {5, width}, 1.0, 3),
                  residual = random_array(random, dtype, {5, width});
      const Array weight = random_array(random, width > 17 ? DType::kFloat32 : dtype, {width});
      Array y(dtype, {5, width}, 1), sum(dtype, {5, width}, 2);
      const auto check = [&](const Array& rows) {
        for (int64_t r = 0; r < 5; ++r) {
          double squares = 0.0;
          for (int64_t i = 0; i < width; ++i) squares += double{rows(r, i)} * rows(r, i);
          const double factor = 1 / std::sqrt(squares / static_cast<double>(width) + 0.25);
          for (int64_t i = 0; i < width; ++i) {
            const double want = rows(r, i) * factor * weight(i);
            CHECK_CLOSE(y(r, i), rounded({want, std::abs(want) * kUnit * static_cast<double>(width + 8)}, dtype), r,
                        " ", i);
          }
        }
      };
      for_each_isa(
          {&y}, [&](Execution exec) { rms_norm({.x = x, .weight = weight, .eps = 0.25f, .y = y}, exec); },
          [&] { check(x); });
      for_each_isa(
          {&y, &sum},
          [&](Execution exec) {
            rms_norm({.x = x, .residual = residual, .weight = weight, .eps = 0.25f, .y = y, .sum = sum}, exec);
          },
          [&] {
            for (int64_t i = 0; i < 5 * width; ++i) {
              const int64_t r = i / width, c = i % width;
              CHECK_CLOSE(sum(r, c), rounded({double{x(r, c)} + residual(r, c), kUnit * 8}, dtype), r, " ", c);
            }
            check(sum);
          });
    }
  }
}

TEST(rotate_heads_matches_reference) {
  constexpr int64_t kB = 2, kT = 3, kN = 4, kJ = 2, kD = 11, kV = 5, kR = 4;
  for (const DType dtype : kFloatTypes) {
    for (const int64_t normed : {int64_t{0}, int64_t{1}, kN}) {  // heads that a weight is for
      const bool interleaved = normed == 1;
      note = join(name_of(dtype), " ", normed);
      Random random{9};
      const Array q = random_array(random, dtype, {kB * kT * kN, kD}, 1.0, 3);
      const Array k = random_array(random, dtype, {kB * kT * kJ, kD}),
                  v = random_array(random, dtype, {kB * kT * kJ, kV});
      const Array cos = random_array(random, dtype, {kT, kR}), sin = random_array(random, dtype, {kT, kR});
      const int64_t k_normed = normed == kN ? kJ : normed;
      const Array q_weight = random_array(random, dtype, {std::max<int64_t>(normed, 1) * kD});
      const Array k_weight = random_array(random, DType::kFloat32, {std::max<int64_t>(k_normed, 1) * kD});
      Array q_out(dtype, {kB * kT * kN, kD}, 1), k_out(dtype, {kB * kJ * kT, kD}, 2),
          v_out(dtype, {kB * kJ * kT, kV}, 3);
      const auto turned = [](const Array& rows) {  // [B,T,J,·] of [B,J,T,·]
        TensorView out = heads(rows, kB, kJ, kT);
        std::swap(out.shape[1], out.shape[2]);
        std::swap(out.stride[1], out.stride[2]);
        return out;
      };
      const auto angles = [](const Array& t) {
        TensorView out = t;
        out.ndim = 3;
        out.shape = {1, kT, kR};
        out.stride = {kT * kR, kR, 1};
        return out;
      };
      const RotateHeadsArgs args{.q = heads(q, kB, kT, kN),
                                 .k = heads(k, kB, kT, kJ),
                                 .v = heads(v, kB, kT, kJ),
                                 .cos = angles(cos),
                                 .sin = angles(sin),
                                 .q_weight = normed > 0 ? q_weight.view() : TensorView{},
                                 .k_weight = normed > 0 ? k_weight.view() : TensorView{},
                                 .eps = 0.5f,
                                 .q_out = heads(q_out, kB, kT, kN),
                                 .k_out = turned(k_out),
                                 .v_out = turned(v_out),
                                 .interleaved = interleaved};
      const auto check = [&](const Array& from, int64_t count, int64_t group, const Array& weight, auto&& got) {
        for (int64_t token = 0; token < kB * kT; ++token) {
          const auto at = [&](int64_t i) {  // element i of all heads, normalised
            const double x = from(token * count + i / kD, i % kD);
            if (group == 0) return x;
            const int64_t first = group == 1 ? i / kD * kD : 0, width = group * kD;
            double squares = 0.0;
            for (int64_t j = first; j < first + width; ++j) {
              squares += double{from(token * count + j / kD, j % kD)} * from(token * count + j / kD, j % kD);
            }
            return x / std::sqrt(squares / static_cast<double>(width) + 0.5) * weight(group == 1 ? i % kD : i);
          };
          for (int64_t i = 0; i < count * kD; ++i) {
            const int64_t d = i % kD, angle = interleaved ? d / 2 : d % kR;
            const bool is_first = interleaved ? d % 2 == 0 : d < kR;
            const int64_t distance = interleaved ? 1 : kR, other = is_first ? i + distance : i - distance;
            double want = at(i), size = std::abs(want);
            if (d < 2 * kR) {
              const double c = cos(token % kT, angle), s = sin(token % kT, angle);
              size = std::abs(want * c) + std::abs(at(other) * s);
              want = want * c + (is_first ? -1 : 1) * at(other) * s;
            }
            CHECK_CLOSE(got(token, i / kD, d), rounded({want, 64 * kUnit * size}, dtype), token, " ", i);
          }
        }
      };
      for_each_isa(
          {&q_out, &k_out, &v_out}, [&](Execution exec) { rotate_heads(args, exec); },
          [&] {
            const auto row = [](int64_t token, int64_t head) { return (token / kT * kJ + head) * kT + token % kT; };
            check(q, kN, normed, q_weight, [&](int64_t t, int64_t n, int64_t d) { return q_out(t * kN + n, d); });
            check(k, kJ, k_normed, k_weight, [&](int64_t t, int64_t j, int64_t d) { return k_out(row(t, j), d); });
            for (int64_t i = 0; i < kB * kT * kJ; ++i) {
              for (int64_t d = 0; d < kV; ++d) CHECK(v_out(row(i / kJ, i % kJ), d) == v(i, d), i, " ", d);
            }
          });
    }
  }
}

}  // namespace
}  // namespace switchgear::test
