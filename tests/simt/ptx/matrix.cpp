// SPDX-License-Identifier: BSD-3-Clause
// ldmatrix, stmatrix and mma. A lane's operands are copied from and to its slots.
#include "address.h"
#include "decode.h"
#include "models.h"

namespace simt::ptx {
namespace {

constexpr size_t kRowBytes = 16;

// Only the first 8 lanes per matrix give addresses.
char* row_address(Thread& t, const Instruction& i, uint16_t slot, size_t matrices) {
  if (static_cast<size_t>(lane_index()) >= 8 * matrices) return nullptr;
  return shared_bytes(t, i, get<uint32_t>(t, slot) + static_cast<uint32_t>(i.offset), kRowBytes);
}

// ldmatrix {r…}, [row]; `mode`: transposed
const Instruction* load_matrices(Thread& t, const Instruction& i) {
  const Detail& detail = *i.detail;
  const size_t matrices = detail.operand_sizes[0];
  uint32_t registers[4];
  ldmatrix(registers, static_cast<int>(matrices), i.mode != 0, row_address(t, i, i.slot[matrices], matrices),
           detail.at);
  for (size_t k = 0; k < matrices; ++k) set<uint32_t>(t, i.slot[k], registers[k]);
  return next(i);
}
// stmatrix [row], {r…}
const Instruction* store_matrices(Thread& t, const Instruction& i) {
  const Detail& detail = *i.detail;
  const size_t matrices = detail.operand_sizes[1];
  uint32_t registers[4];
  for (size_t k = 0; k < matrices; ++k) registers[k] = get<uint32_t>(t, i.slot[1 + k]);
  stmatrix(registers, static_cast<int>(matrices), i.mode != 0, row_address(t, i, i.slot[0], matrices), detail.at);
  return next(i);
}

// mma {d [4]}, {a [4]}, {b [2]}, {c [4]}; `mode`: the Element
const Instruction* multiply(Thread& t, const Instruction& i) {
  const uint16_t* const slots = i.detail->slots.data();
  float d[4];
  uint32_t a[4], b[2];
  for (int k = 0; k < 4; ++k) a[k] = get<uint32_t>(t, slots[4 + k]);
  for (int k = 0; k < 2; ++k) b[k] = get<uint32_t>(t, slots[8 + k]);
  for (int k = 0; k < 4; ++k) d[k] = get<float>(t, slots[10 + k]);
  mma(d, a, b, static_cast<Element>(i.mode), i.detail->at);
  for (int k = 0; k < 4; ++k) set<float>(t, slots[k], d[k]);
  return next(i);
}

Step decode_mma(const Opcode& opcode, Instruction& instruction) {
  const std::string_view text = opcode.text();
  if (text == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") {
    instruction.mode = static_cast<uint32_t>(Element::kBf16);
  } else if (text == "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") {
    instruction.mode = static_cast<uint32_t>(Element::kF16);
  } else if (text == "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32") {
    instruction.mode = static_cast<uint32_t>(Element::kTf32);
  } else {
    unknown("a product of matrices that is not known");
  }
  if (instruction.detail->operand_sizes != std::vector<size_t>{4, 4, 2, 4})
    unknown("mma: other operands than {4}, {4}, {2}, {4}");
  return multiply;
}

}  // namespace

Step decode_matrix(const Opcode& opcode, Instruction& instruction) {
  if (opcode.stem() == "mma") return decode_mma(opcode, instruction);
  const bool loads = opcode.starts("ldmatrix.sync.aligned.m8n8.");
  if (!loads && !opcode.starts("stmatrix.sync.aligned.m8n8.")) return nullptr;
  if (!opcode.consists_of({"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"})) unknown();
  const size_t matrices = opcode.has("x4") ? 4 : opcode.has("x2") ? 2 : 1;
  if (instruction.detail->operand_sizes[loads ? 0 : 1] != matrices)
    unknown("another number of registers than of matrices");
  instruction.mode = opcode.has("trans");
  return loads ? load_matrices : store_matrices;
}

}  // namespace simt::ptx
