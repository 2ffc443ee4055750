// SPDX-License-Identifier: BSD-3-Clause
// From global memory to a stage: the stored bytes of eight steps (16 rows x 32 columns each) with their scales and
// zeros, by cp.async. 16 of a block's 128 threads copy a step, in chunks of 16 bytes; neighbouring steps of a block of
// rows are neighbours in memory. Everything past the matrix is zeros: codes of zero, or, in integers, any number times
// a scale of zero.
//
//   a step in a stage:  kBytes of data, 64 of scales, 32 of zeros
#pragma once
#include "gemm_epilogue.cuh"
#include "gemm_load.cuh"
#include "stored_decode.cuh"

namespace switchgear::cuda {

constexpr int kStageSteps = 8, kThreadsPerStep = 16, kStoredThreads = kStageSteps * kThreadsPerStep;

// Bytes of a step in a stage, and where its scales and zeros are.
template <int kBytes>
struct StepPlace {
  static constexpr int kScales = kBytes, kZeros = kScales + kMostScaleBytes, kAll = kZeros + kMostZeroBytes;
};

// The matrix of one expert. `exists` is false for unassigned rows, and for slots and records out of range, which device
// memory may contain: nothing is read then.
struct StoredMatrix {
  const std::byte *data = nullptr, *scales = nullptr, *zeros = nullptr;
  const float* row_scales = nullptr;
  int bits = 8, step_bytes = 0;
  int64_t block_bytes = 0;
  bool exists = false;

  __device__ StoredMatrix(const StoredOperand& w, int32_t expert, bool assigned) {
    const int32_t slot = !assigned ? -1 : w.slots != nullptr ? w.slots[expert] : expert;
    exists = slot >= 0 && slot < w.num_stored;
    int64_t place = exists ? slot : 0;
    bits = w.bits;
    if (w.format == Format::kGroups) {
      const int32_t first = exists ? w.records[2 * place] : 0, count = exists ? w.records[2 * place + 1] : 1;
      const int64_t offset = first * w.data_stride;
      exists =
          exists && count >= 1 && count <= kMostBits && first >= 0 && offset + count * w.plane_bytes <= w.data_bytes;
      bits = exists ? count : 1;
      data = w.data + (exists ? offset : 0);
    } else {
      data = w.data + place * w.data_stride;
    }
    scales = w.scales + place * w.scales_stride;
    zeros = w.zeros == nullptr ? nullptr : w.zeros + place * w.zeros_stride;
    row_scales = reinterpret_cast<const float*>(w.row_scales + place * w.row_scales_stride);
    step_bytes = kStepRows * kStepColumns / 8 * bits;
    block_bytes = static_cast<int64_t>((w.cols + w.unit - 1) / w.unit) * (kStepRows / 8 * w.unit * bits);
  }
};

// The block that begins at row n of the matrix; n is a multiple of 16 rows after its part's first.
__device__ inline int32_t block_of(const StoredOperand& w, int32_t n) {
  const int32_t part = w.parts == 1 ? 0 : n / w.part_rows;
  return w.first_block + part * w.part_blocks + (n - part * w.part_rows) / kStepRows;
}

// One thread's part of copying one step after another of a block; zeros if `used` is false, and past the last step.
template <int kBytes>
class StepCopy {
 public:
  __device__ StepCopy(const StoredOperand& w, const StoredMatrix& m, int32_t block, int32_t step, bool used)
      : w_(w), step_(step), step_bytes_(m.step_bytes) {
    const int part = static_cast<int>(threadIdx.x) % kThreadsPerStep;
    const int32_t offset = step * m.step_bytes + part * kChunkBytes;
    data_ = m.data + block * m.block_bytes + offset;
    left_ = used && part * kChunkBytes < m.step_bytes ? static_cast<int32_t>(m.block_bytes) - offset : 0;
    // The first eight threads copy scales, the others zeros.
    const bool is_zero = part >= kThreadsPerStep / 2;
    const int chunk = part % (kThreadsPerStep / 2), groups = w.group_size == 16 ? 2 : 1;
    row_bytes_ = is_zero ? kStepRows : w.scale_bytes;
    const bool has_one = chunk < row_bytes_ / kChunkBytes * groups && !(is_zero && m.zeros == nullptr);
    place_ = has_one ? (is_zero ? StepPlace<kBytes>::kZeros : StepPlace<kBytes>::kScales) + chunk * kChunkBytes : -1;
    numbers_ =
        (is_zero ? m.zeros : m.scales) + static_cast<int64_t>(block) * w.groups * row_bytes_ + chunk * kChunkBytes;
    groups_ = !used ? 0 : groups == 2 ? w.groups - chunk : w.groups;  // of two groups, a chunk is one
  }

  __device__ void copy(std::byte* to) const {
    const int part = static_cast<int>(threadIdx.x) % kThreadsPerStep;
#pragma unroll
    for (int i = 0; i < kBytes; i += kThreadsPerStep * kChunkBytes) {
      if (i > 0 && i >= step_bytes_) continue;
      ptx::cp_async16(to + part * kChunkBytes + i, data_ + i, left_ > i);
    }
    if (place_ < 0) return;
    const int32_t group = w_.group_size == 16
                              ? 2 * step_
                              : static_cast<int32_t>(__umulhi(2 * static_cast<unsigned>(step_), w_.group_magic));
    ptx::cp_async16(to + place_, numbers_ + group * row_bytes_, group < groups_);
  }

  __device__ void advance(int32_t steps) {
    step_ += steps;
    data_ += steps * step_bytes_;
    left_ -= steps * step_bytes_;
  }

 private:
  const StoredOperand& w_;
  const std::byte *data_, *numbers_;
  int32_t step_, left_, groups_;
  int step_bytes_, row_bytes_, place_;
};

}  // namespace switchgear::cuda
