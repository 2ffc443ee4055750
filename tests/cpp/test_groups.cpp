// SPDX-License-Identifier: BSD-3-Clause
// Products with weights of 1 to 4 bits on every ISA: every code is exact in any place, sums are those of float64 within bounds,
// with zeros and without, and the bits of a row depend neither on its neighbours nor on how many columns are requested.
#include "stored_products.h"

namespace switchgear::test {
namespace {

constexpr int kBits[] = {1, 2, 3, 4};

uint16_t half_bits(float value) {  // of a float16
  Array one(DType::kFloat16, {1});
  one.fill([&](int64_t) { return value; });
  return *one.view().as<const uint16_t>();
}

// The weight [rows, cols], stored as groups.h says.
struct Groups {
  Groups(int bits, int64_t rows, int64_t cols, int64_t group, bool has_zeros)
      : bits(bits),
        rows(rows),
        cols(cols),
        group(group > 0 ? group : ceil_of(cols, kMinifloatColumns) * kMinifloatColumns),
        steps(ceil_of(cols, kMinifloatColumns)),
        groups(ceil_of(cols, this->group)),
        has_zeros(has_zeros),
        data(blocks() * steps * kPlaneBytes * bits),
        scales(blocks() * groups * kMinifloatRows * 2, 2),
        zeros(has_zeros ? blocks() * groups * kMinifloatRows : 0) {}

  int64_t blocks() const { return ceil_of(rows, kMinifloatRows); }

  void set_bit(int64_t r, int64_t c, int vector, int bit, int value) {
    const int64_t step = r / kMinifloatRows * steps + c / kMinifloatColumns;
    uint8_t* const half = data.data() + (step * bits + vector) * 64 + r % kMinifloatRows * 4 + c % 2 * 2;
    uint8_t& byte = half[bit / 8];
    byte = static_cast<uint8_t>((byte & ~(1 << bit % 8)) | value << bit % 8);
  }
  void set(int64_t r, int64_t c, int q) {
    const int code = q ^ 1 << (bits - 1), i = static_cast<int>(c % kMinifloatColumns / 2), count = 16 / bits;
    for (int b = 0; b < bits; ++b) {
      if (bits == 3 && i == 15) {
        set_bit(r, c, b, 15, code >> b & 1);
      } else {
        set_bit(r, c, i / count, bits * (i % count) + b, code >> b & 1);
      }
    }
  }
  int64_t scale_at(int64_t r, int64_t g) const {
    return (r / kMinifloatRows * groups + g) * kMinifloatRows + r % kMinifloatRows;
  }
  void set_scale(int64_t r, int64_t g, float scale) {
    const uint16_t half = half_bits(scale);
    std::memcpy(scales.data() + 2 * scale_at(r, g), &half, 2);
  }
  void set_zero(int64_t r, int64_t g, int zero) { zeros.data()[scale_at(r, g)] = static_cast<uint8_t>(zero); }

  // Of rows from `first` on, to multiply rows of `dtype`.
  cpu::Matrix matrix(DType dtype, int64_t first = 0) {
    return cpu::Matrix{.data = data.data(),
                       .dtype = dtype,
                       .n_stride = steps * kPlaneBytes * bits,
                       .format = format_of_bits(bits),
                       .scales = scales.data(),
                       .scale_stride = groups * kMinifloatRows * 2,
                       .group_size = group,
                       .zeros = has_zeros ? zeros.data() : nullptr}
        .from(first);
  }

