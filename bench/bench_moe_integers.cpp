// SPDX-License-Identifier: BSD-3-Clause
#include "bench.h"

namespace switchgear::bench {
namespace {

// Random levels: values do not affect the speed.
struct Matrices {
  Matrices(int64_t E, int64_t rows, int64_t cols, int64_t parts, int64_t bits, int64_t group_size, bool symmetric)
      : E(E), rows(rows), cols(cols), parts(parts), bits(bits), group_size(group_size) {
    values = bytes(E * B * W * 64, 1, 1, 255);
    scales = bytes(E * B * G * 16, 2, 60, 127);
    row_scales.assign(static_cast<size_t>(E * B * 16),
                      static_cast<float>(1.0 / 60 / (bits == 8 ? 127 : 8) / std::sqrt(static_cast<double>(cols))));
    if (!symmetric) zeros = bytes(E * B * G * 16, 3, 100, 156);
  }
  static std::vector<uint8_t> bytes(int64_t count, uint64_t seed, int low, int high) {
    std::vector<uint8_t> data(static_cast<size_t>(count));
    test::Random random(seed);
    constexpr int64_t kPeriod = 999'983;
    for (int64_t i = 0; i < count; ++i) {
      data[static_cast<size_t>(i)] = i < kPeriod ? static_cast<uint8_t>(low + random.below(high - low + 1))
                                                 : data[static_cast<size_t>(i - kPeriod)];
    }
    return data;
  }
  Weight matrices() const {
    Weight m{.format = bits == 8 ? Format::kInt8 : Format::kInt4,
             .data = view(const_cast<uint8_t*>(values.data()), DType::kUInt8, E, B, W, 64),
             .scales = view(const_cast<uint8_t*>(scales.data()), DType::kInt8, E, B, G, 16),
             .row_scales = view(const_cast<float*>(row_scales.data()), DType::kFloat32, E, B, 16),
             .rows = rows,
             .cols = cols,
             .parts = parts,
             .group_size = group_size};
    if (!zeros.empty()) m.zeros = view(const_cast<uint8_t*>(zeros.data()), DType::kUInt8, E, B, G, 16);
    return m;
  }
  double weight(int64_t e, int64_t row, int64_t col) const {  // as integers.h defines it
    const int64_t per_part = rows / parts, block = row / per_part * ((per_part + 15) / 16) + row % per_part / 16;
    const int64_t at = e * B + block, lane = 4 * (row % per_part % 16) + col % 4;
    const int byte = values[static_cast<size_t>((at * W + col / (bits == 8 ? 4 : 8)) * 64 + lane)];
    const int q = bits == 8 ? byte : col % 8 < 4 ? byte & 15 : byte >> 4;
    const int64_t g = group_size == 0 ? 0 : col / group_size;
    const auto group = static_cast<size_t>((at * G + g) * 16 + row % per_part % 16);
    const double zero = (zeros.empty() ? 128.0 : zeros[group]) / (bits == 8 ? 1 : 16);
    const auto row_at = static_cast<size_t>(at * 16 + row % per_part % 16);
    return static_cast<double>(row_scales[row_at]) * static_cast<int8_t>(scales[group]) * (q - zero);
  }
  double num_bytes() const { return static_cast<double>(values.size() + scales.size() + zeros.size()); }

  int64_t E, rows, cols, parts, bits, group_size;
  // Blocks of 16 rows, words of 64 bytes, and groups.
  int64_t B = parts * ((rows / parts + 15) / 16), W = (cols + 7) / 8 * (bits == 8 ? 2 : 1);
  int64_t G = group_size == 0 ? 1 : (cols + group_size - 1) / group_size;
  std::vector<uint8_t> values, scales, zeros;
  std::vector<float> row_scales;
};

template <int64_t kBits, int64_t kGroupSize, bool kSymmetric>
struct IntegerMoeForward {
  static constexpr const char* kName = kBits == 8   ? "moe_forward/int8"
                                       : kSymmetric ? "moe_forward/int4"
                                                    : "moe_forward/int4_zeros";
  explicit IntegerMoeForward(const Case& c)
      : c(c),
        routed(c),
        x(Tensor(c.dtype, c.T, c.H).random(1.0, 11)),
        gate_up_proj(c.E, 2 * c.I, c.H, 2, kBits, kGroupSize, kSymmetric),
        down_proj(c.E, c.H, c.I, 1, kBits, kGroupSize, kSymmetric),
        y(c.dtype, c.T, c.H) {
    run();
  }

  void run() {
    moe_forward({.x = x,
                 .weights = {.gate_up_proj = gate_up_proj.matrices(), .down_proj = down_proj.matrices()},
                 .topk_ids = routed.topk_ids,
                 .topk_weights = routed.topk_weights,
                 .y = y},
                c.exec);
  }

  // Some elements of the last token, within the error of rounding x and a to int8.
  bool verify() const {
    const int64_t t = c.T - 1;
    std::vector<std::vector<double>> a(static_cast<size_t>(c.K));
    const auto expert = [&](int64_t k) { return static_cast<int64_t>(routed.topk_ids.as<int32_t>()[t * c.K + k]); };
    for (int64_t k = 0; k < c.K; ++k) {
      const auto h = [&](int64_t n) {
        double sum = 0.0;
        for (int64_t j = 0; j < c.H; ++j) sum += x[t * c.H + j] * gate_up_proj.weight(expert(k), n, j);
        return sum;
      };
      for (int64_t i = 0; i < c.I; ++i) {
        const double gate = h(i);
        a[static_cast<size_t>(k)].push_back(gate / (1 + std::exp(-gate)) * h(c.I + i));
      }
    }
    double error = 0.0, size = 0.0;
    sample(c.H, 64, [&](int64_t column) {
      double sum = 0.0;
      for (int64_t k = 0; k < c.K; ++k) {
        double out = 0.0;
        for (int64_t i = 0; i < c.I; ++i) {
          out += a[static_cast<size_t>(k)][static_cast<size_t>(i)] * down_proj.weight(expert(k), column, i);
        }
        sum += out * routed.topk_weights[t * c.K + k];
      }
      error += std::pow(y[t * c.H + column] - sum, 2);
      size += sum * sum;
      return true;
    });
    return error < 0.05 * 0.05 * size;
  }
  Work work() const {
    const double touched = static_cast<double>(routed.experts_hit()) / static_cast<double>(c.E);
    return {6.0 * static_cast<double>(c.S()) * static_cast<double>(c.H * c.I),
            (gate_up_proj.num_bytes() + down_proj.num_bytes()) * touched + static_cast<double>(x.bytes() + y.bytes())};
  }

  Case c;
  Routed routed;
  Tensor x;
  Matrices gate_up_proj, down_proj;
  Tensor y;
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) {
  using namespace switchgear::bench;
  using switchgear::integer_multiply_rate;
  const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  benchmark::AddCustomContext("int8", switchgear::join(integer_multiply_rate(8, {threads}) / 1e9, " Gop/s"));
  benchmark::AddCustomContext("int4", switchgear::join(integer_multiply_rate(4, {threads}) / 1e9, " Gop/s"));
  return bench_main<IntegerMoeForward<8, 0, true>, IntegerMoeForward<4, 32, true>, IntegerMoeForward<4, 32, false>>(
      argc, argv);
}
