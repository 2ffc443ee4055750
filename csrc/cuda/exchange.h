// SPDX-License-Identifier: BSD-3-Clause
// The launcher of exchange.cuh, with plain data types. Not an op of ops.h: every rank must call it.
#pragma once
#include <cstdint>
#include <vector>

#include "switchgear/ops.h"

namespace switchgear::cuda {

struct ExchangeArgs {
  int rank = 0;
  const void* rows = nullptr;                        // ordered by target
  void* received = nullptr;                          // ordered by source
  std::vector<int64_t> send_bytes, receive_bytes;    // [W]
  std::vector<uint32_t> first_sent, first_received;  // [W] number of pieces in all earlier exchanges
  std::vector<uintptr_t> segments;                   // [W] their addresses in this process
  int64_t slot_bytes = 0;
  const uint32_t* stop = nullptr;  // in memory visible to host and device
};

// Size of a rank's segment. The segment must be zero initially and aligned to 16 bytes.
int64_t exchange_segment_bytes(int64_t num_ranks, int64_t slot_bytes);

// Multiprocessors of the current device that the kernel fills: what other kernels must leave for it to start beside them.
int64_t exchange_multiprocessors(int64_t num_ranks);

// Queues the kernel. ValueError for inconsistent sizes.
void exchange(const ExchangeArgs& args, Execution exec);

}  // namespace switchgear::cuda
