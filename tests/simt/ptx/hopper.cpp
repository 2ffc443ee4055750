// SPDX-License-Identifier: BSD-3-Clause
// mbarriers, wgmma, and the number of registers.
#include "address.h"
#include "decode.h"
#include "models.h"
#include "scheduler.h"

namespace simt::ptx {
namespace {

uint64_t* mbarrier(Thread& t, const Instruction& i, uint16_t slot) {
  const uint32_t address = get<uint32_t>(t, slot) + static_cast<uint32_t>(i.offset);
  if (address % sizeof(uint64_t) != 0) fail_misaligned(i, address, sizeof(uint64_t));
  return reinterpret_cast<uint64_t*>(shared_bytes(t, i, address, sizeof(uint64_t)));
}

// [mbarrier], count
const Instruction* init(Thread& t, const Instruction& i) {
  mbarrier_init(mbarrier(t, i, i.slot[0]), get<uint32_t>(t, i.slot[1]), i.detail->at);
  return next(i);
}
const Instruction* invalidate(Thread& t, const Instruction& i) {
  mbarrier_invalidate(mbarrier(t, i, i.slot[0]), i.detail->at);
  return next(i);
}
// _, [mbarrier]
const Instruction* arrive(Thread& t, const Instruction& i) {
  mbarrier_arrive(mbarrier(t, i, i.slot[1]), 0, i.detail->at);
  return next(i);
}
// _, [mbarrier], bytes
const Instruction* arrive_expecting(Thread& t, const Instruction& i) {
  mbarrier_arrive(mbarrier(t, i, i.slot[1]), get<uint32_t>(t, i.slot[2]), i.detail->at);
  return next(i);
}
const Instruction* expect(Thread& t, const Instruction& i) {
  mbarrier_expect(mbarrier(t, i, i.slot[0]), get<uint32_t>(t, i.slot[1]), i.detail->at);
  return next(i);
}
// p, [mbarrier], parity
const Instruction* test(Thread& t, const Instruction& i) {
  set<bool>(t, i.slot[0], mbarrier_test(mbarrier(t, i, i.slot[1]), get<uint32_t>(t, i.slot[2]), i.detail->at));
  return next(i);
}
// try_wait may give up at any time: here it does where operations are carried out early.
const Instruction* try_wait(Thread& t, const Instruction& i) {
  if (carry_out_early()) return test(t, i);
  uint64_t* const barrier = mbarrier(t, i, i.slot[1]);
  mbarrier_wait(barrier, get<uint32_t>(t, i.slot[2]), false, i.detail->at);
  set<bool>(t, i.slot[0], true);
  return next(i);
}

Step decode_mbarrier(const Opcode& opcode, Instruction& instruction) {
  const std::string_view text = opcode.text();
  if (text == "mbarrier.init.shared::cta.b64") return init;
  if (text == "mbarrier.inval.shared::cta.b64") return invalidate;
  if (starts_with(text, "mbarrier.arrive.") && instruction.slot[0] != kSink)
    unknown("an mbarrier's state is not modelled");
  if (text == "mbarrier.arrive.shared::cta.b64" && instruction.detail->slots.size() == 2) return arrive;
  if (text == "mbarrier.arrive.expect_tx.shared::cta.b64") return arrive_expecting;
  if (text == "mbarrier.expect_tx.relaxed.cta.shared::cta.b64") return expect;
  if (text == "mbarrier.test_wait.parity.shared::cta.b64") return test;
  if (text == "mbarrier.try_wait.parity.shared::cta.b64") return try_wait;
  unknown();
}

// ---- wgmma --------------------------------------------------------------------------------------------------------------

// {d…}, a, b, p, 1, 1 {, transposes}; a is a descriptor or {r [4]}. `mode`: the Element.
const Instruction* multiply(Thread& t, const Instruction& i) {
  const Detail& detail = *i.detail;
  const size_t num_sums = detail.operand_sizes[0];
  const bool a_in_registers = detail.operand_sizes[1] == 4;
  const uint16_t* const a_slot = &detail.slots[num_sums];
  const uint16_t* const rest = a_slot + detail.operand_sizes[1];  // b, p, 1, 1, transposes
  uint32_t a[4] = {};
  for (size_t k = 0; a_in_registers && k < 4; ++k) a[k] = get<uint32_t>(t, a_slot[k]);
  if (get<int>(t, rest[2]) != 1 || get<int>(t, rest[3]) != 1)
    fail("wgmma of negated factors is not modelled", detail.at);
  const bool transposes_b = get<int>(t, rest[a_in_registers ? 4 : 5]) != 0;
  const bool transposes_a = !a_in_registers && get<int>(t, rest[4]) != 0;
  const WgmmaShape shape{static_cast<int>(2 * num_sums), static_cast<Element>(i.mode), transposes_a, transposes_b};
  const AccumulatorRegisters d{reinterpret_cast<float*>(t.slots), detail.slots.data()};
  wgmma(d, FactorRegisters(a_in_registers ? a : nullptr, false), a_in_registers ? 0 : get<uint64_t>(t, a_slot[0]),
        get<uint64_t>(t, rest[0]), get<bool>(t, rest[1]), shape, detail.at);
  return next(i);
}
const Instruction* fence(Thread&, const Instruction& i) {
  wgmma_fence(i.detail->at);
  return next(i);
}
const Instruction* commit(Thread&, const Instruction& i) {
  wgmma_commit(i.detail->at);
  return next(i);
}
const Instruction* wait_group(Thread& t, const Instruction& i) {
  wgmma_wait(get<uint32_t>(t, i.slot[0]), i.detail->at);
  return next(i);
}
const Instruction* set_registers(Thread& t, const Instruction& i) {
  set_max_registers(get<uint32_t>(t, i.slot[0]), i.detail->at);
  return next(i);
}

Step decode_wgmma(const Opcode& opcode, Instruction& instruction) {
  const std::string_view text = opcode.text();
  if (text == "wgmma.fence.sync.aligned") return fence;
  if (text == "wgmma.commit_group.sync.aligned") return commit;
  if (text == "wgmma.wait_group.sync.aligned") return wait_group;
  const std::vector<size_t>& sizes = instruction.detail->operand_sizes;
  const std::string start = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(2 * sizes[0]) + "k16.f32.";
  if (!starts_with(text, start)) unknown();
  const bool a_in_registers = sizes[1] == 4;
  if (sizes.size() != (a_in_registers ? 7u : 8u)) unknown("wgmma with another number of operands");
  const std::string_view types = text.substr(start.size());
  if (types != "bf16.bf16" && types != "f16.f16") unknown();
  instruction.mode = static_cast<uint32_t>(types == "bf16.bf16" ? Element::kBf16 : Element::kF16);
  return multiply;
}

// ---- tensor maps in device memory -----------------------------------------------------------------------------------------

// [map], address
const Instruction* replace_address(Thread& t, const Instruction& i) {
  replace_map_address(reinterpret_cast<void*>(get<uint64_t>(t, i.slot[0]) + static_cast<uint64_t>(int64_t{i.offset})),
                      reinterpret_cast<const void*>(get<uint64_t>(t, i.slot[1])), i.detail->at);
  return next(i);
}
// [map], dimension, size
const Instruction* replace_size(Thread& t, const Instruction& i) {
  replace_map_size(reinterpret_cast<void*>(get<uint64_t>(t, i.slot[0]) + static_cast<uint64_t>(int64_t{i.offset})),
                   get<int>(t, i.slot[1]), get<uint32_t>(t, i.slot[2]), i.detail->at);
  return next(i);
}

Step decode_tensormap(const Opcode& opcode) {
  if (opcode.text() == "tensormap.replace.tile.global_address.global.b1024.b64") return replace_address;
  if (opcode.text() == "tensormap.replace.tile.global_dim.global.b1024.b32") return replace_size;
  unknown();
}

}  // namespace

Step decode_hopper(const Opcode& opcode, Instruction& instruction) {
  if (opcode.stem() == "mbarrier") return decode_mbarrier(opcode, instruction);
  if (opcode.stem() == "wgmma") return decode_wgmma(opcode, instruction);
  if (opcode.stem() == "tensormap") return decode_tensormap(opcode);
  if (opcode.starts("setmaxnreg.") && opcode.has("u32")) return set_registers;
  return nullptr;
}

}  // namespace simt::ptx
