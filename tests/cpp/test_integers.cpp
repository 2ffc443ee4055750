// SPDX-License-Identifier: BSD-3-Clause
// grouped_gemm and moe_forward with integer weights in blocks of random bytes, padding included, element by element against
// the definition in integers.h.
#include "cases.h"
#include "cpu/kernels.h"
#include "switchgear/integers.h"

namespace switchgear::test {
namespace {

struct Format {
  int64_t bits, group_size;
  bool symmetric;
};
constexpr Format kFormats[] = {{8, 0, true},   {4, 0, true},   {4, 32, true},
                               {4, 32, false}, {4, 16, false}, {8, 64, false}};

// Blocks of random bytes; integers.h defines where q, scale and zero are.
struct Integers {
  Integers(Random& random, const Format& f, int64_t E, int64_t rows, int64_t cols, int64_t parts)
      : format(f), rows(rows), cols(cols), parts(parts), part_rows(rows / parts) {
    const int64_t B = parts * ((part_rows + 15) / 16), W = (cols + 7) / 8 * (f.bits == 8 ? 2 : 1);
    groups = f.group_size == 0 ? 1 : (cols + f.group_size - 1) / f.group_size;
    values = bytes(random, DType::kUInt8, {E, B, W, 64});
    scales = bytes(random, DType::kInt8, {E, B, groups, 16});
    row_scales = random_array(random, DType::kFloat32, {E, B, 16}, 1.0 / 1000 / std::sqrt(static_cast<double>(cols)));
    if (!f.symmetric) zeros = bytes(random, DType::kUInt8, {E, B, groups, 16});
  }
  static Array bytes(Random& random, DType dtype, std::vector<int64_t> shape) {
    Array array(dtype, std::move(shape), 0, 0);
    for (int64_t i = 0; i < array.numel(); ++i) array.view().as<uint8_t>()[i] = static_cast<uint8_t>(random.bits());
    return array;
  }
  switchgear::Weight matrices() const {
    return {.format = format.bits == 8 ? switchgear::Format::kInt8 : switchgear::Format::kInt4,
            .data = values,
            .scales = scales,
            .row_scales = row_scales,
            .zeros = zeros,
            .rows = rows,
            .cols = cols,
            .parts = parts,
            .group_size = format.group_size};
  }

  int64_t block(int64_t e, int64_t row) const {
    return e * values.size(1) + row / part_rows * ((part_rows + 15) / 16) + row % part_rows / 16;
  }
  int q(int64_t e, int64_t row, int64_t col) const {
    const int64_t lane = 4 * (row % part_rows % 16) + col % 4, word = col / (format.bits == 8 ? 4 : 8);
    const int byte = values.view().as<const uint8_t>()[(block(e, row) * values.size(2) + word) * 64 + lane];
    return format.bits == 8 ? byte : col % 8 < 4 ? byte & 15 : byte >> 4;
  }
  int64_t group_at(int64_t e, int64_t row, int64_t col) const {
    const int64_t g = format.group_size == 0 ? 0 : col / format.group_size;
    return (block(e, row) * groups + g) * 16 + row % part_rows % 16;
  }
  double scale(int64_t e, int64_t row, int64_t col) const {
    return static_cast<double>(scales.view().as<const int8_t>()[group_at(e, row, col)]) *
           static_cast<double>(row_scales.view().as<const float>()[block(e, row) * 16 + row % part_rows % 16]);
  }
  double zero(int64_t e, int64_t row, int64_t col) const {
    const int code = zeros.defined() ? zeros.view().as<const uint8_t>()[group_at(e, row, col)] : 128;
    return format.bits == 8 ? code : code / 16.0;
  }

  Format format;
  int64_t rows, cols, parts, part_rows, groups = 1;
  Array values, scales, row_scales, zeros;
};

// A row in int8, `block` columns at a time: round(v · (127 / max)), in float32.
struct IntegerRow {
  IntegerRow(const Array& x, int64_t row, int64_t block) : block(block) {
    for (int64_t first = 0; first < x.size(1); first += block) {
      const int64_t last = std::min(first + block, x.size(1));
      float largest = 0.0f;
      for (int64_t k = first; k < last; ++k) largest = std::max(largest, std::abs(x(row, k)));
      const float inverse = largest < 0x1p-100f ? 0.0f : 127.0f / largest;
      scales.push_back(largest < 0x1p-100f ? 0.0 : static_cast<double>(largest / 127.0f));
      for (int64_t k = first; k < last; ++k) values.push_back(static_cast<int>(std::nearbyint(x(row, k) * inverse)));
    }
  }
  double operator()(int64_t k) const { return values[static_cast<size_t>(k)] * scales[static_cast<size_t>(k / block)]; }

