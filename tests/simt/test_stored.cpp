// SPDX-License-Identifier: BSD-3-Clause
// Products with weights of 1 to 8 bits, in both directions, against float64.
#include <span>

#include "cuda/stored.h"
#include "stored_check.h"

namespace switchgear::test {
namespace {

// Rows below and above a tile's, empty experts, sizes that end inside blocks, steps, chunks and groups, several groups,
// parts that end inside a block.
constexpr StoredCase kStoredCases[] = {
    {{"one of everything", 1, 1, 1, 1, 1}, 1, 0, false},
    {{"few rows", 19, 200, 72, 3, 2}, 2, 32, true},
    {{"few rows, deep", 5, 1100, 40, 2, 1}, 1, 0, false},
    {{"a whole tile", 16, 64, 128, 1, 1}, 1, 64, false},
    {{"64 rows", 70, 136, 130, 2, 2, Ids::kDuplicates}, 1, 128, true},
    {{"64 rows, padded parts", 90, 79, 72, 1, 1}, 2, 0, false},
    {{"half groups", 40, 75, 33, 1, 1, Ids::kEmptySlots}, 1, 16, true},
    {{"no rows", 3, 40, 24, 4, 2, Ids::kNone}, 1, 32, false},
    {{"several tiles of columns", 33, 100, 300, 2, 1, Ids::kLastExpert}, 2, 64, true},
};

// The same in small, for planted mistakes: rings that wrap, groups, half groups, blocks of activations, padded parts, both tiles.
constexpr StoredCase kEdgeCases[] = {
    {{"deep", 3, 420, 20, 1, 1}, 1, 32, false},
    {{"padded parts", 6, 100, 24, 2, 2}, 2, 32, true},
    {{"64 rows", 40, 170, 36, 1, 1, Ids::kEmptySlots}, 2, 64, true},
    {{"half groups", 20, 50, 18, 1, 1}, 1, 16, true},
};

// Each case with every format, precision and direction; the rest alternates. `all`: in each order of threads.
template <typename Body>
void for_each_stored(std::span<const StoredCase> cases, bool all, Body&& body) {
  int variant = 0;
  for (const StoredCase& c : cases) {
    for (const Format format : kStoredFormats) {
      for (const Precision& precision : kPrecisions) {
        for (const bool transposed : {false, true}) {
          const StoredProblem p{
              c, format, precision, transposed, variant % 2 == 0, variant % 3 != 0 && !transposed, variant % 5 == 1};
          note = join(c.c.name, " ", name_of(format), " ", precision.name, transposed ? " transposed" : "",
                      p.gather ? " gathered" : "", p.permuted ? " permuted" : "");
          simt::device() = variant % 4 < 2 ? simt::sm_86() : simt::sm_80();
          if (takes_variant(variant++) || all) body(p);
        }
      }
    }
    ++variant;  // the next case's variants run in other orders
  }
}

TEST(stored_matches_float64) { for_each_stored(kStoredCases, false, check_stored); }
TEST(stored_at_the_edges) { for_each_stored(kEdgeCases, true, check_stored); }

// Each code and each scale: products with the identity decode exactly.
TEST(stored_decodes_exactly) {
  simt::device() = simt::sm_80();
  int variant = 0;
  for (const Format format : {Format::kFp8, Format::kMxfp4, Format::kNf4, Format::kGroups, Format::kNvfp4}) {
    for (const Precision& precision : kPrecisions) {
      if (precision.tf32 || !takes_variant(variant++)) continue;
      note = join(name_of(format), " ", precision.name);
      Random random(3);
      const int64_t N = 33, C = 64;
      const StoredWeights weights(random, {format, 4, N, C, 1, group_of(format, 64), false, false});
      Array x(precision.dtype, {4 * C, C}), offsets(DType::kInt32, {5}), got(precision.dtype, {4 * C, N});
      x.fill([&](int64_t i) { return i / C % C == i % C ? 1.0 : 0.0; });
      offsets.fill([&](int64_t e) { return e * C; });
      OpMemory memory(0xff);
      cuda::grouped_gemm({.x = x, .weight = weights.weight(), .expert_offsets = offsets, .out = got},
                         memory.execution());
      for (int64_t e = 0; e < 4; ++e) {
        for (int64_t k = 0; k < C; ++k) {
          for (int64_t n = 0; n < N; ++n) {
            const float value = nearest(weights.value(e, n, k), precision.dtype),
                        scale = weights.scale(e, n, k / weights.group_size()) * weights.row_scale(e, n);
            CHECK(got(e * C + k, n) == nearest(value * scale, precision.dtype), "expert ", e, " [", n, ", ", k, ']');
          }
        }
      }
    }
  }
}

// A row's bits depend neither on the neighbouring rows nor on the tile picked for their number.
TEST(stored_rows_do_not_depend_on_their_number) {
  simt::device() = simt::sm_80();
  int variant = 0;
  for (const Format format : kStoredFormats) {
    for (const bool transposed : {false, true}) {
      const Precision& precision = kPrecisions[2 + variant % 2];
      if (!takes_variant(variant++)) continue;
      Random random(5);
      const int64_t N = 136, C = 328, depth = transposed ? N : C, width = transposed ? C : N;
      const StoredWeights weights(random, {format, 1, N, C, 1, group_of(format, 32), false, false});
      const Array all = random_rows(Rows::kAligned, random, precision.dtype, 200, depth);
      Array first;
      for (const int64_t S : {200, 65, 17, 16, 1}) {
        note = join(name_of(format), " ", precision.name, transposed ? " transposed " : " ", S, " rows");
        TensorView x = all;
        x.shape[0] = S;
        Array offsets(DType::kInt32, {2}), got = make_rows(Rows::kAligned, precision.dtype, S, width);
        offsets.fill([&](int64_t i) { return i * S; });
        OpMemory memory(0xff);
        cuda::grouped_gemm(
            {.x = x, .weight = weights.weight(), .expert_offsets = offsets, .out = got, .transposed = transposed},
            memory.execution());
        if (!first.defined()) first = got;
        for (int64_t s = 0; s < S; ++s) {
          for (int64_t n = 0; n < width; ++n) CHECK(got(s, n) == first(s, n), "row ", s, " column ", n);
        }
      }
    }
  }
}

// Few tiles have twice the warps, with eight columns each, and the same bits; so has the adapter beside them.
TEST(stored_bits_do_not_depend_on_warps) {
  const int64_t S = 13, E = 2, N = 200, C = 150, rank = 24;
  for (const Format format : kStoredFormats) {
    for (const Precision& precision : kPrecisions) {
      if (precision.tf32 || (precision.dtype == DType::kFloat32 && !is_integer(format))) continue;
      note = join(name_of(format), " ", precision.name);
      Random random(5);
      const bool zeros = is_integer(format) || format == Format::kGroups;
      const StoredWeights weights(random, {format, E, N, C, 1, group_of(format, 16), zeros, true});
      const Array x = random_rows(Rows::kAligned, random, precision.dtype, S, C);
      const Array low_a = random_rows(Rows::kAligned, random, precision.dtype, S, rank);
      const Array low_b = random_rows(Rows::kAligned, random, precision.dtype, E * N, rank);
      Array offsets(DType::kInt32, {E + 1});
      offsets.fill([&](int64_t e) { return e == 1 ? 9 : e * S / E; });
      cuda::Gemm g{.dtype = precision.dtype,
                   .a = {x.view().data, x.view().stride[0], S},
                   .low = {.a = {low_a.view().data, low_a.view().stride[0], S},
                           .b = {.data = low_b.view().data,
                                 .expert_stride = N * low_b.view().stride[0],
                                 .n_stride = low_b.view().stride[0],
                                 .aligned = true},
                           .rank = rank},
                   .expert_offsets = offsets.view().as<const int32_t>(),
                   .num_experts = E,
                   .num_slots = S,
                   .n = N,
                   .c = C};
      uint64_t threads[2];
      Array got[2];
      for (const int few : {0, 1}) {
        simt::device() = simt::sm_80();
        simt::device().multiprocessors = 3 + few;  // four blocks on each, for 14 tiles of 32 columns
        got[few] = make_rows(Rows::kAligned, precision.dtype, S, N);
        g.out = got[few].view().data;
        g.out_stride = got[few].view().stride[0];
        const uint64_t before = simt::statistics().threads;
        cuda::Workspace sizes;
        const cuda::QuantizedRows layout(sizes, weights.weight(), S);
        OpMemory op_memory(0xff);
        const Execution execution = op_memory.execution();
        cuda::Workspace memory(cuda::allocate(execution, sizes.size()));
        const cuda::QuantizedRows quantized(memory, weights.weight(), S);
        cuda::forward_gemm(g, "weight", weights.weight(), quantized, execution.stream);
        threads[few] = simt::statistics().threads - before;
      }
      CHECK(threads[1] != threads[0], "which kernel runs");
      CHECK(same_bits(got[0], got[1]));
    }
  }
  simt::device() = simt::sm_80();
}

TEST(stored_reads_rows_without_conflicts) {
  simt::device() = simt::sm_80();
  const auto before = simt::statistics().bank_conflicts;
  const auto matrices = simt::statistics().ldmatrix;
  for (const Format format : kStoredFormats) {
    for (const bool transposed : {false, true})
      check_stored({kStoredCases[4], format, kPrecisions[2], transposed, true, false, false});
  }
  CHECK(simt::statistics().ldmatrix > matrices);
  CHECK(simt::statistics().bank_conflicts == before, simt::statistics().bank_conflicts - before, " extra cycles");
}

TEST(stored_leaves_reserved_multiprocessors) {
  simt::device() = simt::sm_80();
  Random random(3);
  const int64_t S = 300, E = 2, N = 200, C = 64;
  const auto blocks_of = [&](const Weight& weight, bool transposed, int reserved) {
    const Array x = random_rows(Rows::kAligned, random, DType::kBFloat16, S, transposed ? N : C);
    Array offsets(DType::kInt32, {E + 1});
    offsets.fill([&](int64_t e) { return e * S / E; });
    Array got = make_rows(Rows::kAligned, DType::kBFloat16, S, transposed ? C : N);
    OpMemory memory(0xff);
    Execution execution = memory.execution();
    execution.reserved_multiprocessors = reserved;
    const uint64_t before = simt::statistics().blocks;
    cuda::grouped_gemm({.x = x, .weight = weight, .expert_offsets = offsets, .out = got, .transposed = transposed},
                       execution);
    return simt::statistics().blocks - before;
  };
  const StoredWeights weights(random, {Format::kMxfp4, E, N, C, 1, group_of(Format::kMxfp4, 32), false, false});
  for (const bool transposed : {false, true}) {
    simt::device().multiprocessors = 1;
    const uint64_t of_one = blocks_of(weights.weight(), transposed, 0);
    simt::device().multiprocessors = 4;
    CHECK(blocks_of(weights.weight(), transposed, 0) > of_one);
    CHECK(blocks_of(weights.weight(), transposed, 3) == of_one);
  }
  simt::device() = simt::sm_80();
}

// Offsets, indices, slots and records are unchecked values in device memory: for any values, no access is out of range.
TEST(stored_survives_any_memory) {
  simt::device() = simt::sm_80();
  for (int64_t seed = 0; seed < 12; ++seed) {
    Random random(static_cast<uint64_t>(seed));
    const Format format = kStoredFormats[static_cast<size_t>(seed) % std::size(kStoredFormats)];
    note = join("seed ", seed, " ", name_of(format));
    const int64_t T = 9, S = 20, E = 3, N = 24, C = 40;
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
    for (const bool transposed : {false, true}) {
      const Array x = random_rows(Rows::kAligned, random, DType::kBFloat16, T, transposed ? N : C);
      Array got = make_rows(Rows::kAligned, DType::kBFloat16, S, transposed ? C : N);
      OpMemory memory(0xff);
      cuda::grouped_gemm({.x = x,
                          .weight = weight,
                          .expert_offsets = offsets,
                          .token_indices = indices,
                          .out = got,
                          .transposed = transposed},
                         memory.execution());
    }
  }
}

TEST(stored_at_odd_addresses_is_refused) {
  simt::device() = simt::sm_80();
  Random random(1);
  const StoredWeights weights(random, {Format::kFp8, 1, 16, 32, 1, 32, false, false});
  Weight weight = weights.weight();
  weight.scales.data = static_cast<char*>(weight.scales.data) + 4;
  const Array x = random_rows(Rows::kAligned, random, DType::kBFloat16, 1, 32);
  Array offsets(DType::kInt32, {2}), got = make_rows(Rows::kAligned, DType::kBFloat16, 1, 16);
  offsets.fill([](int64_t i) { return i; });
  OpMemory memory(0xff);
  std::string message;
  try {
    cuda::grouped_gemm({.x = x, .weight = weight, .expert_offsets = offsets, .out = got}, memory.execution());
  } catch (const ValueError& error) {
    message = error.what();
  }
  CHECK(message.starts_with("weight: expected stored weights at multiples of 16 bytes on a CUDA device, got"), message);
}

}  // namespace
}  // namespace switchgear::test
