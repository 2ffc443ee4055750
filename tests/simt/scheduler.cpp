// SPDX-License-Identifier: BSD-3-Clause
// Runs one grid, or several co-resident ones, to the end on the calling thread. A fiber runs until it waits, polls, is
// interrupted or ends. If none can run and no asynchronous operation is in flight, that is a deadlock. If all runnable ones
// poll, and nothing changes for long, that is a livelock.
#include "scheduler.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <mutex>
#include <set>

#include "checks.h"
#include "cluster.h"
#include "shared_memory.h"

namespace simt {

Indices indices;

namespace {

struct Aborted {};  // thrown into the remaining fibers after one has failed

constexpr size_t kMaxIdlePolls = 500;  // average number per thread that counts as a livelock

struct Scheduler {
  Context host;
  Fiber* running = nullptr;
  std::deque<Fiber*> ready;
  std::vector<Fiber*> spinning;
  std::vector<std::unique_ptr<Block>> blocks;  // resident
  bool aborting = false;
  size_t idle_polls = 0;  // since something changed
  bool waits_for_others = false;
  std::chrono::steady_clock::time_point waits_since;
  uint64_t random_state = 1;
};
Scheduler scheduler;

void switch_to_host(Fiber& fiber, bool finished = false) {
  switch_context(fiber.context, scheduler.host, finished);
  if (scheduler.aborting) throw Aborted();  // unwinds the kernel's frames
}

void fiber_main() {
  arrived(nullptr);
  Fiber& fiber = *scheduler.running;
  try {
    if (scheduler.aborting) throw Aborted();
    // Arguments are no global memory: bind_kernel's code of a dependent kernel is watched once it has copied them.
    race::running = fiber.block->grid->dependent ? nullptr : &fiber.actor;
    fiber.block->grid->kernel();
    race::running = nullptr;
    check_thread_exit(fiber);
  } catch (const Aborted&) {
  } catch (...) {
    fiber.error = std::current_exception();
  }
  race::running = nullptr;
  fiber.state = State::kDone;
  switch_to_host(fiber, true);
}

void resume(Fiber& fiber) {
  scheduler.running = &fiber;
  indices = fiber.indices;
  ++statistics().switches;
  switch_context(scheduler.host, fiber.context);
  scheduler.running = nullptr;
  race::running = nullptr;
}

uint3 index_of(uint64_t linear, dim3 size) {
  return make_uint3(static_cast<unsigned>(linear % size.x), static_cast<unsigned>(linear / size.x % size.y),
                    static_cast<unsigned>(linear / size.x / size.y));
}

uint64_t volume(dim3 size) { return uint64_t{size.x} * size.y * size.z; }

// ---- blocks -------------------------------------------------------------------------------------------------------------

struct PendingBlock {
  const Grid* grid;
  uint32_t device;
  uint64_t index;  // of the first block of the cluster
};

void start_block(const PendingBlock& pending, const std::shared_ptr<Cluster>& cluster) {
  auto block = std::make_unique<Block>();
  block->cluster = cluster;
  block->cluster_rank = static_cast<unsigned>(cluster->blocks.size());
  cluster->blocks.push_back(block.get());
  const Grid& grid = *pending.grid;
  const unsigned num_threads = static_cast<unsigned>(volume(grid.block));
  block->grid = &grid;
  block->device = pending.device;
  block->live = num_threads;
  block->fibers.resize(num_threads);
  block->warps.resize((num_threads + 31) / 32);
  block->warpgroup_products.resize((num_threads + 127) / 128);
  create_dynamic_shared(*block);
  const uint3 block_index = index_of(pending.index, grid.grid);
  if (race::enabled) {
    std::string name = "block (" + std::to_string(block_index.x) + "," + std::to_string(block_index.y) + "," +
                       std::to_string(block_index.z) + ")";
    if (pending.device > 0) name = "rank " + std::to_string(pending.device) + " " + name;
    block->race_block = race::begin_block(name, grid.block.x, grid.block.y, num_threads, pending.device);
  }
  for (unsigned i = 0; i < num_threads; ++i) {
    Fiber& fiber = block->fibers[i];
    fiber.block = block.get();
    fiber.indices = {index_of(i, grid.block), block_index, grid.block, grid.grid};
    fiber.linear = i;
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    if (race::enabled) race::begin_thread(fiber.actor, block->race_block, i, pending.device);
    prepare(fiber.context, take_stack(), fiber_main);
    scheduler.ready.push_back(&fiber);
  }
  ++statistics().blocks;
  statistics().threads += num_threads;
  scheduler.blocks.push_back(std::move(block));
}

void start_cluster(const PendingBlock& first) {
  const auto cluster = std::make_shared<Cluster>();
  for (unsigned rank = 0; rank < first.grid->cluster; ++rank) {
    start_block({first.grid, first.device, first.index + rank}, cluster);
  }
}

void release_block(Block& block) {
  free_shared(block);
  for (Fiber& fiber : block.fibers) give_stack(fiber.context.stack, scheduler.aborting);
}

void carry_out(Block& block, size_t index) {
  const std::function<void()> operation = std::move(block.pending[index]);
  block.pending.erase(block.pending.begin() + static_cast<ptrdiff_t>(index));
  operation();
  note_progress();
}

void end_block(Block& block) {
  while (!block.pending.empty()) carry_out(block, 0);
  check_block_exit(block);
  check_uses(block);
  block.cluster->blocks[block.cluster_rank] = nullptr;
  release_block(block);
  std::erase_if(scheduler.blocks, [&](const auto& owned) { return owned.get() == &block; });
}

// ---- choosing -----------------------------------------------------------------------------------------------------------

Fiber& take_ready() {
  std::deque<Fiber*>& ready = scheduler.ready;
  Fiber* fiber = nullptr;
  switch (options().order) {
    case Order::kForward:
      fiber = ready.front();
      ready.pop_front();
      break;
    case Order::kReverse:
      fiber = ready.back();
      ready.pop_back();
      break;
    case Order::kRandom: {
      std::swap(ready[random_number() % ready.size()], ready.back());
      fiber = ready.back();
      ready.pop_back();
      break;
    }
  }
  return *fiber;
}

// Carries out one asynchronous operation of a resident block; false if there is none.
bool carry_out_one() {
  const bool random = options().order == Order::kRandom;
  std::vector<Block*> candidates;
  for (const auto& block : scheduler.blocks) {
    if (!block->pending.empty()) candidates.push_back(block.get());
  }
  if (candidates.empty()) return false;
  Block& block = *candidates[random ? random_number() % candidates.size() : 0];
  carry_out(block, random ? random_number() % block.pending.size() : 0);
  return true;
}

void poll_again() {
  for (Fiber* fiber : scheduler.spinning) {
    fiber->state = State::kReady;
    scheduler.ready.push_back(fiber);
  }
  scheduler.spinning.clear();
}

size_t num_live_threads() {
  size_t count = 0;
  for (const auto& block : scheduler.blocks) count += block->live;
  return count;
}

// Lists the waiting threads, grouped by what they wait for.
std::string describe_waiting() {
  std::map<std::string, std::pair<int, std::string>> groups;
  for (const auto& block : scheduler.blocks) {
    for (const Fiber& fiber : block->fibers) {
      if (fiber.state == State::kDone) continue;
      auto& [count, first] = groups[std::string(fiber.waits_for) + " at " + describe(fiber.waits_at)];
      if (count++ == 0) first = describe(fiber);
    }
  }
  std::string text;
  for (const auto& [where, group] : groups) {
    text += "\n  " + std::to_string(group.first) + " thread(s) in " + where + ", the first is " + group.second;
  }
  return text;
}

void wait_for_other_processes() {
  const auto now = std::chrono::steady_clock::now();
  if (!scheduler.waits_for_others) scheduler.waits_since = now;
  scheduler.waits_for_others = true;
  if (now - scheduler.waits_since > std::chrono::duration<double>(options().patience)) {
    throw Error("nothing was changed by another process for " + std::to_string(options().patience) + " s" +
                describe_waiting());
  }
  scheduler.idle_polls = 0;
  sched_yield();
}

void step() {
  if (scheduler.ready.empty()) {
    if (carry_out_one()) return;
    if (scheduler.spinning.empty()) throw Error("deadlock: no thread can run" + describe_waiting());
    poll_again();
    return;
  }
  if (scheduler.idle_polls > kMaxIdlePolls * num_live_threads()) {
    if (options().other_processes) {
      wait_for_other_processes();
      return;
    }
    throw Error("livelock: every thread waits or polls, and nothing changes" + describe_waiting());
  }
  if (options().order == Order::kRandom && random_number() % 16 == 0) {
    carry_out_one();
    poll_again();
  }
  Fiber& fiber = take_ready();
  resume(fiber);
  if (fiber.state != State::kDone) return;
  note_progress();
  if (fiber.error) std::rethrow_exception(fiber.error);
  Block& block = *fiber.block;
  --block.live;
  check_barriers_after_exit(fiber);
  advance_cluster(*block.cluster);
  if (block.live == 0) end_block(block);
}

void abort_all() {
  scheduler.aborting = true;
  for (const auto& block : scheduler.blocks) {
    for (Fiber& fiber : block->fibers) {
      if (fiber.state != State::kDone) resume(fiber);
    }
    release_block(*block);
  }
  scheduler.aborting = false;
  scheduler.blocks.clear();
}

std::vector<PendingBlock> blocks_in_order(const std::vector<Grid>& grids) {
  std::vector<PendingBlock> blocks;
  for (size_t device = 0; device < grids.size(); ++device) {
    const uint64_t count = volume(grids[device].grid);
    for (uint64_t i = 0; i < count; i += grids[device].cluster)
      blocks.push_back({&grids[device], static_cast<uint32_t>(device), i});
  }
  if (options().order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
  if (options().order == Order::kRandom) {
    for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[random_number() % i]);
  }
  return blocks;
}

void run_blocks(const std::vector<PendingBlock>& blocks, size_t max_resident) {
  size_t next = 0;
  while (next < blocks.size() || !scheduler.blocks.empty()) {
    while (next < blocks.size() &&
           (scheduler.blocks.empty() || scheduler.blocks.size() + blocks[next].grid->cluster <= max_resident)) {
      start_cluster(blocks[next++]);
    }
    step();
  }
}

}  // namespace

// ---- interface for models -----------------------------------------------------------------------------------------------

RuntimeScope::~RuntimeScope() {
  race::running = race::enabled && scheduler.running != nullptr ? &scheduler.running->actor : nullptr;
}

Fiber& running_fiber() { return *scheduler.running; }

Fiber* running_fiber_or_null() { return scheduler.running; }

void wait(const char* what, Location at) {
  running_fiber().state = State::kWaiting;
  suspend(what, at);
}

void suspend(const char* what, Location at) {
  Fiber& fiber = running_fiber();
  fiber.waits_for = what;
  fiber.waits_at = at;
  fiber.atomics_in_a_row = 0;
  switch_to_host(fiber);
}

void wake(Fiber& fiber) {
  if (fiber.state == State::kReady) return;
  fiber.state = State::kReady;
  scheduler.ready.push_back(&fiber);
  note_progress();
}

void spin(Location at) {
  Fiber& fiber = running_fiber();
  fiber.state = State::kSpinning;
  fiber.waits_for = "a loop that polls";
  fiber.waits_at = at;
  fiber.atomics_in_a_row = 0;
  ++scheduler.idle_polls;
  scheduler.spinning.push_back(&fiber);
  switch_to_host(fiber);
}

void maybe_interrupt() {
  if (options().order != Order::kRandom || random_number() % 4 != 0) return;
  Fiber& fiber = running_fiber();
  scheduler.ready.push_back(&fiber);
  switch_to_host(fiber);
}

uint64_t random_number() {
  uint64_t& state = scheduler.random_state;  // xorshift64
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

bool carry_out_early() {
  if (options().order == Order::kRandom) return random_number() % 2 == 0;
  return options().order == Order::kReverse;
}

void carry_out_later(Block& block, std::function<void()> operation) { block.pending.push_back(std::move(operation)); }

void note_progress() {
  scheduler.idle_polls = 0;
  scheduler.waits_for_others = false;
}

std::string describe(const Fiber& fiber) {
  const auto triple = [](uint3 index) {
    return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
  };
  std::string text = "block " + triple(fiber.indices.block) + " thread " + triple(fiber.indices.thread);
  if (fiber.block->device > 0) text = "rank " + std::to_string(fiber.block->device) + " " + text;
  return text;
}

std::string describe(Location at) {
  const std::string file = at.file_name();
  std::string text = file.substr(file.rfind('/') + 1) + ":" + std::to_string(at.line());
  if (const PtxPlace* ptx = at.ptx()) {
    text += " (PTX line " + std::to_string(ptx->ptx_line) + " of " + ptx->kernel + ": " + std::string(ptx->text) + ")";
  }
  return text;
}

void fail(const std::string& message, Location at) {
  const std::string who = scheduler.running != nullptr ? describe(*scheduler.running) + ", " : "";
  throw Error(who + describe(at) + ": " + message);
}

void run(const std::vector<Grid>& grids) {
  static std::mutex one_at_a_time;
  static uint64_t num_runs = 0;
  const std::lock_guard lock(one_at_a_time);
  ++statistics().launches;
  scheduler.random_state = (options().seed + 1) * 0x9e3779b97f4a7c15u + num_runs++ * 0xd1342543de82ef95u;
  if (scheduler.random_state == 0) scheduler.random_state = 1;
  scheduler.ready.clear();
  scheduler.spinning.clear();
  note_progress();

  const std::vector<PendingBlock> blocks = blocks_in_order(grids);
  const bool all_resident = grids.size() > 1 || (!grids.empty() && grids[0].cooperative);
  const size_t max_resident =
      all_resident ? std::numeric_limits<size_t>::max() : static_cast<size_t>(std::max(1, options().resident_blocks));
  if (race::enabled) race::begin_run();
  if (race::enabled && !grids.empty() && grids[0].dependent) race::begin_kernel_before();
  std::string error;
  try {
    run_blocks(blocks, max_resident);
  } catch (const std::exception& caught) {
    error = caught.what();
    abort_all();
  }
  // A race may be the cause of an error, so it is reported first.
  const race::Findings races = race::enabled ? race::end_run() : race::Findings{};
  if (races.count > 0)
    error = std::to_string(races.count) + " conflicting access(es)" + races.text +
            (error.empty() ? "" : "\nthen: " + error);
  if (!error.empty()) throw Error(error);
}

}  // namespace simt
