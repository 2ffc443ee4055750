// SPDX-License-Identifier: BSD-3-Clause
// Arithmetic on 16-bit floats, one or a pair. Each result is rounded once: sums are first rounded to odd, with more bits than
// twice those of the result, and then to nearest.
#include <cmath>

#include "decode.h"
#include "half.h"

namespace simt::ptx {
namespace {

// Inexact results are cut off, and their last bit set.
double odd_sum(double a, double b) {
  const double sum = a + b;
  const double part = sum - a, error = (a - (sum - part)) + (b - part);
  if (error == 0.0 || !std::isfinite(sum)) return sum;
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  if ((sum > 0.0) != (error > 0.0)) --bits;
  return std::bit_cast<double>(bits | 1);
}
float odd_float(double value) {
  const float rounded = static_cast<float>(value);
  if (static_cast<double>(rounded) == value || !std::isfinite(rounded)) return rounded;
  uint32_t bits = std::bit_cast<uint32_t>(rounded);
  if (std::fabs(static_cast<double>(rounded)) > std::fabs(value)) --bits;
  return std::bit_cast<float>(bits | 1);
}

struct Half {
  static float widen(uint16_t bits) { return half_to_float(bits); }
  static uint16_t narrow(float value) { return float_to_half(value); }
};
struct Bfloat {
  static float widen(uint16_t bits) { return bfloat_to_float(bits); }
  static uint16_t narrow(float value) { return float_to_bfloat(value); }
};

enum class Operation { kAdd, kSub, kMul, kFma, kMin, kMax, kNeg, kAbs };

template <typename T, Operation kOperation>
uint16_t apply(uint16_t first, uint16_t second, uint16_t third) {
  if (kOperation == Operation::kNeg) return first ^ 0x8000;
  if (kOperation == Operation::kAbs) return first & 0x7fff;
  const float a = T::widen(first), b = T::widen(second), c = T::widen(third);
  switch (kOperation) {
    case Operation::kAdd: return T::narrow(odd_float(odd_sum(a, b)));
    case Operation::kSub: return T::narrow(odd_float(odd_sum(a, -b)));
    case Operation::kMul: return T::narrow(odd_float(double{a} * double{b}));
    case Operation::kFma: return T::narrow(odd_float(odd_sum(double{a} * double{b}, c)));
    case Operation::kMin: return T::narrow(std::fmin(a, b));
    case Operation::kMax: return T::narrow(std::fmax(a, b));
    default: return 0;
  }
}

template <typename T, Operation kOperation, bool kPair>
const Instruction* step(Thread& t, const Instruction& i) {
  const auto word = [&](int operand) { return static_cast<uint32_t>(t.slots[i.slot[operand]]); };
  constexpr bool kUnary = kOperation == Operation::kNeg || kOperation == Operation::kAbs;
  const uint32_t a = word(1), b = kUnary ? 0 : word(2), c = kOperation == Operation::kFma ? word(3) : 0;
  const auto half = [](uint32_t value, int which) { return static_cast<uint16_t>(value >> (16 * which)); };
  uint32_t result = apply<T, kOperation>(half(a, 0), half(b, 0), half(c, 0));
  if (kPair) result |= uint32_t{apply<T, kOperation>(half(a, 1), half(b, 1), half(c, 1))} << 16;
  t.slots[i.slot[0]] = result;
  return next(i);
}

template <Operation kOperation>
Step pick(Type type) {
  switch (type) {
    case Type::kF16: return step<Half, kOperation, false>;
    case Type::kF16x2: return step<Half, kOperation, true>;
    case Type::kBf16: return step<Bfloat, kOperation, false>;
    case Type::kBf16x2: return step<Bfloat, kOperation, true>;
    default: return nullptr;
  }
}

}  // namespace

Step decode_half(const Opcode& opcode, Instruction&) {
  if (!opcode.consists_of({"rn"})) return nullptr;
  const std::string_view stem = opcode.stem();
  if (stem == "add") return pick<Operation::kAdd>(opcode.type());
  if (stem == "sub") return pick<Operation::kSub>(opcode.type());
  if (stem == "mul") return pick<Operation::kMul>(opcode.type());
  if (stem == "fma") return pick<Operation::kFma>(opcode.type());
  if (stem == "min") return pick<Operation::kMin>(opcode.type());
  if (stem == "max") return pick<Operation::kMax>(opcode.type());
  if (stem == "neg") return pick<Operation::kNeg>(opcode.type());
  if (stem == "abs") return pick<Operation::kAbs>(opcode.type());
  return nullptr;
}

}  // namespace simt::ptx
