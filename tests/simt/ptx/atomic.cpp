// SPDX-License-Identifier: BSD-3-Clause
// atom and red.
#include <cstring>

#include "address.h"
#include "decode.h"
#include "models.h"

namespace simt::ptx {
namespace {

enum class Update : uint32_t { kAdd, kExchange, kCompareAndSwap, kMin, kMax, kAnd, kOr, kXor, kIncrement, kDecrement };

// `mode`: the Update, then a bit each for what it orders and where it is, then the scope.
constexpr uint32_t kUpdateMask = 15, kAcquires = 16, kReleases = 32, kShared = 64, kHasResult = 128;
constexpr uint32_t kScopeShift = 8;

template <typename T>
T updated(Update update, T old, T value, T other) {
  switch (update) {
    case Update::kAdd:
      if constexpr (std::is_integral_v<T>)
        return static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(value));
      return old + value;
    case Update::kExchange: return value;
    case Update::kCompareAndSwap: return old == value ? other : old;
    case Update::kMin: return value < old ? value : old;
    case Update::kMax: return old < value ? value : old;
    case Update::kIncrement: return old >= value ? T{0} : static_cast<T>(old + 1);
    case Update::kDecrement: return old == T{0} || old > value ? value : static_cast<T>(old - 1);
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    if (update == Update::kAnd) return static_cast<T>(old & value);
    if (update == Update::kOr) return static_cast<T>(old | value);
    return static_cast<T>(old ^ value);
  }
  return old;
}

template <typename T>
const Instruction* atomic(Thread& t, const Instruction& i) {
  const bool has_result = (i.mode & kHasResult) != 0;
  const uint16_t* const operand = i.slot + has_result;  // [address], value {, other}
  const uint64_t address = t.slots[operand[0]] + static_cast<uint64_t>(static_cast<int64_t>(i.offset));
  if (address % sizeof(T) != 0) fail_misaligned(i, address, sizeof(T));
  char* pointer = reinterpret_cast<char*>(address);
  if ((i.mode & kShared) != 0) {
    pointer = shared_bytes(t, i, static_cast<uint32_t>(address), sizeof(T));
  } else if (looks_poisoned(pointer, sizeof(T))) {
    check_poisoned(i, pointer, sizeof(T));
  }
  const race::AtomicKind kind{.reads = true,
                              .writes = true,
                              .acquire = (i.mode & kAcquires) != 0,
                              .release = (i.mode & kReleases) != 0,
                              .scope = static_cast<race::Scope>(i.mode >> kScopeShift)};
  before_atomic(pointer, sizeof(T), kind, i.detail->at);
  T old;
  std::memcpy(&old, pointer, sizeof(T));
  const auto update = static_cast<Update>(i.mode & kUpdateMask);
  const T other = update == Update::kCompareAndSwap ? get<T>(t, operand[2]) : T{};
  const T value = updated(update, old, get<T>(t, operand[1]), other);
  std::memcpy(pointer, &value, sizeof(T));
  if (has_result) set<T>(t, i.slot[0], old);
  return next(i);
}

Update update_of(const Opcode& opcode) {
  if (opcode.has("add")) return Update::kAdd;
  if (opcode.has("exch")) return Update::kExchange;
  if (opcode.has("cas")) return Update::kCompareAndSwap;
  if (opcode.has("min")) return Update::kMin;
  if (opcode.has("max")) return Update::kMax;
  if (opcode.has("and")) return Update::kAnd;
  if (opcode.has("or")) return Update::kOr;
  if (opcode.has("xor")) return Update::kXor;
  if (opcode.has("inc")) return Update::kIncrement;
  if (opcode.has("dec")) return Update::kDecrement;
  unknown("an atomic that is not known");
}

}  // namespace

// Without a scope it is the device's.
Step decode_atomic(const Opcode& opcode, Instruction& instruction) {
  if (opcode.stem() != "atom" && opcode.stem() != "red") return nullptr;
  if (!opcode.consists_of({"global", "shared", "shared::cta", "relaxed", "acquire", "release", "acq_rel",
                           "cta",    "gpu",    "sys",         "add",     "exch",    "cas",     "min",
                           "max",    "and",    "or",          "xor",     "inc",     "dec"})) {
    unknown();
  }
  const race::Scope scope = opcode.has("cta")   ? race::Scope::kBlock
                            : opcode.has("sys") ? race::Scope::kSystem
                                                : race::Scope::kDevice;
  instruction.mode = static_cast<uint32_t>(update_of(opcode)) | static_cast<uint32_t>(scope) << kScopeShift;
  if (opcode.has("acquire") || opcode.has("acq_rel")) instruction.mode |= kAcquires;
  if (opcode.has("release") || opcode.has("acq_rel")) instruction.mode |= kReleases;
  if (opcode.has("shared") || opcode.has("shared::cta")) instruction.mode |= kShared;
  if (opcode.stem() == "atom") instruction.mode |= kHasResult;
  return with_type(opcode.type(), []<typename T>() -> Step {
    if constexpr (!std::is_same_v<T, bool> && sizeof(T) >= 2) return atomic<T>;
    unknown();
  });
}

}  // namespace simt::ptx
