// SPDX-License-Identifier: BSD-3-Clause
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   exchange_kernel: 80 registers, 1 bytes of shared memory
#include "exchange.cuh"

#include <stdexcept>
#include <string>

#include "exchange.h"
#include "launch.h"
#include "switchgear/check.h"

namespace switchgear::cuda {

// Not in the unnamed namespace: nvcc would name the kernel by the path of this file, and no two builds would be equal.
__global__ void __launch_bounds__(kExchangeThreads) exchange_kernel(ExchangeParams p) { exchange(p); }

namespace {

void check_ranks(int64_t num_ranks) {
  SWITCHGEAR_CHECK(ValueError, num_ranks >= 1 && num_ranks <= kMaxRanks, "segments: expected 1 to ", kMaxRanks,
                   " ranks, got ", num_ranks);
}

void check_segments(int64_t num_ranks, int64_t slot_bytes) {
  check_ranks(num_ranks);
  SWITCHGEAR_CHECK(ValueError, slot_bytes > 0 && slot_bytes % 16 == 0,
                   "slot_bytes: expected a positive multiple of 16, got ", slot_bytes);
}

template <typename T>
void check_length(const char* name, const std::vector<T>& values, size_t num_ranks) {
  SWITCHGEAR_CHECK(ValueError, values.size() == num_ranks, name, ": expected ", num_ranks, " values, got ",
                   values.size());
}

void add_up(const char* name, const std::vector<int64_t>& bytes, int64_t* begin) {
  begin[0] = 0;
  for (size_t r = 0; r < bytes.size(); ++r) {
    SWITCHGEAR_CHECK(ValueError, bytes[r] >= 0, name, ": expected none negative, got ", bytes[r]);
    begin[r + 1] = begin[r] + bytes[r];
  }
}

}  // namespace

int64_t exchange_segment_bytes(int64_t num_ranks, int64_t slot_bytes) {
  check_segments(num_ranks, slot_bytes);
  return kFlagBytes + num_ranks * kSlots * slot_bytes;
}

int64_t exchange_multiprocessors(int64_t num_ranks) {
  check_ranks(num_ranks);
  int resident = 0;  // blocks
  const void* const kernel = reinterpret_cast<const void*>(exchange_kernel);
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kExchangeThreads, 0);
  if (error != cudaSuccess) throw std::runtime_error(std::string("exchange: ") + cudaGetErrorString(error));
  return (exchange_blocks(static_cast<int>(num_ranks)) + resident - 1) / resident;
}

void exchange(const ExchangeArgs& args, Execution exec) {
  const size_t num_ranks = args.segments.size();
  check_segments(static_cast<int64_t>(num_ranks), args.slot_bytes);
  check_length("send_bytes", args.send_bytes, num_ranks);
  check_length("receive_bytes", args.receive_bytes, num_ranks);
  check_length("first_sent", args.first_sent, num_ranks);
  check_length("first_received", args.first_received, num_ranks);
  SWITCHGEAR_CHECK(ValueError, args.rank >= 0 && static_cast<size_t>(args.rank) < num_ranks, "rank: expected 0 to ",
                   num_ranks - 1, ", got ", args.rank);
  const auto own = static_cast<size_t>(args.rank);
  SWITCHGEAR_CHECK(ValueError, args.send_bytes[own] == args.receive_bytes[own], "receive_bytes: expected ",
                   args.send_bytes[own], " of the rank itself, as it sends, got ", args.receive_bytes[own]);
  ExchangeParams params{};
  params.rank = args.rank, params.num_ranks = static_cast<int>(num_ranks), params.slot_bytes = args.slot_bytes;
  params.rows = static_cast<const unsigned char*>(args.rows);
  params.received = static_cast<unsigned char*>(args.received);
  add_up("send_bytes", args.send_bytes, params.send_begin);
  add_up("receive_bytes", args.receive_bytes, params.receive_begin);
  for (size_t r = 0; r < num_ranks; ++r) {
    params.first_sent[r] = args.first_sent[r], params.first_received[r] = args.first_received[r];
    params.segments[r] = reinterpret_cast<unsigned char*>(args.segments[r]);
  }
  params.stop = args.stop;
  launch_cooperative(exchange_kernel, static_cast<unsigned>(exchange_blocks(params.num_ranks)), kExchangeThreads, 0,
                     exec.stream, params);
}

}  // namespace switchgear::cuda
