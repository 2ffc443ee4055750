// SPDX-License-Identifier: BSD-3-Clause
// What tests ask of the shim of the CUDA runtime.
#pragma once
#include <cstdint>
#include <vector>

namespace simt {

// The stream of every launch, memset and copy since the last call of forget_streams.
std::vector<void*> used_streams();
// The device that was current at each of them.
std::vector<int> used_devices();
int host_waits();  // how often the host waited for a stream or a device since then
void forget_streams();

// Bytes that TMA has loaded from inside of tensors so far.
uint64_t& tma_bytes();

}  // namespace simt
