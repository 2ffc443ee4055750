// SPDX-License-Identifier: BSD-3-Clause
// Slots: experts at any position and distance, some shared, give the bits of experts in order, in every format.
#include <array>
#include <deque>
#include <utility>

#include "layer.h"
#include "switchgear/compact.h"
#include "switchgear/groups.h"
#include "switchgear/panels.h"

namespace switchgear::test {
namespace {

constexpr int64_t kSpare = 2;  // unused slots

// Arrays of random bytes that any kernel can multiply: none is an infinity or a NaN as float32, float16, bfloat16 or fp8.
Array bytes(Random& random, DType dtype, std::vector<int64_t> shape) {
  Array array(dtype, std::move(shape), 0, 0);
  auto* const data = array.view().as<uint8_t>();
  for (int64_t i = 0; i < array.numel() * size_of(dtype); ++i) data[i] = static_cast<uint8_t>(random.below(0x3c));
  return array;
}

// A weight that owns its memory.
struct Stored {
  std::deque<Array> arrays;
  Weight weight;

  const TensorView& add(Array array) { return arrays.emplace_back(std::move(array)).view(); }
};

Stored make(Random& random, Format format, DType dtype, int64_t E, int64_t rows, int64_t cols, int64_t parts) {
  const int64_t blocks = parts * ((rows / parts + 15) / 16),
                group = minifloat_group(format) > 0 ? minifloat_group(format) : 32, groups = (cols + group - 1) / group;
  Stored s{.weight = {.format = format, .rows = rows, .cols = cols, .parts = 1}};
  Weight& w = s.weight;
  const auto in_blocks = [&](int64_t steps, int64_t step_bytes, DType scales) {
    w.data = s.add(bytes(random, DType::kUInt8, {E, blocks, steps, step_bytes}));
    w.scales = s.add(bytes(random, scales, {E, blocks, groups, 16}));
    w.parts = parts;
    w.group_size = group;
  };
  switch (format) {
    case Format::kPlain: w = {.data = s.add(random_array(random, dtype, {E, rows, cols}))}; break;
    case Format::kPanels: {
      const PanelLayout layout = panel_layout(dtype);
      const int64_t vectors = layout.rows * cols * size_of(dtype) / layout.vector_bytes;
      w.data = s.add(bytes(random, DType::kUInt8, {E, rows / layout.rows, vectors, layout.vector_bytes}));
      break;
    }
    case Format::kCompact: {
      const Array plain = random_array(random, dtype, {E, rows, cols});
      w.data = s.add(Array(DType::kUInt8, {E, rows, compact_row_bytes(cols, cols, dtype)}, 0, 0));
      pack_compact(plain, w.data);
      w.element_bytes = size_of(dtype);
      break;
    }
    case Format::kInt8:
    case Format::kInt4:
      in_blocks((cols + 7) / 8 * bits_of(format) / 4, 64, DType::kInt8);
      w.row_scales = s.add(random_array(random, DType::kFloat32, {E, blocks, 16}));
      break;
    case Format::kFp8:
    case Format::kMxfp4:
    case Format::kNf4:
    case Format::kNvfp4:
      in_blocks((cols + 31) / 32, minifloat_step_bytes(format), format_row(format).scales);
      if (format_row(format).row_scales) w.row_scales = s.add(random_array(random, DType::kFloat32, {E, blocks, 16}));
      break;
    case Format::kQ40:
      w.data = s.add(bytes(random, DType::kUInt8, {E, parts, rows / parts, cols / 32 * 18}));
      w.parts = parts;
      break;
    default: {  // groups of 1, 2, 3, 4, 1, … bits
      in_blocks((cols + 31) / 32, kPlaneBytes, DType::kFloat16);
      w.zeros = s.add(bytes(random, DType::kUInt8, {E, blocks, groups, 16}));
      Array records(DType::kInt32, {E, 2});
      int64_t planes = 0;
      for (int64_t e = 0; e < E; ++e) {
        const int64_t bits = e % kMostBits + 1;
        records.view().as<int32_t>()[2 * e] = static_cast<int32_t>(planes);
        records.view().as<int32_t>()[2 * e + 1] = static_cast<int32_t>(bits);
        planes += bits;
      }
      w.records = s.add(std::move(records));
      w.data = s.add(bytes(random, DType::kUInt8, {planes, blocks, (cols + 31) / 32, kPlaneBytes}));
    }
  }
  return s;
}

// The same experts, with the data of expert e at slots[e] of num_slots.
Stored moved(const Weight& w, const Array& slots, int64_t num_slots) {
  Stored s{.weight = w};
  const auto move = [&](TensorView& field) {
    if (!field.defined()) return;
    std::vector<int64_t> shape(field.shape.begin(), field.shape.begin() + field.ndim);
    const int64_t expert_bytes = field.numel() / shape[0] * size_of(field.dtype);
    shape[0] = num_slots;
    Array array(field.dtype, shape, 0, 0);
    if (&field == &s.weight.records) {  // checked even where no expert uses them
      array.fill([](int64_t) { return 1; });
    } else {
      array.poison(0xff);
    }
    for (int64_t e = 0; e < slots.size(0); ++e) {
      std::memcpy(array.view().as<char>() + slots.id(e) * expert_bytes, field.as<char>() + e * expert_bytes,
                  static_cast<size_t>(expert_bytes));
    }
    field = s.add(std::move(array));
  };
  for (TensorView* field : {&s.weight.scales, &s.weight.row_scales, &s.weight.zeros, &s.weight.records}) move(*field);
  if (!w.records.defined()) move(s.weight.data);
  s.weight.slots = slots;
  if (w.format == Format::kPlain) s.weight.rows = s.weight.cols = 0;
  return s;
}

Array reversed_slots(int64_t E) {
  Array slots(DType::kInt32, {E});
  slots.fill([&](int64_t e) { return E - 1 - e + kSpare / 2; });
  return slots;
}

int64_t padded(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

// The same experts as records of one arena: all tensors of expert e are in record slots[e], each at a multiple of 64 bytes, and
// the last record ends with the arena. All other bytes are 0xff.
Stored in_records(const Weight& w, const Array& slots, int64_t num_slots) {
  const bool is_plain = w.format == Format::kPlain, has_planes = w.format == Format::kGroups;
  Stored s{.weight = w};
  const std::array fields{&s.weight.data, &s.weight.scales, &s.weight.row_scales, &s.weight.zeros};
  const auto plane_bytes = [](const TensorView& t) { return t.numel() / t.shape[0] * size_of(t.dtype); };
  std::array<int64_t, 4> begin{};
  int64_t record = 0;
  for (size_t i = 0; i < fields.size(); ++i) {
    if (!fields[i]->defined()) continue;
    begin[i] = record;
    const int64_t bytes = plane_bytes(*fields[i]) * (has_planes && i == 0 ? kMostBits : 1);
    record += padded(bytes, 64);
  }
  record += 64;  // not a power of two
  const TensorView arena = s.add(Array(DType::kUInt8, {num_slots, record}, 0, 0));
  if (has_planes) {  // checked even where no expert uses them
    s.weight.records = s.add(Array(DType::kInt32, {num_slots, 2}));
    for (int64_t i = 0; i < num_slots; ++i) {
      s.weight.records.as<int32_t>()[2 * i] = static_cast<int32_t>(i * record / 64);
      s.weight.records.as<int32_t>()[2 * i + 1] = 1;
    }
  }
  for (size_t i = 0; i < fields.size(); ++i) {
    TensorView& field = *fields[i];
    if (!field.defined()) continue;
    const TensorView from = field;
    const bool is_planes = has_planes && i == 0;
    field.data = arena.as<char>() + begin[i];
    field.stride[0] = (is_planes ? 64 : record) / size_of(field.dtype);
    field.shape[0] = is_planes ? (num_slots * record - begin[i] - plane_bytes(from)) / 64 + 1 : num_slots;
    for (int64_t e = 0; e < slots.size(0); ++e) {
      const auto* const known = w.records.as<const int32_t>() + 2 * e;
      if (is_planes) s.weight.records.as<int32_t>()[2 * slots.id(e) + 1] = known[1];
      std::memcpy(field.as<char>() + slots.id(e) * record,
                  from.as<char>() + (is_planes ? known[0] : e) * plane_bytes(from),
                  static_cast<size_t>(plane_bytes(from) * (is_planes ? known[1] : 1)));
    }
  }
  s.weight.slots = slots;
  if (is_plain) s.weight.rows = s.weight.cols = 0;
  return s;
}

constexpr Format kFormats[] = {Format::kPlain,  Format::kPanels, Format::kCompact, Format::kInt8,
                               Format::kInt4,   Format::kFp8,    Format::kMxfp4,   Format::kNf4,
                               Format::kGroups, Format::kNvfp4,  Format::kQ40};

TEST(experts_anywhere_have_the_bits_of_experts_in_order) {
  const Case c{"slots", 40, 128, 64, 5, 2};
  for (const Format format : kFormats) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      note = join(name_of(format), " ", name_of(dtype));
      const Layer l(c, dtype, {}, true, false, 11);
      const Array slots = reversed_slots(c.E);
      Array y(dtype, {c.T, c.H}), wanted(dtype, {c.T, c.H});
      Stored first, second, moved_first, moved_second;
      MoeForwardArgs args{.x = l.x, .weights = l.weights(), .topk_ids = l.ids, .topk_weights = l.topk_weights, .y = y};
      for_each_isa(
          {&y},
          [&](Execution exec) {  // panels are made for the ISA in use
            Random random(7);
            first = make(random, format, dtype, c.E, l.N, c.H, 2),
            second = make(random, format, dtype, c.E, c.H, c.I, 1);
            moved_first = moved(first.weight, slots, c.E + kSpare);
            moved_second = moved(second.weight, slots, c.E + kSpare);
            args.weights.gate_up_proj = moved_first.weight, args.weights.down_proj = moved_second.weight;
            moe_forward(args, exec);
          },
          [&] {
            MoeForwardArgs plain = args;
            plain.weights.gate_up_proj = first.weight, plain.weights.down_proj = second.weight;
            plain.y = wanted;
            moe_forward(plain, {2});
            CHECK(same_bits(y, wanted), "slots change y");
          },
          is_integer(format) || is_gguf(format) ? Isas::kAll : Isas::kFloat);
    }
  }
}

// All that reads a weight: moe_forward, moe_backward, grouped_gemm and its transpose.
TEST(experts_in_records_have_the_bits_of_contiguous_experts) {
  const Case c{"records", 40, 128, 64, 5, 2};
  for (const Format format : kFormats) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      note = join(name_of(format), " ", name_of(dtype));
      const Layer l(c, dtype, {}, true, false, 12);
      const Array slots = reversed_slots(c.E);
      const int64_t S = c.T * c.K;
      Array y(dtype, {c.T, c.H}), h(dtype, {S, l.N}), grad_x(dtype, {c.T, c.H}),
          grad_weights(DType::kFloat32, {c.T, c.K});
      Array product(dtype, {S, l.N}), transposed(dtype, {S, c.H});
      const auto run = [&](const Weight& first, const Weight& second, Execution exec) {
        ExpertWeights weights = l.weights();
        weights.gate_up_proj = first, weights.down_proj = second;
        moe_forward({.x = l.x, .weights = weights, .topk_ids = l.ids, .topk_weights = l.topk_weights, .y = y, .h = h},
                    exec);
        moe_backward({.grad_y = l.grad_y,
                      .x = l.x,
                      .h = h,
                      .weights = weights,
                      .topk_ids = l.ids,
                      .topk_weights = l.topk_weights,
                      .grad_x = grad_x,
                      .grad_topk_weights = grad_weights},
                     exec);
        GroupedGemmArgs gemm{.x = l.x,
                             .weight = first,
                             .expert_offsets = l.plan.expert_offsets,
                             .token_indices = l.plan.token_indices,
                             .out = product};
        grouped_gemm(gemm, exec);
        if (!has_parts(format)) return transposed.poison(0);
        gemm.x = h, gemm.token_indices = {}, gemm.out = transposed, gemm.transposed = true;
        grouped_gemm(gemm, exec);
      };
      Stored first, second;
      for_each_isa(
          {&y, &h, &grad_x, &grad_weights, &product, &transposed},
          [&](Execution exec) {  // panels are made for the ISA in use
            Random random(7);
            first = make(random, format, dtype, c.E, l.N, c.H, 2),
            second = make(random, format, dtype, c.E, c.H, c.I, 1);
            run(in_records(first.weight, slots, c.E + kSpare).weight,
                in_records(second.weight, slots, c.E + kSpare).weight, exec);
          },
          [&] {
            const std::array got{y, h, grad_x, grad_weights, product, transposed};
            run(first.weight, second.weight, {2});
            const std::array wanted{&y, &h, &grad_x, &grad_weights, &product, &transposed};
            for (size_t i = 0; i < got.size(); ++i) CHECK(same_bits(got[i], *wanted[i]), "records change output ", i);
          },
          is_integer(format) || is_gguf(format) ? Isas::kAll : Isas::kFloat);
    }
  }
}

