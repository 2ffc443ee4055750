// SPDX-License-Identifier: BSD-3-Clause
// What products refuse: weights in formats other than plain, of which one property is changed.
#include "checked_ops.h"
#include "switchgear/compact.h"
#include "switchgear/minifloat.h"
#include "switchgear/panels.h"

namespace switchgear::test {
namespace {

// A product with a weight [2, 32, 96] in another format, of which one property is changed.
struct Stored {
  static constexpr int64_t kRows = 32, kCols = 96;

  explicit Stored(Weight w) : weight(std::move(w)) {
    for (TensorView* v : tensors()) {
      if (!v->defined()) continue;
      arrays.emplace_back(v->dtype, std::vector<int64_t>(v->shape.begin(), v->shape.begin() + v->ndim), 0, 0);
      arrays.back().poison(0);
      *v = arrays.back();
    }
    weight.rows = kRows, weight.cols = kCols;
  }
  std::vector<TensorView*> tensors() { return {&weight.data, &weight.scales, &weight.row_scales, &weight.zeros}; }

  std::string complaint(const std::function<void(Weight&)>& change, DType dtype = DType::kFloat32) {
    Weight w = weight;
    change(w);
    const Array x(dtype, {3, kCols}), offsets = zeros({w.num_experts() + 1});
    Array out(dtype, {3, kRows});
    return complaint_of([&] { grouped_gemm({.x = x, .weight = w, .expert_offsets = offsets, .out = out}, {1}); });
  }
  static Array zeros(std::vector<int64_t> shape) {
    Array array(DType::kInt32, std::move(shape));
    array.poison(0);
    return array;
  }
  void accepts(const char* what, const std::function<void(Weight&)>& change, DType dtype = DType::kFloat32) {
    const std::string text = complaint(change, dtype);
    CHECK(text == "none", name_of(weight.format), " with ", what, ": ", text);
  }
  void refuses(const char* by, const std::function<void(Weight&)>& change, DType dtype = DType::kFloat32) {
    const std::string text = complaint(change, dtype);
    CHECK(text.find(by) == 0 && text != "none", name_of(weight.format), ": '", text, "' instead of '", by, "'");
  }
  // Every tensor has one shape.
  void refuses_shapes() {
    accepts("nothing changed", [](Weight&) {});
    const size_t count = tensors().size();
    for (size_t i = 0; i < count; ++i) {
      if (!tensors()[i]->defined()) continue;
      const auto change = [&](const std::function<void(TensorView&)>& edit) {
        return [&, edit](Weight& w) {
          const std::array<TensorView*, 4> all{&w.data, &w.scales, &w.row_scales, &w.zeros};
          edit(*all[i]);
        };
      };
      for (int d = 0; d < tensors()[i]->ndim; ++d) {
        if (d == 0 && i == 0 && !weight.scales.defined()) continue;  // E is that of the data alone
        refuses("", change([&](TensorView& v) { --v.shape[d]; }));
        refuses("", change([&](TensorView& v) { ++v.shape[d]; }));
      }
      refuses("", change([](TensorView& v) { ++v.stride[1]; }));
      refuses("TypeError: ", change([](TensorView& v) { v.dtype = DType::kInt32; }));
    }
    refuses("weight: expected matrices [N, 96], got [32, 97]", [](Weight& w) { ++w.cols; });
    refuses("", [](Weight& w) { ++w.rows; });
    refuses("", [](Weight& w) { --w.rows; });
  }

