// SPDX-License-Identifier: BSD-3-Clause
// Statements to instructions: finds the function that executes each opcode.
#pragma once
#include <deque>
#include <memory>
#include <optional>
#include <stdexcept>

#include "registers.h"
#include "thread.h"

namespace simt::ptx {

enum class Type : uint8_t {
  kU8,
  kS8,
  kU16,
  kS16,
  kU32,
  kS32,
  kU64,
  kS64,
  kF16,
  kBf16,
  kF32,
  kF64,
  kPred,
  kF16x2,
  kBf16x2,
  kTf32,
  kNone
};
size_t size_of(Type type);

// The words of an opcode. `b` types count as unsigned.
class Opcode {
 public:
  explicit Opcode(std::string_view text);
  std::string_view text() const { return text_; }
  std::string_view stem() const { return parts_[0]; }
  bool has(std::string_view part) const;
  bool starts(std::string_view start) const { return starts_with(text_, start); }
  size_t num_parts() const { return parts_.size(); }
  std::string_view part(size_t i) const { return i < parts_.size() ? parts_[i] : std::string_view(); }
  Type type(size_t i = 0) const { return i < types_.size() ? types_[i] : Type::kNone; }  // the i-th of its types
  // Whether every part after the stem is a type or one of these.
  bool consists_of(std::initializer_list<std::string_view> known) const;

 private:
  std::string_view text_;
  std::vector<std::string_view> parts_;
  std::vector<Type> types_;
};

[[noreturn]] inline void unknown(const char* why = "an instruction that is not known") {
  throw std::runtime_error(why);
}

// Each returns null if the opcode is not of its kind, and may set the instruction's mode and detail.
Step decode_half(const Opcode& opcode, Instruction& instruction);
Step decode_cluster(const Opcode& opcode, Instruction& instruction);
Step decode_arithmetic(const Opcode& opcode, Instruction& instruction);
Step decode_logic(const Opcode& opcode, Instruction& instruction);
Step decode_comparison(const Opcode& opcode, Instruction& instruction);
Step decode_move(const Opcode& opcode, Instruction& instruction);
Step decode_conversion(const Opcode& opcode, Instruction& instruction);
Step decode_load_store(const Opcode& opcode, Instruction& instruction);
Step decode_atomic(const Opcode& opcode, Instruction& instruction);
Step decode_control(const Opcode& opcode, Instruction& instruction);
Step decode_lanes(const Opcode& opcode, Instruction& instruction);
Step decode_matrix(const Opcode& opcode, Instruction& instruction);
Step decode_copy(const Opcode& opcode, Instruction& instruction);
Step decode_hopper(const Opcode& opcode, Instruction& instruction);

// A kernel ready to run.
struct Code {
  const Kernel* kernel;
  Registers registers;
  std::vector<Instruction> instructions;
  std::deque<Detail> details;
};
std::unique_ptr<Code> decode(const Kernel& kernel);

// Calls f.template operator()<T>() with the C++ type.
template <typename F>
Step with_type(Type type, F f) {
  switch (type) {
    case Type::kU8: return f.template operator()<uint8_t>();
    case Type::kS8: return f.template operator()<int8_t>();
    case Type::kU16: return f.template operator()<uint16_t>();
    case Type::kS16: return f.template operator()<int16_t>();
    case Type::kU32: return f.template operator()<uint32_t>();
    case Type::kS32: return f.template operator()<int32_t>();
    case Type::kU64: return f.template operator()<uint64_t>();
    case Type::kS64: return f.template operator()<int64_t>();
    case Type::kF32: return f.template operator()<float>();
    case Type::kF64: return f.template operator()<double>();
    case Type::kPred: return f.template operator()<bool>();
    default: unknown("a type that this instruction is not known with");
  }
}

}  // namespace simt::ptx
