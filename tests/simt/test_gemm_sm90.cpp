// SPDX-License-Identifier: BSD-3-Clause
// The grouped GEMMs of gemm_sm90.cuh: which tile is picked, every tile in every layout, and what is left to sm_80's kernels.
#include "api.h"
#include "gemm_problem.h"
#include "gemm_sm90.h"

namespace switchgear::test {
namespace {

using cuda::Epilogue;
using cuda::Gemm;
using cuda::sm90::pick_tile;

// ---- picking a tile -------------------------------------------------------------------------------------------------------

// The row of the table with n, in clusters of this size.
constexpr int row_of(int n, int cluster) {
  int i = 0;
  while (cuda::sm90::kTiles[i].n != n || cuda::sm90::kTiles[i].cluster != cluster) ++i;
  return i;
}
constexpr int kFewRows16 = row_of(16, 1), kFewRows64 = row_of(64, 1), kRows128 = row_of(128, 1),
              kRows192 = row_of(192, 1);
constexpr int kPairs128 = row_of(128, 2), kPairs192 = row_of(192, 2), kPairs256 = row_of(256, 2);

Gemm gemm_of(int64_t num_slots, int64_t num_experts, int64_t n, Epilogue epilogue = Epilogue::kStore) {
  Gemm g{.num_experts = num_experts, .num_slots = num_slots, .n = n, .c = 64, .epilogue = epilogue};
  g.b.n_stride = 64;
  g.b.k_stride = 1;
  return g;
}

TEST(sm90_tiles_follow_the_rows_of_an_expert) {
  CHECK(pick_tile(gemm_of(1, 1, 256)) == kFewRows16);
  CHECK(pick_tile(gemm_of(16, 1, 256)) == kFewRows16);
  CHECK(pick_tile(gemm_of(17, 1, 256)) == kFewRows64);
  CHECK(pick_tile(gemm_of(64, 1, 256)) == kFewRows64);
  CHECK(pick_tile(gemm_of(65, 1, 256)) == kRows128);
  CHECK(pick_tile(gemm_of(8 * 64, 8, 256)) == kFewRows64);
  CHECK(pick_tile(gemm_of(8 * 64 + 1, 8, 256)) == kRows128);
  CHECK(pick_tile(gemm_of(8 * 255, 8, 1536)) == kRows192);
  CHECK(pick_tile(gemm_of(8 * 256, 8, 1536)) == kPairs192);
  CHECK(pick_tile(gemm_of(int64_t{1} << 29, 128, 1536)) == kPairs192);
  // The backward epilogue has no registers left for other tiles.
  for (const int64_t slots : {1, 64, 255}) {
    CHECK(pick_tile(gemm_of(slots, 1, 1536, Epilogue::kGluBackward)) == kRows128);
  }
  CHECK(pick_tile(gemm_of(256, 1, 1536, Epilogue::kGluBackward)) == kPairs128);
}

// Cooperative tiles where the products take much longer than the epilogue.
TEST(sm90_tiles_follow_the_inner_dimension) {
  const auto pick = [](int64_t n, int64_t c, Epilogue epilogue) {
    Gemm g = gemm_of(100000, 10, n, epilogue);
    g.c = c;
    return pick_tile(g);
  };
  CHECK(pick(512, 1536, Epilogue::kGlu) == kPairs256);     // T 24576, H 1536, I 256: gate_up,
  CHECK(pick(1536, 256, Epilogue::kStore) == kPairs192);   // down
  CHECK(pick(1536, 512, Epilogue::kStore) == kPairs256);   // and grad_x
  CHECK(pick(2048, 4096, Epilogue::kGlu) == kPairs256);    // T 32768, H 4096, I 1024: gate_up,
  CHECK(pick(4096, 1024, Epilogue::kStore) == kPairs256);  // down
  CHECK(pick(4096, 2048, Epilogue::kStore) == kPairs256);  // and grad_x
  CHECK(pick(128, 4096, Epilogue::kStore) == kRows128);
}

TEST(sm90_weight_gradients_share_what_is_not_gathered) {
  const int32_t index = 0;
  const auto pick = [&](int64_t m, int64_t n, bool gather_a, bool gather_b) {
    cuda::Wgrad g{.num_experts = 8, .num_slots = 8 * 2048, .num_matrices = 8, .m = m, .n = n};
    g.a.indices = gather_a ? &index : nullptr;
    g.b.indices = gather_b ? &index : nullptr;
    return pick_tile(g);
  };
  CHECK(pick(2048, 4096, false, true) == kPairs256);  // grad_gate_up_proj
  CHECK(pick(4096, 1024, true, false) == kPairs256);  // grad_down_proj
  CHECK(pick(4096, 1024, true, true) != kPairs256);   // nothing to share
  CHECK(pick(128, 1024, true, false) != kPairs256);   // half of each pair would be empty
  CHECK(pick(1024, 256, false, true) != kPairs256);
}

TEST(sm90_tiles_are_wide_where_the_last_one_is_not_mostly_empty) {
  for (const int64_t n : {192, 320, 384, 576, 768, 1536, 2048, 4096}) {
    CHECK(pick_tile(gemm_of(250, 1, n)) == kRows192, "n ", n);
  }
  for (const int64_t n : {8, 64, 128, 200, 256}) {
    CHECK(pick_tile(gemm_of(250, 1, n)) == kRows128, "n ", n);
  }
  Gemm pairs = gemm_of(250, 1, 1536, Epilogue::kGlu);
  CHECK(pick_tile(pairs) == kRows192);
  std::swap(pairs.b.n_stride, pairs.b.k_stride);  // 96 columns of each are no whole number of blocks
  CHECK(pick_tile(pairs) == kRows128);
  pairs.options.interleaved = true;
  CHECK(pick_tile(pairs) == kRows192);
}

// ---- products -------------------------------------------------------------------------------------------------------------

uint64_t products_of_wgmma() { return simt::statistics().wgmma; }

// Runs with a number of multiprocessors that gives a block one tile or several.
template <typename Check>
void on_hopper(const GemmProblem& p, int multiprocessors, bool takes, Check&& check) {
  simt::device() = simt::sm_90();
  simt::device().multiprocessors = multiprocessors;
  note = join(describe(p), " on ", multiprocessors, " multiprocessors");
  const uint64_t before = products_of_wgmma();
  check(p);
  CHECK((products_of_wgmma() > before) == takes, "wgmma is ", takes ? "not used" : "used");
  simt::device() = simt::sm_90();
}

struct HopperCase {
  Case c;  // I is N, H is C
  bool has_products = true;
};
constexpr HopperCase kHopperCases[] = {
    {{"one row", 1, 8, 8, 1, 1}},
    {{"up to 16 rows", 25, 72, 136, 2, 1}},
    {{"up to 16 rows, most experts empty", 6, 64, 128, 40, 2}},
    {{"up to 16 rows, a ring that wraps", 16, 712, 136, 1, 1}},
    {{"up to 64 rows", 70, 200, 264, 2, 1, Ids::kDuplicates}},
    {{"up to 64 rows, all to one", 50, 40, 128, 3, 1, Ids::kOneExpert}},
    {{"128 columns", 129, 136, 136, 1, 1}},
    {{"128 columns, a ring that wraps", 66, 456, 128, 1, 1}},
    {{"128 columns, several tiles an expert", 300, 72, 256, 2, 1}},
    {{"128 columns, holes", 120, 64, 72, 2, 3, Ids::kEmptySlots}},
    {{"192 columns", 80, 136, 200, 1, 1}},
    {{"192 columns, some empty", 220, 8, 384, 3, 1, Ids::kLastExpert}},
    {{"a warp of experts, empty slots", 24, 40, 64, 32, 2, Ids::kEmptySlots}},
    {{"two warps of experts, empty slots", 20, 16, 64, 64, 2, Ids::kEmptySlots}},
    {{"nothing chosen", 11, 16, 24, 3, 2, Ids::kNone}, false},
    {{"no tokens", 0, 16, 8, 4, 2}, false},
};

template <typename Check>
void for_each_hopper_problem(Check&& check) {
  int variant = 0;
  for (const HopperCase& hopper : kHopperCases) {
    for (const Storage storage : {Storage::kPacked, Storage::kTransposed}) {
      for (const bool gather : {false, true}) {
        const GemmProblem p{hopper.c,        kPrecisions[2 + variant / 2 % 2], storage, Rows::kAligned, gather,
                            variant % 3 != 0};
        const int multiprocessors = variant % 3 == 0 ? 1 : 3;
        if (takes_variant(variant++)) on_hopper(p, multiprocessors, hopper.has_products, check);
      }
    }
    ++variant;
  }
}

TEST(sm90_grouped_gemm_matches_reference) { for_each_hopper_problem(check_forward); }
TEST(sm90_grouped_gemm_wgrad_matches_reference) { for_each_hopper_problem(check_wgrad); }

// The table of tiles is full.
TEST(sm90_has_tiles_for_1024_experts) {
  on_hopper({{"1024 experts", 40, 8, 16, 1024, 2, Ids::kEmptySlots},
             kPrecisions[2],
             Storage::kPacked,
             Rows::kAligned,
             true,
             false},
            5, true, check_forward);
}

// Enough rows per expert for pairs of blocks: ping-pong, and cooperative with deep inner dimensions. An odd number of row tiles,
// so that the last ones are paired with themselves: two columns of tiles, or only one.
TEST(sm90_pairs_match_reference) {
  const Case wide{"pairs, 192 columns", 560, 72, 384, 2, 1};
  const Case deep{"pairs, cooperative", 300, 264, 504, 1, 1}, narrow{"pairs, one column", 300, 504, 256, 1, 1};
  const auto picked = [](const Case& c) {
    Gemm g = gemm_of(c.T, c.E, c.I);
    g.c = c.H;
    return pick_tile(g);
  };
  CHECK(picked(wide) == kPairs192 && picked(deep) == kPairs256 && picked(narrow) == kPairs256);
  int64_t variant = 0;
  for (const Storage storage : {Storage::kPacked, Storage::kTransposed}) {
    for (const bool gather : {false, true}) {
      if (!takes_variant(variant++)) continue;
      const Precision precision = kPrecisions[2 + variant % 2];
      on_hopper({wide, precision, storage, Rows::kAligned, gather, true}, 4, true, check_forward);
      on_hopper({deep, precision, storage, Rows::kAligned, gather, true}, 4, true, check_forward);
      on_hopper({narrow, precision, storage, Rows::kAligned, gather, false}, 3, true, check_forward);
      on_hopper({narrow, precision, storage, Rows::kAligned, gather, false}, 3, true, check_wgrad);
    }
  }
}

// Multiprocessors that are reserved, and however many there are: the same bits.
TEST(sm90_results_do_not_depend_on_the_grid) {
  const Case c{"several tiles", 300, 136, 72, 3, 1};
  Random random(7);
  const PlanArrays plan = reference_plan(make_ids(random, c), c.E);
  const Array x = random_rows(Rows::kAligned, random, DType::kBFloat16, c.T, c.H);
  const Weights weights(random, Rows::kAligned, DType::kBFloat16, c.E, c.I, c.H, Storage::kPacked);
  Array first;
  for (const int multiprocessors : {1, 2, 5, 16}) {
    for (const int reserved : {0, 3, 100}) {
      simt::device().multiprocessors = multiprocessors;
      Array got = make_rows(Rows::kAligned, DType::kBFloat16, c.T * c.K, c.I);
      OpMemory memory(0xff);
      Execution execution = memory.execution();
      execution.reserved_multiprocessors = reserved;
      const uint64_t blocks = simt::statistics().blocks;
      cuda::grouped_gemm({.x = x,
                          .weight = weights.matrices(),
                          .expert_offsets = plan.expert_offsets,
                          .token_indices = plan.token_indices,
                          .out = got},
                         execution);
      const auto used = static_cast<int>(simt::statistics().blocks - blocks);
      CHECK(used <= std::max(1, multiprocessors - reserved), used, " blocks, ", reserved, " reserved");
      if (!first.defined()) first = got;
      for (int64_t i = 0; i < c.T * c.I; ++i) CHECK(got(i / c.I, i % c.I) == first(i / c.I, i % c.I));
    }
  }
  simt::device() = simt::sm_90();
}

// Sizes, strides and addresses that TMA cannot describe, and float32: sm_80's kernels handle these, with the same result.
TEST(sm90_leaves_the_rest_to_sm80) {
  const Case odd_depth{"odd depth", 20, 67, 64, 2, 1}, odd_columns{"odd columns", 20, 64, 43, 2, 1};
  const Case even{"whole vectors", 20, 64, 64, 2, 1};
  const auto check = [](const GemmProblem& p) {
    on_hopper(p, 3, false, check_forward);
    on_hopper(p, 3, false, check_wgrad);
  };
  check({odd_depth, kPrecisions[2], Storage::kPacked, Rows::kAligned, true, false});
  check({odd_columns, kPrecisions[3], Storage::kPacked, Rows::kAligned, false, true});
  check({even, kPrecisions[2], Storage::kPacked, Rows::kAnywhere, true, true});
  check({even, kPrecisions[0], Storage::kPacked, Rows::kAligned, false, true});
  check({even, kPrecisions[1], Storage::kTransposed, Rows::kAligned, true, false});
}

// Experts in tensors of their own, of different numbers of rows, one without any: forward, and x·W of the gradient.
constexpr Case kSeparateCases[] = {
    {"up to 16 rows", 25, 72, 136, 3, 1},
    {"up to 64 rows", 70, 200, 264, 2, 1, Ids::kDuplicates},
    {"128 columns", 129, 136, 136, 2, 1},
    {"192 columns", 260, 72, 384, 3, 1},
    {"a block of maps and more", 40, 24, 40, 130, 2},
    {"nothing to multiply", 8, 16, 24, 3, 2, Ids::kNone},
    {"pairs", 1200, 72, 384, 2, 1},
};

TEST(sm90_takes_experts_in_tensors_of_their_own) {
  int variant = 0;
  for (const Case& c : kSeparateCases) {
    for (const bool gather : {false, true}) {
      for (const bool transposed : {false, true}) {
        if (!takes_variant(variant++)) continue;
        const GemmProblem p{c, kPrecisions[2 + variant % 2], Storage::kSeparate, Rows::kAligned, gather, false};
        on_hopper(p, 3, c.ids != Ids::kNone, [&](const GemmProblem& problem) { check_product(problem, transposed); });
      }
    }
    ++variant;
  }
  // Addresses that TMA cannot describe.
  const GemmProblem p{kSeparateCases[0], kPrecisions[2], Storage::kSeparate, Rows::kAnywhere, true, false};
  on_hopper(p, 3, false, check_forward);
}

// Bits do not depend on where experts are.
TEST(sm90_separate_experts_have_the_bits_of_packed_ones) {
  simt::device() = simt::sm_90();
  const int64_t E = 3, N = 136, C = 72, S = 150;
  Random random(9);
  const Weights weights(random, Rows::kAligned, DType::kBFloat16, E, N, C, Storage::kPacked);
  const Array x = random_rows(Rows::kAligned, random, DType::kBFloat16, S, C);
  Array offsets(DType::kInt32, {E + 1});
  offsets.fill([&](int64_t e) { return e * 50; });
  Weight separate = weights.matrices();
  std::vector<const void*> base;
  for (int64_t e = 0; e < E; ++e) {
    base.push_back(static_cast<const char*>(separate.data.data) + 2 * e * separate.data.stride[0]);
  }
  const std::vector<int64_t> rows(E, N);
  separate.base = base.data();
  separate.row_count = rows.data();
  separate.data.data = nullptr;
  Array first = make_rows(Rows::kAligned, DType::kBFloat16, S, N),
        second = make_rows(Rows::kAligned, DType::kBFloat16, S, N);
  OpMemory memory(0xff);
  cuda::grouped_gemm({.x = x, .weight = weights.matrices(), .expert_offsets = offsets, .out = first},
                     memory.execution());
  cuda::grouped_gemm({.x = x, .weight = separate, .expert_offsets = offsets, .out = second}, memory.execution());
  for (int64_t i = 0; i < S * N; ++i) CHECK(first(i / N, i % N) == second(i / N, i % N), "element ", i);
}

// Decoding: up to 16 tokens, the weights of touched experts are read once, and no others.
TEST(sm90_reads_touched_experts_once) {
  simt::device() = simt::sm_90();
  for (const int64_t T : {1, 5, 16}) {
    const Case c{"decoding", T, 72, 136, 9, 2};
    Random random(3);
    const PlanArrays plan = reference_plan(make_ids(random, c), c.E);
    const Array x = random_rows(Rows::kAligned, random, DType::kBFloat16, T, c.H);
    const Weights weights(random, Rows::kAligned, DType::kBFloat16, c.E, c.I, c.H, Storage::kPacked);
    Array got = make_rows(Rows::kAligned, DType::kBFloat16, T * c.K, c.I);
    uint64_t touched = 0;
    for (int64_t e = 0; e < c.E; ++e) touched += plan.expert_offsets.id(e + 1) > plan.expert_offsets.id(e);
    const uint64_t before = simt::tma_bytes();
    OpMemory memory(0xff);
    cuda::grouped_gemm({.x = x,
                        .weight = weights.matrices(),
                        .expert_offsets = plan.expert_offsets,
                        .token_indices = plan.token_indices,
                        .out = got},
                       memory.execution());
    CHECK(simt::tma_bytes() - before == touched * static_cast<uint64_t>(c.I * c.H) * 2, T, " tokens");
  }
}

// A row's bits depend neither on the neighbouring rows nor on the tile picked for their number.
TEST(sm90_rows_do_not_depend_on_their_number) {
  simt::device() = simt::sm_90();
  const DType dtype = DType::kBFloat16;
  const int64_t C = 328;
  for (const int64_t N : {136, 192}) {
    for (const Storage storage : {Storage::kPacked, Storage::kTransposed}) {
      Random random(5);
      const Weights weights(random, Rows::kAligned, dtype, 1, N, C, storage);
      const Array all = random_rows(Rows::kAligned, random, dtype, 140, C);
      Array first;
      for (const int64_t S : {140, 70, 40, 17, 3, 1}) {
        note = join("N ", N, " ", kStorageNames[static_cast<int>(storage)], " ", S, " rows");
        TensorView x = all;
        x.shape[0] = S;
        Array offsets(DType::kInt32, {2});
        offsets.fill([&](int64_t i) { return i * S; });
        Array got = make_rows(Rows::kAligned, dtype, S, N);
        OpMemory memory(0xff);
        cuda::grouped_gemm({.x = x, .weight = weights.matrices(), .expert_offsets = offsets, .out = got},
                           memory.execution());
        if (!first.defined()) first = got;
        for (int64_t s = 0; s < S; ++s) {
          for (int64_t n = 0; n < N; ++n) CHECK(got(s, n) == first(s, n), "row ", s, " column ", n);
        }
      }
    }
  }
}

// Offsets and indices are unchecked values in device memory: for any values, no access is out of range.
TEST(sm90_survives_any_plan) {
  simt::device() = simt::sm_90();
  for (int64_t seed = 0; seed < 12; ++seed) {
    if (!takes_variant(seed)) continue;
    note = join("seed ", seed);
    Random random(static_cast<uint64_t>(seed));
    const int64_t T = 9, S = seed % 2 == 0 ? 20 : 300, E = 3, N = 24, C = 40;
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
  }
}

// Gates and ups in halves or in turns, on a cooperative tile: a has the same bits. Every order of threads runs both.
TEST(sm90_interleaved_gates_have_the_bits_of_halves) {
  simt::device() = simt::sm_90();
  const int64_t S = 520, I = 128, C = 504;
  Random random(9);
  const Array x = random_rows(Rows::kAligned, random, DType::kBFloat16, S, C);
  const Array halves = random_rows(Rows::kAligned, random, DType::kBFloat16, 2 * I, C);
  Array interleaved = make_rows(Rows::kAligned, DType::kBFloat16, 2 * I, C);
  interleaved.fill([&](int64_t i) { return halves(i / C % 2 * I + i / C / 2, i % C); });
  Array offsets(DType::kInt32, {2});
  offsets.fill([&](int64_t i) { return i * (S - 3); });  // and some unassigned rows
  Array got[2];
  for (const bool in_turns : {false, true}) {
    const TensorView weights = in_turns ? interleaved.view() : halves.view();
    got[in_turns] = make_rows(Rows::kAligned, DType::kBFloat16, S, I);
    const Gemm g{.dtype = DType::kBFloat16,
                 .a = {x.view().data, x.view().stride[0], S},
                 .b = {.data = weights.data,
                       .expert_stride = 2 * I * weights.stride[0],
                       .n_stride = weights.stride[0],
                       .aligned = true},
                 .expert_offsets = offsets.view().as<const int32_t>(),
                 .num_experts = 1,
                 .num_slots = S,
                 .n = 2 * I,
                 .c = C,
                 .epilogue = Epilogue::kGlu,
                 .out = got[in_turns].view().data,
                 .out_stride = got[in_turns].view().stride[0],
                 .options = {.gated = true, .interleaved = in_turns}};
    CHECK(pick_tile(g) == kPairs256);
    const uint64_t before = products_of_wgmma();
    cuda::gemm(g, nullptr);
    CHECK(products_of_wgmma() > before);
  }
  CHECK(same_bits(got[0], got[1]));
}

}  // namespace
}  // namespace switchgear::test
