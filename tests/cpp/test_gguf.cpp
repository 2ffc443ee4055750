// SPDX-License-Identifier: BSD-3-Clause
// Products with GGUF's blocks on every ISA: those of rounded rows with the decoded weight within bounds, with the bits of each row
// alone. tests/weights/test_gguf.py compares the decoded weight with ggml's.
#include "cases.h"
#include "switchgear/gguf.h"

namespace switchgear::test {
namespace {

// Blocks of bytes below 0x30, so that scales are small; exponents are near 1, which float16 holds.
Array random_blocks(Random& random, Format format, const std::vector<int64_t>& shape) {
  Array array(DType::kUInt8, shape, 0, 0);
  auto* const data = array.view().as<uint8_t>();
  for (int64_t i = 0; i < array.numel(); ++i) {
    data[i] = static_cast<uint8_t>(random.below(0x30));
    if (format == Format::kMxfp4Gguf && i % gguf_type(format).bytes == 0) data[i] = 0x78 | (data[i] & 7);
  }
  return array;
}

Array offsets_of(int64_t num_rows) {
  Array offsets(DType::kInt32, {2});
  offsets.fill([&](int64_t i) { return i * num_rows; });
  return offsets;
}

// w [N,C] in float32: the product of the unit matrix, whose sums have one number.
Array decoded(const Weight& weight) {
  Array unit(DType::kFloat32, {weight.rows, weight.rows}), out(DType::kFloat32, {weight.rows, weight.cols});
  unit.fill([&](int64_t i) { return i / weight.rows == i % weight.rows; });
  grouped_gemm({.x = unit, .weight = weight, .expert_offsets = offsets_of(weight.rows), .out = out, .transposed = true},
               {1});
  return out;
}

// A row as products round it.
std::vector<double> rounded(const Array& x, int64_t row, int64_t group) {
  std::vector<double> values;
  for (int64_t first = 0; first < x.size(1); first += group) {
    float largest = 0.0f;
    for (int64_t c = first; c < first + group; ++c) largest = std::max(largest, std::fabs(x(row, c)));
    for (int64_t c = first; c < first + group; ++c) {
      const float code = largest > 0.0f ? std::nearbyint(x(row, c) * (127.0f / largest)) : 0.0f;
      values.push_back(static_cast<double>(code) * (largest / 127.0f));
    }
  }
  return values;
}

TEST(products_are_those_of_rounded_rows_in_any_batch) {
  for (int number = static_cast<int>(Format::kQ80); number <= static_cast<int>(kLastFormat); ++number) {
    const auto format = static_cast<Format>(number);
    CHECK(is_gguf(format), "types are consecutive");
    const auto [columns, bytes] = gguf_type(format);
    Random random(number);
    // An odd number of blocks, as few or more than kernels take apart at once; more rows than a panel.
    for (const int64_t blocks : {3, 17}) {
      const int64_t N = 69, C = columns * blocks, T = blocks == 3 ? 13 : 5;
      const Array data = random_blocks(random, format, {1, 1, N, blocks * bytes});
      const Weight weight{.format = format, .data = data, .rows = N, .cols = C};
      for (const DType dtype : kFloatTypes) {
        note = join(name_of(format), " ", name_of(dtype));
        const double rounding = dtype == DType::kBFloat16 ? 0x1p-8 : dtype == DType::kFloat16 ? 0x1p-11 : 0.0;
        Array x = random_array(random, dtype, {T, C}, 1.0, 3);
        for (int64_t c = 0; c < columns; ++c) x.set(0.0f, 1, c);  // a block of zeros
        Array y(DType::kFloat32, {T, N}), got(dtype, {T, N}, 2);
        for_each_isa(
            {&got},
            [&](Execution exec) {
              grouped_gemm({.x = x, .weight = weight, .expert_offsets = offsets_of(T), .out = got}, exec);
            },
            [&] {
              const Array w = decoded(weight);
              for (int64_t t = 0; t < T; ++t) {
                const std::vector<double> row = rounded(x, t, columns);
                for (int64_t n = 0; n < N; ++n) {
                  double sum = 0.0, magnitude = 0.0;
                  for (int64_t c = 0; c < C; ++c) {
                    sum += row[static_cast<size_t>(c)] * w(n, c);
                    magnitude += std::fabs(row[static_cast<size_t>(c)] * w(n, c));
                  }
                  // Offsets of codes and mins are terms of their own, so magnitudes are up to 16 times as large.
                  const double bound = 16 * magnitude * 1e-6 + std::fabs(sum) * rounding;
                  CHECK(std::fabs(got(t, n) - sum) <= bound, "[", t, ", ", n, "] is ", got(t, n), ", not ", sum);
                }
              }
              for (const int64_t count : {1, 2, 5}) {
                Array some(dtype, {count, N}), first(dtype, {count, C});
                first.fill([&](int64_t i) { return x(i / C, i % C); });
                grouped_gemm({.x = first, .weight = weight, .expert_offsets = offsets_of(count), .out = some}, {1});
                for (int64_t i = 0; i < count * N; ++i) {
                  CHECK(some(i / N, i % N) == got(i / N, i % N), count, " rows change [", i / N, ", ", i % N, ']');
                }
              }
            },
            Isas::kAll);
      }
    }
  }
}

}  // namespace
}  // namespace switchgear::test
