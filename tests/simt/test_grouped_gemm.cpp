// SPDX-License-Identifier: BSD-3-Clause
#include "gemm_problem.h"

namespace switchgear::test {
namespace {

// Cases that tiles distinguish: all kinds of rows per expert, sizes below, at and above a tile, a ring that wraps.
constexpr Case kTileCases[] = {
    {"16 rows", 30, 72, 136, 2, 1},
    {"16 rows, one tile each", 16, 64, 128, 1, 1},
    {"64 rows", 70, 200, 130, 2, 2, Ids::kDuplicates},
    {"64 rows, a whole tile", 64, 32, 128, 1, 1},
    {"128 rows", 129, 80, 129, 1, 1},
    {"128 rows, several bands", 1300, 8, 264, 1, 1},
    {"128 rows, some empty", 220, 24, 40, 2, 1, Ids::kLastExpert},
    {"128 rows, holes", 150, 40, 72, 2, 3, Ids::kEmptySlots},
};

// Each case once with every precision and storage; the other options alternate, and so do devices with much and little shared
// memory.
template <typename Body>
void for_each_problem(Body&& body) {
  int variant = 0;
  const auto run = [&](const Case& c) {
    for (const Precision& precision : kPrecisions) {
      for (const Storage storage : {Storage::kPacked, Storage::kTransposed, Storage::kSeparate}) {
        const GemmProblem p{c,
                            precision,
                            storage,
                            variant % 4 == 0 ? Rows::kAnywhere : Rows::kAligned,
                            variant % 2 == 0,
                            variant % 5 < 3};
        simt::device() = variant % 2 == 0 ? simt::sm_86() : simt::sm_80();
        note = join(describe(p), " on sm_8", simt::device().minor);
        if (takes_variant(variant++)) body(p);
      }
    }
    ++variant;
  };
  for (const Case& c : kCases) run(c);
  for (const Case& c : kTileCases) run(c);
}

TEST(grouped_gemm_matches_reference) { for_each_problem(check_forward); }

TEST(grouped_gemm_wgrad_matches_reference) {
  for_each_problem([](const GemmProblem& p) {
    if (p.storage != Storage::kSeparate) check_wgrad(p);
  });
}

TEST(grouped_gemm_reads_shared_memory_without_conflicts) {
  simt::device() = simt::sm_80();
  const auto before = simt::statistics().bank_conflicts;
  const auto matrices = simt::statistics().ldmatrix;
  for (const Case& c : kTileCases) {
    for (const Storage storage : {Storage::kPacked, Storage::kTransposed}) {
      note = join(c.name, " ", kStorageNames[static_cast<int>(storage)]);
      check_forward({c, kPrecisions[2], storage, Rows::kAligned, true, false});
    }
  }
  check_wgrad({kTileCases[4], kPrecisions[2], Storage::kPacked, Rows::kAligned, true, false});
  CHECK(simt::statistics().ldmatrix > matrices);
  CHECK(simt::statistics().bank_conflicts == before, simt::statistics().bank_conflicts - before, " extra cycles");
}

// While a block is in its epilogue, another one on the multiprocessor multiplies: also where a block may have 99 KB, and all of
// them 100.
TEST(grouped_gemm_has_two_blocks_per_multiprocessor) {
  for (const simt::Device& device : {simt::sm_80(), simt::sm_86()}) {
    for (const Precision& precision : kPrecisions) {
      simt::device() = device;
      simt::device().multiprocessors = 1;
      const uint64_t before = simt::statistics().blocks, launches = simt::statistics().launches;
      note = join(precision.name, " on sm_8", device.minor);
      Random random(5);
      const int64_t S = 260, N = 260, C = 16;
      const Weights weights(random, Rows::kAligned, precision.dtype, 1, N, C, Storage::kPacked);
      const Array x = random_rows(Rows::kAligned, random, precision.dtype, S, C);
      Array offsets(DType::kInt32, {2}), got = make_rows(Rows::kAligned, precision.dtype, S, N);
      offsets.fill([&](int64_t i) { return i * S; });
      OpMemory memory(0xff);
      Execution exec = memory.execution();
      exec.allow_tf32 = precision.tf32;
      cuda::grouped_gemm({.x = x, .weight = weights.matrices(), .expert_offsets = offsets, .out = got}, exec);
      CHECK(simt::statistics().launches == launches + 1);
      CHECK(simt::statistics().blocks == before + 2, simt::statistics().blocks - before, " blocks");
    }
  }
  simt::device() = simt::sm_80();
}

// A row's bits depend neither on the neighbouring rows nor on the kernel picked for their number.
TEST(grouped_gemm_rows_do_not_depend_on_their_number) {
  simt::device() = simt::sm_80();
  const int64_t N = 136, C = 328;
  int variant = 0;
  for (const Precision& precision : kPrecisions) {
    for (const Storage storage : {Storage::kPacked, Storage::kTransposed}) {
      if (!takes_variant(variant++)) continue;
      Random random(5);
      const Weights weights(random, Rows::kAligned, precision.dtype, 1, N, C, storage);
      const Array all = random_rows(Rows::kAligned, random, precision.dtype, 200, C);
      Array first;
      for (const int64_t S : {200, 90, 40, 17, 16, 3, 1}) {
        note = join(precision.name, " ", kStorageNames[static_cast<int>(storage)], " ", S, " rows");
        TensorView x = all;
        x.shape[0] = S;
        Array offsets(DType::kInt32, {2});
        offsets.fill([&](int64_t i) { return i * S; });
        Array got = make_rows(Rows::kAligned, precision.dtype, S, N);
        OpMemory memory(0xff);
        Execution exec = memory.execution();
        exec.allow_tf32 = precision.tf32;
        cuda::grouped_gemm({.x = x, .weight = weights.matrices(), .expert_offsets = offsets, .out = got}, exec);
        if (!first.defined()) first = got;
        for (int64_t s = 0; s < S; ++s) {
          for (int64_t n = 0; n < N; ++n) CHECK(got(s, n) == first(s, n), "row ", s, " column ", n);
        }
      }
    }
  }
}

// Offsets and indices are unchecked values in device memory: for any values, no access is out of range.
TEST(grouped_gemm_survives_any_plan) {
  simt::device() = simt::sm_80();
  for (int64_t seed = 0; seed < 30; ++seed) {
    note = join("seed ", seed);
    Random random(static_cast<uint64_t>(seed));
    const int64_t T = 9, S = 20, E = 3, N = 24, C = 40;
    const auto wild = [&](int64_t n) {
      return random.below(3) == 0 ? static_cast<int32_t>(random.bits()) : static_cast<int32_t>(random.below(n + 1));
    };
    const Array offsets = wild_offsets(E, [&] { return wild(S); });
    Array indices(DType::kInt32, {S});
    indices.fill([&](int64_t) { return wild(T); });
    const Array x = random_rows(Rows::kAligned, random, DType::kBFloat16, T, C);
    const Array grad = random_rows(Rows::kAligned, random, DType::kBFloat16, S, N);
    const Weights weights(random, Rows::kAligned, DType::kBFloat16, E, N, C, Storage::kPacked);
    Array got = make_rows(Rows::kAligned, DType::kBFloat16, S, N), gradient(DType::kBFloat16, {E, N, C});
    OpMemory memory(0xff);
    cuda::grouped_gemm(
        {.x = x, .weight = weights.matrices(), .expert_offsets = offsets, .token_indices = indices, .out = got},
        memory.execution());
    cuda::grouped_gemm_wgrad(
        {.grad_out = grad, .x = x, .expert_offsets = offsets, .token_indices = indices, .grad_weight = gradient},
        memory.execution());
    for (int64_t i = 0; i < E * N * C; ++i) CHECK(std::isfinite(gradient(i / (N * C), i / C % N, i % C)));
    Array experts(DType::kInt32, {E});
    experts.fill([&](int64_t) { return wild(E); });
    cuda::grouped_gemm_wgrad({.grad_out = grad,
                              .x = x,
                              .expert_offsets = offsets,
                              .token_indices = indices,
                              .experts = experts,
                              .grad_weight = gradient},
                             memory.execution());
    for (int64_t i = 0; i < E * N * C; ++i) CHECK(std::isfinite(gradient(i / (N * C), i / C % N, i % C)));
  }
}

}  // namespace
}  // namespace switchgear::test