  int bits;
  int64_t rows, cols, group, steps, groups;
  bool has_zeros;
  Bytes data, scales, zeros;
};

std::string describe(DType dtype, const Groups& w, int64_t num_rows) {
  return join(w.bits, " bits [", w.rows, ", ", w.cols, "], group ", w.group, w.has_zeros ? ", zeros, " : ", ", num_rows,
              " rows of ", name_of(dtype));
}

int value_of(int bits, int q, int zero) { return bits == 1 ? 2 * q - 1 : q - zero; }

// Rows of x with a single 1 select one weight each. Scales are powers of two, extremes of float16 included, so products are exact.
TEST(every_code_is_exact) {
  for (const int bits : kBits) {
    for (const bool has_zeros : {false, true}) {
      for (const DType dtype : kFloatTypes) {
        Groups w(bits, 64, 64, 32, has_zeros);
        const int codes = 1 << bits;
        const auto code_at = [&](int64_t r, int64_t c) { return static_cast<int>((r * 5 + c * 3 + c / 7) % codes); };
        const auto zero_of = [&](int64_t r, int64_t g) {
          return has_zeros ? static_cast<int>((r + 3 * g) % (codes + 1)) : codes / 2;
        };
        const auto scale_of = [&](int64_t r, int64_t g) {
          const float scale = std::ldexp(1.0f, static_cast<int>(r == 0 ? -24 : r == 1 ? 15 : r % 7 - 3 + g));
          return r % 2 == 0 ? scale : -scale;
        };
        for (int64_t r = 0; r < w.rows; ++r) {
          for (int64_t g = 0; g < 2; ++g) {
            w.set_scale(r, g, scale_of(r, g));
            if (has_zeros) w.set_zero(r, g, zero_of(r, g));
          }
          for (int64_t c = 0; c < w.cols; ++c) w.set(r, c, code_at(r, c));
        }
        Array x(dtype, {64, 64});
        x.fill([](int64_t i) { return i / 64 == i % 64; });
        note = describe(dtype, w, 64);
        on_each_isa([&] {
          const int64_t panel = cpu::kernels().panel;
          for (int64_t first = 0; first < w.rows; first += panel) {
            const auto want = [&](int64_t n, int64_t k) {
              const int64_t r = first + n, g = k / 32;
              return static_cast<float>(value_of(bits, code_at(r, k), zero_of(r, g))) * scale_of(r, g);
            };
            const std::vector<float> all = multiply(w.matrix(dtype, first), x, 0, 64, panel);
            for (int64_t k = 0; k < 64; ++k) {
              const std::vector<float> one = multiply(w.matrix(dtype, first), x, k, 1, panel);
              for (int64_t n = 0; n < panel; ++n) {
                const float got = all[static_cast<size_t>(k * panel + n)];
                CHECK(got == want(n, k), "row ", first + n, ", column ", k, ": got ", got, ", expected ", want(n, k));
                CHECK(one[static_cast<size_t>(n)] == want(n, k), "alone: row ", first + n, ", column ", k);
              }
            }
            Array rows(DType::kFloat32, {panel, 30}, 3, 0);
            cpu::kernels().expand_minifloats(rows.view().data, 33, DType::kFloat32, w.matrix(dtype, first), panel, 32,
                                             30);
            CHECK(rows.padding_holds(0xff), "expanded too much");
            for (int64_t i = 0; i < panel * 30; ++i) {
              CHECK(rows(i / 30, i % 30) == want(i / 30, 32 + i % 30), "expanded row ", first + i / 30, ", column ",
                    32 + i % 30);
            }
          }
        });
      }
    }
  }
}

// Random codes, scales and zeros; `value(r, c)` is what they mean, and `parts(r, c)` the terms that kernels add for it.
struct RandomGroups {
  RandomGroups(Random& random, int bits, const Shape& shape, bool has_zeros)
      : w(bits, shape.columns, shape.depth, shape.group, has_zeros),
        codes(static_cast<size_t>(w.rows * w.cols)),
        scales(static_cast<size_t>(w.rows * w.groups)),
        zeros(scales.size(), 1 << (bits - 1)) {
    for (int64_t r = 0; r < w.rows; ++r) {
      for (int64_t g = 0; g < w.groups; ++g) {
        const auto at = static_cast<size_t>(r * w.groups + g);
        scales[at] =
            std::ldexp(1.0f + static_cast<float>(random.below(1024)) / 1024, static_cast<int>(random.below(9)) - 8);
        w.set_scale(r, g, scales[at]);
        if (!has_zeros) continue;
        const auto zero = static_cast<int>(random.below((1 << bits) + 1));
        w.set_zero(r, g, zero);
        if (bits > 1) zeros[at] = zero;
      }
      for (int64_t c = 0; c < w.cols; ++c) {
        int& code = codes[static_cast<size_t>(r * w.cols + c)];
        code = static_cast<int>(random.below(1 << bits));
        w.set(r, c, code);
      }
    }
  }

