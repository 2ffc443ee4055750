// SPDX-License-Identifier: BSD-3-Clause
// Products with tiles, on a processor with AMX or in emulation, bit by bit against the order of sums that kernels_amx.cpp
// states. Each runs with every layout of its operands.
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

// c plus the sum in the order that kernels_amx.cpp states; the numbers are bfloat16.
float dot(const std::vector<float>& a, const std::vector<float>& b, float c = 0.0f) {
  constexpr size_t kStep = 32;
  for (size_t k = 0; k < a.size(); k += kStep) {
    float sums[2] = {};
    for (size_t i = k; i < std::min(a.size(), k + kStep); ++i) {
      sums[i % 2] = flushed(std::fma(flushed(a[i]), flushed(b[i]), sums[i % 2]));
    }
    c = flushed(c + flushed(sums[0] + sums[1]));
  }
  return c;
}

using Numbers = std::vector<std::vector<float>>;

// at(i, k) for i in [0, count), k in [0, depth)
template <typename At>
Numbers rows_of_numbers(int64_t count, int64_t depth, At&& at) {
  Numbers rows(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t k = 0; k < depth; ++k) rows[static_cast<size_t>(i)].push_back(at(i, k));
  }
  return rows;
}

// B [columns, depth] in one of the layouts of weights.
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
Weights spaced(const Array& b) {  // neither dimension is contiguous
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
  w.matrix = {w.array.view().data, DType::kBFloat16, row, 1, Format::kCompact, 2};
  return w;
}

// Memory aligned as the kernels require.
class Aligned {
 public:
  explicit Aligned(int64_t bytes) : memory_(static_cast<size_t>(bytes) / 4 + 16, NAN) {}
  float* data() { return memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) / 4 % 16; }
  void forget() { std::fill(memory_.begin(), memory_.end(), NAN); }

 private:
  std::vector<float> memory_;
};

std::vector<const void*> rows_of(const Array& a) {
  std::vector<const void*> rows;
  for (int64_t m = 0; m < a.size(0); ++m) rows.push_back(a.view().as<char>() + m * a.view().stride[0] * 2);
  return rows;
}

void check_bits(float got, float want, int64_t row, int64_t column) {
  CHECK(std::bit_cast<uint32_t>(got) == std::bit_cast<uint32_t>(want), "row ", row, " column ", column, ": ", got, ", ",
        want);
}

void check_products(Random& random, int64_t M, int64_t N, int64_t K) {
  const std::string shape = join("M=", M, " N=", N, " K=", K);
  const Array a = random_array(random, DType::kBFloat16, {M, K}, 1.0, 1),
              b = random_array(random, DType::kBFloat16, {N, K});
  const Numbers x = rows_of_numbers(M, K, a), y = rows_of_numbers(N, K, b);
  std::vector<float> want;
  for (const auto& row : x) {
    for (const auto& column : y) want.push_back(dot(row, column));
  }
  const std::vector<const void*> rows = rows_of(a);
  const cpu::Kernels& kernels = cpu::kernels_amx();
  Aligned scratch(cpu::kProductScratch);
  const int64_t block = kernels.gathered_bytes(DType::kBFloat16, K);
  Aligned gathered(block * (M + 15) / 16 + block);
  for (int64_t m = 0; m < M; m += 16) {  // in two parts, as the first projection writes the columns of a
    const int64_t count = std::min<int64_t>(16, M - m), first = std::min<int64_t>(K, 64);
    void* const out = reinterpret_cast<char*>(gathered.data()) + m / 16 * block;
    kernels.gather_rows(out, rows.data() + m, count, 0, first);
    std::vector<const void*> rest;
    for (int64_t i = 0; i < count; ++i)
      rest.push_back(static_cast<const char*>(rows[static_cast<size_t>(m + i)]) + 2 * first);
    if (K > first) kernels.gather_rows(out, rest.data(), count, first, K - first);
  }
  for (const auto make : {padded, transposed, spaced, compact}) {
    const Weights w = make(b);
    for (const bool gathers : {false, true}) {
      note = shape + w.layout + (gathers ? " gathered" : "");
      scratch.forget();
      std::vector<float> c(static_cast<size_t>(M * kernels.panel), NAN);
      kernels.dot_products({.rows = gathers ? nullptr : rows.data(),
                            .num_rows = M,
                            .b = w.matrix,
                            .num_columns = N,
                            .depth = K,
                            .c = c.data(),
                            .next = M % 2 == 0 ? w.matrix.start() : cpu::Start{},
                            .scratch = scratch.data(),
                            .gathered = gathers ? gathered.data() : nullptr});
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < kernels.panel; ++n) {
          check_bits(c[static_cast<size_t>(m * kernels.panel + n)], n < N ? want[static_cast<size_t>(m * N + n)] : 0.0f,
                     m, n);
        }
      }
    }
  }
}

