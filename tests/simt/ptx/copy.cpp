// SPDX-License-Identifier: BSD-3-Clause
// Asynchronous copies: cp.async, and bulk copies with and without a tensor map.
#include "address.h"
#include "decode.h"
#include "models.h"

namespace simt::ptx {
namespace {

// The first slot of an operand.
uint16_t slot_of(const Detail& detail, size_t operand) {
  size_t at = 0;
  for (size_t k = 0; k < operand; ++k) at += detail.operand_sizes[k];
  return detail.slots[at];
}
uint64_t address_of(const Thread& t, const Instruction& i, size_t operand) {
  return t.slots[slot_of(*i.detail, operand)] + static_cast<uint64_t>(i.detail->offsets[operand]);
}
char* shared_operand(Thread& t, const Instruction& i, size_t operand, size_t size) {
  return shared_bytes(t, i, static_cast<uint32_t>(address_of(t, i, operand)), size);
}
uint64_t* mbarrier_operand(Thread& t, const Instruction& i, size_t operand) {
  const auto address = static_cast<uint32_t>(address_of(t, i, operand));
  if (address % sizeof(uint64_t) != 0) fail_misaligned(i, address, sizeof(uint64_t));
  return reinterpret_cast<uint64_t*>(shared_bytes(t, i, address, sizeof(uint64_t)));
}

// cp.async [shared], [global], size {, valid}; `mode`: only 16 bytes (.cg)
const Instruction* copy(Thread& t, const Instruction& i) {
  const Detail& detail = *i.detail;
  const auto size = get<uint32_t>(t, slot_of(detail, 2));
  const bool known = size == 16 || (i.mode == 0 && (size == 4 || size == 8));
  if (!known) fail("cp.async of " + std::to_string(size) + " bytes", detail.at);
  const uint32_t valid = detail.operand_sizes.size() > 3 ? get<uint32_t>(t, slot_of(detail, 3)) : size;
  const auto from = reinterpret_cast<const void*>(address_of(t, i, 1));
  cp_async(shared_operand(t, i, 0, size), from, size, valid, detail.at);
  return next(i);
}
const Instruction* commit(Thread&, const Instruction& i) {
  cp_async_commit(i.detail->at);
  return next(i);
}
const Instruction* wait_group(Thread& t, const Instruction& i) {
  cp_async_wait(get<uint32_t>(t, i.slot[0]), i.detail->at);
  return next(i);
}
const Instruction* wait_all(Thread&, const Instruction& i) {
  cp_async_commit(i.detail->at);
  cp_async_wait(0, i.detail->at);
  return next(i);
}
const Instruction* arrive(Thread& t, const Instruction& i) {
  cp_async_arrive(mbarrier_operand(t, i, 0), i.detail->at);
  return next(i);
}

// ---- bulk copies --------------------------------------------------------------------------------------------------------

struct Coordinates {
  int values[5];
};
// Those of an operand [map, {x, y, …}].
Coordinates coordinates_of(const Thread& t, const Detail& detail, size_t operand) {
  Coordinates result{};
  size_t at = 1;
  for (size_t k = 0; k < operand; ++k) at += detail.operand_sizes[k];
  for (size_t k = 0; k + 1 < detail.operand_sizes[operand]; ++k) result.values[k] = get<int>(t, detail.slots[at + k]);
  return result;
}

// [shared], [map, {x, …}], [mbarrier]; `mode`: the rank
const Instruction* load_box(Thread& t, const Instruction& i) {
  const Coordinates at = coordinates_of(t, *i.detail, 1);
  const auto map = reinterpret_cast<const void*>(address_of(t, i, 1));
  tma_load(shared_operand(t, i, 0, 1), map, mbarrier_operand(t, i, 2), at.values, static_cast<int>(i.mode),
           i.detail->at);
  return next(i);
}
// The same, and a mask of the blocks of the cluster.
const Instruction* load_box_multicast(Thread& t, const Instruction& i) {
  const Coordinates at = coordinates_of(t, *i.detail, 1);
  const auto map = reinterpret_cast<const void*>(address_of(t, i, 1));
  const auto blocks = get<uint16_t>(t, slot_of(*i.detail, 3));
  tma_load_multicast(shared_operand(t, i, 0, 1), map, mbarrier_operand(t, i, 2), at.values, static_cast<int>(i.mode),
                     blocks, i.detail->at);
  return next(i);
}
// [map, {x, …}], [shared]
const Instruction* store_box(Thread& t, const Instruction& i) {
  const Coordinates at = coordinates_of(t, *i.detail, 0);
  const auto map = reinterpret_cast<const void*>(address_of(t, i, 0));
  tma_store(map, shared_operand(t, i, 1, 1), at.values, static_cast<int>(i.mode), i.detail->at);
  return next(i);
}
// [shared], [global], size, [mbarrier]
const Instruction* load_bytes(Thread& t, const Instruction& i) {
  const auto size = get<uint32_t>(t, slot_of(*i.detail, 2));
  const auto from = reinterpret_cast<const void*>(address_of(t, i, 1));
  bulk_load(shared_operand(t, i, 0, size), from, size, mbarrier_operand(t, i, 3), i.detail->at);
  return next(i);
}
const Instruction* commit_stores(Thread&, const Instruction& i) {
  bulk_commit(i.detail->at);
  return next(i);
}
// `mode`: waits only for the reads
const Instruction* wait_stores(Thread& t, const Instruction& i) {
  bulk_wait(get<uint32_t>(t, i.slot[0]), i.mode != 0, i.detail->at);
  return next(i);
}

Step decode_tensor(const Opcode& opcode, Instruction& instruction) {
  const Detail& detail = *instruction.detail;
  const uint32_t rank = static_cast<uint32_t>(opcode.part(4)[0] - '0');
  instruction.mode = rank;
  const std::string_view rest = opcode.text().substr(opcode.text().find("d.") + 2);
  if (rest == "shared::cluster.global.tile.mbarrier::complete_tx::bytes" &&
      detail.operand_sizes == std::vector<size_t>{1, rank + 1, 1}) {
    return load_box;
  }
  if (rest == "shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster" &&
      detail.operand_sizes == std::vector<size_t>{1, rank + 1, 1, 1}) {
    return load_box_multicast;
  }
  if (rest == "global.shared::cta.tile.bulk_group" && detail.operand_sizes == std::vector<size_t>{rank + 1, 1})
    return store_box;
  unknown();
}

Step decode_bulk(const Opcode& opcode, Instruction& instruction) {
  const std::string_view text = opcode.text();
  if (opcode.part(3) == "tensor") return decode_tensor(opcode, instruction);
  if (text == "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes") return load_bytes;
  if (text == "cp.async.bulk.commit_group") return commit_stores;
  if (text == "cp.async.bulk.wait_group" || text == "cp.async.bulk.wait_group.read") {
    instruction.mode = opcode.has("read");
    return wait_stores;
  }
  unknown();
}

}  // namespace

Step decode_copy(const Opcode& opcode, Instruction& instruction) {
  const std::string_view text = opcode.text();
  if (!opcode.starts("cp.async.")) return nullptr;
  if (opcode.part(2) == "bulk") return decode_bulk(opcode, instruction);
  if (text == "cp.async.commit_group") return commit;
  if (text == "cp.async.wait_group") return wait_group;
  if (text == "cp.async.wait_all") return wait_all;
  if (text == "cp.async.mbarrier.arrive.noinc.shared::cta.b64") return arrive;
  if (!opcode.consists_of({"async", "ca", "cg", "shared", "shared::cta", "global", "L2::128B"})) unknown();
  instruction.mode = opcode.has("cg");
  return copy;
}

}  // namespace simt::ptx
