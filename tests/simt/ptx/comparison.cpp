// SPDX-License-Identifier: BSD-3-Clause
#include "decode.h"

namespace simt::ptx {
namespace {

enum class Compare { kEqual, kNotEqual, kLess, kLessEqual, kGreater, kGreaterEqual, kNumbers, kNan };

// With kUnordered the result is true if an operand is NaN, otherwise false.
template <typename T, Compare kCompare, bool kUnordered>
const Instruction* compare(Thread& t, const Instruction& i) {
  const T a = get<T>(t, i.slot[1]), b = get<T>(t, i.slot[2]);
  bool result = false;
  switch (kCompare) {
    case Compare::kEqual: result = a == b; break;
    case Compare::kNotEqual: result = a < b || a > b; break;
    case Compare::kLess: result = a < b; break;
    case Compare::kLessEqual: result = a <= b; break;
    case Compare::kGreater: result = a > b; break;
    case Compare::kGreaterEqual: result = a >= b; break;
    case Compare::kNumbers: result = a == a && b == b; break;
    case Compare::kNan: result = a != a || b != b; break;
  }
  if (kUnordered) result = result || a != a || b != b;
  set<bool>(t, i.slot[0], result);
  return next(i);
}

template <Compare kCompare>
Step pick(Type type, bool unordered) {
  return with_type(type, [=]<typename T>() -> Step {
    if constexpr (std::is_floating_point_v<T>) {
      if (unordered) return compare<T, kCompare, true>;
    }
    return compare<T, kCompare, false>;
  });
}

Step decode_compare(std::string_view name, Type type) {
  const bool is_float = type == Type::kF32 || type == Type::kF64;
  const bool unordered = name.size() == 3 && name[2] == 'u';
  if (unordered && !is_float) unknown();
  const std::string_view base = unordered ? name.substr(0, 2) : name;
  if (base == "eq") return pick<Compare::kEqual>(type, unordered);
  if (base == "ne") return pick<Compare::kNotEqual>(type, unordered);
  if (base == "lt" || (base == "lo" && !is_float)) return pick<Compare::kLess>(type, unordered);
  if (base == "le" || (base == "ls" && !is_float)) return pick<Compare::kLessEqual>(type, unordered);
  if (base == "gt" || (base == "hi" && !is_float)) return pick<Compare::kGreater>(type, unordered);
  if (base == "ge" || (base == "hs" && !is_float)) return pick<Compare::kGreaterEqual>(type, unordered);
  if (base == "num" && is_float) return pick<Compare::kNumbers>(type, false);
  if (base == "nan" && is_float) return pick<Compare::kNan>(type, false);
  unknown("a comparison that is not known");
}

template <typename T>
const Instruction* choose(Thread& t, const Instruction& i) {
  set<T>(t, i.slot[0], get<T>(t, get<bool>(t, i.slot[3]) ? i.slot[1] : i.slot[2]));
  return next(i);
}

}  // namespace

Step decode_comparison(const Opcode& opcode, Instruction& instruction) {
  if (opcode.stem() == "setp") {
    const bool one_result = instruction.detail->operand_sizes[0] == 1;
    if (opcode.num_parts() != 3 || !one_result) unknown();
    return decode_compare(opcode.part(1), opcode.type());
  }
  if (opcode.stem() != "selp" || opcode.num_parts() != 2) return nullptr;
  switch (size_of(opcode.type())) {
    case 2: return choose<uint16_t>;
    case 4: return choose<uint32_t>;
    case 8: return choose<uint64_t>;
    default: unknown();
  }
}

}  // namespace simt::ptx
