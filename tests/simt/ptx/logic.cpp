// SPDX-License-Identifier: BSD-3-Clause
// Bits: logic, shifts, counts, and selections of bytes.
#include <algorithm>
#include <bit>

#include "decode.h"

namespace simt::ptx {
namespace {

template <typename T>
T both(T a, T b) {
  return static_cast<T>(a & b);
}
template <typename T>
T either(T a, T b) {
  return static_cast<T>(a | b);
}
template <typename T>
T differ(T a, T b) {
  return static_cast<T>(a ^ b);
}
template <typename T>
T inverse(T a) {
  if constexpr (std::is_same_v<T, bool>) {
    return !a;
  } else {
    return static_cast<T>(~a);
  }
}

template <typename T, T (*f)(T, T)>
const Instruction* binary(Thread& t, const Instruction& i) {
  set<T>(t, i.slot[0], f(get<T>(t, i.slot[1]), get<T>(t, i.slot[2])));
  return next(i);
}
template <typename T>
const Instruction* invert(Thread& t, const Instruction& i) {
  set<T>(t, i.slot[0], inverse(get<T>(t, i.slot[1])));
  return next(i);
}

// Shifts by the width or more give zeros, or copies of the sign.
template <typename T>
const Instruction* shift_left(Thread& t, const Instruction& i) {
  const uint32_t count = get<uint32_t>(t, i.slot[2]);
  const T value = get<T>(t, i.slot[1]);
  set<T>(t, i.slot[0], count >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<uint64_t>(value) << count));
  return next(i);
}
template <typename T>
const Instruction* shift_right(Thread& t, const Instruction& i) {
  const uint32_t count = get<uint32_t>(t, i.slot[2]);
  const T value = get<T>(t, i.slot[1]);
  const T emptied = static_cast<T>(value < T{0} ? -1 : 0);
  set<T>(t, i.slot[0], count >= 8 * sizeof(T) ? emptied : static_cast<T>(value >> count));
  return next(i);
}

template <typename T>
const Instruction* count_ones(Thread& t, const Instruction& i) {
  set<uint32_t>(t, i.slot[0], static_cast<uint32_t>(std::popcount(get<T>(t, i.slot[1]))));
  return next(i);
}
template <typename T>
const Instruction* count_leading_zeros(Thread& t, const Instruction& i) {
  set<uint32_t>(t, i.slot[0], static_cast<uint32_t>(std::countl_zero(get<T>(t, i.slot[1]))));
  return next(i);
}
template <typename T>
const Instruction* reverse_bits(Thread& t, const Instruction& i) {
  const T value = get<T>(t, i.slot[1]);
  T result = 0;
  for (size_t bit = 0; bit < 8 * sizeof(T); ++bit) result = static_cast<T>(result << 1 | (value >> bit & 1));
  set<T>(t, i.slot[0], result);
  return next(i);
}
// The position of the highest one, or with kShift how far left it can be shifted; all ones if there is none.
template <typename T, bool kShift>
const Instruction* find_highest(Thread& t, const Instruction& i) {
  const T value = get<T>(t, i.slot[1]);
  const auto zeros = static_cast<uint32_t>(std::countl_zero(value));
  const uint32_t position = kShift ? zeros : static_cast<uint32_t>(8 * sizeof(T)) - 1 - zeros;
  set<uint32_t>(t, i.slot[0], value == 0 ? 0xffffffffu : position);
  return next(i);
}

// Any function of three inputs, given by its table of eight bits.
const Instruction* table_of_three(Thread& t, const Instruction& i) {
  const uint32_t a = get<uint32_t>(t, i.slot[1]), b = get<uint32_t>(t, i.slot[2]), c = get<uint32_t>(t, i.slot[3]);
  const uint32_t table = get<uint32_t>(t, i.slot[4]);
  uint32_t result = 0;
  for (uint32_t row = 0; row < 8; ++row) {
    if ((table >> row & 1) == 0) continue;
    result |= ((row & 4) != 0 ? a : ~a) & ((row & 2) != 0 ? b : ~b) & ((row & 1) != 0 ? c : ~c);
  }
  set<uint32_t>(t, i.slot[0], result);
  return next(i);
}
// Four bytes of eight; bit 3 of a selector repeats the byte's sign.
const Instruction* select_bytes(Thread& t, const Instruction& i) {
  const uint64_t bytes = uint64_t{get<uint32_t>(t, i.slot[2])} << 32 | get<uint32_t>(t, i.slot[1]);
  const uint32_t selectors = get<uint32_t>(t, i.slot[3]);
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t selector = selectors >> (4 * k) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (selector & 7)) & 0xff);
    if ((selector & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    result |= byte << (8 * k);
  }
  set<uint32_t>(t, i.slot[0], result);
  return next(i);
}
// The middle of {b, a} shifted left (the upper word) or right (the lower one).
template <bool kLeft, bool kWrap>
const Instruction* funnel_shift(Thread& t, const Instruction& i) {
  const uint64_t words = uint64_t{get<uint32_t>(t, i.slot[2])} << 32 | get<uint32_t>(t, i.slot[1]);
  const uint32_t given = get<uint32_t>(t, i.slot[3]);
  const uint32_t count = kWrap ? given & 31 : std::min(given, 32u);
  set<uint32_t>(t, i.slot[0], static_cast<uint32_t>(kLeft ? words << count >> 32 : words >> count));
  return next(i);
}
template <typename T>
const Instruction* extract_field(Thread& t, const Instruction& i) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  const T value = get<T>(t, i.slot[1]);
  const uint32_t start = get<uint32_t>(t, i.slot[2]) & 0xff, size = get<uint32_t>(t, i.slot[3]) & 0xff;
  using U = std::make_unsigned_t<T>;
  U result = start >= kBits ? U{0} : static_cast<U>(static_cast<U>(value) >> start);
  if (size < kBits) result &= static_cast<U>((U{1} << size) - 1);
  if constexpr (std::is_signed_v<T>) {
    const uint32_t last = std::min(start + size - 1, kBits - 1);
    const bool negative = size > 0 && (static_cast<U>(value) >> last & 1) != 0;
    const uint32_t inside = start >= kBits ? 0 : std::min(size, kBits - start);  // bits above are copies of the sign
    if (negative && inside < kBits) result |= static_cast<U>(~U{0} << inside);
  }
  set<T>(t, i.slot[0], size == 0 ? T{0} : static_cast<T>(result));
  return next(i);
}
template <typename T>
const Instruction* insert_field(Thread& t, const Instruction& i) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  const T field = get<T>(t, i.slot[1]), into = get<T>(t, i.slot[2]);
  const uint32_t start = get<uint32_t>(t, i.slot[3]) & 0xff, size = get<uint32_t>(t, i.slot[4]) & 0xff;
  const T ones = size >= kBits ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << size) - 1);
  const T mask = start >= kBits ? T{0} : static_cast<T>(ones << start);
  const T moved = start >= kBits ? T{0} : static_cast<T>(field << start);
  set<T>(t, i.slot[0], static_cast<T>((into & ~mask) | (moved & mask)));
  return next(i);
}

