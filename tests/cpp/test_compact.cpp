// SPDX-License-Identifier: BSD-3-Clause
// Compact weights: nothing is lost, every ISA gives the bits of plain weights, and no bytes make it leave its rows.
#include "layer.h"
#include "switchgear/compact.h"

namespace switchgear::test {
namespace {

Array packed(const Array& weight) {
  for (int64_t room = 0;;) {
    Array rows(DType::kUInt8, {weight.size(0), weight.size(1), compact_row_bytes(weight.size(2), room)});
    const int64_t needed = pack_compact(weight, rows, {2});
    if (compact_row_bytes(weight.size(2), needed) <= rows.size(2)) return rows;
    room = needed;
  }
}

// Weights of which some have exponents without a code.
Array weight_of(Random& random, int64_t E, int64_t rows, int64_t cols) {
  Array weight(DType::kBFloat16, {E, rows, cols});
  const double scale = 1.0 / std::sqrt(static_cast<double>(cols));
  weight.fill([&](int64_t) {
    return std::ldexp(random.normal() * scale, random.below(20) == 0 ? -static_cast<int>(random.below(60)) : 0);
  });
  return weight;
}

TEST(compact_weights_expand_to_what_they_were) {
  Random random(1);
  for (const int64_t cols : {1, 31, 64, 127, 128, 129, 300, 2048, 2200}) {
    note = "columns " + std::to_string(cols);
    Array weight = weight_of(random, 3, 5, cols), again(DType::kBFloat16, {3, 5, cols});
    if (cols == 129) {  // every pattern of bits
      for (int64_t i = 0; i < weight.numel(); ++i) {
        const auto bits = static_cast<uint16_t>(random.bits());
        std::memcpy(weight.view().as<char>() + 2 * i, &bits, 2);
      }
    }
    expand_compact(packed(weight), again, {2});
    CHECK(same_bits(weight, again), "expanded");
  }
}

TEST(compact_weights_give_the_bits_of_plain_ones) {
  Random random(2);
  const std::vector<GluOptions> all = all_glu_options();
  size_t variant = 0;
  const auto check = [&](const Case& c) {
    const GluOptions& o = all[++variant * 7 % all.size()];
    note = std::string(c.name) + describe(o);
    Layer l(c, DType::kBFloat16, o, variant % 2 == 0, false, 83 + variant);
    l.gate_up_proj = weight_of(random, c.E, l.N, c.H);
    l.down_proj = weight_of(random, c.E, c.H, c.I);
    const Array gate_up = packed(l.gate_up_proj), down = packed(l.down_proj);
    Array y(l.dtype, {c.T, c.H}, 2), plain(l.dtype, {c.T, c.H});
    MoeForwardArgs args{
        .x = l.x, .weights = l.weights(), .topk_ids = l.ids, .topk_weights = l.topk_weights, .options = o, .y = plain};
    MoeForwardArgs compact = args;
    compact.y = y;
    compact.weights.gate_up_proj.packed = gate_up;
    compact.weights.down_proj.packed = down;
    for_each_isa(
        {&y}, [&](Execution exec) { moe_forward(compact, exec); },
        [&] {
          moe_forward(args, {2});
          CHECK(same_bits(y, plain), "compact weights change y");
        });
  };
  for_each_case(check);
  check({"more than a chunk of columns", 9, 2200, 10, 2, 1});
  check({"many tokens and chunks", 40, 2200, 10, 2, 1});
}

TEST(any_bytes_stay_within_their_rows) {
  Random random(3);
  const Case c{"random bytes", 30, 200, 70, 3, 2};
  const Layer l(c, DType::kBFloat16, {}, false, false, 5);
  const auto bytes = [&](int64_t rows, int64_t cols) {
    Array array(DType::kUInt8, {c.E, rows, compact_row_bytes(cols, 0)});
    for (int64_t i = 0; i < array.numel(); ++i) array.view().as<uint8_t>()[i] = static_cast<uint8_t>(random.bits());
    return array;
  };
  for (int round = 0; round < 20; ++round) {
    const Array gate_up = bytes(l.N, c.H), down = bytes(c.H, c.I);
    Array y(l.dtype, {round % 2 == 0 ? c.T : 1, c.H}), weight(DType::kBFloat16, {c.E, c.H, c.I});
    TensorView x = l.x, ids = l.ids, topk_weights = l.topk_weights;
    x.shape[0] = ids.shape[0] = topk_weights.shape[0] = y.size(0);
    const MoeForwardArgs args{.x = x,
                              .weights = {.gate_up_proj = {.packed = gate_up}, .down_proj = {.packed = down}},
                              .topk_ids = ids,
                              .topk_weights = topk_weights,
                              .y = y};
    for_each_isa({&y}, [&](Execution exec) { moe_forward(args, exec); }, [] {});
    expand_compact(down, weight, {2});
  }
}

}  // namespace
}  // namespace switchgear::test
