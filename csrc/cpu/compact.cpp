// SPDX-License-Identifier: BSD-3-Clause
// Between bfloat16 and compact rows: once when weights are packed, and when they are saved; so in plain C++.
#include "compact.h"

#include <array>
#include <vector>

#include "switchgear/check.h"
#include "threads.h"

namespace switchgear {
namespace {

using namespace cpu;

constexpr int kCodes = 16;

int exponent_of(uint16_t bits) { return bits >> 7 & 0xff; }

// The exponents that most elements have, ascending; of two as frequent, the lower one.
std::array<uint8_t, kCodes> frequent_exponents(const uint16_t* elements, int64_t count) {
  std::array<int64_t, 256> counts{};
  for (int64_t i = 0; i < count; ++i) ++counts[exponent_of(elements[i])];
  std::array<uint8_t, 256> order;
  for (int e = 0; e < 256; ++e) order[e] = static_cast<uint8_t>(e);
  std::stable_sort(order.begin(), order.end(), [&](uint8_t a, uint8_t b) { return counts[a] > counts[b]; });
  std::array<uint8_t, kCodes> chosen;
  std::copy_n(order.begin(), kCodes, chosen.begin());
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

struct Codes {
  std::array<uint8_t, kCodes> exponents;
  std::array<int8_t, 256> code;  // of an exponent, -1 for none

  explicit Codes(const std::array<uint8_t, kCodes>& of) : exponents(of) {
    code.fill(-1);
    for (int i = 0; i < kCodes; ++i) code[exponents[i]] = static_cast<int8_t>(i);
  }
};

// Returns the number of exceptions, of which those that find room are written.
int64_t pack_row(uint8_t* out, int64_t header, const uint16_t* row, int64_t cols, const Codes& codes) {
  std::memset(out, 0, static_cast<size_t>(header));
  std::memcpy(out, codes.exponents.data(), kCodes);
  const int64_t room = CompactExceptions::room(header);
  uint8_t* record = out + header;
  uint8_t* exception = out + CompactExceptions::kFirst;
  int64_t exceptions = 0;
  for (int64_t first = 0; first < cols; first += kCompactRecord, record += kCompactRecordBytes) {
    std::memset(record, 0, kCompactRecordBytes);
    const int64_t count = std::min(kCompactRecord, cols - first);
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t bits = row[first + i];
      const int code = codes.code[exponent_of(bits)];
      const int64_t half = i / 64, place = compact_place(i);
      record[64 * half + place] = static_cast<uint8_t>((bits >> 8 & 0x80) | (bits & 0x7f));
      record[128 + place] |= static_cast<uint8_t>(std::max(code, 0) << 4 * half);
      if (code >= 0) continue;
      if (exceptions++ < room) {
        const auto column = static_cast<uint16_t>(first + i);
        std::memcpy(exception, &column, 2);
        std::memcpy(exception + 2, &bits, 2);
        exception += CompactExceptions::kBytes;
      }
    }
  }
  const auto written = static_cast<uint16_t>(std::min(exceptions, room));
  std::memcpy(out + CompactExceptions::kCount, &written, 2);
  return exceptions;
}

void expand_row(uint16_t* out, const CompactRow& row, int64_t cols) {
  CompactExceptions exceptions(row);
  for (int64_t r = 0, first = 0; first < cols; ++r, first += kCompactRecord) {
    const uint8_t* const record = row.record(r);
    uint16_t elements[kCompactRecord];
    for (int64_t i = 0; i < kCompactRecord; ++i) {
      const int64_t half = i / 64, place = compact_place(i);
      const int byte = record[64 * half + place], code = record[128 + place] >> 4 * half & 0xf;
      elements[i] = static_cast<uint16_t>((byte & 0x80) << 8 | row.exponents()[code] << 7 | (byte & 0x7f));
    }
    exceptions.apply(r, [&](int64_t i, uint16_t bits) { elements[i] = bits; });
    std::memcpy(out + first, elements, static_cast<size_t>(std::min(kCompactRecord, cols - first)) * 2);
  }
}

// weight [E,N,C] bfloat16, compact [E,N,B] uint8, both contiguous
void check_shapes(const TensorView& weight, const TensorView& compact) {
  SWITCHGEAR_CHECK(ValueError, weight.dtype == DType::kBFloat16 && weight.ndim == 3 && weight.contiguous(),
                   "weight: expected contiguous bfloat16 [E, N, C], got ", describe(weight));
  const int64_t cols = weight.shape[2], header = compact_header(compact.shape[2], cols);
  SWITCHGEAR_CHECK(ValueError, cols <= kMaxCompactColumns, "weight: expected at most ", kMaxCompactColumns,
                   " columns, got ", describe(weight));
  SWITCHGEAR_CHECK(ValueError,
                   compact.dtype == DType::kUInt8 && compact.ndim == 3 && compact.contiguous() &&
                       compact.shape[0] == weight.shape[0] && compact.shape[1] == weight.shape[1] &&
                       header >= kCompactHeader && header % kCompactHeader == 0,
                   "compact: expected contiguous uint8 rows for weight ", describe(weight), ", got ",
                   describe(compact));
}

}  // namespace

int64_t compact_row_bytes(int64_t cols, int64_t exceptions) {
  const int64_t header = CompactExceptions::kFirst + exceptions * CompactExceptions::kBytes;
  return (header + kCompactHeader - 1) / kCompactHeader * kCompactHeader + compact_records_bytes(cols);
}

int64_t pack_compact(const TensorView& weight, const TensorView& compact, Execution exec) {
  check_shapes(weight, compact);
  const int64_t num_experts = weight.shape[0], rows = weight.shape[1], cols = weight.shape[2];
  const int64_t row_bytes = compact.shape[2], header = compact_header(row_bytes, cols);
  std::vector<int64_t> most(static_cast<size_t>(num_experts), 0);  // exceptions in a row, by expert
  parallel_for_shares(resolve_threads(exec.num_threads), num_experts, [&](int64_t e, int) {
    const uint16_t* const matrix = weight.as<uint16_t>() + e * rows * cols;
    const Codes codes(frequent_exponents(matrix, rows * cols));
    for (int64_t n = 0; n < rows; ++n) {
      uint8_t* const out = compact.as<uint8_t>() + (e * rows + n) * row_bytes;
      int64_t& known = most[static_cast<size_t>(e)];
      known = std::max(known, pack_row(out, header, matrix + n * cols, cols, codes));
    }
  });
  return most.empty() ? 0 : *std::max_element(most.begin(), most.end());
}

void expand_compact(const TensorView& compact, const TensorView& weight, Execution exec) {
  check_shapes(weight, compact);
  const int64_t rows = weight.shape[0] * weight.shape[1], cols = weight.shape[2], row_bytes = compact.shape[2];
  const int64_t header = compact_header(row_bytes, cols);
  parallel_for_shares(resolve_threads(exec.num_threads), rows, [&](int64_t n, int) {
    expand_row(weight.as<uint16_t>() + n * cols, {compact.as<uint8_t>() + n * row_bytes, header}, cols);
  });
}

}  // namespace switchgear
