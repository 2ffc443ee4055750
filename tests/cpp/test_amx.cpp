// SPDX-License-Identifier: BSD-3-Clause
// Products by tiles, on a processor with AMX or in emulation, against the order of sums that kernels_amx.cpp states: bit by bit.
#include <functional>

#include "cpu/kernels.h"
#include "support.h"
#include "switchgear/compact.h"

#if defined(SWITCHGEAR_AMX_EMULATED)
#include "cpu/amx.h"
#endif

namespace switchgear::test {
namespace {

bool runs_amx() {
  const std::vector<std::string> isas = available_cpu_isas();
  const bool runs = std::find(isas.begin(), isas.end(), "amx") != isas.end();
  if (!runs) std::printf("skipped: amx does not run here, %s is the last of the ISAs that do\n", isas.back().c_str());
  return runs;
}

float flushed(float v) { return std::abs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }

// The sum as the kernel's file states it, of numbers that are bfloat16.
float dot(const std::vector<float>& a, const std::vector<float>& b) {
  constexpr size_t kStep = 32;
  float c = 0.0f;
  for (size_t k = 0; k < a.size(); k += kStep) {
    float sums[2] = {};
    for (size_t i = k; i < std::min(a.size(), k + kStep); ++i) {
      sums[i % 2] = flushed(std::fma(flushed(a[i]), flushed(b[i]), sums[i % 2]));
    }
    c = flushed(c + flushed(sums[0] + sums[1]));
  }
  return c;
}

// B [columns, depth] in one of the ways in which weights lie in memory.
struct Weights {
  const char* layout;
  Array array;
  cpu::Matrix matrix;
};

Weights padded(const Array& b) {
  Weights w{" rows", Array(DType::kBFloat16, {b.size(0), b.size(1)}, 3), {}};
  w.array.fill([&](int64_t i) { return b(i / b.size(1), i % b.size(1)); });
  w.matrix = {w.array.view().data, DType::kBFloat16, b.size(1) + 3, 1};
  return w;
}
Weights transposed(const Array& b) {
  Weights w{" transposed", Array(DType::kBFloat16, {b.size(1), b.size(0)}), {}};
  w.array.fill([&](int64_t i) { return b(i % b.size(0), i / b.size(0)); });
  w.matrix = {w.array.view().data, DType::kBFloat16, 1, b.size(0)};
  return w;
}
Weights spaced(const Array& b) {  // neither runs along memory
  Weights w{" spaced", Array(DType::kBFloat16, {b.size(0), 2 * b.size(1)}), {}};
  w.array.fill([&](int64_t i) { return i % 2 == 0 ? b(i / 2 / b.size(1), i / 2 % b.size(1)) : NAN; });
  w.matrix = {w.array.view().data, DType::kBFloat16, 2 * b.size(1), 2};
  return w;
}
Weights compact(const Array& b) {
  TensorView matrix = view(b.view().data, DType::kBFloat16, 1, b.size(0), b.size(1));
  const int64_t row = compact_row_bytes(b.size(1), b.size(1), DType::kBFloat16);
  Weights w{" compact", Array(DType::kUInt8, {1, b.size(0), row}), {}};
  pack_compact(matrix, w.array, {1});
  w.matrix = {w.array.view().data, DType::kBFloat16, row, 1, 2};
  return w;
}

void check_products(Random& random, int64_t M, int64_t N, int64_t K) {
  const std::string shape = join("M=", M, " N=", N, " K=", K);
  const Array a = random_array(random, DType::kBFloat16, {M, K}, 1.0, 1),
              b = random_array(random, DType::kBFloat16, {N, K});
  std::vector<float> want;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      std::vector<float> x, y;
      for (int64_t k = 0; k < K; ++k) x.push_back(a(m, k)), y.push_back(b(n, k));
      want.push_back(dot(x, y));
    }
  }
  std::vector<const void*> rows;
  for (int64_t m = 0; m < M; ++m) rows.push_back(a.view().as<char>() + m * a.view().stride[0] * 2);
  std::vector<float> scratch(cpu::kProductScratch / 4 + 16);
  float* const aligned = scratch.data() + (64 - reinterpret_cast<uintptr_t>(scratch.data()) % 64) / 4;
  const cpu::Kernels& kernels = cpu::kernels_amx();
  for (const auto make : {padded, transposed, spaced, compact}) {
    const Weights w = make(b);
    note = shape + w.layout;
    std::fill(scratch.begin(), scratch.end(), NAN);
    std::vector<float> c(static_cast<size_t>(M * kernels.panel), NAN);
    kernels.dot_products({.rows = rows.data(),
                          .num_rows = M,
                          .b = w.matrix,
                          .num_columns = N,
                          .depth = K,
                          .c = c.data(),
                          .next = M % 2 == 0 ? w.matrix.data : nullptr,
                          .scratch = aligned});
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < kernels.panel; ++n) {
        const float got = c[static_cast<size_t>(m * kernels.panel + n)];
        const float sum = n < N ? want[static_cast<size_t>(m * N + n)] : 0.0f;
        CHECK(std::bit_cast<uint32_t>(got) == std::bit_cast<uint32_t>(sum), "row ", m, " column ", n, ": ", got, ", ",
              sum);
      }
    }
  }
}

