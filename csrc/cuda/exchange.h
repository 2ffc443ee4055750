// SPDX-License-Identifier: BSD-3-Clause
// The launcher of exchange.cuh, in plain data. Not an op of ops.h: it has a partner on every rank.
#pragma once
#include <cstdint>
#include <vector>

#include "switchgear/ops.h"

namespace switchgear::cuda {

struct ExchangeArgs {
  int rank = 0;
  const void* rows = nullptr;                        // in the order of targets
  void* received = nullptr;                          // in the order of sources
  std::vector<int64_t> send_bytes, receive_bytes;    // [W]
  std::vector<uint32_t> first_sent, first_received;  // [W] pieces of all exchanges before
  std::vector<uintptr_t> segments;                   // [W] their addresses here
  int64_t slot_bytes = 0;
  const uint32_t* stop = nullptr;  // in memory that host and device see
};

// Of a rank's segment, which is zero at first and aligned to 16 bytes.
int64_t exchange_segment_bytes(int64_t num_ranks, int64_t slot_bytes);

// Queues the kernel. ValueError for sizes that do not fit each other.
void exchange(const ExchangeArgs& args, Execution exec);

}  // namespace switchgear::cuda
