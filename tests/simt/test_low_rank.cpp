// SPDX-License-Identifier: BSD-3-Clause
// Products whose inner dimension is extended by an adapter (Gemm::low), for every kernel and epilogue. With the operands
// concatenated along k, and the adapter's part padded with zeros to whole stages, the same sums are added in the same order,
// so the bits are the same.
#include "dropout.cuh"
#include "gemm.h"
#include "gemm_problem.h"
#include "tiles_sm90.h"

namespace switchgear::test {
namespace {

using cuda::Epilogue;
using cuda::ExpertOperand;
using cuda::Gemm;

constexpr int64_t kStage = 64;  // depths, in the largest stage of all kernels

// E matrices [N,K] with n or k contiguous.
struct Matrices {
  Array data;
  bool k_contiguous;
  int64_t E, N, K;

  template <typename Value>
  Matrices(Rows rows, DType dtype, int64_t num_experts, int64_t n, int64_t k, bool along_k, Value&& value)
      : data(make_rows(rows, dtype, num_experts * (along_k ? n : k), along_k ? k : n)),
        k_contiguous(along_k),
        E(num_experts),
        N(n),
        K(k) {
    for (int64_t e = 0; e < E; ++e) {
      for (int64_t i = 0; i < N; ++i) {
        for (int64_t j = 0; j < K; ++j) {
          const float v = value(e, i, j);
          along_k ? data.set(v, e * N + i, j) : data.set(v, e * K + j, i);
        }
      }
    }
  }
  float operator()(int64_t e, int64_t n, int64_t k) const {
    return k_contiguous ? data(e * N + n, k) : data(e * K + k, n);
  }
  ExpertOperand operand() const {
    const int64_t stride = data.view().stride[0], bytes = size_of(data.view().dtype);
    ExpertOperand b{.data = data.view().data, .expert_stride = (k_contiguous ? N : K) * stride};
    b.n_stride = k_contiguous ? stride : 1;
    b.k_stride = k_contiguous ? 1 : stride;
    b.aligned = reinterpret_cast<uintptr_t>(b.data) % 16 == 0 && stride * bytes % 16 == 0;
    return b;
  }
};

enum class Gate { kNone, kHalves, kInterleaved };

struct Problem {
  Case c;  // I is N, H is C
  int64_t rank;
  Precision precision;
  bool k_contiguous, gather, ragged;
  Rows rows;
  Epilogue epilogue;
  Gate gate;
};

std::string describe(const Problem& p) {
  constexpr const char* kEpilogues[] = {"store", "glu", "glu backward"};
  constexpr const char* kGates[] = {"", ", halves", ", interleaved"};
  return join(p.c.name, ", rank ", p.rank, " ", p.precision.name, p.k_contiguous ? "" : " transposed",
              p.gather ? " gathered" : "", p.ragged ? " ragged" : "", p.rows == Rows::kAligned ? " aligned" : "", " ",
              kEpilogues[static_cast<int>(p.epilogue)], kGates[static_cast<int>(p.gate)]);
}

cuda::Rows rows_of(const Array& a) { return {a.view().data, a.view().stride[0], a.size(0), nullptr}; }

// The tensors of a product, besides its operands.
struct Product {
  int64_t S, N, width;  // of h
  PlanArrays plan;
  Array bias, h, slot_weights, out, weighted_a, parts;

  Product(const Problem& p, Random& random)
      : S(p.c.T * p.c.K),
        N(p.c.I),
        width(p.epilogue == Epilogue::kGluBackward && p.gate != Gate::kNone ? 2 * N : N),
        plan(reference_plan(make_ids(random, p.c), p.c.E)) {
    const DType dtype = p.precision.dtype;
    bias = random_rows(p.rows, random, dtype, p.c.E, N);
    h = p.epilogue == Epilogue::kGluBackward ? random_rows(p.rows, random, dtype, S, width)
                                             : make_rows(p.rows, dtype, S, width);
    slot_weights = random_array(random, DType::kFloat32, {S});
    const bool halved = p.epilogue == Epilogue::kGlu && p.gate != Gate::kNone;
    out = make_rows(p.rows, dtype, S, p.epilogue == Epilogue::kGluBackward ? width : halved ? N / 2 : N);
    weighted_a = make_rows(p.rows, dtype, S, N);
    parts = Array(DType::kFloat32, {S, cuda::weight_parts_of(N)});
  }