  Weight weight;
  std::vector<Array> arrays;
};

TensorView bytes(DType dtype, std::initializer_list<int64_t> shape) {
  TensorView v = floats(shape);
  v.dtype = dtype;
  return v;
}

Weight integers(Format format, int64_t group_size, int64_t groups) {
  return {.format = format,
          .data = bytes(DType::kUInt8, {2, 2, format == Format::kInt8 ? 24 : 12, 64}),
          .scales = bytes(DType::kInt8, {2, 2, groups, 16}),
          .row_scales = floats({2, 2, 16}),
          .zeros = bytes(DType::kUInt8, {2, 2, groups, 16}),
          .group_size = group_size};
}

TEST(integers_of_other_shapes_are_errors) {
  for (const auto& [group_size, groups] : {std::pair<int64_t, int64_t>{0, 1}, {16, 6}, {64, 2}, {128, 1}}) {
    for (const Format format : {Format::kInt8, Format::kInt4}) {
      Stored s(integers(format, group_size, groups));
      s.refuses_shapes();
      s.accepts("no zeros", [](Weight& w) { w.zeros = {}; });
      for (const int64_t other : {-16, 1, 8, 15, 17, 24, 48}) {
        s.refuses("weight: expected a group_size of 0 (the whole row) or a power of two from 16 on, got ",
                  [&](Weight& w) { w.group_size = other; });
      }
      s.refuses("weight: expected parts that divide N=32, got 0", [](Weight& w) { w.parts = 0; });
      s.refuses("weight: expected parts that divide N=32, got 3", [](Weight& w) { w.parts = 3; });
      s.accepts("2 parts", [](Weight& w) { w.parts = 2; });
      s.refuses("weight_scales: expected shape", [](Weight& w) { w.scales = {}; });
      s.refuses("weight_row_scales: expected shape", [](Weight& w) { w.row_scales = {}; });
    }
  }
  // Two parts of 8 rows have a block of 16 each, like one of 32.
  Stored s(integers(Format::kInt8, 0, 1));
  const Array x(DType::kFloat32, {3, Stored::kCols}), offsets = Stored::zeros({3});
  Array out(DType::kFloat32, {3, 16});
  Weight w = s.weight;
  w.rows = 16, w.parts = 2;
  const auto run = [&] { grouped_gemm({.x = x, .weight = w, .expert_offsets = offsets, .out = out}, {1}); };
  CHECK(complaint_of(run) == "none", complaint_of(run));
  w.parts = 1;
  CHECK(complaint_of(run).find("weight: expected shape") == 0, complaint_of(run));
}

TEST(integers_of_too_many_columns_are_errors) {
  for (const int64_t cols : {int64_t{65536}, int64_t{65537}}) {
    const Array data(DType::kUInt8, {1, 1, (cols + 7) / 8 * 2, 64}, 0, 0), scales(DType::kInt8, {1, 1, 1, 16}, 0, 0);
    const Array row_scales(DType::kFloat32, {1, 1, 16}), x(DType::kFloat32, {1, cols}), offsets = Stored::zeros({2});
    Array out(DType::kFloat32, {1, 16});
    const Weight w{
        .format = Format::kInt8, .data = data, .scales = scales, .row_scales = row_scales, .rows = 16, .cols = cols};
    const std::string text =
        complaint_of([&] { grouped_gemm({.x = x, .weight = w, .expert_offsets = offsets, .out = out}, {1}); });
    CHECK(text.find(cols == 65536 ? "none" : "weight: expected at most 65536 columns, got 65537") == 0, text);
  }
}

TEST(minifloats_of_other_shapes_are_errors) {
  const auto data = [](Format format) { return bytes(DType::kUInt8, {2, 2, 3, minifloat_step_bytes(format)}); };
  for (const auto& [group_size, groups] : {std::pair<int64_t, int64_t>{0, 1}, {32, 3}, {64, 2}, {96, 1}}) {
    Stored s({.format = Format::kFp8,
              .data = data(Format::kFp8),
              .scales = floats({2, 2, groups, 16}),
              .group_size = group_size});
    s.refuses_shapes();
    for (const int64_t other : {-32, 16, 33}) {
      s.refuses("weight: expected a group_size of 0 (the whole row) or a multiple of 32, got ",
                [&](Weight& w) { w.group_size = other; });
    }
    s.refuses("weight: expected parts that divide N=32, got 5", [](Weight& w) { w.parts = 5; });
  }
  Stored s({.format = Format::kMxfp4,
            .data = data(Format::kMxfp4),
            .scales = bytes(DType::kUInt8, {2, 2, 3, 16}),
            .group_size = 32});
  s.refuses_shapes();
  for (const int64_t other : {0, 16, 64}) {
    s.refuses("weight: expected a group_size of 32, got ", [&](Weight& w) { w.group_size = other; });
  }
}

TEST(groups_of_other_shapes_are_errors) {
  Array records(DType::kInt32, {2, 2});
  const auto set = [&](int32_t first, int32_t bits) {
    auto* const p = records.view().as<int32_t>();
    p[0] = 0, p[1] = 3, p[2] = first, p[3] = bits;
  };
  set(3, 1);
  Stored s({.format = Format::kGroups,
            .data = bytes(DType::kUInt8, {4, 2, 3, 64}),
            .scales = bytes(DType::kFloat16, {2, 2, 3, 16}),
            .zeros = bytes(DType::kUInt8, {2, 2, 3, 16}),
            .group_size = 32});
  s.weight.records = records;
  s.accepts("3 bits and 1 bit", [](Weight&) {});
  s.accepts("no zeros", [](Weight& w) { w.zeros = {}; });
  for (const int64_t other : {-32, 16, 33}) {
    s.refuses("weight: expected a group_size of 0 (the whole row) or a multiple of 32, got ",
              [&](Weight& w) { w.group_size = other; });
  }
  s.refuses("weight_scales: expected shape", [](Weight& w) { w.scales.shape[2] = 2; });
  s.refuses("TypeError: weight_scales: expected float16", [](Weight& w) { w.scales.dtype = DType::kBFloat16; });
  s.refuses("weight_zeros: expected shape", [](Weight& w) { w.zeros.shape[2] = 2; });
  s.refuses("weight_records: expected a tensor", [](Weight& w) { w.records = {}; });
  s.refuses("weight_records: expected shape", [](Weight& w) { w.records.shape[1] = 1; });
  for (const auto& [first, bits] : {std::pair{3, 0}, {0, 5}, {-1, 1}, {2, 3}, {4, 1}, {INT32_MAX, 4}}) {
    set(first, bits);
    s.refuses("weight_records: expected ", [](Weight&) {});
  }
  s.refuses("weight: expected plain weights on this device, got bits3", [](Weight& w) { w.format = Format::kBits3; });
}

TEST(compact_weights_of_other_shapes_are_errors) {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    Stored s({.format = Format::kCompact,
              .data = bytes(DType::kUInt8, {2, Stored::kRows, compact_row_bytes(Stored::kCols, 0, dtype)}),
              .element_bytes = size_of(dtype)});
    s.refuses_shapes();
    s.accepts("a row more in x", [](Weight&) {}, dtype);
    if (dtype == DType::kFloat32)
      s.refuses(
          "TypeError: weight: expected compact bfloat16 like x, got compact elements of 4 bytes", [](Weight&) {},
          DType::kBFloat16);
    s.refuses("TypeError: weight: expected float16 like x, got compact weights", [](Weight&) {}, DType::kFloat16);
    for (const int bad : {0, 1, 3, 8}) {
      s.refuses("TypeError: weight: expected compact float32 like x, got compact elements of ",
                [bad](Weight& w) { w.element_bytes = bad; });
    }
  }
}

// Experts in slots: indices of the data.
TEST(slots_are_checked) {
  Stored s({.format = Format::kMxfp4,
            .data = bytes(DType::kUInt8, {2, 2, 3, 256}),
            .scales = bytes(DType::kUInt8, {2, 2, 3, 16}),
            .group_size = 32});
  Array slots = Stored::zeros({5});
  slots.set_id(1, 4);
  s.accepts("5 experts in 2 slots", [&](Weight& w) { w.slots = slots; });
  for (const int32_t bad : {-1, 2}) {
    slots.set_id(bad, 4);
    s.refuses("weight_slots: expected values in [0, 2), got ", [&](Weight& w) { w.slots = slots; });
  }
  slots.set_id(0, 4);
  const std::array<const void*, 5> base{};
  s.refuses("weight_slots: expected none beside matrices of their own",
            [&](Weight& w) { w.slots = slots, w.base = base.data(); });
}

// gate_up_proj and down_proj are both integers, or neither; gate_up_proj has its gates and ups in parts.
TEST(formats_of_a_layer_fit) {
  constexpr int64_t kH = 32, kI = 32;
  const auto stored = [](Format format, int64_t rows, int64_t parts) {
    Weight w = format == Format::kInt8 ? integers(format, 0, 1) : Weight{.format = format, .group_size = 32};
    const int64_t blocks = rows / 16;
    w.data = bytes(DType::kUInt8, {2, blocks, format == Format::kInt8 ? 8 : 1, format == Format::kInt8 ? 64 : 256});
    w.scales = bytes(format == Format::kInt8 ? DType::kInt8 : DType::kUInt8, {2, blocks, 1, 16});
    w.row_scales = format == Format::kInt8 ? floats({2, blocks, 16}) : TensorView{};
    w.zeros = {};
    Stored s(w);
    s.weight.rows = rows, s.weight.cols = 32, s.weight.parts = parts;
    return s;
  };
  Stored wide = stored(Format::kInt8, 2 * kI, 2), mx_wide = stored(Format::kMxfp4, 2 * kI, 2);
  Stored down = stored(Format::kInt8, kH, 1), mx_down = stored(Format::kMxfp4, kH, 1);
  const Array x(DType::kFloat32, {3, kH}), ids = Stored::zeros({3, 1}), weights(DType::kFloat32, {3, 1});
  Array y(DType::kFloat32, {3, kH});
  const auto complaint = [&](const Weight& first, const Weight& second, const GluOptions& options = {}) {
    return complaint_of([&] {
      moe_forward({.x = x,
                   .weights = {.gate_up_proj = first, .down_proj = second},
                   .topk_ids = ids,
                   .topk_weights = weights,
                   .options = options,
                   .y = y},
                  {1});
    });
  };
  const auto begins = [](const std::string& text, const char* with) {
    CHECK(text.find(with) == 0, text, " instead of ", with);
  };
  begins(complaint(wide.weight, down.weight), "none");
  begins(complaint(mx_wide.weight, mx_down.weight), "none");
  begins(complaint(wide.weight, mx_down.weight),
         "down_proj: expected int8 or int4 beside gate_up_proj in int8, got mxfp4");
  begins(complaint(mx_wide.weight, down.weight),
         "down_proj: expected no integers beside gate_up_proj in mxfp4, got int8");
  for (Stored* s : {&wide, &mx_wide}) {
    const Weight& second = s == &wide ? down.weight : mx_down.weight;
    begins(complaint(s->weight, second, {.interleaved = true}), "gate_up_proj: expected its rows in parts of 1, got 2");
    s->weight.parts = 1;
    begins(complaint(s->weight, second), "gate_up_proj: expected its rows in parts of 2, got 1");
    begins(complaint(s->weight, second, {.interleaved = true}), "none");
  }
  down.weight.parts = 2;
  begins(complaint(wide.weight, down.weight, {.interleaved = true}), "down_proj: expected its rows in 1 part, got 2");
}

}  // namespace
}  // namespace switchgear::test
