// SPDX-License-Identifier: BSD-3-Clause
// However a processor reads fastest: products of few rows have the same bits, and the probe reads all bytes.
#include "stored_products.h"

namespace switchgear::test {
namespace {

constexpr cpu::Reads kAllReads[] = {cpu::Reads::kEveryLine, cpu::Reads::kSomeLines, cpu::Reads::kStreams};

// c [rows, panel] beside the products of x and w in float64.
void check_products(const std::vector<float>& c, const Array& x, const Array& w, int64_t rows, int64_t columns) {
  const int64_t depth = x.size(1), panel = static_cast<int64_t>(c.size()) / rows;
  for (int64_t m = 0; m < rows; m += rows - 1 + (rows == 1)) {
    double sum = 0.0, magnitude = 0.0;
    for (int64_t k = 0; k < depth; ++k) {
      const double term = double{x(m, k)} * w(columns - 1, k);
      sum += term;
      magnitude += std::fabs(term);
    }
    const double bound = static_cast<double>(depth) * 0x1p-24 * magnitude;
    CHECK(std::fabs(c[static_cast<size_t>(m * panel + columns - 1)] - sum) <= bound, m, " of ", rows, " rows, ",
          columns, " columns");
  }
}

TEST(few_rows_have_the_same_bits_however_weights_are_read) {
  const cpu::Reads before = cpu::fastest_reads();
  Random random(3);
  for (const DType dtype : kFloatTypes) {
    // below one vector; several; two chunks, the second ends within a vector; more than is widened at once
    const int64_t widened = cpu::kMaxRows / cpu::kTileRows * cpu::kChunkWords;
    for (const int64_t depth : {int64_t{5}, int64_t{96}, 2 * cpu::kChunkWords + 21, widened + 40}) {
      const Array x = random_array(random, dtype, {cpu::kTileRows, depth}, 1.0, 1);
      const Array w = random_array(random, dtype, {cpu::kMaxPanel, depth}, 1.0, 1);
      note = std::string(name_of(dtype)) + " depth " + std::to_string(depth);
      on_each_isa([&] {
        const cpu::Matrix b{
            .data = w.view().data, .dtype = dtype, .n_stride = w.view().stride[0], .k_stride = w.view().stride[1]};
        for (int64_t rows = 1; rows <= cpu::kTileRows; ++rows) {
          for (const int64_t columns : {1, 3, 4, 7, cpu::kernels().panel}) {
            std::vector<float> first;
            for (const cpu::Reads reads : kAllReads) {
              cpu::set_fastest_reads(reads);
              const std::vector<float> c = multiply(b, x, 0, rows, columns);
              if (first.empty()) {
                first = c;
                check_products(c, x, w, rows, columns);
              }
              CHECK(std::memcmp(c.data(), first.data(), c.size() * sizeof(float)) == 0, rows, " rows, ", columns,
                    " columns");
            }
          }
        }
      });
    }
  }
  cpu::set_fastest_reads(before);
}

TEST(a_probe_reads_any_number_of_bytes) {
  const cpu::Reads before = cpu::fastest_reads();
  std::vector<char> zeros(1 << 20);
  on_each_isa([&] {
    for (const cpu::Reads reads : kAllReads) {
      cpu::set_fastest_reads(reads);
      for (const int64_t bytes : {0, 511, 512, 300'000, 1 << 20}) CHECK(cpu::kernels().read(zeros.data(), bytes) == 0);
      std::vector<char> one(512 << 10);
      for (size_t at = 0; at < one.size(); at += 2048 + 64) {  // a byte anywhere is read
        one[at] = 1;
        CHECK(cpu::kernels().read(one.data(), static_cast<int64_t>(one.size())) != 0, at);
        one[at] = 0;
      }
    }
  });
  cpu::set_fastest_reads(before);
}

}  // namespace
}  // namespace switchgear::test
