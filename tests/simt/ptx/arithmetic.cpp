// SPDX-License-Identifier: BSD-3-Clause
// Sums, products, quotients, and functions of floats. Approximate ones are exact here, as in tests/simt.
#include <cfenv>
#include <cmath>
#include <limits>

#include "decode.h"

namespace simt::ptx {
namespace {

template <typename T>
constexpr bool is_float = std::is_floating_point_v<T>;
template <typename T>
constexpr bool is_integer = std::is_integral_v<T> && !std::is_same_v<T, bool>;

template <typename T>
T sum(T a, T b) {
  if constexpr (is_float<T>) return a + b;
  return static_cast<T>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}
template <typename T>
T difference(T a, T b) {
  if constexpr (is_float<T>) return a - b;
  return static_cast<T>(static_cast<uint64_t>(a) - static_cast<uint64_t>(b));
}
template <typename T>
T product(T a, T b) {
  if constexpr (is_float<T>) return a * b;
  return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}
template <typename T>
T high_product(T a, T b) {
  if constexpr (is_float<T>) return T{};
  return static_cast<T>((static_cast<__int128>(a) * static_cast<__int128>(b)) >> (8 * sizeof(T)));
}
template <typename T>
T quotient(T a, T b) {
  if constexpr (is_float<T>) {
    return a / b;
  } else {
    if (b == 0) return static_cast<T>(-1);
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return difference<T>(0, a);
    }
    return static_cast<T>(a / b);
  }
}
template <typename T>
T remainder_of(T a, T b) {
  if constexpr (is_float<T>) {
    return T{};
  } else {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return 0;
    }
    return static_cast<T>(a % b);
  }
}
// If one is NaN the result is the other; -0 is less than +0.
template <typename T>
T least(T a, T b) {
  if constexpr (is_float<T>) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}
template <typename T>
T greatest(T a, T b) {
  if constexpr (is_float<T>) {
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}
template <typename T>
T with_sign_of(T sign, T value) {
  if constexpr (is_float<T>) return std::copysign(value, sign);
  return T{};
}
template <typename T>
T negative(T a) {
  if constexpr (is_float<T>) return -a;
  return difference<T>(0, a);
}
template <typename T>
T magnitude(T a) {
  if constexpr (is_float<T>) return std::fabs(a);
  return a < T{0} ? difference<T>(0, a) : a;
}

// ---- steps --------------------------------------------------------------------------------------------------------------

template <typename T, T (*f)(T)>
const Instruction* unary(Thread& t, const Instruction& i) {
  set<T>(t, i.slot[0], f(get<T>(t, i.slot[1])));
  return next(i);
}
template <typename T, T (*f)(T, T)>
const Instruction* binary(Thread& t, const Instruction& i) {
  set<T>(t, i.slot[0], f(get<T>(t, i.slot[1]), get<T>(t, i.slot[2])));
  return next(i);
}

template <typename T>
using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;

// The product of the inputs' width times two.
template <typename T>
const Instruction* wide_product(Thread& t, const Instruction& i) {
  const Wide<T> value = static_cast<Wide<T>>(get<T>(t, i.slot[1])) * static_cast<Wide<T>>(get<T>(t, i.slot[2]));
  set<Wide<T>>(t, i.slot[0], value);
  return next(i);
}
template <typename T>
const Instruction* wide_product_sum(Thread& t, const Instruction& i) {
  const Wide<T> value = static_cast<Wide<T>>(get<T>(t, i.slot[1])) * static_cast<Wide<T>>(get<T>(t, i.slot[2]));
  set<uint64_t>(t, i.slot[0], static_cast<uint64_t>(value) + get<uint64_t>(t, i.slot[3]));
  return next(i);
}
template <typename T, T (*multiply)(T, T)>
const Instruction* product_sum(Thread& t, const Instruction& i) {
  set<T>(t, i.slot[0], sum<T>(multiply(get<T>(t, i.slot[1]), get<T>(t, i.slot[2])), get<T>(t, i.slot[3])));
  return next(i);
}
template <typename T>
const Instruction* fused(Thread& t, const Instruction& i) {
  set<T>(t, i.slot[0], std::fma(get<T>(t, i.slot[1]), get<T>(t, i.slot[2]), get<T>(t, i.slot[3])));
  return next(i);
}
// Rounded in the direction of `mode`, one of <cfenv>'s.
template <typename T>
const Instruction* fused_directed(Thread& t, const Instruction& i) {
  const volatile T a = get<T>(t, i.slot[1]), b = get<T>(t, i.slot[2]), c = get<T>(t, i.slot[3]);
  const int usual = std::fegetround();
  std::fesetround(static_cast<int>(i.mode));
  const volatile T value = std::fma(a, b, c);
  std::fesetround(usual);
  set<T>(t, i.slot[0], value);
  return next(i);
}

float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }

