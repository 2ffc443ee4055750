// SPDX-License-Identifier: BSD-3-Clause
// A low-rank adapter of a Weight (LoRA, arXiv:2106.09685): the projection multiplies by W + s_e · B_e[:, :r_e] · A_e[:r_e].
//
// Products: u = s_e · (x·Aᵀ), rounded once to the dtype of x, and then x·Wᵀ + u·Bᵀ in float32. Elements of a and b past an
// expert's rank are not read. `dropout`, for training: the rows that A reads are multiplied by a mask, and s_e by
// 1 / (1 - dropout). The mask is a hash of (seed, projection, slot, column): see python/switchgear/reference/layer.py.
#pragma once
#include <cstdint>

#include "switchgear/tensor.h"

namespace switchgear {

struct Adapter {
  TensorView a;          // [E,r,C] float, rows or columns contiguous; not defined: no adapter
  TensorView b;          // [E,N,r] float, the same
  TensorView scales;     // [E] float32, finite: s_e
  TensorView ranks;      // [E] int32, optional: r_e in [0, r]
  double dropout = 0.0;  // in [0, 1)
  uint64_t seed = 0;
  TensorView device_seed;  // [1] int64 on the device of a, used instead of seed: no value is copied to the host

  bool defined() const { return a.defined(); }
  int64_t rank() const { return a.shape[1]; }
  int64_t rank_of(int64_t expert) const { return ranks.defined() ? ranks.as<const int32_t>()[expert] : rank(); }
};

}  // namespace switchgear
