// SPDX-License-Identifier: BSD-3-Clause
// What tests can ask the shim of the CUDA runtime.
#pragma once
#include <cstdint>
#include <vector>

namespace simt {

// The stream of every launch, memset and copy since the last call of forget_streams.
std::vector<void*> used_streams();
// The current device at each of them.
std::vector<int> used_devices();
int host_waits();  // how often the host has waited for a stream or a device since then
void forget_streams();

// Total bytes that TMA has loaded from inside tensors.
uint64_t& tma_bytes();

}  // namespace simt
