// SPDX-License-Identifier: BSD-3-Clause
// The names of an adapter's tensors in errors.
#pragma once

namespace switchgear {

struct AdapterNames {
  const char *adapter, *a, *b, *scales, *ranks;
};
inline constexpr AdapterNames kGateUpAdapter{"gate_up_adapter", "gate_up_adapter_a", "gate_up_adapter_b",
                                             "gate_up_adapter_scales", "gate_up_adapter_ranks"};
inline constexpr AdapterNames kDownAdapter{"down_adapter", "down_adapter_a", "down_adapter_b", "down_adapter_scales",
                                           "down_adapter_ranks"};

}  // namespace switchgear
