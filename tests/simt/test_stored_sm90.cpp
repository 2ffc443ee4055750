// SPDX-License-Identifier: BSD-3-Clause
// Products of stored weights on wgmma (stored_sm90.cuh): every format, tile and epilogue, and what is left to sm_80's kernels.
#include <span>

#include "stored_check.h"

namespace switchgear::test {
namespace {

// Sizes that end inside tiles, blocks, stages, steps and groups; empty experts; rings that wrap; groups longer than a stage.
constexpr StoredCase kCases[] = {
    {{"one row", 1, 8, 8, 1, 1}, 1, 0, false},
    {{"up to 16 rows", 19, 200, 80, 3, 2}, 2, 32, true},
    {{"up to 16 rows, a ring that wraps", 5, 1160, 40, 2, 1}, 1, 0, false},
    {{"up to 64 rows", 70, 136, 136, 2, 1, Ids::kDuplicates}, 1, 128, true},
    {{"up to 64 rows, padded parts", 34, 80, 208, 1, 1}, 2, 0, false},
    {{"128 rows, several tiles", 300, 72, 264, 2, 1, Ids::kLastExpert}, 1, 32, true},
    {{"128 rows, a ring that wraps", 70, 712, 24, 1, 1, Ids::kEmptySlots}, 1, 64, false},
    {{"no rows", 3, 40, 24, 4, 2, Ids::kNone}, 1, 32, false},
};

// In each order, for planted mistakes.
constexpr StoredCase kEdges[] = {
    {{"a ring that wraps", 3, 840, 24, 1, 1}, 1, 32, true},
    {{"two tiles of columns, parts", 20, 104, 272, 2, 2, Ids::kEmptySlots}, 2, 64, true},
};

template <typename Body>
void with_hopper(const char* what, bool takes, Body&& body) {
  simt::device() = simt::sm_90();
  const uint64_t before = simt::statistics().wgmma;
  body();
  CHECK((simt::statistics().wgmma > before) == takes, what, ": wgmma is ", takes ? "not used" : "used");
  simt::device() = simt::sm_90();
}

void for_each_case(std::span<const StoredCase> cases, bool all) {
  int variant = 0;
  for (const StoredCase& c : cases) {
    for (const Format format : kWgmmaFormats) {
      for (const Precision& precision : {kPrecisions[2], kPrecisions[3]}) {
        const StoredProblem p{
            c, format, precision, false, variant % 2 == 0, variant % 3 != 0, variant % 5 == 1, Rows::kAligned};
        note = join(c.c.name, " ", name_of(format), " ", precision.name, p.gather ? " gathered" : "",
                    p.permuted ? " permuted" : "");
        if (!takes_variant(variant++) && !all) continue;
        with_hopper(c.c.name, c.c.ids != Ids::kNone, [&] {
          simt::device().multiprocessors = variant % 3 == 0 ? 1 : 3;
          check_stored(p);
        });
      }
    }
    ++variant;
  }
}

TEST(stored_sm90_matches_float64) { for_each_case(kCases, false); }
TEST(stored_sm90_at_the_edges) { for_each_case(kEdges, true); }

// What the kernel does not take has the same results.
TEST(stored_sm90_leaves_the_rest_to_sm80) {
  const auto check = [](StoredCase c, Format format, Precision precision, bool transposed, Rows rows = Rows::kAligned) {
    with_hopper(c.c.name, false, [&] { check_stored({c, format, precision, transposed, true, false, false, rows}); });
  };
  const StoredCase even{{"even", 20, 64, 72, 2, 1}, 1, 32, false};
  check({{"odd depth", 20, 67, 64, 2, 1}, 1, 32, false}, Format::kInt4, kPrecisions[2], false);
  check({{"odd columns", 20, 64, 43, 2, 1}, 1, 32, false}, Format::kFp8, kPrecisions[3], false);
  check({{"half groups", 20, 64, 72, 2, 1}, 1, 16, true}, Format::kInt8, kPrecisions[2], false);
  check(even, Format::kMxfp4, kPrecisions[2], false, Rows::kAnywhere);
  check(even, Format::kNf4, kPrecisions[0], false);
  check(even, Format::kInt4, kPrecisions[0], false);
}

// Bits depend neither on the number of rows nor on the kernel: sm_80's adds in the same order.
TEST(stored_sm90_has_the_bits_of_sm80) {
  int variant = 0;
  for (const Format format : kWgmmaFormats) {
    const Precision& precision = kPrecisions[2 + variant % 2];
    if (!takes_variant(variant++)) continue;
    Random random(5);
    const int64_t N = 136, C = 328;
    const StoredWeights weights(random, {format, 1, N, C, 1, group_of(format, 32), false, false});
    const Array all = random_rows(Rows::kAligned, random, precision.dtype, 140, C);
    Array first;
    for (const int64_t S : {-140, 140, 65, 17, 16, 1}) {  // negative: on sm_80
      const int64_t rows = std::abs(S);
      note = join(name_of(format), " ", precision.name, " ", S, " rows");
      simt::device() = S < 0 ? simt::sm_80() : simt::sm_90();
      TensorView x = all;
      x.shape[0] = rows;
      Array offsets(DType::kInt32, {2}), got = make_rows(Rows::kAligned, precision.dtype, rows, N);
      offsets.fill([&](int64_t i) { return i * rows; });
      OpMemory memory(0xff);
      cuda::grouped_gemm({.x = x, .weight = weights.weight(), .expert_offsets = offsets, .out = got},
                         memory.execution());
      if (!first.defined()) first = got;
      for (int64_t s = 0; s < rows; ++s) {
        for (int64_t n = 0; n < N; ++n) CHECK(got(s, n) == first(s, n), "row ", s, " column ", n);
      }
    }
  }
  simt::device() = simt::sm_90();
}

// Whole layers: gates, biases, h, adapters. What sm_80's kernels store. Of relu, since sm_90's other gates round in their own way.
struct LayerCase {
  int64_t T, E, H, I, rank;
  bool gated, interleaved;
};
constexpr LayerCase kLayers[] = {
    {12, 2, 72, 40, 0, true, false},  {30, 2, 136, 72, 16, true, false}, {20, 1, 72, 136, 8, true, true},
    {9, 3, 40, 88, 72, false, false}, {150, 2, 72, 40, 16, true, false}, {140, 1, 40, 72, 0, true, true},
};

struct LayerOutputs {
  Array y, h;
};

LayerOutputs run_layer(const LayerCase& c, Format format, const Precision& precision) {
  Random random(8);
  const DType dtype = precision.dtype;
  const int64_t N = c.gated ? 2 * c.I : c.I, S = 2 * c.T;
  const Case shape{"", c.T, c.H, c.I, c.E, 2, Ids::kDuplicates};
  const Array ids = make_ids(random, shape), topk_weights = random_array(random, DType::kFloat32, {c.T, 2});
  const Array x = random_rows(Rows::kAligned, random, dtype, c.T, c.H);
  const int64_t parts = c.gated && !c.interleaved ? 2 : 1;
  const StoredWeights gate_up(random, {format, c.E, N, c.H, parts, group_of(format, 64), false, false});
  const StoredWeights down(random, {format, c.E, c.H, c.I, 1, group_of(format, 32), false, false});
  const Array gate_up_bias = random_rows(Rows::kAligned, random, dtype, c.E, N),
              down_bias = random_rows(Rows::kAligned, random, dtype, c.E, c.H);
  Array scales(DType::kFloat32, {c.E});
  scales.fill([](int64_t e) { return 0.5 + static_cast<double>(e); });
  const auto matrix = [&](int64_t rows, int64_t columns) {
    Array data(dtype, {c.E, rows, columns}, 0, 16 / size_of(dtype));
    data.fill([&](int64_t) { return 0.1 * random.normal(); });
    return data;
  };
  const Array a1 = matrix(c.rank, c.H), b1 = matrix(N, c.rank), a2 = matrix(c.rank, c.I), b2 = matrix(c.H, c.rank);
  LayerOutputs out{make_rows(Rows::kAligned, dtype, c.T, c.H), make_rows(Rows::kAligned, dtype, S, N)};
  MoeForwardArgs args{.x = x,
                      .weights = {.gate_up_proj = gate_up.weight(),
                                  .down_proj = down.weight(),
                                  .gate_up_bias = gate_up_bias,
                                  .down_bias = down_bias},
                      .topk_ids = ids,
                      .topk_weights = topk_weights,
                      .options = {.activation = Activation::kRelu, .gated = c.gated, .interleaved = c.interleaved},
                      .y = out.y,
                      .h = out.h};
  if (c.rank > 0) {
    args.weights.gate_up_adapter = {.a = a1, .b = b1, .scales = scales};
    args.weights.down_adapter = {.a = a2, .b = b2, .scales = scales};
  }
  OpMemory memory(0xff);
  cuda::moe_forward(args, memory.execution());
  return out;
}

void check_layer(const LayerCase& c, Format format, const Precision& precision, int multiprocessors) {
  note = join(name_of(format), " ", precision.name, " T ", c.T, " rank ", c.rank, c.interleaved ? " interleaved" : "",
              ", multiprocessors ", multiprocessors);
  simt::device() = simt::sm_80();
  const LayerOutputs want = run_layer(c, format, precision);
  LayerOutputs got;
  with_hopper("layer", true, [&] {
    simt::device().multiprocessors = multiprocessors;
    got = run_layer(c, format, precision);
  });
  CHECK(same_bits(got.h, want.h), "h");
  CHECK(same_bits(got.y, want.y), "y");
}

TEST(stored_sm90_layers_have_the_bits_of_sm80) {
  int variant = 0;
  for (const LayerCase& c : kLayers) {
    for (const Format format : kWgmmaFormats) {
      const Precision& precision = kPrecisions[2 + variant % 2];
      if (takes_variant(variant++)) check_layer(c, format, precision, variant % 2 == 0 ? 1 : 100);
    }
    ++variant;
  }
}

// In each order, for planted mistakes: a block has several tiles, whose stages wrap around the ring.
TEST(stored_sm90_adapters_at_the_edges) { check_layer(kLayers[1], Format::kInt4, kPrecisions[2], 1); }

// Offsets, indices, slots and records are unchecked values in device memory: for any values, no access is out of range.
TEST(stored_sm90_survives_any_memory) {
  for (int64_t seed = 0; seed < 12; ++seed) {
    if (!takes_variant(seed)) continue;
    Random random(static_cast<uint64_t>(seed));
    const Format format = kWgmmaFormats[static_cast<size_t>(seed) % 6];
    note = join("seed ", seed, " ", name_of(format));
    const int64_t T = 9, S = seed % 4 == 0 ? 300 : 20, E = 3, N = 24, C = 40;
    const auto wild = [&](int64_t n) {
      return random.below(3) == 0 ? static_cast<int32_t>(random.bits()) : static_cast<int32_t>(random.below(n + 1));
    };
    const Array offsets = wild_offsets(E, [&] { return wild(S); });
    Array indices(DType::kInt32, {S}), slots(DType::kInt32, {E}), records(DType::kInt32, {E + 1, 2});
    indices.fill([&](int64_t) { return wild(T); });
    slots.fill([&](int64_t) { return wild(E); });
    records.fill([&](int64_t) { return wild(4); });
    const StoredWeights weights(random, {format, E, N, C, 1, group_of(format, 32), false, true});
    Weight weight = weights.weight();
    weight.slots = slots;
    if (format == Format::kGroups) weight.records = records;
    const Array x = random_rows(Rows::kAligned, random, DType::kBFloat16, T, C);
    Array got = make_rows(Rows::kAligned, DType::kBFloat16, S, N);
    simt::device() = simt::sm_90();
    OpMemory memory(0xff);
    cuda::grouped_gemm({.x = x, .weight = weight, .expert_offsets = offsets, .token_indices = indices, .out = got},
                       memory.execution());
  }
}

}  // namespace
}  // namespace switchgear::test
