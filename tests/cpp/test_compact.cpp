// SPDX-License-Identifier: BSD-3-Clause
// Compact weights: lossless, the bits of plain weights on every ISA, and no bytes make a kernel read outside its rows.
#include "layer.h"
#include "switchgear/compact.h"

namespace switchgear::test {
namespace {

Weight rows_of(const Array& data, int64_t rows, int64_t cols, DType elements) {
  return {.format = Format::kCompact, .data = data, .rows = rows, .cols = cols, .element_bytes = size_of(elements)};
}

Array packed(const Array& weight) {
  for (int64_t room = 0;;) {
    const auto row_bytes = [&](int64_t exceptions) {
      return compact_row_bytes(weight.size(2), exceptions, weight.view().dtype);
    };
    Array rows(DType::kUInt8, {weight.size(0), weight.size(1), row_bytes(room)});
    const int64_t needed = pack_compact(weight, rows, {2});
    if (row_bytes(needed) <= rows.size(2)) return rows;
    room = needed;
  }
}

// Weights some of whose exponents have no code.
Array weight_of(Random& random, DType dtype, int64_t E, int64_t rows, int64_t cols) {
  Array weight(dtype, {E, rows, cols});
  const double scale = 1.0 / std::sqrt(static_cast<double>(cols));
  weight.fill([&](int64_t) {
    return std::ldexp(random.normal() * scale, random.below(20) == 0 ? -static_cast<int>(random.below(60)) : 0);
  });
  return weight;
}

// dtypes of x and of the weights. float32 values that fit bfloat16 are stored as bfloat16.
struct Kind {
  const char* name;
  DType dtype, stored;
};
constexpr Kind kKinds[] = {{"bfloat16", DType::kBFloat16, DType::kBFloat16},
                           {"float32", DType::kFloat32, DType::kFloat32},
                           {"float32 of bfloat16", DType::kFloat32, DType::kBFloat16}};

Array converted(const Array& weight, DType dtype) {
  Array out(dtype, {weight.size(0), weight.size(1), weight.size(2)});
  const int64_t rows = weight.size(1), cols = weight.size(2);
  out.fill([&](int64_t i) { return weight(i / (rows * cols), i / cols % rows, i % cols); });
  return out;
}

TEST(compact_weights_expand_to_what_they_were) {
  Random random(1);
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int64_t cols : {1, 31, 64, 127, 128, 129, 300, 2048, 2200}) {
      note = std::string(name_of(dtype)) + ", columns " + std::to_string(cols);
      Array weight = weight_of(random, dtype, 3, 5, cols), again(dtype, {3, 5, cols});
      if (cols == 129) {  // any bit pattern
        for (int64_t i = 0; i < weight.numel(); ++i) {
          const auto bits = static_cast<uint32_t>(random.bits());
          const int64_t size = size_of(dtype);
          std::memcpy(weight.view().as<char>() + size * i, &bits, static_cast<size_t>(size));
        }
      }
      expand_compact(packed(weight), again, {2});
      CHECK(same_bits(weight, again), "expanded");
    }
  }
}

TEST(compact_weights_give_the_bits_of_plain_ones) {
  Random random(2);
  const std::vector<GluOptions> all = all_glu_options();
  size_t variant = 0;
  const auto check = [&](const Case& c, const Kind& kind) {
    const GluOptions& o = all[++variant * 7 % all.size()];
    note = std::string(c.name) + describe(o) + ", " + kind.name;
    Layer l(c, kind.dtype, o, variant % 2 == 0, false, 83 + variant);
    const Array first = weight_of(random, kind.stored, c.E, l.N, c.H);
    const Array second = weight_of(random, kind.stored, c.E, c.H, c.I);
    l.gate_up_proj = converted(first, kind.dtype);
    l.down_proj = converted(second, kind.dtype);
    const Array gate_up = packed(first), down = packed(second);
    Array y(l.dtype, {c.T, c.H}, 2), plain(l.dtype, {c.T, c.H});
    MoeForwardArgs args{
        .x = l.x, .weights = l.weights(), .topk_ids = l.ids, .topk_weights = l.topk_weights, .options = o, .y = plain};
    MoeForwardArgs compact = args;
    compact.y = y;
    compact.weights.gate_up_proj = rows_of(gate_up, l.N, c.H, kind.stored);
    compact.weights.down_proj = rows_of(down, c.H, c.I, kind.stored);
    for_each_isa(
        {&y}, [&](Execution exec) { moe_forward(compact, exec); },
        [&] {
          moe_forward(args, {2});
          CHECK(same_bits(y, plain), "compact weights change y");
        });
  };
  for (const Kind& kind : kKinds) {
    const auto check_kind = [&](const Case& c) { check(c, kind); };
    for_each_case(check_kind);
    check_kind({"more than a chunk of columns", 9, 2200, 10, 2, 1});
    check_kind({"many tokens and chunks", 40, 2200, 10, 2, 1});
  }
}

