// SPDX-License-Identifier: BSD-3-Clause
// Moves, also between a register and the parts of it.
#include <algorithm>

#include "decode.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace simt::ptx {
namespace {

template <typename T>
const Instruction* move(Thread& t, const Instruction& i) {
  set<T>(t, i.slot[0], get<T>(t, i.slot[1]));
  return next(i);
}

// mov.b32 %r, {%rs, %rs}: the first part is the lowest. `mode`: the bits of a part.
const Instruction* pack(Thread& t, const Instruction& i) {
  const size_t parts = i.detail->operand_sizes[1];
  const uint64_t mask = (uint64_t{1} << i.mode) - 1;
  uint64_t value = 0;
  for (size_t k = parts; k > 0; --k) value = value << i.mode | (t.slots[i.slot[k]] & mask);
  t.slots[i.slot[0]] = value;
  return next(i);
}
const Instruction* unpack(Thread& t, const Instruction& i) {
  const size_t parts = i.detail->operand_sizes[0];
  const uint64_t mask = (uint64_t{1} << i.mode) - 1;
  const uint64_t value = t.slots[i.slot[parts]];
  for (size_t k = 0; k < parts; ++k) t.slots[i.slot[k]] = value >> (i.mode * k) & mask;
  return next(i);
}

Step decode_mov(const Opcode& opcode, Instruction& instruction) {
  const std::vector<size_t>& sizes = instruction.detail->operand_sizes;
  if (opcode.num_parts() != 2 || sizes.size() != 2) unknown();
  const size_t parts = std::max(sizes[0], sizes[1]);
  if (parts > 1) {
    instruction.mode = static_cast<uint32_t>(8 * size_of(opcode.type()) / parts);
    if (instruction.mode >= 64) unknown();
    return sizes[0] > 1 ? unpack : pack;
  }
  if (opcode.type() == Type::kPred) return move<bool>;
  switch (size_of(opcode.type())) {
    case 2: return move<uint16_t>;
    case 4: return move<uint32_t>;
    case 8: return move<uint64_t>;
    default: unknown();
  }
}

// Generic addresses are those of the host.
const Instruction* to_shared(Thread& t, const Instruction& i) {
  const auto pointer = reinterpret_cast<const void*>(get<uint64_t>(t, i.slot[1]));
  set<uint64_t>(t, i.slot[0], shared_address(running_block(), pointer, i.detail->at));
  return next(i);
}
const Instruction* from_shared(Thread& t, const Instruction& i) {
  const auto address = get<uint32_t>(t, i.slot[1]);
  const char* const pointer = shared_pointer(running_block(), address, 0, i.detail->at);
  set<uint64_t>(t, i.slot[0], reinterpret_cast<uint64_t>(pointer));
  return next(i);
}

}  // namespace

Step decode_move(const Opcode& opcode, Instruction& instruction) {
  if (opcode.stem() == "mov") return decode_mov(opcode, instruction);
  if (opcode.stem() != "cvta" || opcode.type() != Type::kU64) return nullptr;
  if (!opcode.consists_of({"to", "shared", "global", "local", "param", "const"})) unknown();
  if (!opcode.has("shared")) return move<uint64_t>;
  return opcode.has("to") ? to_shared : from_shared;
}

}  // namespace simt::ptx
