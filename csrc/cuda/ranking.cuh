// SPDX-License-Identifier: BSD-3-Clause
// Yields the experts of a row, best first: one warp per row, keys (score.cuh) in memory of the warp. The keys are split into 32
// segments with known bests. To take an expert, the lanes agree on the best segment, then all search it for its next best.
// That is about E/32 + 30 instructions per lane.
#pragma once
#include "platform.cuh"
#include "score.cuh"
#include "switchgear/tensor.h"

namespace switchgear::cuda {

// The largest key that the lanes found and, among equal keys, the lowest expert.
struct Best {
  uint32_t key, expert;
};

__device__ inline Best best_over_warp(Best mine) {
  const uint32_t top = max_over<32>(mine.key);
  return {top, min_over<32>(mine.key == top ? mine.expert : ~0u)};
}

class Ranking {
 public:
  // The lanes have written keys[E].
  __device__ Ranking(uint32_t* keys, int num_experts, int lane)
      : keys_(keys), num_experts_(num_experts), lane_(lane), segment_((num_experts + 31) / 32 | 1) {
    __syncwarp();
    const int64_t begin = static_cast<int64_t>(lane) * segment_;
    for (int64_t e = begin; e < begin + segment_ && e < num_experts; ++e) {
      if (keys[e] > mine_.key) mine_ = {keys[e], static_cast<uint32_t>(e)};
    }
  }

  // The best remaining expert, the same in all lanes; its key is kTaken if none remains.
  __device__ Best take() {
    const Best best = best_over_warp(mine_);
    const int owner = static_cast<int>(best.expert) / segment_;
    __syncwarp();  // what other lanes read before
    if (lane_ == 0) keys_[best.expert] = kTaken;
    __syncwarp();
    Best found{kTaken, 0};
    const int64_t from = static_cast<int64_t>(owner) * segment_;
    for (int64_t e = from + lane_; e < from + segment_ && e < num_experts_; e += 32) {
      if (keys_[e] > found.key) found = {keys_[e], static_cast<uint32_t>(e)};
    }
    const Best next = best_over_warp(found);
    if (lane_ == owner) mine_ = next;
    return best;
  }

 private:
  uint32_t* keys_;
  int num_experts_, lane_;
  int segment_;  // odd: lanes that each walk a segment hit different banks
  Best mine_{kTaken, 0};
};

}  // namespace switchgear::cuda
