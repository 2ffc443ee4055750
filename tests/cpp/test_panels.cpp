// SPDX-License-Identifier: BSD-3-Clause
// Weights in panels: every ISA that reads them gives the bits of plain weights, and other shapes are errors.
#include <map>

#include "layer.h"
#include "switchgear/panels.h"

namespace switchgear::test {
namespace {

// The lanes of an ISA in the order of its sums, by rows of a panel and number of lanes.
const std::map<std::pair<int64_t, int64_t>, std::vector<int64_t>> kLanes{
    {{64, 16}, {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15}},
    {{16, 8}, {0, 2, 4, 6, 1, 3, 5, 7}},
    {{16, 4}, {0, 1, 2, 3}},
    {{8, 4}, {0, 2, 1, 3}}};

// Position of element (row, k) in a panel of C columns of tiles: [pair of tiles][step][tile][row][32 k], 16 rows per tile.
int64_t place_in_tiles(int64_t row, int64_t k, int64_t C) {
  return ((row / 32 * (C / 32) + k / 32) * 2 + row / 16 % 2) * 512 + row % 16 * 32 + k % 32;
}

Weight panels(const TensorView& data, int64_t rows, int64_t cols) {
  return {.format = Format::kPanels, .data = data, .rows = rows, .cols = cols};
}

// Element by element; panel_products.inl defines the order, amx_dot_products.inl that of tiles.
Array packed(const Array& weight, PanelLayout layout) {
  const DType dtype = weight.view().dtype;
  const int64_t E = weight.size(0), N = weight.size(1), C = weight.size(2), rows = layout.rows, size = size_of(dtype);
  Array panels(DType::kUInt8, {E, N / rows, rows * C * size / layout.vector_bytes, layout.vector_bytes}, 0, 0);
  char* const out = panels.view().as<char>();
  if (layout.vector_bytes == 1024) {
    for (int64_t i = 0; i < E * N * C; ++i) {
      const int64_t row = i / C % rows, place = i / C / rows * rows * C + place_in_tiles(row, i % C, C);
      std::memcpy(out + size * place, weight.view().as<char>() + size * i, static_cast<size_t>(size));
    }
    return panels;
  }
  const int64_t per_word = dtype == DType::kBFloat16 && layout.vector_bytes == 64 ? 2 : 1;
  const int64_t lanes = layout.vector_bytes / (per_word * size), classes = rows / lanes / 2, groups = rows / lanes / 2;
  const std::vector<int64_t>& order = kLanes.at({rows, lanes});
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < C; ++k) {
        const int64_t word = k / per_word, chunk = word / 1024 * 1024, words = C / per_word;
        const int64_t steps = std::min<int64_t>(1024, words - chunk) / lanes, step = (word - chunk) / lanes;
        const int64_t p = std::find(order.begin(), order.end(), word % lanes) - order.begin();
        const int64_t row = n % rows, group = row / (2 * lanes);
        const int64_t vector = ((p / classes * groups + group) * steps + step) * classes + p % classes;
        const int64_t place = chunk * rows + vector * 2 * lanes + row % (2 * lanes);
        const int64_t element = ((e * N + n - row) * C) + place * per_word + k % per_word;
        std::memcpy(out + size * element, weight.view().as<char>() + size * ((e * N + n) * C + k),
                    static_cast<size_t>(size));
      }
    }
  }
  return panels;
}

const Case kCases[] = {{"one token", 1, 64, 64, 3, 2},
                       {"a few", 5, 128, 192, 4, 2},
                       {"seven rows", 7, 64, 64, 1, 1},
                       {"more than a chunk of words", 9, 2176, 64, 2, 1},
                       {"two chunks and many rows", 40, 4224, 64, 2, 1},
                       {"more rows than a product has", 500, 64, 128, 1, 1},
                       {"nobody", 0, 64, 64, 2, 1}};