TEST(any_bytes_stay_within_their_rows) {
  Random random(3);
  const Case c{"random bytes", 30, 200, 70, 3, 2};
  for (int round = 0; round < 20; ++round) {
    const DType dtype = kKinds[round % 3].dtype, stored = kKinds[round % 3].stored;
    const Layer l(c, dtype, {}, false, false, 5);
    const auto bytes = [&](int64_t rows, int64_t cols) {
      Array array(DType::kUInt8, {c.E, rows, compact_row_bytes(cols, 0, stored)});
      uint8_t* const data = array.view().as<uint8_t>();
      for (int64_t i = 0; i < array.numel(); ++i) data[i] = static_cast<uint8_t>(random.bits());
      data[kCompactElementBytes] = static_cast<uint8_t>(size_of(stored));  // which expand_compact checks
      return array;
    };
    const Array gate_up = bytes(l.N, c.H), down = bytes(c.H, c.I);
    Array y(dtype, {round % 4 < 2 ? c.T : 1, c.H}), weight(stored, {c.E, c.H, c.I});
    TensorView x = l.x, ids = l.ids, topk_weights = l.topk_weights;
    x.shape[0] = ids.shape[0] = topk_weights.shape[0] = y.size(0);
    const MoeForwardArgs args{
        .x = x,
        .weights = {.gate_up_proj = rows_of(gate_up, l.N, c.H, stored), .down_proj = rows_of(down, c.H, c.I, stored)},
        .topk_ids = ids,
        .topk_weights = topk_weights,
        .y = y};
    for_each_isa({&y}, [&](Execution exec) { moe_forward(args, exec); }, [] {});
    expand_compact(down, weight, {2});
  }
}

TEST(other_shapes_are_errors) {
  const auto complaint = [](const TensorView& weight, const TensorView& compact) {
    try {
      pack_compact(weight, compact);
    } catch (const ValueError& error) {
      return std::string(error.what());
    }
    return std::string("none");
  };
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int64_t cols : {kMaxCompactColumns, kMaxCompactColumns + 1}) {
      const Array weight(dtype, {1, 1, cols}), rows(DType::kUInt8, {1, 1, compact_row_bytes(cols, 0, dtype)});
      const bool fits = cols == kMaxCompactColumns;
      CHECK(complaint(weight, rows).find(fits ? "none" : "weight: expected at most 32768 columns") == 0);
    }
    const int64_t bytes = compact_row_bytes(5, 0, dtype);
    const Array weight(dtype, {2, 3, 5}), rows(DType::kUInt8, {2, 3, bytes + 64}, 0, 0);
    const auto refused = [&](const char* by, auto&& change) {
      TensorView w = weight, c = rows;
      change(w, c);
      CHECK(complaint(w, c).find(by) == 0, complaint(w, c));
    };
    refused("none", [](TensorView&, TensorView&) {});
    refused("none", [&](TensorView&, TensorView& c) { c = view(c.data, DType::kUInt8, 2, 3, bytes); });
    const char* const by_rows = "compact: expected contiguous uint8 rows for weight";
    for (const int64_t wrong : {bytes - 64, bytes - 1, bytes + 1, bytes + 63}) {
      refused(by_rows, [&](TensorView&, TensorView& c) { c = view(c.data, DType::kUInt8, 2, 3, wrong); });
    }
    refused(by_rows, [](TensorView&, TensorView& c) { --c.shape[0]; });
    refused(by_rows, [](TensorView& w, TensorView&) { --w.shape[0]; });
    refused(by_rows, [](TensorView&, TensorView& c) { c = view(c.data, DType::kUInt8, 2, 2, c.shape[2]); });
    refused(by_rows, [](TensorView&, TensorView& c) { c.dtype = DType::kInt8; });
    refused(by_rows, [](TensorView&, TensorView& c) { c = view(c.data, DType::kUInt8, 6, c.shape[2]); });
    refused("weight: expected contiguous", [](TensorView& w, TensorView&) { w.dtype = DType::kFloat16; });
    refused("weight: expected contiguous", [](TensorView& w, TensorView&) { ++w.stride[1]; });
    refused("weight: expected contiguous", [](TensorView& w, TensorView&) { w.ndim = 2; });
    refused("weight: expected data, got a null pointer", [](TensorView& w, TensorView&) { w.data = nullptr; });
    refused("compact: expected data, got a null pointer", [](TensorView&, TensorView& c) { c.data = nullptr; });
    refused("weight: expected data aligned", [](TensorView& w, TensorView&) { w.data = w.as<char>() + 1; });
    refused("weight: expected a tensor in host memory",
            [](TensorView& w, TensorView&) { w.device = {DeviceType::kCUDA, 0}; });
    refused("compact: expected memory of its own", [](TensorView& w, TensorView& c) { c.data = w.data; });
  }
}

}  // namespace
}  // namespace switchgear::test
