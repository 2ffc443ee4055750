// SPDX-License-Identifier: BSD-3-Clause
#include "execute.h"

#include <cstring>

#include "models.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace simt::ptx {
namespace {

constexpr uint64_t kMaxInstructions = uint64_t{1} << 33;  // of a thread, after which it counts as endless

struct Launch {
  const Code* code;
  std::unique_ptr<char[]> memory;     // of the parameters
  std::vector<uint64_t> fixed_slots;  // as every thread starts
  std::vector<std::pair<uint16_t, Special>> specials;
  std::vector<std::pair<uint16_t, const Fixed*>> per_block;
};

uint32_t special_value(Special special) {
  switch (special) {
    case Special::kThreadX: return indices.thread.x;
    case Special::kThreadY: return indices.thread.y;
    case Special::kThreadZ: return indices.thread.z;
    case Special::kBlockSizeX: return indices.block_size.x;
    case Special::kBlockSizeY: return indices.block_size.y;
    case Special::kBlockSizeZ: return indices.block_size.z;
    case Special::kBlockX: return indices.block.x;
    case Special::kBlockY: return indices.block.y;
    case Special::kBlockZ: return indices.block.z;
    case Special::kGridX: return indices.grid_size.x;
    case Special::kGridY: return indices.grid_size.y;
    case Special::kGridZ: return indices.grid_size.z;
    case Special::kLane: return static_cast<uint32_t>(lane_index());
    case Special::kClusterRank: return cluster_rank();
    case Special::kWarpSize: return 32;
    case Special::kCount: break;
  }
  return 0;
}

// Slots and tags of threads that have ended, for the next ones.
class SlotPool {
 public:
  std::unique_ptr<uint64_t[]> take(size_t words) {
    auto& free = free_[words];
    if (free.empty()) return std::make_unique<uint64_t[]>(words);
    auto slots = std::move(free.back());
    free.pop_back();
    return slots;
  }
  void give(std::unique_ptr<uint64_t[]> slots, size_t words) { free_[words].push_back(std::move(slots)); }

 private:
  std::map<size_t, std::vector<std::unique_ptr<uint64_t[]>>> free_;
};
SlotPool pool;

// A thread's slots, its tags behind them, and its local memory.
class Memory {
 public:
  explicit Memory(const Code& code)
      : num_slots_(code.registers.num_slots),
        words_(num_slots_ + (code.registers.num_tags + 7) / 8 + (code.kernel->local_bytes + 7) / 8 + 2),
        slots_(pool.take(words_)) {
    std::memset(slots_.get() + num_slots_, 0, code.registers.num_tags);
  }
  ~Memory() { pool.give(std::move(slots_), words_); }
  Memory(const Memory&) = delete;

  uint64_t* slots() const { return slots_.get(); }
  uint8_t* tags() const { return reinterpret_cast<uint8_t*>(slots_.get() + num_slots_); }
  char* local(const Code& code) const {
    char* const behind = reinterpret_cast<char*>(slots_.get() + num_slots_ + (code.registers.num_tags + 7) / 8);
    return behind + reinterpret_cast<uintptr_t>(behind) % 16;
  }

 private:
  size_t num_slots_, words_;
  std::unique_ptr<uint64_t[]> slots_;
};

void set_block_values(const Launch& launch, Thread& thread) {
  const Kernel& kernel = *launch.code->kernel;
  const Location at(&kernel.statements.front().place);
  for (const auto& [slot, fixed] : launch.per_block) {
    if (fixed->kind == Fixed::kLocal) {
      thread.slots[slot] = reinterpret_cast<uint64_t>(thread.local + fixed->data);
      continue;
    }
    const void* array;
    if (fixed->kind == Fixed::kDynamicShared) {
      array = dynamic_shared();
    } else {
      const Variable& variable = kernel.shared[fixed->data];
      array = static_shared(&variable, variable.size, variable.alignment, at);
    }
    thread.slots[slot] = shared_address(array, at);
  }
}

void run_thread(const Launch& launch) {
  const Code& code = *launch.code;
  const Memory memory(code);
  Thread thread{memory.slots(), memory.tags(), {}, memory.local(code), code.kernel->local_bytes};
  std::memcpy(thread.slots, launch.fixed_slots.data(), launch.fixed_slots.size() * sizeof(uint64_t));
  for (const auto& [slot, special] : launch.specials) thread.slots[slot] = special_value(special);
  set_block_values(launch, thread);

  struct Counter {
    uint64_t steps = 0;
    ~Counter() { executed_instructions() += steps; }
  } counter;
  const Instruction* instruction = code.instructions.data();
  uint64_t steps = 0;
  while (instruction != nullptr) {
    instruction = instruction->step(thread, *instruction);
    if ((++steps & 0xffff) == 0 && steps > kMaxInstructions) {
      fail("the thread does not end", instruction->detail->at);
    }
  }
  counter.steps = steps;
}

}  // namespace

uint64_t& executed_instructions() {
  static uint64_t count = 0;
  return count;
}

std::function<void()> bind(const Code& code, void* const* arguments) {
  constexpr size_t kParameterAlignment = 128;  // tensor maps need 64
  const Kernel& kernel = *code.kernel;
  auto launch = std::make_shared<Launch>();
  launch->code = &code;
  launch->memory = std::make_unique<char[]>(kernel.parameter_bytes + kParameterAlignment);
  char* const start = launch->memory.get();
  char* const parameters = start + (kParameterAlignment - reinterpret_cast<uintptr_t>(start) % kParameterAlignment);
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    std::memcpy(parameters + kernel.parameters[i].offset, arguments[i], kernel.parameters[i].size);
  }
  launch->fixed_slots.resize(code.registers.num_fixed);
  for (const Fixed& fixed : kernel.fixed) {
    const uint16_t slot = code.registers.slots[fixed.value];
    switch (fixed.kind) {
      case Fixed::kConstant: launch->fixed_slots[slot] = fixed.data; break;
      case Fixed::kParameter: launch->fixed_slots[slot] = reinterpret_cast<uint64_t>(parameters + fixed.data); break;
      case Fixed::kSpecial: launch->specials.emplace_back(slot, static_cast<Special>(fixed.data)); break;
      default: launch->per_block.emplace_back(slot, &fixed); break;
    }
  }
  return [launch] { run_thread(*launch); };
}

}  // namespace simt::ptx