template <bool kFlush>
const Instruction* exp2_of(Thread& t, const Instruction& i) {
  const float x = get<float>(t, i.slot[1]);
  set<float>(t, i.slot[0], kFlush ? flushed(std::exp2(flushed(x))) : std::exp2(x));
  return next(i);
}

template <typename T>
T reciprocal(T x) {
  return T{1} / x;
}
const Instruction* reciprocal_flushed(Thread& t, const Instruction& i) {
  set<float>(t, i.slot[0], flushed(1.0f / flushed(get<float>(t, i.slot[1]))));
  return next(i);
}
template <typename T>
T square_root(T x) {
  return std::sqrt(x);
}
template <typename T>
T reciprocal_root(T x) {
  return T{1} / std::sqrt(x);
}
template <typename T>
T logarithm(T x) {
  return std::log2(x);
}

#define UNARY(f) with_type(opcode.type(), []<typename T>() -> Step { return unary<T, f<T>>; })
#define BINARY(f) with_type(opcode.type(), []<typename T>() -> Step { return binary<T, f<T>>; })
#define FLOATS(f) (opcode.type() == Type::kF64 ? Step(unary<double, f<double>>) : Step(unary<float, f<float>>))

Step integers_only(const Opcode& opcode, Step step) {
  if (opcode.type() >= Type::kF16) unknown();
  return step;
}

Step decode_product(const Opcode& opcode) {
  if (opcode.has("hi")) return integers_only(opcode, BINARY(high_product));
  if (!opcode.has("wide")) return BINARY(product);
  return with_type(opcode.type(), []<typename T>() -> Step {
    if constexpr (is_integer<T> && sizeof(T) <= 4) return wide_product<T>;
    unknown();
  });
}

Step decode_product_sum(const Opcode& opcode) {
  return with_type(opcode.type(), [&]<typename T>() -> Step {
    if constexpr (is_integer<T>) {
      if (opcode.has("lo")) return product_sum<T, product<T>>;
      if (opcode.has("hi")) return product_sum<T, high_product<T>>;
      if (opcode.has("wide") && sizeof(T) == 4) return wide_product_sum<T>;
    }
    unknown();
  });
}

Step decode_fused(const Opcode& opcode, Instruction& instruction) {
  const bool is_double = opcode.type() == Type::kF64;
  if (!is_double && opcode.type() != Type::kF32) unknown();
  if (opcode.has("rn")) return is_double ? Step(fused<double>) : Step(fused<float>);
  instruction.mode = static_cast<uint32_t>(opcode.has("rm")   ? FE_DOWNWARD
                                           : opcode.has("rp") ? FE_UPWARD
                                                              : FE_TOWARDZERO);
  return is_double ? Step(fused_directed<double>) : Step(fused_directed<float>);
}

}  // namespace

Step decode_arithmetic(const Opcode& opcode, Instruction& instruction) {
  const std::string_view stem = opcode.stem();
  if (!opcode.consists_of({"lo", "hi", "wide", "rn", "rm", "rp", "rz", "approx", "full", "ftz"})) return nullptr;
  if (opcode.text() == "rcp.approx.ftz.f32") return reciprocal_flushed;
  if (opcode.has("ftz") && stem != "ex2") return nullptr;
  if (stem == "fma") return decode_fused(opcode, instruction);
  if (opcode.has("rm") || opcode.has("rp") || opcode.has("rz")) return nullptr;
  if (stem == "add") return BINARY(sum);
  if (stem == "sub") return BINARY(difference);
  if (stem == "mul") return decode_product(opcode);
  if (stem == "mad") return decode_product_sum(opcode);
  if (stem == "div") return BINARY(quotient);
  if (stem == "rem") return integers_only(opcode, BINARY(remainder_of));
  if (stem == "min") return BINARY(least);
  if (stem == "max") return BINARY(greatest);
  if (stem == "copysign") return BINARY(with_sign_of);
  if (stem == "neg") return UNARY(negative);
  if (stem == "abs") return UNARY(magnitude);
  if (stem == "ex2") return opcode.has("ftz") ? Step(exp2_of<true>) : Step(exp2_of<false>);
  if (stem == "rcp") return FLOATS(reciprocal);
  if (stem == "sqrt") return FLOATS(square_root);
  if (stem == "rsqrt") return FLOATS(reciprocal_root);
  if (stem == "lg2") return FLOATS(logarithm);
  return nullptr;
}

}  // namespace simt::ptx
