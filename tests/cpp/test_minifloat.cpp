// SPDX-License-Identifier: BSD-3-Clause
// Products with fp8, mxfp4 and nf4 weights on every ISA: every code is exact, sums are those of float64 within bounds, and the
// bits of a row depend neither on its neighbours nor on how many columns are requested.
#include "stored_products.h"

namespace switchgear::test {
namespace {

constexpr Format kFormats[] = {Format::kFp8, Format::kMxfp4, Format::kNf4};

float value_of(Format format, int code) {
  if (format == Format::kNf4) return kNf4Values[code];
  if (format == Format::kMxfp4) {
    constexpr float kValues[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    return code & 8 ? -kValues[code & 7] : kValues[code & 7];
  }
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const float magnitude =
      std::ldexp(static_cast<float>(exponent > 0 ? 8 + fraction : fraction), std::max(exponent, 1) - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

int codes_of(Format format) { return format == Format::kFp8 ? 256 : 16; }

// Whether the ISA in use multiplies rows of `dtype` by rounded values: pairs of bfloat16 do not hold those of nf4.
bool rounds_values(Format format, DType dtype) {
  const std::string isa = cpu_isa();
  return format == Format::kNf4 && dtype == DType::kBFloat16 && (isa == "avx512bf16" || isa == "amx");
}

// Columns that share a scale, if it is `group` for fp8.
int64_t group_of(Format format, int64_t group) { return format == Format::kFp8 ? group : minifloat_group(format); }

// The weight [rows, cols], stored as minifloat.h says.
struct Minifloats {
  Minifloats(Format format, int64_t rows, int64_t cols, int64_t group)
      : format(format),
        rows(rows),
        cols(cols),
        group(group > 0 ? group : ceil_of(cols, kMinifloatColumns) * kMinifloatColumns),
        steps(ceil_of(cols, kMinifloatColumns)),
        groups(ceil_of(cols, this->group)),
        scale_bytes(format == Format::kMxfp4 ? 1 : 4),
        data(blocks() * steps * minifloat_step_bytes(format)),
        scales(blocks() * groups * kMinifloatRows * scale_bytes) {}

  int64_t blocks() const { return ceil_of(rows, kMinifloatRows); }

  void set(int64_t r, int64_t c, int code) {
    const int64_t i = r % kMinifloatRows, k = c % kMinifloatColumns;
    uint8_t* const step =
        data.data() + (r / kMinifloatRows * steps + c / kMinifloatColumns) * minifloat_step_bytes(format);
    if (format == Format::kFp8) {
      const int64_t j = k % 4;
      step[k / 4 * 64 + 16 * (i / 4) + 8 * (j / 2) + 2 * (i % 4) + j % 2] = static_cast<uint8_t>(code);
      return;
    }
    if (format == Format::kNf4) code ^= kNf4Zero;
    for (int64_t b = 0; b < 4; ++b) {
      const int64_t first = 4 * (b % 2) + b / 2;
      uint8_t& byte = step[k / 8 * 64 + 4 * i + b];
      if (k % 8 == first) byte = static_cast<uint8_t>((byte & 0xf0) | code);
      if (k % 8 == first + 2) byte = static_cast<uint8_t>((byte & 0x0f) | code << 4);
    }
  }
  void set_scale(int64_t r, int64_t g, float scale) {
    uint8_t* const p =
        scales.data() + ((r / kMinifloatRows * groups + g) * kMinifloatRows + r % kMinifloatRows) * scale_bytes;
    if (format != Format::kMxfp4) {
      std::memcpy(p, &scale, 4);
    } else {
      *p = static_cast<uint8_t>(std::ilogb(scale) + 127);
    }
  }
  // Of rows from `first` on, to multiply rows of `dtype`.
  cpu::Matrix matrix(DType dtype, int64_t first = 0) {
    return cpu::Matrix{.data = data.data(),
                       .dtype = dtype,
                       .n_stride = steps * minifloat_step_bytes(format),
                       .format = format,
                       .scales = scales.data(),
                       .scale_stride = groups * kMinifloatRows * scale_bytes,
                       .group_size = group}
        .from(first);
  }

  Format format;
  int64_t rows, cols, group, steps, groups, scale_bytes;
  Bytes data, scales;
};

std::string describe(Format format, DType dtype, const Minifloats& w, int64_t num_rows) {
  return join(name_of(format), " [", w.rows, ", ", w.cols, "], group ", w.group, ", ", num_rows, " rows of ",
              name_of(dtype));
}

// Rows of x with a single 1 select one weight each. Scales are powers of two, extremes included, so products are exact.
TEST(every_code_is_exact) {
  for (const Format format : kFormats) {
    const int codes = codes_of(format);
    for (const DType dtype : kFloatTypes) {
      Minifloats w(format, 64, 32, group_of(format, 32));
      const auto code_at = [&](int64_t r, int64_t c) {
        const int64_t code = (r % kMinifloatRows * 32 + c + 37 * (r / kMinifloatRows)) % codes;
        return static_cast<int>(format == Format::kFp8 && (code & 0x7f) == 0x7f ? code - 1 : code);
      };
      const auto scale_of = [&](int64_t r) {
        return std::ldexp(1.0f, static_cast<int>(r == 0 ? -127 : r == 1 ? 124 : r == 2 ? -126 : r % 7 - 3));
      };
      for (int64_t r = 0; r < w.rows; ++r) {
        w.set_scale(r, 0, scale_of(r));
        for (int64_t c = 0; c < w.cols; ++c) w.set(r, c, code_at(r, c));
      }
      Array x(dtype, {32, 32});
      x.fill([](int64_t i) { return i / 32 == i % 32; });
      note = describe(format, dtype, w, 32);
      on_each_isa([&] {
        const int64_t panel = cpu::kernels().panel;
        for (int64_t first = 0; first < w.rows; first += panel) {
          const std::vector<float> all = multiply(w.matrix(dtype, first), x, 0, 32, panel);
          for (int64_t k = 0; k < 32; ++k) {
            const std::vector<float> one = multiply(w.matrix(dtype, first), x, k, 1, panel);
            for (int64_t n = 0; n < panel; ++n) {
              const float value = value_of(format, code_at(first + n, k));
              const float want = (rounds_values(format, dtype) ? round_to(value, dtype) : value) * scale_of(first + n);
              const float got = all[static_cast<size_t>(k * panel + n)];
              CHECK(got == want, "row ", first + n, ", column ", k, ": got ", got, ", expected ", want);
              CHECK(one[static_cast<size_t>(n)] == want, "alone: row ", first + n, ", column ", k);
            }
          }
          Array rows(DType::kFloat32, {panel, 30}, 3, 0);
          cpu::kernels().expand_minifloats(rows.view().data, 33, DType::kFloat32, w.matrix(dtype, first), panel, 0, 30);
          CHECK(rows.padding_holds(0xff), "expanded too much");
          for (int64_t i = 0; i < panel * 30; ++i) {
            CHECK(rows(i / 30, i % 30) == value_of(format, code_at(first + i / 30, i % 30)) * scale_of(first + i / 30),
                  "expanded row ", first + i / 30, ", column ", i % 30);
          }
        }
      });
    }
  }
}

TEST(the_last_scale_code_is_nan) {
  Minifloats w(Format::kMxfp4, 64, 32, 32);
  for (int64_t r = 0; r < w.rows; ++r) w.set_scale(r, 0, 1.0f);
  w.scales.data()[3] = 255;
  Array x(DType::kBFloat16, {7, 32});
  x.fill([](int64_t) { return 1.0; });
  on_each_isa([&] {
    const std::vector<float> c = multiply(w.matrix(DType::kBFloat16), x, 0, 7, 8);
    for (int64_t i = 0; i < static_cast<int64_t>(c.size()); ++i) {
      const bool has_it = i % cpu::kernels().panel == 3;
      CHECK(has_it ? std::isnan(c[static_cast<size_t>(i)]) : c[static_cast<size_t>(i)] == 0.0f, "at ", i);
    }
  });
}

TEST(products_are_those_of_float64) {
  Random random(1);
  for (const Shape& shape : kShapes) {
    for (const Format format : kFormats) {
      for (const DType dtype : kFloatTypes) {
        Minifloats w(format, shape.columns, shape.depth, group_of(format, shape.group));
        std::vector<int> codes(static_cast<size_t>(w.rows * w.cols));
        std::vector<float> scales(static_cast<size_t>(w.rows * w.groups));
        for (int64_t r = 0; r < w.rows; ++r) {
          for (int64_t g = 0; g < w.groups; ++g) {
            const auto exponent = static_cast<int>(random.below(9)) - 8;
            float& scale = scales[static_cast<size_t>(r * w.groups + g)];
            scale = std::ldexp(format == Format::kMxfp4 ? 1.0f : 1.0f + static_cast<float>(random.unit()), exponent);
            w.set_scale(r, g, scale);
          }
          for (int64_t c = 0; c < w.cols; ++c) {
            int& code = codes[static_cast<size_t>(r * w.cols + c)];
            code = static_cast<int>(random.below(codes_of(format)));
            if (format == Format::kFp8 && (code & 0x7f) == 0x7f) code ^= 1;
            w.set(r, c, code);
          }
        }
        const Array x = random_array(random, dtype, {shape.rows, shape.depth}, 1.0, 1);
        for (const bool rounds : {false, true}) {  // rounded values have sums of their own
          if (rounds && (format != Format::kNf4 || dtype != DType::kBFloat16)) continue;
          std::vector<Bounded> want;
          for (int64_t m = 0; m < shape.rows; ++m) {
            std::vector<float> row;
            for (int64_t k = 0; k < shape.depth; ++k) row.push_back(x(m, k));
            for (int64_t n = 0; n < w.rows; ++n) {
              Sum sum;
              for (int64_t k = 0; k < shape.depth; ++k) {
                const float value = value_of(format, codes[static_cast<size_t>(n * w.cols + k)]);
                const double scale = scales[static_cast<size_t>(n * w.groups + k / w.group)];
                sum.add({row[static_cast<size_t>(k)]}, {scale * (rounds ? round_to(value, dtype) : value)});
              }
              want.push_back(sum.result());
            }
          }
          note = describe(format, dtype, w, shape.rows);
          on_each_isa([&] {
            if (rounds_values(format, dtype) != rounds) return;
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
}

TEST(rows_do_not_depend_on_their_neighbours) {
  Random random(2);
  for (const Format format : kFormats) {
    for (const DType dtype : kFloatTypes) {
      for (const int64_t depth : {71, 2880}) {
        Minifloats w(format, 64, depth, group_of(format, 128));
        for (int64_t r = 0; r < w.rows; ++r) {
          for (int64_t g = 0; g < w.groups; ++g)
            w.set_scale(r, g, std::ldexp(1.0f, static_cast<int>(random.below(9)) - 8));
          for (int64_t c = 0; c < w.cols; ++c)
            w.set(r, c, static_cast<int>(random.below(format == Format::kFp8 ? 0x7f : 16)));
        }
        const Array x = random_array(random, dtype, {240, depth}, 1.0, 1);
        note = describe(format, dtype, w, 240);
        on_each_isa([&] {
          const auto panel = static_cast<size_t>(cpu::kernels().panel);
          for (int64_t first = 0; first < w.rows; first += cpu::kernels().panel) {
            const cpu::Matrix b = w.matrix(dtype, first);
            const std::vector<float> all = multiply(b, x, 0, 240, cpu::kernels().panel);
            for (const int64_t count : {1, 2, 3, 4, 5, 6, 7, 13, 36, 37, 64, 239}) {
              const int64_t begin = random.below(240 - count + 1);
              const std::vector<float> some = multiply(b, x, begin, count, cpu::kernels().panel);
              CHECK(std::memcmp(some.data(), all.data() + static_cast<size_t>(begin) * panel, some.size() * 4) == 0,
                    count, " rows from ", begin, ", columns from ", first);
              const std::vector<float> fewer = multiply(b, x, begin, count, 5);
              for (size_t i = 0; i < fewer.size(); ++i) {
                CHECK(fewer[i] == (i % panel < 5 ? some[i] : 0.0f), count, " rows, 5 columns");
              }
            }
          }
        });
      }
    }
  }
}

}  // namespace
}  // namespace switchgear::test
