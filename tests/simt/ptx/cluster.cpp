// SPDX-License-Identifier: BSD-3-Clause
// Clusters. A shared address of another block is that of the block itself with the rank above it, from 1.
#include "address.h"
#include "decode.h"
#include "models.h"

namespace simt::ptx {

namespace {

constexpr uint32_t kRankShift = 24;  // a block's own addresses are below

// mapa.shared::cluster.u32 d, address, rank
const Instruction* map_address(Thread& t, const Instruction& i) {
  const uint32_t address = get<uint32_t>(t, i.slot[1]), rank = get<uint32_t>(t, i.slot[2]);
  if (address >> kRankShift != 0) fail("mapa: expected an address of the block's own shared memory", i.detail->at);
  set<uint32_t>(t, i.slot[0], address | (rank + 1) << kRankShift);
  return next(i);
}

// Where another block's address is in this block, and the other's rank.
struct Remote {
  uint64_t* own;
  uint32_t rank;
};
Remote remote_of(Thread& t, const Instruction& i, uint16_t slot) {
  const uint32_t address = get<uint32_t>(t, slot) + static_cast<uint32_t>(i.offset);
  const uint32_t own = address & ((1u << kRankShift) - 1);
  if (address >> kRankShift == 0) fail("expected an address from mapa", i.detail->at);
  if (own % sizeof(uint64_t) != 0) fail_misaligned(i, own, sizeof(uint64_t));
  return {reinterpret_cast<uint64_t*>(shared_bytes(t, i, own, sizeof(uint64_t))), (address >> kRankShift) - 1};
}

// _, [mbarrier]; `mode`: releases what the thread stored
const Instruction* arrive_there(Thread& t, const Instruction& i) {
  const Remote remote = remote_of(t, i, i.slot[1]);
  mbarrier_arrive_cluster(remote.own, remote.rank, i.mode != 0, i.detail->at);
  return next(i);
}
// p, [mbarrier], parity, also for what other blocks released
const Instruction* wait_cluster(Thread& t, const Instruction& i) {
  const uint32_t address = get<uint32_t>(t, i.slot[1]) + static_cast<uint32_t>(i.offset);
  if (address % sizeof(uint64_t) != 0) fail_misaligned(i, address, sizeof(uint64_t));
  auto* const mbarrier = reinterpret_cast<uint64_t*>(shared_bytes(t, i, address, sizeof(uint64_t)));
  mbarrier_wait(mbarrier, get<uint32_t>(t, i.slot[2]), true, i.detail->at);
  set<bool>(t, i.slot[0], true);
  return next(i);
}
const Instruction* store_there(Thread& t, const Instruction& i) {
  const Remote remote = remote_of(t, i, i.slot[0]);
  store_cluster(remote.own, remote.rank, get<uint64_t>(t, i.slot[1]), i.detail->at);
  return next(i);
}
const Instruction* arrive(Thread&, const Instruction& i) {
  cluster_arrive(i.detail->at);
  return next(i);
}
const Instruction* wait_for_all(Thread&, const Instruction& i) {
  cluster_wait(i.detail->at);
  return next(i);
}

}  // namespace

Step decode_cluster(const Opcode& opcode, Instruction& instruction) {
  const std::string_view text = opcode.text();
  if (text == "mapa.shared::cluster.u32") return map_address;
  if (starts_with(text, "mbarrier.arrive.") && text.find("shared::cluster") != std::string_view::npos) {
    if (instruction.slot[0] != kSink) unknown("an mbarrier's state is not modelled");
    instruction.mode = text == "mbarrier.arrive.release.cluster.shared::cluster.b64";
    if (instruction.mode == 0 && text != "mbarrier.arrive.shared::cluster.b64") unknown();
    return arrive_there;
  }
  if (text == "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64") return wait_cluster;
  if (text == "st.shared::cluster.b64") return store_there;
  if (text == "barrier.cluster.arrive.release") return arrive;
  if (text == "barrier.cluster.wait.acquire") return wait_for_all;
  return nullptr;
}

}  // namespace simt::ptx
