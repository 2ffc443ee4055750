// SPDX-License-Identifier: BSD-3-Clause
// The state of threads, warps and blocks, shared by the parts of the runtime. Internal.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "context.h"
#include "models.h"
#include "race.h"
#include "runtime.h"

namespace simt {

// A FIFO queue that allocates nothing while empty: every thread has several.
template <typename T>
class Queue {
 public:
  void push_back(T value) { values_.push_back(std::move(value)); }
  void pop_front() { values_.erase(values_.begin()); }
  T& front() { return values_.front(); }
  T& operator[](size_t i) { return values_[i]; }
  size_t size() const { return values_.size(); }
  bool empty() const { return values_.empty(); }
  auto begin() { return values_.begin(); }
  auto end() { return values_.end(); }
  auto begin() const { return values_.begin(); }
  auto end() const { return values_.end(); }

 private:
  std::vector<T> values_;
};

enum class State : uint8_t { kReady, kWaiting, kSpinning, kDone };

// A copy by cp.async. Both its group and an mbarrier may wait for it.
struct Copy {
  char* to;
  const char* from;
  unsigned size, valid;  // bytes past `valid` are zeros
  bool landed = false;
  bool awaited = false;  // by a wait of the thread, or by an mbarrier
};
using Copies = std::vector<std::shared_ptr<Copy>>;

// Bulk stores committed together; empty once carried out.
struct StoreGroup {
  std::vector<std::function<void()>> stores;
  uint32_t time;
};

struct Block;
struct Fiber;

// Blocks that are resident together and may use each other's shared memory; by rank, null once a block has ended.
struct Cluster {
  std::vector<Block*> blocks;
  unsigned arrived = 0;  // at barrier.cluster
  uint32_t phase = 0;
  std::vector<Fiber*> waiting;
  race::View arriving, completed;
};

struct Fiber {
  Indices indices;
  unsigned linear = 0, lane = 0, warp = 0;
  Block* block = nullptr;
  Context context;
  State state = State::kReady;
  std::exception_ptr error;
  const char* waits_for = "";
  Location waits_at;
  unsigned atomics_in_a_row = 0;
  bool waited_for_kernel_before = false;
  bool arrived_at_cluster = false;  // and has not waited yet
  uint32_t cluster_phase = 0;       // in which it arrived

  Copies open_copies;                // cp.async since the last commit
  Queue<Copies> copy_groups;         // committed, oldest first
  Queue<uint32_t> copy_group_times;  // times of those groups on the copy engine
  race::Agent copy_engine;

  std::vector<std::function<void()>> open_stores;  // bulk stores since the last commit
  Queue<StoreGroup> store_groups;
  race::Agent store_reader, store_writer;
  std::map<uintptr_t, uint64_t> acquired_maps;  // versions of tensor maps, by address

  race::Actor actor;
};

// A named barrier; number 0 is __syncthreads'.
struct Barrier {
  unsigned arrived = 0, expected = 0;
  bool whole_block = false;
  std::vector<Fiber*> waiting;
  Location first_at;
  race::View view;
};

// The lanes that have arrived at a collective instruction, and their operands.
struct Collective {
  uint32_t arrived = 0, mask = 0;
  const char* name = "";
  std::array<void*, 32> operands{};
  std::array<Fiber*, 32> fibers{};
  Location at;
};

// Accumulators of a warp's wgmma in flight.
struct Accumulators {
  std::array<AccumulatorRegisters, 32> registers{};
  std::vector<float> values;  // [32 lanes][columns / 2]
  int pending = 0;
};

struct WarpProduct {
  std::shared_ptr<Accumulators> accumulators;
  std::function<void()> multiply;  // empty once done
  std::function<void()> check;     // at the wait: its factors in registers are unchanged
};

struct Warp {
  std::vector<Collective> collectives;  // with disjoint masks
  std::vector<WarpProduct> open_products;
  Queue<std::vector<WarpProduct>> product_groups;
  Queue<uint32_t> product_group_times;
  uint32_t finished_time = 0;
  std::map<const float*, std::vector<float>>
      finished_accumulators;  // as the hardware left them, keyed by lane 0's registers
  bool fenced = false;
  bool fenced_group = false;  // since the last commit; factors in registers need it
  unsigned registers = 0;     // per thread, after setmaxnreg
  size_t num_products = 0;
  race::Agent tensor_core;
};

struct Mbarrier {
  unsigned expected = 0, pending = 0;
  int64_t transactions = 0;  // bytes still expected
  uint32_t phase = 0;
  int copies_in_flight = 0;
  const Fiber* initialised_by = nullptr;
  bool visible_to_copies = false;  // a fence followed its initialisation
  std::vector<Fiber*> waiting;
  race::View arriving;
  std::array<race::View, 2> completed;  // by parity
  // What other blocks of the cluster released; only waits of cluster scope acquire it.
  race::View arriving_from_others;
  std::array<race::View, 2> completed_from_others;
  race::Agent copies;
};

struct SharedArray {
  const void* key = nullptr;
  char* memory = nullptr;
  size_t size = 0;
  uint32_t address = 0;
};

struct Block {
  const Grid* grid = nullptr;
  uint32_t device = 0;
  uint32_t race_block = 0;
  std::shared_ptr<Cluster> cluster;
  unsigned cluster_rank = 0;
  std::map<std::pair<uint32_t, uint32_t>, race::Moment>
      used_by_others;  // last accesses of other blocks, by block and thread
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned live = 0;
  std::array<Barrier, 16> barriers;
  std::vector<SharedArray> shared;  // [0] is the dynamic shared memory
  std::map<uint32_t, Mbarrier> mbarriers;
  std::deque<std::function<void()>> pending;  // asynchronous operations in flight
  int free_registers = 0;                     // released by setmaxnreg, per thread of a warp
  std::vector<Fiber*> waiting_for_registers;
  // Per warpgroup: the operands of each wgmma, which must be the same in all four warps.
  std::vector<std::vector<std::array<uint64_t, 4>>> warpgroup_products;
};

}  // namespace simt
