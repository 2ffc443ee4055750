// SPDX-License-Identifier: BSD-3-Clause
// Conversion between plain and compact rows. It runs only when weights are packed or saved, so it is plain C++.
#include "compact.h"

#include <array>
#include <vector>

#include "checks.h"
#include "switchgear/check.h"
#include "threads.h"

namespace switchgear {
namespace {

using namespace cpu;

constexpr int kCodes = 16;

uint16_t upper_half(uint16_t bits) { return bits; }
uint16_t upper_half(uint32_t bits) { return static_cast<uint16_t>(bits >> 16); }

int exponent_of(uint16_t upper) { return upper >> 7 & 0xff; }

// The 16 most frequent exponents, ascending; of equally frequent ones, the lower.
template <typename Bits>
std::array<uint8_t, kCodes> frequent_exponents(const Bits* elements, int64_t count) {
  std::array<int64_t, 256> counts{};
  for (int64_t i = 0; i < count; ++i) ++counts[exponent_of(upper_half(elements[i]))];
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
  std::array<int8_t, 256> code;  // by exponent, -1 for none

  explicit Codes(const std::array<uint8_t, kCodes>& of) : exponents(of) {
    code.fill(-1);
    for (int i = 0; i < kCodes; ++i) code[exponents[i]] = static_cast<int8_t>(i);
  }
};

// Elements as bits: uint16_t for bfloat16, uint32_t for float32.
template <typename Bits>
constexpr bool kHasHalves = sizeof(Bits) == 4;
template <typename Bits>
constexpr DType kDType = kHasHalves<Bits> ? DType::kFloat32 : DType::kBFloat16;

// Position in a record of the upper half of element i.
template <typename Bits>
int64_t place_of(int64_t i) {
  return kHasHalves<Bits> ? compact_place_of_halves(i) : i;
}

// Returns the number of exceptions; writes as many as the header has space for.
template <typename Bits>
int64_t pack_row(uint8_t* out, int64_t header, const Bits* row, int64_t cols, const Codes& codes) {
  constexpr int64_t kRecordBytes = compact_record_bytes(kDType<Bits>);
  std::memset(out, 0, static_cast<size_t>(header));
  std::memcpy(out, codes.exponents.data(), kCodes);
  out[kCompactElementBytes] = sizeof(Bits);
  const int64_t room = CompactExceptions::room(header);
  uint8_t* record = out + header;
  uint8_t* exception = out + CompactExceptions::kFirst;
  int64_t exceptions = 0;
  for (int64_t first = 0; first < cols; first += kCompactRecord, record += kRecordBytes) {
    std::memset(record, 0, kRecordBytes);
    const int64_t count = std::min(kCompactRecord, cols - first);
    for (int64_t i = 0; i < count; ++i) {
      const Bits bits = row[first + i];
      const uint16_t upper = upper_half(bits);
      const int code = codes.code[exponent_of(upper)];
      const int64_t at = place_of<Bits>(i), half = at / 64, place = compact_place(at);
      record[64 * half + place] = static_cast<uint8_t>((upper >> 8 & 0x80) | (upper & 0x7f));
      record[128 + place] |= static_cast<uint8_t>(std::max(code, 0) << 4 * half);
      if constexpr (kHasHalves<Bits>) {
        const auto lower = static_cast<uint16_t>(bits);
        std::memcpy(record + kLowerHalves + 2 * at, &lower, 2);
      }
      if (code >= 0) continue;
      if (exceptions++ < room) {
        const auto column = static_cast<uint16_t>(first + i);
        std::memcpy(exception, &column, 2);
        std::memcpy(exception + 2, &upper, 2);
        exception += CompactExceptions::kBytes;
      }
    }
  }
  const auto written = static_cast<uint16_t>(std::min(exceptions, room));
  std::memcpy(out + CompactExceptions::kCount, &written, 2);
  return exceptions;
}

template <typename Bits>
void expand_row(Bits* out, const CompactRow& row, int64_t cols) {
  CompactExceptions exceptions(row);
  const uint8_t* record = row.records();
  for (int64_t r = 0, first = 0; first < cols; ++r, first += kCompactRecord) {
    uint16_t upper[kCompactRecord];
    for (int64_t i = 0; i < kCompactRecord; ++i) {
      const int64_t at = place_of<Bits>(i), half = at / 64, place = compact_place(at);
      const int byte = record[64 * half + place], code = record[128 + place] >> 4 * half & 0xf;
      upper[i] = static_cast<uint16_t>((byte & 0x80) << 8 | row.exponents()[code] << 7 | (byte & 0x7f));
    }
    exceptions.apply(r, [&](int64_t i, uint16_t bits) { upper[i] = bits; });
    for (int64_t i = 0; i < std::min(kCompactRecord, cols - first); ++i) {
      Bits bits = upper[i];
      if constexpr (kHasHalves<Bits>) {
        uint16_t lower;
        std::memcpy(&lower, record + kLowerHalves + 2 * place_of<Bits>(i), 2);
        bits = bits << 16 | lower;
      }
      out[first + i] = bits;
    }
    record += compact_record_bytes(kDType<Bits>);
  }
}

// weight [E,N,C] bfloat16 or float32, contiguous; compact [E,N,B] uint8, its experts contiguous
void check(const TensorView& weight, const TensorView& compact, bool is_contiguous) {
  SWITCHGEAR_CHECK(
      ValueError,
      (weight.dtype == DType::kBFloat16 || weight.dtype == DType::kFloat32) && weight.ndim == 3 && weight.contiguous(),
      "weight: expected contiguous bfloat16 or float32 [E, N, C], got ", describe(weight));
  const int64_t cols = weight.shape[2], header = compact_header(compact.shape[2], cols, weight.dtype);
  SWITCHGEAR_CHECK(ValueError, cols <= kMaxCompactColumns, "weight: expected at most ", kMaxCompactColumns,
                   " columns, got ", describe(weight));
  SWITCHGEAR_CHECK(
      ValueError,
      compact.dtype == DType::kUInt8 && compact.ndim == 3 && is_contiguous && compact.shape[0] == weight.shape[0] &&
          compact.shape[1] == weight.shape[1] && header >= kCompactHeader && header % kCompactHeader == 0,
      "compact: expected contiguous uint8 rows for weight ", describe(weight), ", got ", describe(compact));
  check_host("weight", weight);
  check_host("compact", compact);
  SWITCHGEAR_CHECK(ValueError, !share_memory(weight, compact),
                   "compact: expected memory of its own, got memory shared with weight");
}

// Calls function(tag); the tag's type holds the bits of an element.
template <typename Function>
auto with_bits(DType dtype, Function&& function) {
  return dtype == DType::kFloat32 ? function(uint32_t{}) : function(uint16_t{});
}

}  // namespace

int64_t compact_row_bytes(int64_t cols, int64_t exceptions, DType dtype) {
  const int64_t header = CompactExceptions::kFirst + exceptions * CompactExceptions::kBytes;
  return (header + kCompactHeader - 1) / kCompactHeader * kCompactHeader + compact_records_bytes(cols, dtype);
}

int64_t pack_compact(const TensorView& weight, const TensorView& compact, Execution exec) {
  check_threads(exec);
  check(weight, compact, compact.contiguous());
  const int64_t num_experts = weight.shape[0], rows = weight.shape[1], cols = weight.shape[2];
  const int64_t row_bytes = compact.shape[2], header = compact_header(row_bytes, cols, weight.dtype);
  std::vector<int64_t> most(static_cast<size_t>(num_experts), 0);  // most exceptions in a row, by expert
  with_bits(weight.dtype, [&]<typename Bits>(Bits) {
    parallel_for_shares(resolve_threads(exec.num_threads), num_experts, [&](int64_t e, int) {
      const Bits* const matrix = weight.as<Bits>() + e * rows * cols;
      const Codes codes(frequent_exponents(matrix, rows * cols));
      for (int64_t n = 0; n < rows; ++n) {
        uint8_t* const out = compact.as<uint8_t>() + (e * rows + n) * row_bytes;
        int64_t& known = most[static_cast<size_t>(e)];
        known = std::max(known, pack_row(out, header, matrix + n * cols, cols, codes));
      }
    });
  });
  return most.empty() ? 0 : *std::max_element(most.begin(), most.end());
}

void expand_compact(const TensorView& compact, const TensorView& weight, Execution exec) {
  check_threads(exec);
  check(weight, compact, compact.contiguous() || (compact.ndim == 3 && compact.contiguous_apart()));
  SWITCHGEAR_CHECK(TypeError,
                   compact.numel() == 0 || compact.as<uint8_t>()[kCompactElementBytes] == size_of(weight.dtype),
                   "compact: expected compact ", name_of(weight.dtype), " like weight, got compact elements of ",
                   int{compact.as<uint8_t>()[kCompactElementBytes]}, " bytes");
  const int64_t rows = weight.shape[1], cols = weight.shape[2], row_bytes = compact.shape[2];
  const int64_t header = compact_header(row_bytes, cols, weight.dtype);
  with_bits(weight.dtype, [&]<typename Bits>(Bits) {
    parallel_for_shares(resolve_threads(exec.num_threads), weight.shape[0] * rows, [&](int64_t i, int) {
      const uint8_t* const row = compact.as<uint8_t>() + i / rows * compact.stride[0] + i % rows * row_bytes;
      expand_row(weight.as<Bits>() + i * cols, {row, header}, cols);
    });
  });
}

}  // namespace switchgear
