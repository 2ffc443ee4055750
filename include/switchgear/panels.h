// SPDX-License-Identifier: BSD-3-Clause
// Weights in panels: the same elements in the order in which the kernels of one ISA read them, on the CPU.
//
// A tensor [E,N,C] becomes a contiguous [E,N/rows,vectors,vector_bytes] of uint8, whose shape tells for which ISA it was
// made. csrc/cpu/panel_products.inl defines the order, amx_dot_products.inl that of tiles. N, and I if gates precede ups,
// are multiples of `rows`; C is a multiple of kPanelColumns.
#pragma once
#include "switchgear/ops.h"

namespace switchgear {

struct PanelLayout {
  int64_t rows;          // of a weight, per panel
  int64_t vector_bytes;  // of a vector of the kernels (a word of each of some rows), or of a tile
};

inline constexpr int64_t kPanelColumns = 32;  // a pair of elements for each lane of any ISA

PanelLayout panel_layout(DType dtype);

}  // namespace switchgear
