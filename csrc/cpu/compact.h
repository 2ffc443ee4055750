// SPDX-License-Identifier: BSD-3-Clause
// Reading rows of compact weights, in the format of switchgear/compact.h.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "switchgear/compact.h"

namespace switchgear::cpu {

// The bytes of a row: its header, then its records.
struct CompactRow {
  const uint8_t* data;
  int64_t header;

  const uint8_t* exponents() const { return data; }
  const uint8_t* records() const { return data + header; }
};

// Bytes of the header of rows with `row_bytes` bytes and `cols` elements.
inline int64_t compact_header(int64_t row_bytes, int64_t cols, DType dtype) {
  return row_bytes - compact_records_bytes(cols, dtype);
}

// Position of the byte of element i in a record of bfloat16, within its half of 64.
inline int64_t compact_place(int64_t i) { return i % 32 / 8 * 16 + i / 32 % 2 * 8 + i % 8; }

// Position of the halves of element i in a record of float32: interleaving lower and upper ones within 16-byte lanes leaves
// elements in order, 16 at a time.
constexpr int64_t compact_place_of_halves(int64_t i) { return i / 32 * 32 + i % 16 / 4 * 8 + i % 32 / 16 * 4 + i % 4; }
constexpr int64_t kLowerHalves = compact_record_bytes(DType::kBFloat16);  // their offset in a record of float32

// The elements of a row whose exponents have no code, by column. Whatever the bytes are, it reads nothing outside the header.
class CompactExceptions {
 public:
  CompactExceptions() = default;
  explicit CompactExceptions(const CompactRow& row) : next_(row.data + kFirst) {
    uint16_t count;
    std::memcpy(&count, row.data + kCount, sizeof count);
    end_ = next_ + std::min<int64_t>(count, room(row.header)) * kBytes;
  }

  static int64_t room(int64_t header) { return (header - kFirst) / kBytes; }

  // The record of the next one; kNone after the last.
  static constexpr int64_t kNone = INT64_MAX;
  int64_t record() const { return next_ == end_ ? kNone : column() / kCompactRecord; }

  void skip_to(int64_t first_record) {
    while (record() < first_record) next_ += kBytes;
  }
  // Calls set(i, bits) for each exception of a record.
  template <typename Set>
  void apply(int64_t of_record, Set&& set) {
    for (; record() == of_record; next_ += kBytes) {
      uint16_t bits;
      std::memcpy(&bits, next_ + 2, sizeof bits);
      set(column() % kCompactRecord, bits);
    }
  }

  static constexpr int64_t kCount = 16, kFirst = 20, kBytes = 4;  // in the header

 private:
  int64_t column() const {
    uint16_t value;
    std::memcpy(&value, next_, sizeof value);
    return value;
  }
  const uint8_t* next_ = nullptr;
  const uint8_t* end_ = nullptr;
};

}  // namespace switchgear::cpu
