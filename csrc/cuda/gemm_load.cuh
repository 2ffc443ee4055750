// SPDX-License-Identifier: BSD-3-Clause
// From global memory to a stage of the ring: tiles of `rows` rows (of out, or columns of b: any dimension not summed over) by
// depth_bytes of the inner dimension, in chunks of 16 bytes by cp.async. A chunk is contiguous in both memories, so there are
// two layouts, named by the dimension that is contiguous in global memory:
//
//   DepthMajorTile   [rows][depth]: chunks run along the inner dimension     x, and weights [N,C] of x·Wᵀ
//   RowMajorTile     [depth][rows]: chunks run across it                     weights of x·W, both operands of weight gradients
//
// Chunks are permuted by exclusive or so that the eight rows of an ldmatrix matrix, and the columns that a warp writes, are in
// eight different groups of banks. cp.async itself fills chunks past an edge with zeros. Chunks that an edge divides, and all
// chunks if addresses are not multiples of 16 bytes, are read element by element and stored at once; everything else stays
// the same. One branch decides for all chunks of a thread: between products each instruction counts.
#pragma once
#include "gemm.h"
#include "ptx.cuh"
#include "vector.cuh"

namespace switchgear::cuda {

constexpr int kChunkBytes = 16;

// Copies `count` elements at `from`, followed by zeros, one by one; count <= 0: zeros only, and `from` is not read.
template <typename T>
__device__ inline void copy_elements(std::byte* to, const T* from, int32_t count) {
  constexpr int kChunk = kChunkBytes / sizeof(T);
  const Words words = load_vector(from, count < 0 ? 0 : count < kChunk ? count : kChunk, false);
  *reinterpret_cast<uint4*>(to) = make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]);
}

// values[i] without indexed registers.
template <int kCount>
__device__ inline int32_t element_of(const int32_t (&values)[kCount], int i) {
  int32_t value = values[0];
#pragma unroll
  for (int k = 1; k < kCount; ++k) value = i == k ? values[k] : value;
  return value;
}

// The start of row `row` of aligned rows, whose stride in bytes fits into 32 bits: one instruction for each chunk.
template <typename T>
struct AlignedRows {
  uintptr_t start;
  uint32_t row_bytes;

  __device__ AlignedRows(const T* data, int64_t stride, int32_t at)
      : start(reinterpret_cast<uintptr_t>(data) + static_cast<int64_t>(at) * sizeof(T)),
        row_bytes(static_cast<uint32_t>(stride * static_cast<int64_t>(sizeof(T)))) {}
  __device__ const void* row(int32_t row) const {
    return reinterpret_cast<const void*>(start + static_cast<uint64_t>(static_cast<uint32_t>(row)) * row_bytes);
  }
};

// Offset of chunk `chunk` of a row of depth_bytes. Two neighbouring rows of 64 bytes share a line of 128.
template <int kDepthBytes>
__device__ inline int depth_major_offset(int row, int chunk) {
  static_assert(kDepthBytes == 64 || kDepthBytes == 128);
  if constexpr (kDepthBytes == 128) return row * 128 + ((chunk ^ (row & 7)) * kChunkBytes);
  return row / 2 * 128 + (((row & 1) * 4 + (chunk ^ (row / 2 & 3))) * kChunkBytes);
}

// 16-bit elements are read by ldmatrix.trans, eight depths at a time. float32 is read by words, 4 depths x 8 rows per warp.
template <typename T, int kRows>
__device__ inline int row_major_offset(int depth, int chunk) {
  const int permutation = sizeof(T) == 2 ? depth & 7 : (depth & 3) * 2;
  return depth * kRows * static_cast<int>(sizeof(T)) + ((chunk ^ permutation) * kChunkBytes);
}

// A thread copies the same chunk of every kStep-th row.
template <typename T, int kRows, int kDepthBytes, int kThreads>
class DepthMajorTile {
  static constexpr int kChunks = kDepthBytes / kChunkBytes;
  static constexpr int kStep = kThreads / kChunks;
  static constexpr int kPerThread = (kRows + kStep - 1) / kStep;
  static_assert(kThreads % kChunks == 0);

