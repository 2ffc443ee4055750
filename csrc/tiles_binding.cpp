// SPDX-License-Identifier: BSD-3-Clause
#include "tiles_binding.h"

#include <string>

#include "cuda/tiles_sm80.h"
#include "cuda/tiles_sm90.h"
#include "names.h"

namespace py = pybind11;

namespace switchgear {
namespace {

namespace sm90 = cuda::sm90;

constexpr Names<unsigned, 3> kEpilogues{
    {{"store", sm90::kStore}, {"glu", sm90::kGlu}, {"glu_backward", sm90::kGluBackward}}};

// (rows, columns, resident blocks)
py::tuple gemm_tile_sm80(int64_t rows_per_expert) {
  const cuda::TileConfig& tile = cuda::kTiles[static_cast<int>(cuda::pick_tile(rows_per_expert))];
  return py::make_tuple(tile.rows, tile.columns, tile.blocks);
}

// (rows, columns, blocks of a cluster, cooperative)
py::tuple describe(const sm90::TileRow& tile) {
  return py::make_tuple(tile.few_rows() ? tile.n : 128, tile.few_rows() ? 128 : tile.n, tile.cluster, tile.cooperative);
}

py::tuple gemm_tile_sm90(int64_t rows_per_expert, int64_t columns, int64_t depth, const std::string& epilogue) {
  const unsigned use = parse("epilogue", kEpilogues, epilogue);
  return describe(sm90::kTiles[sm90::pick_tile(sm90::GemmSize{rows_per_expert, columns, depth, use})]);
}

py::tuple wgrad_tile_sm90(int64_t m, int64_t n, int64_t depth, bool shares_b) {
  return describe(sm90::kTiles[sm90::pick_tile(sm90::WgradSize{m, n, depth, true, shares_b})]);
}

}  // namespace

void define_tiles(py::module_& m) {
  using namespace py::literals;
  m.def("gemm_tile_sm80", &gemm_tile_sm80, "rows_per_expert"_a);
  m.def("gemm_tile_sm90", &gemm_tile_sm90, "rows_per_expert"_a, "columns"_a, "depth"_a, "epilogue"_a);
  m.def("wgrad_tile_sm90", &wgrad_tile_sm90, "m"_a, "n"_a, "depth"_a, "shares_b"_a);
}

}  // namespace switchgear