#define BITWISE(f)                                               \
  with_type(opcode.type(), []<typename T>() -> Step {            \
    if constexpr (std::is_integral_v<T>) return binary<T, f<T>>; \
    unknown();                                                   \
  })
#define INTEGERS(f)                                                                                 \
  with_type(opcode.type(), []<typename T>() -> Step {                                               \
    if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool> && sizeof(T) >= 2) return f<T>; \
    unknown();                                                                                      \
  })
#define WORDS(f) (size_of(opcode.type()) == 8 ? Step(f<uint64_t>) : Step(f<uint32_t>))

}  // namespace

Step decode_logic(const Opcode& opcode, Instruction&) {
  const std::string_view stem = opcode.stem();
  if (!opcode.consists_of({"shiftamt", "l", "r", "wrap", "clamp"})) return nullptr;
  if (stem == "and") return BITWISE(both);
  if (stem == "or") return BITWISE(either);
  if (stem == "xor") return BITWISE(differ);
  if (stem == "not") {
    return with_type(opcode.type(), []<typename T>() -> Step {
      if constexpr (std::is_integral_v<T>) return invert<T>;
      unknown();
    });
  }
  if (stem == "shl") return INTEGERS(shift_left);
  if (stem == "shr") return INTEGERS(shift_right);
  if (stem == "popc") return WORDS(count_ones);
  if (stem == "clz") return WORDS(count_leading_zeros);
  if (stem == "brev") return WORDS(reverse_bits);
  if (stem == "bfind" && (opcode.type() == Type::kU32 || opcode.type() == Type::kU64)) {
    const bool words = opcode.type() == Type::kU32;
    if (opcode.has("shiftamt")) return words ? Step(find_highest<uint32_t, true>) : Step(find_highest<uint64_t, true>);
    return words ? Step(find_highest<uint32_t, false>) : Step(find_highest<uint64_t, false>);
  }
  if (stem == "bfe") return INTEGERS(extract_field);
  if (stem == "bfi") return WORDS(insert_field);
  if (stem == "lop3" && opcode.type() == Type::kU32) return table_of_three;
  if (opcode.text() == "prmt.b32") return select_bytes;
  if (stem == "shf") {
    if (opcode.has("l")) return opcode.has("wrap") ? funnel_shift<true, true> : funnel_shift<true, false>;
    return opcode.has("wrap") ? funnel_shift<false, true> : funnel_shift<false, false>;
  }
  return nullptr;
}

}  // namespace simt::ptx
