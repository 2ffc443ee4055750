// SPDX-License-Identifier: BSD-3-Clause
// Levels are the nearest for their scales, fits are no worse than the whole range, and threads and other rows do not change
// them. That the bits are those of the definition in torch is tested in tests/weights/test_quantize.py.
#include "switchgear/quantize.h"

#include <algorithm>
#include <cmath>

#include "cases.h"

namespace switchgear::test {
namespace {

struct Sizes {
  int64_t rows, columns, group_size;
};
constexpr Sizes kSizes[] = {{9, 100, 32}, {4, 64, 0}, {3, 17, 16}, {1, 1, 0}};

double nearest(double w, double scale, double zero, double top) {
  return std::clamp(std::nearbyint(scale == 0 ? zero : w / scale + zero), 0.0, top);
}

double square(double x) { return x * x; }

// Checks one group: its levels for the scale and zero that decode them, and its sum of squared errors beside those of scales
// that map a range to all levels, whose ends are `shares` of the group's. rounding: how far a stored scale may be from the
// fitted one.
void check_group(const float* w, const uint8_t* q, int64_t count, double scale, double rounding, double zero,
                 double top, bool symmetric, const std::vector<double>& shares = {1.0}) {
  const double low = std::min(0.0f, *std::min_element(w, w + count)),
               high = std::max(0.0f, *std::max_element(w, w + count));
  const double middle = (top + 1) / 2;
  const auto level_error = [&](double scale, double zero) {
    double error = 0;
    for (int64_t i = 0; i < count; ++i) error += square((nearest(w[i], scale, zero, top) - zero) * scale - w[i]);
    return error;
  };
  double most = INFINITY;
  for (const double low_share : shares) {
    for (const double high_share : shares) {
      const double start =
          symmetric ? (high > -low ? high : low) / -middle * high_share : (high * high_share - low * low_share) / top;
      most = std::min(most, level_error(start, symmetric ? middle : std::nearbyint(-low * low_share / start)));
    }
  }
  double error = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double want = nearest(w[i], scale, zero, top), exact = w[i] / scale + zero;
    const bool is_tie = std::abs(std::abs(exact - std::floor(exact)) - 0.5) < 1e-3;
    CHECK(q[i] == want || (is_tie && std::abs(q[i] - want) <= 1), int{q[i]}, " instead of ", want);
    error += square((q[i] - zero) * scale - w[i]);
  }
  const double room = std::sqrt(static_cast<double>(count)) * top * rounding + 1e-6;
  CHECK(std::sqrt(error) <= std::sqrt(most) + room, "squares ", error, ", of a range ", most);
}

template <typename Quantize>
void for_all_sizes(Quantize&& quantize) {
  Random random(1);
  for (const auto [rows, columns, group_size] : kSizes) {
    Array w(DType::kFloat32, {rows, columns});
    w.fill([&](int64_t) { return random.normal(); });
    const int64_t size = group_size > 0 ? group_size : columns;
    for (const bool symmetric : {true, false}) {
      for (int64_t bits = 2; bits <= 4; ++bits) quantize(w, size, (columns + size - 1) / size, bits, symmetric);
    }
  }
}

TEST(groups_are_fitted_and_nearest) {
  for_all_sizes([](const Array& w, int64_t size, int64_t groups, int64_t bits, bool symmetric) {
    const int64_t rows = w.size(0), columns = w.size(1);
    Array q(DType::kUInt8, {rows, columns}), scales(DType::kFloat32, {rows, groups}),
        zeros(DType::kUInt8, {rows, groups});
    const TensorView no_zeros{};
    quantize_groups(w, {q, scales, symmetric ? no_zeros : zeros.view()}, {bits, size}, {2});
    for (int64_t g = 0; g < rows * groups; ++g) {
      const int64_t first = g / groups * columns + g % groups * size;
      const double zero = symmetric ? 1 << (bits - 1) : zeros.view().as<uint8_t>()[g];
      check_group(w.view().as<float>() + first, q.view().as<uint8_t>() + first,
                  std::min(size, columns - g % groups * size), scales.view().as<float>()[g],
                  0x1p-11 * std::abs(scales.view().as<float>()[g]), zero, (1 << bits) - 1, symmetric,
                  {1.0, 0.85, 0.7, 0.55});
    }
    Array alone(DType::kUInt8, {rows, columns}), scale(DType::kFloat32, {rows, groups}),
        zero(DType::kUInt8, {rows, groups});
    quantize_groups(w, {alone, scale, symmetric ? no_zeros : zero.view()}, {bits, size}, {1});
    CHECK(alone.bytes() == q.bytes() && scale.bytes() == scales.bytes());
  });
}

TEST(integers_are_fitted_and_nearest) {
  for_all_sizes([](const Array& w, int64_t size, int64_t groups, int64_t bits, bool symmetric) {
    if (bits != 4) return;
    const int64_t rows = w.size(0), columns = w.size(1);
    Array q(DType::kUInt8, {rows, columns}), scales(DType::kInt8, {rows, groups}), units(DType::kFloat32, {rows});
    Array zeros(DType::kUInt8, {rows, groups});
    quantize_integers(w, {q, scales, units, symmetric ? TensorView{} : zeros.view()}, {bits, size}, {2});
    for (int64_t g = 0; g < rows * groups; ++g) {
      const int64_t first = g / groups * columns + g % groups * size;
      const double scale = units.view().as<float>()[g / groups] * scales.view().as<int8_t>()[g];
      const double zero = symmetric ? 8 : zeros.view().as<uint8_t>()[g] / 16.0;
      check_group(w.view().as<float>() + first, q.view().as<uint8_t>() + first,
                  std::min(size, columns - g % groups * size), scale, units.view().as<float>()[g / groups] / 2, zero,
                  15, symmetric);
    }
  });
}

}  // namespace
}  // namespace switchgear::test