 public:
  // Row i of the tile is row row_at(i) of `data`, or zeros if that is negative. Stores indices instead of addresses: registers
  // are scarce, multiplications are not.
  template <typename RowAt>
  __device__ DepthMajorTile(const T* data, int64_t stride, const RowAt& row_at, int thread, bool aligned)
      : data_(data), stride_(stride), first_row_(thread / kChunks), chunk_(thread % kChunks), aligned_(aligned) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int row = first_row_ + i * kStep;
      rows_[i] = row < kRows ? row_at(row) : -1;
    }
  }

  // Loads depths [depth, …) up to `end`.
  __device__ void load(std::byte* tile, int32_t depth, int32_t end) {
    constexpr int kChunk = kChunkBytes / sizeof(T);
    const int32_t at = depth + chunk_ * kChunk, left = end - at;
    if (aligned_ && (left >= kChunk || left <= 0)) {
      const AlignedRows<T> from(data_, stride_, at);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int row = first_row_ + i * kStep;
        if (kRows % kStep != 0 && row >= kRows) continue;
        ptx::cp_async16(tile + depth_major_offset<kDepthBytes>(row, chunk_), from.row(rows_[i]),
                        rows_[i] >= 0 && left > 0);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPerThread; ++i) {
        const int row = first_row_ + i * kStep;
        if (kRows % kStep != 0 && row >= kRows) continue;
        const int32_t from = element_of(rows_, i);
        const bool used = from >= 0 && left > 0;
        copy_elements(tile + depth_major_offset<kDepthBytes>(row, chunk_), used ? data_ + from * stride_ + at : data_,
                      used ? left : 0);
      }
    }
  }

 private:
  const T* data_;
  int64_t stride_;
  int32_t rows_[kPerThread];
  int first_row_, chunk_;
  bool aligned_;
};

// A thread copies the same chunk of the rows at every kStep-th depth. Depths may be gathered; their indices are read one stage
// ahead, so that no copy waits for them.
template <typename T, int kRows, int kDepthBytes, int kThreads>
class RowMajorTile {
  static constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));
  static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kRows / kChunk;
  static constexpr int kStep = kThreads / kChunks;
  static constexpr int kPerThread = kDepth / kStep;
  static_assert(kThreads % kChunks == 0 && kDepth % kStep == 0 && kStep > 0);

 public:
  // Row r(d) of `rows` belongs to depth d. `first_column` and `count` describe the thread's chunk (chunk_row).
  __device__ RowMajorTile(const Rows& rows, int32_t first_column, int32_t count, int thread, bool aligned,
                          int32_t begin, int32_t end)
      : data_(static_cast<const T*>(rows.data) + (count > 0 ? first_column : 0)),
        stride_(rows.stride),
        num_rows_(static_cast<int32_t>(rows.count)),
        indices_(rows.indices),
        count_(count < 0        ? 0
               : count < kChunk ? static_cast<int>(count)
                                : kChunk),
        first_depth_(thread / kChunks),
        chunk_(thread % kChunks),
        aligned_(aligned) {
    read_indices(begin, end);
  }

  static __device__ int chunk_row(int thread) { return thread % kChunks * kChunk; }  // first row of a thread's chunks

  __device__ void load(std::byte* tile, int32_t depth, int32_t end) {
    int32_t row[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) row[i] = indices_ != nullptr ? next_[i] : row_of(depth, end, i);
    read_indices(depth + kDepth, end);
    if (aligned_ && (count_ == kChunk || count_ == 0)) {
      const AlignedRows<T> from(data_, stride_, 0);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const bool inside = static_cast<uint32_t>(row[i]) < static_cast<uint32_t>(num_rows_);
        ptx::cp_async16(tile + row_major_offset<T, kRows>(first_depth_ + i * kStep, chunk_), from.row(row[i]),
                        inside && count_ > 0);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPerThread; ++i) {
        const int32_t from = element_of(row, i);
        const bool inside = from >= 0 && from < num_rows_;
        copy_elements(tile + row_major_offset<T, kRows>(first_depth_ + i * kStep, chunk_),
                      inside ? data_ + from * stride_ : data_, inside ? count_ : 0);
      }
    }
  }

 private:
  __device__ int32_t row_of(int32_t depth, int32_t end, int i) const {
    const int32_t at = depth + first_depth_ + i * kStep;
    return at < end ? at : -1;
  }

  __device__ void read_indices(int32_t depth, int32_t end) {
    if (indices_ == nullptr) return;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int32_t at = row_of(depth, end, i);
      next_[i] = at >= 0 ? indices_[at] : -1;
    }
  }

  const T* data_;
  int64_t stride_;
  int32_t num_rows_;
  const int32_t* indices_;
  int32_t next_[kPerThread];
  int count_, first_depth_, chunk_;
  bool aligned_;
};

}  // namespace switchgear::cuda