// Waves: ascending ranges of experts, [begin, end), each a call that adds to the same sums. Empty ones and those without rows too.
std::vector<std::pair<int64_t, int64_t>> random_waves(Random& random, int64_t E) {
  std::vector<std::pair<int64_t, int64_t>> waves;
  const int64_t most = 1 + random.below(E);  // 1: one expert each
  for (int64_t begin = 0; begin < E;) {
    const int64_t end = std::min(E, begin + random.below(most + 1));
    waves.emplace_back(begin, end);
    begin = end;
  }
  return waves;
}

Array masked(const Array& ids, int64_t begin, int64_t end) {
  Array some = ids;
  some.fill([&](int64_t i) {
    const int32_t id = ids.view().as<const int32_t>()[i];
    return begin <= id && id < end ? id : -1;
  });
  return some;
}

TEST(sums_of_waves_round_to_the_bits_of_one_call) {
  for (const Case& c : {Case{"many rows", 70, 128, 64, 6, 3}, Case{"few rows", 3, 128, 64, 6, 2, Ids::kEmptySlots},
                        Case{"one expert", 20, 128, 64, 1, 1}, Case{"no tokens", 0, 128, 64, 3, 2}}) {
    for (const Format format : kFormats) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        if (format == Format::kCompact && dtype == DType::kFloat16) continue;
        note = join(c.name, " ", name_of(format), " ", name_of(dtype));
        const Layer l(c, dtype, {}, true, false, 13);
        Random random(static_cast<uint64_t>(format) + 17);
        const Array scales = random_array(random, DType::kFloat32, {c.E});
        const Array a = random_array(random, dtype, {c.E, 3, c.I}), b = random_array(random, dtype, {c.E, c.H, 3});
        const auto waves = random_waves(random, c.E);
        Array sums(DType::kFloat32, {c.T, c.H}, 5), y(dtype, {c.T, c.H}), rounded(dtype, {c.T, c.H});
        Stored first, second;
        MoeForwardArgs args{
            .x = l.x, .weights = l.weights(), .topk_ids = l.ids, .topk_weights = l.topk_weights, .y = y};
        if (random.below(2) == 0) args.weights.down_adapter = {.a = a, .b = b, .scales = scales};
        for_each_isa(
            {&sums},
            [&](Execution exec) {  // panels are made for the ISA in use
              Random bytes(7);
              first = make(bytes, format, dtype, c.E, l.N, c.H, 2);
              second = make(bytes, format, dtype, c.E, c.H, c.I, 1);
              args.weights.gate_up_proj = first.weight, args.weights.down_proj = second.weight;
              sums.fill([](int64_t) { return 0; });
              for (const auto& [begin, end] : waves) {
                const Array ids = masked(l.ids, begin, end);
                MoeForwardArgs wave = args;
                wave.topk_ids = ids, wave.y = {}, wave.sums = sums;
                moe_forward(wave, exec);
              }
            },
            [&] {
              moe_forward(args, {2});
              rounded.fill([&](int64_t i) { return sums(i / c.H, i % c.H); });
              CHECK(same_bits(y, rounded), waves.size(), " waves change y");
            },
            is_integer(format) || is_gguf(format) ? Isas::kAll : Isas::kFloat);
      }
    }
  }
}