  Groups w;
  std::vector<int> codes;
  std::vector<float> scales;
  std::vector<int> zeros;
};

TEST(products_are_those_of_float64) {
  Random random(1);
  for (const Shape& shape : kShapes) {
    for (const int bits : kBits) {
      for (const bool has_zeros : {false, true}) {
        const DType dtype = kFloatTypes[random.below(3)];
        RandomGroups all(random, bits, shape, has_zeros);
        Groups& w = all.w;
        const Array x = random_array(random, dtype, {shape.rows, shape.depth}, 1.0, 1);
        std::vector<Bounded> want;
        for (int64_t m = 0; m < shape.rows; ++m) {
          std::vector<float> row;
          for (int64_t k = 0; k < shape.depth; ++k) row.push_back(x(m, k));
          for (int64_t n = 0; n < w.rows; ++n) {
            Sum sum;
            for (int64_t k = 0; k < shape.depth; ++k) {
              const auto group = static_cast<size_t>(n * w.groups + k / w.group);
              const int middle = 1 << (bits - 1), q = all.codes[static_cast<size_t>(n * w.cols + k)];
              const double scale = all.scales[group];
              const float a = row[static_cast<size_t>(k)];
              sum.add({a}, {scale * value_of(bits, q, middle)});
              if (has_zeros && bits > 1) sum.add({a}, {scale * (middle - all.zeros[group])});
            }
            want.push_back(sum.result());
          }
        }
        note = describe(dtype, w, shape.rows);
        on_each_isa([&] {
          const int64_t panel = cpu::kernels().panel;
          for (int64_t first = 0; first < w.rows; first += panel) {
            const int64_t columns = std::min(panel, w.rows - first);
            const cpu::Matrix b = w.matrix(dtype, first);
            for (int64_t begin = 0, count; begin < shape.rows; begin += count) {
              count = std::min(shape.rows - begin, cpu::kernels().most_rows);
              const std::vector<float> got =
                  multiply(b, x, begin, count, columns, begin > 0 ? b.start() : cpu::Start{});
              for (int64_t i = 0; i < count * panel; ++i) {
                const int64_t m = begin + i / panel, n = i % panel;
                const Bounded expected = n < columns ? want[static_cast<size_t>(m * w.rows + first + n)] : Bounded{};
                CHECK_CLOSE(got[static_cast<size_t>(i)], expected, "; row ", m, ", column ", first + n);
              }
            }
          }
        });
      }
    }
  }
}

TEST(rows_do_not_depend_on_their_neighbours) {
  Random random(2);
  for (const int bits : kBits) {
    for (const bool has_zeros : {false, true}) {
      for (const DType dtype : kFloatTypes) {
        for (const int64_t depth : {71, 5120}) {  // sums of 240 rows of 5120 exceed the scratch
          RandomGroups all(random, bits, {64, depth, 64, 240}, has_zeros);
          const Array x = random_array(random, dtype, {240, depth}, 1.0, 1);
          note = describe(dtype, all.w, 240);
          on_each_isa([&] {
            const auto panel = static_cast<size_t>(cpu::kernels().panel);
            const int64_t first = random.below(all.w.rows / cpu::kernels().panel) * cpu::kernels().panel;
            const cpu::Matrix b = all.w.matrix(dtype, first);
            const std::vector<float> whole = multiply(b, x, 0, 240, cpu::kernels().panel);
            for (const int64_t count : {1, 2, 3, 4, 5, 6, 7, 36, 37}) {
              const int64_t begin = random.below(240 - count + 1);
              const std::vector<float> some = multiply(b, x, begin, count, cpu::kernels().panel);
              CHECK(std::memcmp(some.data(), whole.data() + static_cast<size_t>(begin) * panel, some.size() * 4) == 0,
                    count, " rows from ", begin, ", columns from ", first);
              const std::vector<float> fewer = multiply(b, x, begin, count, 5);
              for (size_t i = 0; i < fewer.size(); ++i) {
                CHECK(fewer[i] == (i % panel < 5 ? some[i] : 0.0f), count, " rows, 5 columns");
              }
            }
          });
        }
      }
    }
  }
}

}  // namespace
}  // namespace switchgear::test