// C += A·B for rows of A at equal distances, or not.
void check_multiply(Random& random, int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kBefore = 5;  // elements of a row before those that are used
  const Array a = random_array(random, DType::kBFloat16, {M, kBefore + K}, 1.0, 1),
              b = random_array(random, DType::kBFloat16, {N, K});
  const cpu::Kernels& kernels = cpu::kernels_amx();
  const std::vector<const void*> all_rows = rows_of(a);
  const Numbers x = rows_of_numbers(M, K, [&](int64_t m, int64_t k) { return a(m, kBefore + k); }),
                y = rows_of_numbers(kernels.panel, K, [&](int64_t n, int64_t k) { return n < N ? b(n, k) : 0.0f; });
  Aligned scratch(cpu::kProductScratch);
  std::vector<float> before;
  for (int64_t i = 0; i < M * kernels.panel; ++i) before.push_back(random.normal());
  for (const bool adds : {false, true}) {
    for (const bool scatters : {false, true}) {
      std::vector<size_t> indices;
      std::vector<const void*> rows;
      for (int64_t m = 0; m < M; ++m) {
        indices.push_back(static_cast<size_t>(scatters ? random.below(M) : m));
        rows.push_back(all_rows[indices.back()]);
      }
      std::vector<float> want;
      for (const size_t index : indices) {
        for (const auto& column : y) want.push_back(dot(x[index], column, adds ? before[want.size()] : 0.0f));
      }
      for (const auto make : {padded, transposed, spaced}) {
        const Weights w = make(b);
        note = join("multiply M=", M, " N=", N, " K=", K, w.layout, adds ? " adds" : "", scatters ? " scattered" : "");
        scratch.forget();
        std::vector<float> c = before;
        kernels.multiply({.rows = rows.data(),
                          .num_rows = M,
                          .b = w.matrix,
                          .num_columns = N,
                          .depth = K,
                          .c = c.data(),
                          .next = M % 2 == 0 ? w.matrix.start() : cpu::Start{},
                          .next_width = 2,
                          .scratch = scratch.data(),
                          .row_begin = kBefore,
                          .accumulate = adds});
        for (int64_t m = 0; m < M; ++m) {
          for (int64_t n = 0; n < kernels.panel; ++n) {
            const auto at = static_cast<size_t>(m * kernels.panel + n);
            check_bits(c[at], want[at], m, n);
          }
        }
      }
    }
  }
}

// out[m,n] = Σ_s left[s][m]·right[s][n], for columns from the middle of both.
void check_gradient(Random& random, int64_t M, int64_t N, int64_t S) {
  constexpr int64_t kFirst = 3;
  const Array left = random_array(random, DType::kBFloat16, {S, kFirst + M}, 1.0, 1),
              right = random_array(random, DType::kBFloat16, {S, kFirst + N}, 1.0, 1);
  const std::vector<const void*> left_rows = rows_of(left), right_rows = rows_of(right);
  const cpu::Kernels& kernels = cpu::kernels_amx();
  const Numbers x = rows_of_numbers(M, S, [&](int64_t m, int64_t s) { return left(s, kFirst + m); }),
                y = rows_of_numbers(N, S, [&](int64_t n, int64_t s) { return right(s, kFirst + n); });
  Array want(DType::kBFloat16, {M, N});
  want.fill([&](int64_t i) { return dot(x[static_cast<size_t>(i / N)], y[static_cast<size_t>(i % N)]); });
  const int64_t padding = cpu::kLeftPadding;
  Aligned transposed((M + padding) * (S + padding) * 4), packing(cpu::kChunkWords * cpu::kMaxPanel * 4),
      carried((M + padding) * kernels.panel * 4), out(M * 64 * 2);
  kernels.transpose(transposed.data(), left_rows.data(), S, kFirst, M, DType::kBFloat16);
  for (const bool past_caches : {false, true}) {
    note = join("gradient M=", M, " N=", N, " S=", S, past_caches ? " past caches" : "");
    out.forget();
    cpu::GradientPanel product{.left = transposed.data(),
                               .num_rows = M,
                               .right = right_rows.data(),
                               .num_slots = S,
                               .dtype = DType::kBFloat16,
                               .first_column = kFirst,
                               .num_columns = N,
                               .out = out.data(),
                               .out_stride = 64,
                               .past_caches = past_caches,
                               .packing = packing.data(),
                               .carried = carried.data(),
                               .adds = false};
    for (const float times : {1.0f, 2.0f}) {  // added to itself
      product.adds = times == 2.0f;
      kernels.gradient_panel(product);
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
          const char* const got = reinterpret_cast<const char*>(out.data()) + (m * 64 + n) * 2;
          check_bits(decode(got, DType::kBFloat16), static_cast<float>(times * want(m, n)), m, n);
        }
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
  check_products(random, cpu::kMaxRows, 64, 100);
  check_products(random, cpu::kMaxRows - 1, 63, 100);
  check_products(random, cpu::kMaxRows - 1, 17, 2100);
}

TEST(tiles_multiply_rows_across_in_that_order) {
  if (!runs_amx()) return;
  Random random(2);
  for (const int64_t M : {1, 15, 16, 17, 32, 47}) {
    for (const int64_t N : {1, 16, 40, 64}) check_multiply(random, M, N, 1 + random.below(100));
  }
  for (const int64_t K : {1, 32, 33, 1023, 1024, 1025, 2100}) check_multiply(random, 18, 20, K);
  check_multiply(random, cpu::kMaxRows, 64, 64);
}

TEST(tiles_of_weight_gradients_add_up_in_that_order) {
  if (!runs_amx()) return;
  Random random(3);
  for (const int64_t M : {1, 15, 16, 33, 70}) {
    for (const int64_t N : {1, 17, 32, 33, 64}) check_gradient(random, M, N, 1 + random.below(100));
  }
  for (const int64_t S : {1, 2, 31, 32, 33, 2047, 2048, 2049, 4200}) check_gradient(random, 20, 40, S);
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