  int64_t block;
  std::vector<int> values;
  std::vector<double> scales;
};

constexpr double kUnit = 0x1p-24;

TEST(grouped_gemm_is_what_the_bytes_say) {
  Random random(7);
  for_each_case([&](const Case& c) {
    const std::string name = note;
    const Array ids = make_ids(random, c);
    const PlanArrays plan = reference_plan(ids, c.E);
    for (const Format& f : kFormats) {
      const int64_t parts = 1 + random.below(2), N = c.I * parts;
      const DType dtype = kFloatTypes[random.below(3)];
      note = name + join(" ", name_of(dtype), " bits ", f.bits, " group ", f.group_size, " parts ", parts);
      const Integers weight(random, f, c.E, N, c.H, parts);
      const Array x = random_array(random, dtype, {c.T, c.H}, 1.0, 3);
      const Array bias = random_array(random, dtype, {c.E, N}, 1.0, 1);
      Array out(dtype, {plan.num_slots(), N}, 2);
      const GroupedGemmArgs args{.x = x,
                                 .weight = weight.matrices(),
                                 .bias = bias,
                                 .expert_offsets = plan.expert_offsets,
                                 .token_indices = plan.token_indices,
                                 .out = out};
      for_each_isa(
          {&out}, [&](Execution exec) { grouped_gemm(args, exec); },
          [&] {
            for (int64_t e = 0; e < c.E; ++e) {
              for (int64_t s = plan.expert_offsets.id(e); s < plan.expert_offsets.id(e + 1); ++s) {
                const int64_t block = f.group_size == 0 ? c.H : std::max(f.group_size, kActivationBlock);
                const IntegerRow row(x, plan.token_indices.id(s), block);
                for (int64_t n = 0; n < N; ++n) {
                  double sum = 0.0, size = 0.0;
                  for (int64_t k = 0; k < c.H; ++k) {
                    const double a = row(k), w = weight.scale(e, n, k);
                    sum += a * w * (weight.q(e, n, k) - weight.zero(e, n, k));
                    size += std::abs(a * w) * (weight.q(e, n, k) + weight.zero(e, n, k));
                  }
                  const double wanted = sum + bias(e, n);
                  const auto num_terms = static_cast<double>(2 * (weight.groups + std::ssize(row.scales)) + 5);
                  const double bound = 2 * kUnit * num_terms * (size + std::abs(bias(e, n))) +
                                       std::ldexp(std::abs(wanted), -mantissa_bits(dtype)) + 1e-7;
                  CHECK(std::abs(out(s, n) - wanted) <= bound, "[", s, ", ", n, "] is ", out(s, n), ", not ", wanted);
                }
              }
            }
            for (int64_t s = plan.used(); s < plan.num_slots(); ++s) {
              for (int64_t n = 0; n < N; ++n) CHECK(out(s, n) == 0.0f, "a row past the last slot");
            }
          },
          Isas::kAll);

      // out = x · W, with W rounded to the dtype
      const Array grad = random_array(random, dtype, {plan.num_slots(), N}, 1.0, 1);
      Array flipped(dtype, {plan.num_slots(), c.H}, 1);
      const GroupedGemmArgs transposed{.x = grad,
                                       .weight = weight.matrices(),
                                       .expert_offsets = plan.expert_offsets,
                                       .out = flipped,
                                       .transposed = true};
      for_each_isa(
          {&flipped}, [&](Execution exec) { grouped_gemm(transposed, exec); },
          [&] {
            for (int64_t e = 0; e < c.E; ++e) {
              for (int64_t s = plan.expert_offsets.id(e); s < plan.expert_offsets.id(e + 1); ++s) {
                for (int64_t k = 0; k < c.H; ++k) {
                  double sum = 0.0, error = 0.0;
                  for (int64_t n = 0; n < N; ++n) {
                    const double w = weight.scale(e, n, k) * (weight.q(e, n, k) - weight.zero(e, n, k));
                    sum += grad(s, n) * w;
                    error += std::abs(grad(s, n) * w) * (std::ldexp(1.0, -mantissa_bits(dtype)) + 2 * N * kUnit);
                    error += std::abs(grad(s, n)) * std::ldexp(1.0, min_exponent(dtype) - mantissa_bits(dtype));
                  }
                  error += std::ldexp(std::abs(sum), -mantissa_bits(dtype)) + 1e-7;
                  CHECK(std::abs(flipped(s, k) - sum) <= error, "[", s, ", ", k, "] is ", flipped(s, k), ", not ", sum);
                }
              }
            }
          },
          Isas::kAll);
    }
  });
}

// The longest sums of the largest products, which overflow first: all values of weights and of activations are extremes.
TEST(the_largest_sums_are_exact) {
  Random random(9);
  constexpr int64_t kRows = 40, kColumns = 1000;  // sums below 2^24 are exact in float32
  for (const Format& f : {Format{8, 0, true}, Format{4, 0, true}, Format{4, 128, true}}) {
    Integers weight(random, f, 1, kRows, kColumns, 1);
    const auto fill = [](Array& array, int value) {
      std::fill_n(array.view().as<uint8_t>(), array.numel(), static_cast<uint8_t>(value));
    };
    fill(weight.values, 0xff);
    fill(weight.scales, 1);
    std::fill_n(weight.row_scales.view().as<float>(), weight.row_scales.numel(), 1.0f);
    const double value = f.bits == 8 ? 255 - 128 : 15 - 8;
    for (const int64_t T : {1, 2, 6, 7, 13}) {
      note = join("bits ", f.bits, " group ", f.group_size, " rows ", T);
      Array x(DType::kFloat32, {T, kColumns}), out(DType::kFloat32, {T, kRows}), expert_offsets(DType::kInt32, {2});
      for (int64_t t = 0; t < T; ++t)
        std::fill_n(&x.view().as<float>()[t * kColumns], kColumns, t % 2 == 0 ? 1.0f : -1.0f);
      expert_offsets.view().as<int32_t>()[0] = 0;
      expert_offsets.view().as<int32_t>()[1] = static_cast<int32_t>(T);
      const GroupedGemmArgs args{.x = x, .weight = weight.matrices(), .expert_offsets = expert_offsets, .out = out};
      for_each_isa(
          {&out}, [&](Execution exec) { grouped_gemm(args, exec); },
          [&] {
            for (int64_t t = 0; t < T; ++t) {
              const double wanted = value * kColumns * x(t, 0);
              for (int64_t n = 0; n < kRows; ++n) {
                CHECK(std::abs(out(t, n) - wanted) <= 10 * kUnit * std::abs(wanted), "[", t, ", ", n, "] is ",
                      out(t, n), ", not ", wanted);
              }
            }
          },
          Isas::kAll);
    }
  }
}

// The layer equals its stages, which have their own tests: the same h bit by bit, also if the weights are read in other ways,
// and the sum of the choices.
TEST(moe_forward_is_its_stages) {
  const cpu::Reads before = cpu::fastest_reads();
  Random random(8);
  for_each_case([&](const Case& c) {
    const std::string name = note;
    const Array ids = make_ids(random, c);
    const PlanArrays plan = reference_plan(ids, c.E);
    const Array topk_weights = random_array(random, DType::kFloat32, {c.T, c.K});
    for (const Format& f : kFormats) {
      GluOptions o{.gated = random.below(3) > 0};
      o.interleaved = o.gated && random.below(2) > 0;
      const int64_t N = o.gated ? 2 * c.I : c.I;
      note = name + join(" bits ", f.bits, " gated ", o.gated, " interleaved ", o.interleaved);
      const Integers gate_up(random, f, c.E, N, c.H, o.gated && !o.interleaved ? 2 : 1),
          down(random, f, c.E, c.H, c.I, 1);
      const Array x = random_array(random, DType::kFloat32, {c.T, c.H}, 1.0, 1);
      const Array gate_up_bias = random_array(random, DType::kFloat32, {c.E, N}, 1.0, 2);
      const Array down_bias = random_array(random, DType::kFloat32, {c.E, c.H}, 1.0, 3);
      Array y(DType::kFloat32, {c.T, c.H}, 1), h(DType::kFloat32, {plan.num_slots(), N}, 2);
      const MoeForwardArgs args{.x = x,
                                .weights = {.gate_up_proj = gate_up.matrices(),
                                            .down_proj = down.matrices(),
                                            .gate_up_bias = gate_up_bias,
                                            .down_bias = down_bias},
                                .topk_ids = ids,
                                .topk_weights = topk_weights,
                                .options = o,
                                .y = y,
                                .h = h};
      for_each_isa(
          {&y, &h},
          [&](Execution exec) {
            cpu::set_fastest_reads(cpu::Reads::kStreams);
            moe_forward(args, exec);
          },
          [&] {
            cpu::set_fastest_reads(cpu::Reads::kEveryLine);
            Array stage_h(DType::kFloat32, {plan.num_slots(), N}), a(DType::kFloat32, {plan.num_slots(), c.I});
            Array rows(DType::kFloat32, {plan.num_slots(), c.H});
            grouped_gemm({.x = x,
                          .weight = gate_up.matrices(),
                          .bias = gate_up_bias,
                          .expert_offsets = plan.expert_offsets,
                          .token_indices = plan.token_indices,
                          .out = stage_h});
            CHECK(same_bits(stage_h, h), "h");
            glu({.h = stage_h, .options = o, .a = a});
            grouped_gemm({.x = a,
                          .weight = down.matrices(),
                          .bias = down_bias,
                          .expert_offsets = plan.expert_offsets,
                          .out = rows});
            for (int64_t t = 0; t < c.T; ++t) {
              for (int64_t n = 0; n < c.H; ++n) {
                double sum = 0.0, size = 0.0;
                for (int64_t k = 0; k < c.K; ++k) {
                  if (ids.id(t, k) < 0) continue;
                  const double term = static_cast<double>(topk_weights(t, k)) * rows(plan.slot_indices.id(t, k), n);
                  sum += term;
                  size += std::abs(term);
                }
                CHECK(std::abs(y(t, n) - sum) <= 2 * kUnit * static_cast<double>(c.K + 1) * size, "y[", t, ", ", n,
                      "] is ", y(t, n), ", not ", sum);
              }
            }
          },
          Isas::kAll);
    }
  });
  cpu::set_fastest_reads(before);
}

}  // namespace
}  // namespace switchgear::test
