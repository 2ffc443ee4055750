// SPDX-License-Identifier: BSD-3-Clause
// cvt. A 16-bit float is converted through float, which holds it exactly.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "decode.h"
#include "half.h"

namespace simt::ptx {
namespace {

enum class Round : uint32_t { kNone, kNearest, kNearestInteger, kZeroInteger, kDownInteger, kUpInteger };
constexpr uint32_t kSaturates = 16;  // in `mode`, beside the Round

struct Half {};
struct Bfloat {};

template <typename S>
auto read(const Thread& t, uint16_t slot) {
  if constexpr (std::is_same_v<S, Half>) {
    return half_to_float(get<uint16_t>(t, slot));
  } else if constexpr (std::is_same_v<S, Bfloat>) {
    return bfloat_to_float(get<uint16_t>(t, slot));
  } else {
    return get<S>(t, slot);
  }
}

double to_integer(double value, Round round) {
  switch (round) {
    case Round::kNearestInteger: return std::nearbyint(value);
    case Round::kZeroInteger: return std::trunc(value);
    case Round::kDownInteger: return std::floor(value);
    case Round::kUpInteger: return std::ceil(value);
    default: return value;
  }
}

// Integers from floats saturate, and NaN becomes 0.
template <typename D>
D integer_of(double value) {
  constexpr double kLow = static_cast<double>(std::numeric_limits<D>::min());
  constexpr double kHigh = static_cast<double>(std::numeric_limits<D>::max());
  if (value != value) return D{0};
  if (value <= kLow) return std::numeric_limits<D>::min();
  return value >= kHigh ? std::numeric_limits<D>::max() : static_cast<D>(value);
}

template <typename D, typename S>
const Instruction* convert(Thread& t, const Instruction& i) {
  const auto source = read<S>(t, i.slot[1]);
  using From = std::remove_const_t<decltype(source)>;
  const auto round = static_cast<Round>(i.mode & 15);
  const bool saturates = (i.mode & kSaturates) != 0;
  if constexpr (std::is_integral_v<D> && std::is_floating_point_v<From>) {
    set<D>(t, i.slot[0], integer_of<D>(to_integer(static_cast<double>(source), round)));
  } else if constexpr (std::is_integral_v<D>) {
    __int128 value = source;
    if (saturates) value = std::clamp<__int128>(value, std::numeric_limits<D>::min(), std::numeric_limits<D>::max());
    set<D>(t, i.slot[0], static_cast<D>(value));
  } else if constexpr (std::is_same_v<D, double>) {
    set<double>(t, i.slot[0], to_integer(static_cast<double>(source), round));
  } else {
    float value;
    if constexpr (std::is_floating_point_v<From>) {
      value = static_cast<float>(to_integer(static_cast<double>(source), round));
      if (saturates) value = value > 0.0f ? std::min(value, 1.0f) : 0.0f;  // NaN: 0
    } else {
      value = static_cast<float>(source);
    }
    if constexpr (std::is_same_v<D, Half>) {
      set<uint16_t>(t, i.slot[0], float_to_half(value));
    } else if constexpr (std::is_same_v<D, Bfloat>) {
      set<uint16_t>(t, i.slot[0], float_to_bfloat(value));
    } else {
      set<float>(t, i.slot[0], value);
    }
  }
  return next(i);
}

template <typename S>
Step pick_result(Type type) {
  if (type == Type::kF16) return convert<Half, S>;
  if (type == Type::kBf16) return convert<Bfloat, S>;
  return with_type(type, []<typename D>() -> Step {
    if constexpr (!std::is_same_v<D, bool>) return convert<D, S>;
    unknown();
  });
}

// Two floats to a pair, the first in the upper half.
template <uint16_t (*f)(float)>
const Instruction* convert_pair(Thread& t, const Instruction& i) {
  const uint32_t high = f(get<float>(t, i.slot[1])), low = f(get<float>(t, i.slot[2]));
  set<uint32_t>(t, i.slot[0], high << 16 | low);
  return next(i);
}

// To the nearest tf32, ties away from zero.
const Instruction* convert_tf32(Thread& t, const Instruction& i) {
  const uint32_t bits = get<uint32_t>(t, i.slot[1]);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  set<uint32_t>(t, i.slot[0], finite ? (bits + 0x1000u) & 0xffffe000u : bits);
  return next(i);
}

Round round_of(const Opcode& opcode) {
  if (opcode.has("rni")) return Round::kNearestInteger;
  if (opcode.has("rzi")) return Round::kZeroInteger;
  if (opcode.has("rmi")) return Round::kDownInteger;
  if (opcode.has("rpi")) return Round::kUpInteger;
  return opcode.has("rn") ? Round::kNearest : Round::kNone;
}

}  // namespace

Step decode_conversion(const Opcode& opcode, Instruction& instruction) {
  if (opcode.stem() != "cvt") return nullptr;
  if (opcode.text() == "cvt.rna.tf32.f32") return convert_tf32;
  if (opcode.text() == "cvt.rn.bf16x2.f32") return convert_pair<float_to_bfloat>;
  if (opcode.text() == "cvt.rn.f16x2.f32") return convert_pair<float_to_half>;
  if (!opcode.consists_of({"rn", "rni", "rzi", "rmi", "rpi", "sat"})) unknown();
  instruction.mode = static_cast<uint32_t>(round_of(opcode)) | (opcode.has("sat") ? kSaturates : 0);
  const Type from = opcode.type(1), to = opcode.type(0);
  if (from == Type::kF16) return pick_result<Half>(to);
  if (from == Type::kBf16) return pick_result<Bfloat>(to);
  return with_type(from, [=]<typename S>() -> Step {
    if constexpr (!std::is_same_v<S, bool>) return pick_result<S>(to);
    unknown();
  });
}

}  // namespace simt::ptx
