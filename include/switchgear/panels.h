// SPDX-License-Identifier: BSD-3-Clause
// Weights in panels: the same elements in the order in which the kernels of one ISA read them, for moe_forward on the CPU.
//
// In place of a tensor [E,N,C] there is one [E,N/rows,vectors,vector_bytes] of uint8, contiguous, whose shape says for which ISA it
// was made. csrc/cpu/panel_products.inl has the order, amx_dot_products.inl that of tiles; N, and I of gated experts, are multiples
// of `rows`, C of kPanelColumns.
#pragma once
#include "switchgear/ops.h"

namespace switchgear {

struct PanelLayout {
  int64_t rows;          // of a weight, in a panel
  int64_t vector_bytes;  // of a vector of the kernels, a word of each of some rows, or of a tile
};

inline constexpr int64_t kPanelColumns = 32;  // words of all lanes of any ISA, of pairs of elements

PanelLayout panel_layout(DType dtype);

}  // namespace switchgear