TEST(tiles_add_up_in_the_order_that_is_stated) {
  if (!runs_amx()) return;
  Random random(1);
  for (const int64_t M : {1, 15, 16, 17, 33}) {
    for (const int64_t N : {1, 15, 16, 17, 40, 64}) check_products(random, M, N, 1 + random.below(130));
  }
  for (const int64_t K : {1, 2, 31, 32, 33, 64, 2047, 2048, 2049, 4130}) check_products(random, 18, 20, K);
  check_products(random, 240, 64, 100);
  check_products(random, 239, 63, 2100);
}

#if defined(SWITCHGEAR_AMX_EMULATED)

std::string complaint(const std::function<void()>& run) {
  std::string text = "none";
  try {
    run();
  } catch (const std::logic_error& error) {
    text = error.what();
  }
  cpu::tile_release();
  return text;
}

cpu::TileConfig shapes(int rows, int row_bytes) {
  cpu::TileConfig config;
  for (int t = 0; t < 3; ++t)
    config.rows[t] = static_cast<uint8_t>(rows), config.row_bytes[t] = static_cast<uint16_t>(row_bytes);
  return config;
}

TEST(the_emulation_refuses_what_a_processor_would) {
  using namespace cpu;
  char memory[1024] = {};
  const auto after = [&](int rows, int bytes, const std::function<void()>& run) {
    return complaint([&] { tile_configure(shapes(rows, bytes)), run(); });
  };
  CHECK(after(16, 64, [&] { tile_load<0>(memory, 64), tile_multiply<0, 1, 2>(), tile_store<0>(memory, 64); }) ==
        "none");
  CHECK(complaint([&] { tile_zero<0>(); }) == "AMX: a tile without a shape is used");
  CHECK(after(16, 64, [&] { tile_load<3>(memory, 64); }) == "AMX: a tile without a shape is used");
  CHECK(after(16, 64, [&] { tile_release(), tile_store<0>(memory, 64); }) == "AMX: a tile without a shape is used");
  CHECK(after(16, 64, [&] { tile_configure(shapes(16, 64)); }) == "AMX: tiles are configured again without a release");
  CHECK(after(8, 64, [&] { tile_multiply<0, 1, 2>(); }) == "AMX: shapes of a product do not fit");
  CHECK(after(17, 64, [] {}) == "AMX: a shape is out of range");
  CHECK(after(16, 66, [] {}) == "AMX: a shape is out of range");
  CHECK(after(16, 0, [] {}) == "AMX: a shape has rows without bytes, or bytes without rows");
}

#endif

}  // namespace
}  // namespace switchgear::test