  Gemm gemm(const Problem& p) {
    Gemm g{.dtype = p.precision.dtype, .allow_tf32 = p.precision.tf32};
    g.expert_offsets = plan.expert_offsets.view().as<const int32_t>();
    g.num_experts = p.c.E;
    g.num_slots = S;
    g.n = N;
    g.epilogue = p.epilogue;
    g.options = {
        .activation = Activation::kSilu, .gated = p.gate != Gate::kNone, .interleaved = p.gate == Gate::kInterleaved};
    g.out = out.view().data;
    g.out_stride = out.view().stride[0];
    if (p.epilogue != Epilogue::kGluBackward) {
      g.bias = bias.view().data;
      g.bias_stride = bias.view().stride[0];
    }
    if (p.epilogue == Epilogue::kStore) return g;
    g.h = h.view().data;
    g.h_stride = h.view().stride[0];
    if (p.epilogue == Epilogue::kGlu) return g;
    g.slot_weights = slot_weights.view().as<const float>();
    g.weighted_a = weighted_a.view().data;
    g.weighted_a_stride = weighted_a.view().stride[0];
    g.weight_parts = parts.view().as<float>();
    return g;
  }
};

void check_concatenation(const Problem& p) {
  const Case& c = p.c;
  const DType dtype = p.precision.dtype;
  Random random(21);
  Product split(p, random);
  const int64_t S = split.S, N = split.N, C = c.H, r = p.rank, padded = (r + kStage - 1) / kStage * kStage;
  const Array a = random_rows(p.rows, random, dtype, p.gather ? c.T : S, C);
  const Array low_a = random_rows(Rows::kAligned, random, dtype, S, r);
  Array ends(DType::kInt32, {c.E});
  ends.fill([&](int64_t e) { return e % 3 == 0 ? random.below(r) : e % 3 == 1 ? r : r + 1000; });
  if (c.E > 4) ends.set_id(-3, 4);  // as none: the values are not checked
  const auto rank_of = [&](int64_t e) { return p.ragged ? std::clamp<int64_t>(ends.id(e), 0, r) : r; };
  const auto any = [&](int64_t, int64_t, int64_t) { return random.normal(); };
  const Matrices b(p.rows, dtype, c.E, N, C, p.k_contiguous, any);
  // What an expert's rank excludes is not read: NaN.
  const Matrices low_b(p.rows, dtype, c.E, N, r, p.k_contiguous,
                       [&](int64_t e, int64_t, int64_t k) { return k < rank_of(e) ? random.normal() : NAN; });
  const Matrices both(p.rows, dtype, c.E, N, padded + C, p.k_contiguous, [&](int64_t e, int64_t n, int64_t k) {
    if (k >= padded) return b(e, n, k - padded);
    return k < rank_of(e) ? low_b(e, n, k) : 0.0f;
  });
  Array rows = make_rows(p.rows, dtype, S, padded + C);
  for (int64_t s = 0; s < S; ++s) {
    const int64_t row = p.gather ? split.plan.token_indices.id(s) : s;
    for (int64_t k = 0; k < padded + C; ++k) {
      const bool low = k < padded;
      rows.set(low ? (k < r ? low_a(s, k) : 0.0f) : row < 0 ? 0.0f : a(row, k - padded), s, k);
    }
  }

  Product joined = split;
  Gemm g = split.gemm(p);
  g.a = rows_of(a);
  if (p.gather) g.a.indices = split.plan.token_indices.view().as<const int32_t>();
  g.b = b.operand();
  g.c = C;
  g.low = {.a = rows_of(low_a), .b = low_b.operand(), .rank = r};
  if (p.ragged) g.low.b.ends = ends.view().as<const int32_t>();
  g.low.b.rows_are_n = false;
  cuda::gemm(g, nullptr);
  Gemm one = joined.gemm(p);
  one.a = rows_of(rows);
  one.b = both.operand();
  one.c = padded + C;
  cuda::gemm(one, nullptr);
  CHECK(same_bits(split.out, joined.out), "out");
  CHECK(same_bits(split.h, joined.h), "h");
  CHECK(same_bits(split.weighted_a, joined.weighted_a), "weighted_a");
  CHECK(same_bits(split.parts, joined.parts), "parts");
}

constexpr int64_t kRanks[] = {1, 8, 16, 64, 72};
constexpr Case kLowCases[] = {
    {"one row", 1, 40, 32, 1, 1},
    {"up to 16 rows", 25, 72, 144, 3, 1},
    {"decoding", 9, 136, 64, 8, 2},
    {"up to 64 rows", 70, 200, 144, 2, 1, Ids::kDuplicates},
    {"more rows", 129, 80, 144, 1, 1},
    {"some empty", 220, 24, 48, 3, 1, Ids::kLastExpert},
    {"holes", 120, 64, 80, 2, 3, Ids::kEmptySlots},
    {"a ring that wraps", 90, 456, 32, 2, 1},
    {"nothing chosen", 11, 16, 32, 3, 2, Ids::kNone},
    {"no tokens", 0, 16, 16, 4, 2},
};
constexpr std::pair<Epilogue, Gate> kEpilogues[] = {
    {Epilogue::kStore, Gate::kNone},         {Epilogue::kGlu, Gate::kHalves},
    {Epilogue::kGlu, Gate::kInterleaved},    {Epilogue::kGlu, Gate::kNone},
    {Epilogue::kGluBackward, Gate::kHalves}, {Epilogue::kGluBackward, Gate::kInterleaved},
};

// Each case with each epilogue, or with kStore only; the other options alternate.
template <typename Check>
void for_each_problem(bool hopper, const Check& check, bool only_store = false) {
  int variant = 0;
  for (Case c : kLowCases) {
    const int64_t columns = c.I;
    for (int i = 0; i < (only_store ? 5 : 6); ++i) {
      const int v = variant++;
      const auto& [epilogue, gate] = kEpilogues[only_store ? 0 : i];
      const int64_t rank = kRanks[(v + v / 30) % 5];
      c.I = !hopper && v % 3 == 0 ? columns - 2 : columns;  // not whole vectors
      const Problem p{c,
                      rank,
                      kPrecisions[hopper ? 2 + v % 2 : v % 4],
                      v / 2 % 2 == 0,
                      v / 3 % 2 == 0,
                      !hopper && v % 5 < 2,
                      hopper || v % 7 > 1 ? Rows::kAligned : Rows::kAnywhere,
                      epilogue,
                      gate};
      note = describe(p);
      if (hopper && rank == 1) continue;  // left to sm_80's kernels
      if (takes_variant(v)) check(p);
    }
    ++variant;
  }
}

TEST(low_rank_is_more_of_the_inner_dimension) {
  simt::device() = simt::sm_80();
  for_each_problem(false, check_concatenation);
}

TEST(sm90_low_rank_is_more_of_the_inner_dimension) {
  int variant = 0;
  for_each_problem(true, [&](const Problem& p) {
    simt::device() = simt::sm_90();
    simt::device().multiprocessors = variant++ % 2 == 0 ? 1 : 3;
    const uint64_t before = simt::statistics().wgmma;
    check_concatenation(p);
    CHECK((simt::statistics().wgmma > before) == (p.c.T > 0 && p.c.ids != Ids::kNone), "which kernel runs");
  });
  simt::device() = simt::sm_90();
}

// ---- scales, and the mask of dropout --------------------------------------------------------------------------------------

// out = scale · (a·bᵀ + mask ⊙ (low.a · low.bᵀ)), for every kernel that masks.
void check_mask(const Problem& p) {
  const Case& c = p.c;
  const DType dtype = p.precision.dtype;
  Random random(22);
  Product product(p, random);
  const int64_t S = product.S, N = product.N, C = c.H, r = p.rank;
  const Array a = random_rows(p.rows, random, dtype, S, C);
  const Array low_a = random_rows(Rows::kAligned, random, dtype, S, r);
  const Array scales = random_array(random, DType::kFloat32, {c.E});
  const auto any = [&](int64_t, int64_t, int64_t) { return random.normal(); };
  const Matrices b(p.rows, dtype, c.E, N, C, p.k_contiguous, any), low_b(p.rows, dtype, c.E, N, r, p.k_contiguous, any);
  Gemm g = product.gemm(p);
  g.bias = nullptr;
  g.a = rows_of(a);
  g.b = b.operand();
  g.c = C;
  g.low = {.a = rows_of(low_a),
           .b = low_b.operand(),
           .rank = r,
           .mask = {.seed = 7, .projection = 1, .threshold = cuda::dropout_threshold(0.375)}};
  g.scales = scales.view().as<const float>();
  g.scale_divisor = 0.625f;
  cuda::gemm(g, nullptr);
  int64_t dropped = 0;
  for (int64_t e = 0; e < c.E; ++e) {
    for (int64_t s = product.plan.expert_offsets.id(e); s < product.plan.expert_offsets.id(e + 1); ++s) {
      const cuda::DropoutRow row(g.low.mask, static_cast<int32_t>(s));
      for (int64_t n = 0; n < N; ++n) {
        Sum sum;
        const bool kept = row.keeps(static_cast<int32_t>(n));
        dropped += !kept;
        for (int64_t k = 0; k < r && kept; ++k) {
          sum.add(p.precision.factor(low_a(s, k)), p.precision.factor(low_b(e, n, k)));
        }
        for (int64_t k = 0; k < C; ++k) sum.add(p.precision.factor(a(s, k)), p.precision.factor(b(e, n, k)));
        Sum scaled;
        const double scale = static_cast<double>(scales(e)) / 0.625;
        scaled.add(sum.result(), {scale, std::abs(scale) * kUnit});
        CHECK_CLOSE(product.out(s, n), rounded(scaled.result(), dtype), "slot ", s, " column ", n);
      }
    }
  }
  const auto total = static_cast<double>(product.plan.used() * N);
  CHECK(std::abs(static_cast<double>(dropped) - 0.375 * total) <= 6 * std::sqrt(0.25 * total), dropped, " of ", total);
}

TEST(low_rank_is_masked_and_scaled) {
  simt::device() = simt::sm_80();
  for_each_problem(false, check_mask, true);
}

TEST(sm90_low_rank_is_masked_and_scaled) {
  simt::device() = simt::sm_90();
  const auto check = [](const Problem& p) {
    const uint64_t before = simt::statistics().wgmma;
    check_mask(p);
    CHECK((simt::statistics().wgmma > before) == (p.c.T > 0 && p.c.ids != Ids::kNone), "which kernel runs");
  };
  for_each_problem(true, check, true);
}

// A tile of both consumers, whose rows each has half of.
TEST(sm90_low_rank_is_masked_in_cooperative_tiles) {
  simt::device() = simt::sm_90();
  const Problem p{{"pairs, cooperative", 264, 136, 256, 1, 1},
                  64,
                  kPrecisions[2],
                  true,
                  false,
                  false,
                  Rows::kAligned,
                  Epilogue::kStore,
                  Gate::kNone};
  const cuda::sm90::GemmSize size{p.c.T, p.c.I, p.c.H, cuda::sm90::kStore};
  CHECK(cuda::sm90::kTiles[cuda::sm90::pick_tile(size)].cooperative);
  check_mask(p);
}

// Reference: keeps in python/switchgear/reference/layer.py.
TEST(dropout_mask_is_the_one_of_the_reference) {
  const int64_t seed = 0x123456789abcdef0;
  cuda::DropoutMask mask{.seed = seed, .projection = 1, .threshold = cuda::dropout_threshold(0.5)};
  for (const bool on_device : {false, true}) {
    if (on_device) mask.seed = 0, mask.device_seed = &seed;
    const cuda::DropoutRow row(mask, 3);
    std::string bits;
    for (int32_t column = 0; column < 32; ++column) bits += row.keeps(column) ? '1' : '0';
    CHECK(bits == "00011000111001100110011101000110", bits);
  }
  CHECK(cuda::dropout_threshold(0.0) == 0);
}

}  // namespace
}  // namespace switchgear::test
