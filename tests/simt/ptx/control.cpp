// SPDX-License-Identifier: BSD-3-Clause
// Branches, barriers, fences, and the end of a thread.
#include "control.h"

#include "decode.h"
#include "models.h"

namespace simt::ptx {
namespace {

const Instruction* branch(Thread&, const Instruction& i) { return i.target; }
const Instruction* branch_if(Thread& t, const Instruction& i) {
  return get<bool>(t, i.slot[kGuardSlot]) ? i.target : next(i);
}
const Instruction* branch_unless(Thread& t, const Instruction& i) {
  return get<bool>(t, i.slot[kGuardSlot]) ? next(i) : i.target;
}
const Instruction* finish(Thread&, const Instruction&) { return nullptr; }
const Instruction* nothing(Thread&, const Instruction& i) { return next(i); }
const Instruction* trap(Thread&, const Instruction& i) { fail("trap", i.detail->at); }
const Instruction* wait_for_kernel(Thread&, const Instruction& i) {
  wait_for_kernel_before(i.detail->at);
  return next(i);
}
const Instruction* sleep_a_while(Thread&, const Instruction& i) {
  sleep(i.detail->at);
  return next(i);
}

// bar.sync 0 without a count is __syncthreads.
const Instruction* barrier(Thread& t, const Instruction& i) {
  const auto id = get<uint32_t>(t, i.slot[0]);
  if (i.detail->slots.size() > 1) {
    barrier_sync(id, get<uint32_t>(t, i.slot[1]), i.detail->at);
  } else {
    if (id != 0) fail("a barrier other than 0 without a number of threads", i.detail->at);
    block_barrier(i.detail->at);
  }
  return next(i);
}
const Instruction* arrive(Thread& t, const Instruction& i) {
  barrier_arrive(get<uint32_t>(t, i.slot[0]), get<uint32_t>(t, i.slot[1]), i.detail->at);
  return next(i);
}

template <Scope kScope>
const Instruction* fence_of(Thread&, const Instruction& i) {
  fence(kScope);
  return next(i);
}
template <Space kSpace>
const Instruction* async_proxy_fence(Thread&, const Instruction& i) {
  proxy_fence(kSpace);
  return next(i);
}
const Instruction* fence_init(Thread&, const Instruction& i) {
  mbarrier_init_fence();
  return next(i);
}
const Instruction* release_tensor_maps(Thread&, const Instruction& i) {
  release_maps(i.detail->at);
  return next(i);
}
// [map], 128
const Instruction* acquire_tensor_map(Thread& t, const Instruction& i) {
  if (get<uint32_t>(t, i.slot[1]) != 128) fail("fence.proxy.tensormap of another size", i.detail->at);
  acquire_map(reinterpret_cast<const void*>(get<uint64_t>(t, i.slot[0]) + static_cast<uint64_t>(int64_t{i.offset})),
              i.detail->at);
  return next(i);
}

Step decode_fence(const Opcode& opcode) {
  if (opcode.text() == "fence.mbarrier_init.release.cluster") return fence_init;
  if (opcode.text() == "fence.proxy.async.shared::cta") return async_proxy_fence<Space::kShared>;
  if (opcode.text() == "fence.proxy.async.global") return async_proxy_fence<Space::kGlobal>;
  if (opcode.text() == "fence.proxy.tensormap::generic.release.gpu") return release_tensor_maps;
  if (opcode.text() == "fence.proxy.tensormap::generic.acquire.gpu") return acquire_tensor_map;
  if (opcode.has("proxy")) unknown();
  if (opcode.has("cta")) return fence_of<Scope::kBlock>;
  if (opcode.has("gpu") || opcode.has("gl")) return fence_of<Scope::kDevice>;
  if (opcode.has("sys")) return fence_of<Scope::kSystem>;
  unknown();
}

}  // namespace

Step guarded_branch(bool negated) { return negated ? branch_unless : branch_if; }

Step decode_control(const Opcode& opcode, Instruction& instruction) {
  const std::string_view text = opcode.text(), stem = opcode.stem();
  if (text == "bra" || text == "bra.uni") return branch;
  if (text == "ret" || text == "exit" || text == "ret.uni") return finish;
  if (text == "trap") return trap;
  if (text == "griddepcontrol.wait") return wait_for_kernel;
  if (text == "griddepcontrol.launch_dependents") return nothing;
  if (stem == "nanosleep") return sleep_a_while;
  if (stem == "prefetch" || stem == "prefetchu") return nothing;
  if (stem == "fence" || stem == "membar") return decode_fence(opcode);
  if (text == "bar.sync" || text == "barrier.sync.aligned" || text == "barrier.sync") return barrier;
  if (text == "bar.arrive" || text == "barrier.arrive.aligned" || text == "barrier.arrive") {
    if (instruction.detail->slots.size() != 2) unknown();
    return arrive;
  }
  return nullptr;
}

}  // namespace simt::ptx
