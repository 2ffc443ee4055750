// SPDX-License-Identifier: BSD-3-Clause
// Products of one panel with a stored matrix on every ISA, for the tests of its formats.
#pragma once
#include <memory>

#include "bounded.h"
#include "cpu/kernels.h"
#include "support.h"

namespace switchgear::test {

inline int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that ends where its last byte ends, at an odd address or an `offset` from an even one.
struct Bytes {
  explicit Bytes(int64_t size, int64_t offset = 1) : offset(offset), all(static_cast<size_t>(size + offset)) {}
  uint8_t* data() { return all.data() + offset; }
  int64_t offset;
  std::vector<uint8_t> all;
};

// C [rows, panel] of a product.
inline std::vector<float> multiply(const cpu::Matrix& b, const Array& x, int64_t first_row, int64_t num_rows,
                                   int64_t num_columns, const cpu::Start& next = {}) {
  static const auto memory = std::make_unique<char[]>(cpu::kProductScratch + 64);
  std::vector<const void*> rows;
  const TensorView& view = x.view();
  for (int64_t m = 0; m < num_rows; ++m) {
    rows.push_back(view.as<const char>() + (first_row + m) * view.stride[0] * size_of(view.dtype));
  }
  std::vector<float> c(static_cast<size_t>(num_rows * cpu::kernels().panel), NAN);
  auto* const scratch = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
  std::memset(scratch, 0xff, cpu::kProductScratch);
  cpu::kernels().dot_products({.rows = rows.data(),
                               .num_rows = num_rows,
                               .b = b,
                               .num_columns = num_columns,
                               .depth = x.size(1),
                               .c = c.data(),
                               .next = next,
                               .scratch = scratch});
  return c;
}

// body() on each ISA whose products of floats are its own.
template <typename Body>
void on_each_isa(Body&& body) {
  const std::string before = cpu_isa(), case_note = note;
  for (const std::string& isa : isas_to_test()) {
    if (isa.ends_with("vnni") || isa.ends_with("dot")) continue;
    set_cpu_isa(isa);
    note = case_note + " " + isa;
    body();
  }
  set_cpu_isa(before);
  note = case_note;
}

struct Shape {
  int64_t columns, depth, group, rows;  // group 0: the whole row
};
inline constexpr Shape kShapes[] = {{1, 32, 32, 1},     {64, 32, 0, 2},      {17, 71, 32, 5},    {63, 95, 64, 3},
                                    {8, 1, 32, 4},      {33, 31, 0, 7},      {64, 64, 32, 64},   {40, 100, 128, 240},
                                    {23, 33, 32, 384},  {64, 2880, 128, 6},  {50, 2880, 0, 13},  {64, 1100, 32, 20},
                                    {16, 4111, 96, 12}, {64, 2047, 1024, 1}, {12, 2049, 32, 30}, {64, 96, 0, 250}};

}  // namespace switchgear::test
