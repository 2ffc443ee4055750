// SPDX-License-Identifier: BSD-3-Clause
// Loads and stores. Those with an order or volatile are atomics of tests/simt, and let other threads run before a load, since a
// loop may poll with it.
#include <cstring>

#include "address.h"
#include "decode.h"
#include "models.h"

namespace simt::ptx {
namespace {

// Of a volatile access, or one with `.relaxed`, `.acquire` or `.release`.
constexpr uint32_t kOrdered = 1, kScopeShift = 1;

race::Scope scope_of(const Opcode& opcode) {
  if (opcode.has("cta")) return race::Scope::kBlock;
  return opcode.has("gpu") || opcode.has("cluster") ? race::Scope::kDevice : race::Scope::kSystem;
}

template <typename T, StateSpace kSpace, int kCount>
const Instruction* load(Thread& t, const Instruction& i) {
  const char* const from = accessed<kSpace>(t, i, t.slots[i.slot[kCount]], sizeof(T) * kCount, false);
  for (int k = 0; k < kCount; ++k) {
    T value;
    std::memcpy(&value, from + sizeof(T) * k, sizeof(T));
    set<T>(t, i.slot[k], value);
  }
  return next(i);
}

template <typename T, StateSpace kSpace, int kCount>
const Instruction* store(Thread& t, const Instruction& i) {
  char* const to = accessed<kSpace>(t, i, t.slots[i.slot[0]], sizeof(T) * kCount, true);
  for (int k = 0; k < kCount; ++k) {
    const T value = get<T>(t, i.slot[1 + k]);
    std::memcpy(to + sizeof(T) * k, &value, sizeof(T));
  }
  return next(i);
}

char* ordered_address(Thread& t, const Instruction& i, uint16_t slot, size_t size, StateSpace space) {
  const uint64_t address = t.slots[slot] + static_cast<uint64_t>(static_cast<int64_t>(i.offset));
  if (address % size != 0) fail_misaligned(i, address, size);
  if (space == StateSpace::kShared) return shared_bytes(t, i, static_cast<uint32_t>(address), size);
  char* const pointer = reinterpret_cast<char*>(address);
  if (looks_poisoned(pointer, size)) check_poisoned(i, pointer, size);
  return pointer;
}

template <typename T, StateSpace kSpace>
const Instruction* load_ordered(Thread& t, const Instruction& i) {
  poll(i.detail->at);
  const char* const from = ordered_address(t, i, i.slot[1], sizeof(T), kSpace);
  const race::AtomicKind kind{
      .reads = true, .acquire = (i.mode & kOrdered) != 0, .scope = static_cast<race::Scope>(i.mode >> kScopeShift)};
  before_atomic(from, sizeof(T), kind, i.detail->at);
  T value;
  std::memcpy(&value, from, sizeof(T));
  set<T>(t, i.slot[0], value);
  return next(i);
}
template <typename T, StateSpace kSpace>
const Instruction* store_ordered(Thread& t, const Instruction& i) {
  char* const to = ordered_address(t, i, i.slot[0], sizeof(T), kSpace);
  const race::AtomicKind kind{
      .writes = true, .release = (i.mode & kOrdered) != 0, .scope = static_cast<race::Scope>(i.mode >> kScopeShift)};
  before_atomic(to, sizeof(T), kind, i.detail->at);
  const T value = get<T>(t, i.slot[1]);
  std::memcpy(to, &value, sizeof(T));
  return next(i);
}

template <StateSpace kSpace>
Step pick(const Opcode& opcode, size_t count, bool ordered, bool loads) {
  return with_type(opcode.type(), [=]<typename T>() -> Step {
    if (ordered) {
      if (count != 1 || kSpace == StateSpace::kParameter || kSpace == StateSpace::kLocal) unknown();
      return loads ? Step(load_ordered<T, kSpace>) : Step(store_ordered<T, kSpace>);
    }
    if (count == 1) return loads ? Step(load<T, kSpace, 1>) : Step(store<T, kSpace, 1>);
    if (count == 2) return loads ? Step(load<T, kSpace, 2>) : Step(store<T, kSpace, 2>);
    if constexpr (sizeof(T) <= 4) {
      if (count == 4) return loads ? Step(load<T, kSpace, 4>) : Step(store<T, kSpace, 4>);
    }
    unknown("a vector that is not known");
  });
}

}  // namespace

Step decode_load_store(const Opcode& opcode, Instruction& instruction) {
  const bool loads = opcode.stem() == "ld" || opcode.stem() == "ldu";
  if (!loads && opcode.stem() != "st") return nullptr;
  if (!opcode.consists_of({"global",
                           "shared",
                           "shared::cta",
                           "local",
                           "param",
                           "const",
                           "v2",
                           "v4",
                           "ca",
                           "cg",
                           "cs",
                           "lu",
                           "cv",
                           "wb",
                           "wt",
                           "nc",
                           "volatile",
                           "relaxed",
                           "acquire",
                           "release",
                           "weak",
                           "cta",
                           "gpu",
                           "sys",
                           "cluster",
                           "L1::no_allocate",
                           "L1::evict_first",
                           "L1::evict_last",
                           "L2::128B",
                           "L2::256B"})) {
    unknown();
  }
  const size_t count = instruction.detail->operand_sizes[loads ? 0 : 1];
  const bool ordered =
      opcode.has("volatile") || opcode.has("relaxed") || opcode.has("acquire") || opcode.has("release");
  if (ordered) {
    const bool orders = opcode.has("acquire") || opcode.has("release");
    instruction.mode = (orders ? kOrdered : 0) | static_cast<uint32_t>(scope_of(opcode)) << kScopeShift;
  }
  if (opcode.has("param")) return pick<StateSpace::kParameter>(opcode, count, ordered, loads);
  if (opcode.has("shared") || opcode.has("shared::cta"))
    return pick<StateSpace::kShared>(opcode, count, ordered, loads);
  if (opcode.has("local")) return pick<StateSpace::kLocal>(opcode, count, ordered, loads);
  if (opcode.has("global")) return pick<StateSpace::kGlobal>(opcode, count, ordered, loads);
  return pick<StateSpace::kGeneric>(opcode, count, ordered, loads);
}

}  // namespace simt::ptx