TEST(sums_that_are_errors) {
  const Case c{"sums", 3, 16, 8, 2, 1};
  const Layer l(c, DType::kBFloat16, {}, false, false, 3);
  Array y(DType::kBFloat16, {c.T, c.H}), sums(DType::kFloat32, {c.T, c.H}), low(DType::kBFloat16, {c.T, c.H});
  const auto message = [&](auto&& change) -> std::string {
    MoeForwardArgs args{
        .x = l.x, .weights = l.weights(), .topk_ids = l.ids, .topk_weights = l.topk_weights, .sums = sums};
    change(args);
    try {
      moe_forward(args);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  sums.fill([](int64_t) { return 0; });
  CHECK(message([](MoeForwardArgs&) {}).empty(), "an error without a defect");
  const auto refused = [&](const char* wanted, auto&& change) {
    const std::string got = message(change);
    CHECK(got.find(wanted) == 0, got);
  };
  refused("sums: expected float32, got bfloat16", [&](MoeForwardArgs& args) { args.sums = low; });
  refused("sums: expected shape [T=3, H=16], got", [](MoeForwardArgs& args) { --args.sums.shape[0]; });
  refused("sums: expected memory of its own", [&](MoeForwardArgs& args) { args.sums.data = args.topk_weights.data; });
  refused("y: expected none beside sums", [&](MoeForwardArgs& args) { args.y = y; });
}

// Strides that no kernel follows are errors that name the tensor, and so are planes past the memory of the data.
TEST(strides_that_are_errors) {
  const Case c{"strides", 3, 32, 32, 2, 1};
  const Layer l(c, DType::kFloat32, {}, false, false, 3);
  const Array slots = reversed_slots(c.E);
  for (const Format format : kFormats) {
    if (format == Format::kPlain || format == Format::kPanels) continue;  // any stride; the same check as compact
    if (format == Format::kQ40) continue;                                 // experts and parts lie where a file has them
    note = name_of(format);
    Random random(9);
    const Stored first = make(random, format, l.dtype, c.E, l.N, c.H, 2),
                 second = make(random, format, l.dtype, c.E, c.H, c.I, 1);
    const Stored whole = in_records(first.weight, slots, c.E + kSpare);
    const auto message = [&](auto&& change) -> std::string {
      Weight changed = whole.weight;
      change(changed);
      Array y(l.dtype, {c.T, c.H});
      ExpertWeights weights = l.weights();
      weights.gate_up_proj = changed, weights.down_proj = second.weight;
      try {
        moe_forward({.x = l.x, .weights = weights, .topk_ids = l.ids, .topk_weights = l.topk_weights, .y = y});
      } catch (const ValueError& error) {
        return error.what();
      }
      return "";
    };
    CHECK(message([](Weight&) {}).empty(), "an error without a defect");
    const std::pair<TensorView Weight::*, std::string> fields[] = {{&Weight::data, "gate_up_proj"},
                                                                   {&Weight::scales, "gate_up_proj_scales"},
                                                                   {&Weight::row_scales, "gate_up_proj_row_scales"},
                                                                   {&Weight::zeros, "gate_up_proj_zeros"}};
    for (const auto& [part, name] : fields) {
      TensorView Weight::* const field = part;  // a lambda captures no structured binding before Clang 16
      if (!(whole.weight.*field).defined()) continue;
      const std::string wanted = name + ": expected contiguous experts, adjacent or a multiple of 64 bytes apart, got ";
      for (const int64_t by : {-1, 1}) {
        const std::string got = message([&](Weight& w) { (w.*field).stride[0] += by; });
        CHECK(got.find(wanted) == 0, got);
      }
      const std::string inner = message([&](Weight& w) { (w.*field).stride[1] += 64; });
      CHECK(inner.find(wanted) == 0, inner);
    }
    if (format != Format::kGroups) continue;
    auto* const records = whole.weight.records.as<int32_t>();
    const int64_t last = c.E + kSpare - 1;
    for (const int32_t more : {0, 1}) {  // the last record's slack is one unit of 64 bytes
      Weight w = whole.weight;
      const int32_t before = records[2 * last + 1];
      const auto plane = static_cast<int32_t>(w.data.shape[1] * w.data.shape[2]);
      records[2 * last] = static_cast<int32_t>(w.data.shape[0]) - 1 - 2 * plane + more, records[2 * last + 1] = 3;
      const std::string got = message([](Weight&) {});
      CHECK(more == 0 ? got.empty() : got.find("gate_up_proj_records: expected 3 of ") == 0, got);
      records[2 * last] = 0, records[2 * last + 1] = before;
    }
  }
}

TEST(gradients_of_experts_that_share_a_slot) {
  const Case c{"shared", 30, 33, 20, 4, 2};
  const Layer l(c, DType::kFloat32, {}, false, false, 5);
  Array slots(DType::kInt32, {c.E});
  slots.fill([](int64_t e) { return e / 2; });
  // Experts 2i and 2i + 1 are the same matrix, once by copies and once by slots.
  Array gate_up(DType::kFloat32, {c.E, l.N, c.H}), down(DType::kFloat32, {c.E, c.H, c.I});
  const auto copy = [&](Array& to, const Array& from) {
    const int64_t size = to.numel() / c.E;
    for (int64_t e = 0; e < c.E; ++e) {
      std::memcpy(to.view().as<float>() + e * size, from.view().as<float>() + e / 2 * size,
                  static_cast<size_t>(size) * 4);
    }
  };
  copy(gate_up, l.gate_up_proj), copy(down, l.down_proj);
  const auto run = [&](const Weight& first, const Weight& second, std::vector<Array>& out) {
    const ExpertWeights weights{.gate_up_proj = first, .down_proj = second};
    out.assign(1, Array(DType::kFloat32, {c.T, c.H}));
    out.emplace_back(DType::kFloat32, std::vector<int64_t>{c.T * c.K, l.N});
    out.emplace_back(DType::kFloat32, std::vector<int64_t>{c.T, c.H});
    out.emplace_back(DType::kFloat32, std::vector<int64_t>{c.E, l.N, c.H});
    out.emplace_back(DType::kFloat32, std::vector<int64_t>{c.E, c.H, c.I});
    moe_forward(
        {.x = l.x, .weights = weights, .topk_ids = l.ids, .topk_weights = l.topk_weights, .y = out[0], .h = out[1]});
    moe_backward({.grad_y = l.grad_y,
                  .x = l.x,
                  .h = out[1],
                  .weights = weights,
                  .topk_ids = l.ids,
                  .topk_weights = l.topk_weights,
                  .grad_x = out[2],
                  .grad_gate_up_proj = out[3],
                  .grad_down_proj = out[4]});
  };
  std::vector<Array> by_copies, by_slots;
  run({.data = gate_up}, {.data = down}, by_copies);
  run({.data = l.gate_up_proj, .slots = slots}, {.data = l.down_proj, .slots = slots}, by_slots);
  for (size_t i = 0; i < by_copies.size(); ++i) CHECK(same_bits(by_copies[i], by_slots[i]), "output ", i);
}

TEST(slots_out_of_range_are_errors) {
  const Case c{"range", 3, 16, 8, 2, 1};
  const Layer l(c, DType::kFloat32, {}, false, false, 3);
  for (const int64_t bad : {int64_t{-1}, c.E}) {
    Array slots(DType::kInt32, {c.E}), y(DType::kFloat32, {c.T, c.H});
    slots.fill([&](int64_t e) { return e == 1 ? bad : 0; });
    std::string message;
    try {
      moe_forward(
          {.x = l.x,
           .weights = {.gate_up_proj = {.data = l.gate_up_proj, .slots = slots}, .down_proj = {.data = l.down_proj}},
           .topk_ids = l.ids,
           .topk_weights = l.topk_weights,
           .y = y});
    } catch (const ValueError& error) {
      message = error.what();
    }
    CHECK(message.find("gate_up_proj_slots: expected values in [0, 2)") == 0, message);
  }
}

}  // namespace
}  // namespace switchgear::test
