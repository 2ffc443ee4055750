// SPDX-License-Identifier: BSD-3-Clause
// What a Weight must be, by format: the storage that weight.h and the headers it names describe.
#pragma once
#include "checks.h"

namespace switchgear {

// The names of a weight's tensors in errors.
struct WeightNames {
  const char *data, *scales, *row_scales, *zeros, *records, *slots;
};
inline constexpr WeightNames kWeight{"weight",       "weight_scales",  "weight_row_scales",
                                     "weight_zeros", "weight_records", "weight_slots"};
inline constexpr WeightNames kGateUpProj{"gate_up_proj",       "gate_up_proj_scales",  "gate_up_proj_row_scales",
                                         "gate_up_proj_zeros", "gate_up_proj_records", "gate_up_proj_slots"};
inline constexpr WeightNames kDownProj{"down_proj",       "down_proj_scales",  "down_proj_row_scales",
                                       "down_proj_zeros", "down_proj_records", "down_proj_slots"};

// A weight [E,N,C] of any format that the device takes. Called after a float tensor of the call has been checked.
void weight_input(Call& call, const WeightNames& names, const Weight& weight, Dim& E, Dim& N, Dim& C);

// Copies a weight's slots and records and checks them. Called after the last tensor of the call, since it reads memory.
void check_slots(Call& call, const WeightNames& names, Weight& weight);

}  // namespace switchgear
