// SPDX-License-Identifier: BSD-3-Clause
#include "decode.h"

#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "control.h"
#include "coverage.h"
#include "runtime.h"
#include "undefined.h"

namespace simt::ptx {
namespace {

Type type_named(std::string_view word) {
  static const std::map<std::string_view, Type> types = {
      {"b8", Type::kU8},     {"u8", Type::kU8},       {"s8", Type::kS8},         {"b16", Type::kU16},
      {"u16", Type::kU16},   {"s16", Type::kS16},     {"b32", Type::kU32},       {"u32", Type::kU32},
      {"s32", Type::kS32},   {"b64", Type::kU64},     {"u64", Type::kU64},       {"s64", Type::kS64},
      {"f16", Type::kF16},   {"bf16", Type::kBf16},   {"f32", Type::kF32},       {"f64", Type::kF64},
      {"pred", Type::kPred}, {"f16x2", Type::kF16x2}, {"bf16x2", Type::kBf16x2}, {"tf32", Type::kTf32}};
  const auto found = types.find(word);
  return found == types.end() ? Type::kNone : found->second;
}

Step execute_step(const Opcode& opcode, Instruction& instruction) {
  constexpr Step (*kDecoders[])(const Opcode&, Instruction&) = {
      decode_half,  decode_cluster,    decode_arithmetic, decode_logic,  decode_comparison,
      decode_move,  decode_conversion, decode_load_store, decode_atomic, decode_control,
      decode_lanes, decode_matrix,     decode_copy,       decode_hopper};
  for (const auto decoder : kDecoders) {
    if (const Step step = decoder(opcode, instruction)) return step;
  }
  unknown();
}

const Instruction* if_true(Thread& thread, const Instruction& i) {
  return get<bool>(thread, i.slot[kGuardSlot]) ? i.detail->after_guard(thread, i) : next(i);
}
const Instruction* if_false(Thread& thread, const Instruction& i) {
  return get<bool>(thread, i.slot[kGuardSlot]) ? next(i) : i.detail->after_guard(thread, i);
}

const Instruction* check_guard(Thread& thread, const Instruction& i) {
  const Detail& detail = *i.detail;
  if (thread.tags[detail.guard_tag] == 0) fail("the guard is read before it is written", detail.at);
  return detail.statement->guard_negated ? if_false(thread, i) : if_true(thread, i);
}

// The first execution of an instruction, by any thread.
const Instruction* first_time(Thread& thread, const Instruction& i) {
  mark_executed(i.detail->statement->opcode);
  const_cast<Instruction&>(i).step = i.detail->after_first;
  return i.step(thread, i);
}

void resolve_operands(const Statement& statement, const Registers& registers, Instruction& instruction) {
  Detail& detail = *instruction.detail;
  for (const Operand& operand : statement.operands) {
    for (const Value value : operand.values) detail.slots.push_back(registers.slots[value]);
    detail.operand_sizes.push_back(operand.values.size());
    detail.offsets.push_back(operand.offset);
    if (operand.address && instruction.offset == 0) instruction.offset = static_cast<int32_t>(operand.offset);
  }
  const size_t count = std::min(detail.slots.size(), kGuardSlot);
  std::copy_n(detail.slots.begin(), count, instruction.slot);
}

// Values whose tags must be checked before, and set after the instruction.
void find_checks(const Statement& statement, const Registers& registers, Detail& detail) {
  bool guard_next = statement.guard >= 0;  // read first, and checked by itself
  const auto add = [&](std::vector<Checked>& list) {
    return [&](Value value) {
      if (std::exchange(guard_next, false)) return;
      if (registers.tags[value] != kUntracked) list.push_back({registers.slots[value], registers.tags[value]});
    };
  };
  for_each_value(statement, add(detail.reads), add(detail.writes));
  detail.passes_undefined = passes_undefined(statement);
}

}  // namespace

size_t size_of(Type type) {
  constexpr size_t kSizes[] = {1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8, 1, 4, 4, 4, 0};
  return kSizes[static_cast<size_t>(type)];
}

Opcode::Opcode(std::string_view text) : text_(text) {
  for (size_t at = 0; at <= text.size();) {
    const size_t dot = std::min(text.find('.', at), text.size());
    parts_.push_back(text.substr(at, dot - at));
    if (const Type type = type_named(parts_.back()); type != Type::kNone) types_.push_back(type);
    at = dot + 1;
  }
}

bool Opcode::has(std::string_view part) const { return std::find(parts_.begin(), parts_.end(), part) != parts_.end(); }

bool Opcode::consists_of(std::initializer_list<std::string_view> known) const {
  return std::all_of(parts_.begin() + 1, parts_.end(), [&](std::string_view part) {
    return type_named(part) != Type::kNone || std::find(known.begin(), known.end(), part) != known.end();
  });
}

std::unique_ptr<Code> decode(const Kernel& kernel) {
  auto code = std::make_unique<Code>();
  code->kernel = &kernel;
  code->registers = assign_registers(kernel);
  code->instructions.resize(kernel.statements.size());
  for (size_t n = 0; n < kernel.statements.size(); ++n) {
    const Statement& statement = kernel.statements[n];
    Instruction& instruction = code->instructions[n];
    Detail& detail = code->details.emplace_back();
    instruction.detail = &detail;
    detail.statement = &statement;
    detail.at = Location(&statement.place);
    detail.value_names = &kernel.value_names;
    if (statement.target >= 0) instruction.target = &code->instructions[static_cast<size_t>(statement.target)];
    resolve_operands(statement, code->registers, instruction);
    find_checks(statement, code->registers, detail);
    Step step;
    try {
      step = execute_step(Opcode(statement.opcode), instruction);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error("PTX line " + std::to_string(statement.place.ptx_line) + ": " + error.what() + ": " +
                               std::string(statement.place.text));
    }
    if (!detail.reads.empty() || !detail.writes.empty()) {
      detail.after_check = step;
      step = starts_with(statement.opcode, "selp.") ? check_selected
             : accumulates(statement.opcode)        ? check_sums
                                                    : check_defined;
    }
    if (statement.guard >= 0) {
      instruction.slot[kGuardSlot] = code->registers.slots[static_cast<size_t>(statement.guard)];
      detail.after_guard = step;
      step = statement.guard_negated ? if_false : if_true;
      if (statement.target >= 0) step = guarded_branch(statement.guard_negated);
      detail.guard_tag = code->registers.tags[static_cast<size_t>(statement.guard)];
      if (detail.guard_tag != kUntracked) step = check_guard;
    }
    detail.after_first = step;
    instruction.step = first_time;
  }
  return code;
}

}  // namespace simt::ptx
