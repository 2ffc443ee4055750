// SPDX-License-Identifier: BSD-3-Clause
// Memory for the words of a row, for blocks of one warp that loop over the rows: shared memory or, if that is too small, global
// memory.
#pragma once
#include <algorithm>

#include "gemm.h"
#include "launch.h"
#include "workspace.h"

namespace switchgear::cuda {

constexpr int64_t kSharedBytes = 98304;
static_assert(kSharedBytes <= kLeastSharedBytes);

struct WarpRows {
  static constexpr int64_t kScratchBlocks =
      std::min<int64_t>(1024, kMaxBlocks);  // rows in flight, if too long for shared memory

  WarpRows(int64_t num_rows, int64_t words_of_row)
      : bytes(4 * words_of_row), blocks(std::min(num_rows, in_shared() ? kMaxBlocks : kScratchBlocks)) {}

  bool in_shared() const { return bytes <= kSharedBytes; }
  size_t shared_bytes() const { return in_shared() ? static_cast<size_t>(bytes) : 0; }
  int64_t scratch_words() const { return in_shared() ? 0 : blocks * bytes / 4; }

  int64_t bytes;
  int64_t blocks;
};

}  // namespace switchgear::cuda