TEST(panels_give_the_bits_of_plain_weights) {
  const std::vector<GluOptions> all = all_glu_options();
  size_t variant = 0;
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const Case& c : kCases) {
      const GluOptions& o = all[++variant * 7 % all.size()];
      note = std::string(c.name) + describe(o) + ", " + name_of(dtype);
      const Layer l(c, dtype, o, variant % 2 == 0, false, 31 + variant);
      Array y(dtype, {c.T, c.H}, 2), plain(dtype, {c.T, c.H}), h(dtype, {c.T * c.K, l.N}), plain_h = h;
      Array product(dtype, {c.T * c.K, l.N}, 2), plain_product = product;
      MoeForwardArgs args{.x = l.x,
                          .weights = l.weights(),
                          .topk_ids = l.ids,
                          .topk_weights = l.topk_weights,
                          .options = o,
                          .y = plain,
                          .h = plain_h};
      const GroupedGemmArgs gemm{.x = l.x,
                                 .weight = l.weights().gate_up_proj,
                                 .bias = l.weights().gate_up_bias,
                                 .expert_offsets = l.plan.expert_offsets,
                                 .token_indices = l.plan.token_indices,
                                 .out = plain_product};
      Array gate_up = l.gate_up_proj, down = l.down_proj;
      for_each_isa(
          {&y, &product},
          [&](Execution exec) {
            MoeForwardArgs in_panels = args;
            in_panels.y = y;
            in_panels.h = h;
            const PanelLayout layout = panel_layout(dtype);
            gate_up = packed(l.gate_up_proj, layout);
            down = packed(l.down_proj, layout);
            in_panels.weights.gate_up_proj = panels(gate_up, l.N, c.H);
            in_panels.weights.down_proj = panels(down, c.H, c.I);
            moe_forward(in_panels, exec);
            GroupedGemmArgs gemm_in_panels = gemm;
            gemm_in_panels.weight = in_panels.weights.gate_up_proj;
            gemm_in_panels.out = product;
            grouped_gemm(gemm_in_panels, exec);
          },
          [&] {
            moe_forward(args, {2});
            CHECK(same_bits(y, plain), "panels change y");
            CHECK(same_bits(h, plain_h), "panels change h");
            grouped_gemm(gemm, {2});
            CHECK(same_bits(product, plain_product), "panels change a product");
          });
    }
  }
}

TEST(panels_of_another_shape_are_errors) {
  const Case c{"shapes", 3, 128, 64, 2, 1};
  const Layer l(c, DType::kFloat32, {}, false, false, 7);
  const PanelLayout layout = panel_layout(DType::kFloat32);
  const Array gate_up = packed(l.gate_up_proj, layout), down = packed(l.down_proj, layout);
  Array y(DType::kFloat32, {c.T, c.H});
  const auto refused = [&](const TensorView& first, const TensorView& second, const char* by) {
    y.poison(7);
    const std::vector<uint8_t> before = y.bytes();
    MoeForwardArgs args{.x = l.x,
                        .weights = {.gate_up_proj = panels(first, l.N, c.H), .down_proj = panels(second, c.H, c.I)},
                        .topk_ids = l.ids,
                        .topk_weights = l.topk_weights,
                        .y = y};
    std::string message;
    try {
      moe_forward(args, {1});
    } catch (const ValueError& error) {
      message = error.what();
    }
    CHECK(message.find(by) == 0, "refused by '", message, "' instead of '", by, "'");
    CHECK(y.bytes() == before, "y was written to");
  };
  for (int i = 0; i < 4; ++i) {
    TensorView shorter = gate_up;
    --shorter.shape[i];
    refused(shorter, down, i == 0 ? "down_proj: expected" : "gate_up_proj: expected");
    TensorView less = down;
    --less.shape[i];
    refused(gate_up, less, "down_proj: expected");
  }
  TensorView strided = down, shifted = down;
  ++strided.stride[1];
  refused(gate_up, strided, "down_proj: expected contiguous experts");
  shifted.data = shifted.as<char>() + 1;
  refused(gate_up, shifted, "down_proj: expected data aligned to its elements (float32)");
}

}  // namespace
}  // namespace switchgear::test
