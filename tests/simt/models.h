// SPDX-License-Identifier: BSD-3-Clause
// What instructions do: the second body of every wrapper in csrc/cuda/ptx.cuh and hopper.cuh, and of CUDA's own functions in
// simt.h. `at` is the location in the kernel.
#pragma once
#include <cstddef>
#include <cstdint>

#include "race.h"
#include "runtime.h"

// For functions that move values between lanes; these accesses are not the kernel's.
#define SIMT_UNTRACKED __attribute__((no_sanitize("thread")))

namespace simt {

using race::Scope;
using race::Space;

// ---- shared memory (shared_memory.cpp) ------------------------------------------------------------------------------------

void* dynamic_shared();
void* static_shared(const void* key, size_t size, size_t alignment, Location at);  // one array per key and block
uint32_t shared_address(const void* pointer, Location at);

// ---- barriers and collectives (barriers.cpp) --------------------------------------------------------------------------------

void block_barrier(Location at);
void barrier_sync(unsigned id, unsigned num_threads, Location at);
void barrier_arrive(unsigned id, unsigned num_threads, Location at);

// Waits for the lanes in `mask`. The last one combines the operands of all, [32] by lane; those of other lanes are null.
using Combine = void (*)(void* const* operands, uint32_t mask);
void collective(const char* name, uint32_t mask, void* operands, Combine combine, Location at);
void warp_barrier(uint32_t mask, Location at);
int lane_index();
// True in one lane of all 32: the lowest, or any one in random order.
bool elect(Location at);

// ---- atomics, fences, polling (atomics.cpp) ---------------------------------------------------------------------------------

void before_atomic(const void* location, size_t size, race::AtomicKind kind, Location at);
void read_only_load(const void* location, size_t size, Location at);
void fence(Scope scope);
void poll(Location at);  // before a load in a polling loop
void sleep(Location at);

// ---- cp.async, ldmatrix, mma (cp_async.cpp, mma.cpp) --------------------------------------------------------------------------

void cp_async(void* shared, const void* global, unsigned size, unsigned valid, Location at);
void cp_async_commit(Location at);
void cp_async_wait(unsigned groups_left, Location at);
void cp_async_arrive(uint64_t* mbarrier, Location at);  // .noinc

void ldmatrix(uint32_t* registers, int matrices, bool transposed, const void* row, Location at);
void stmatrix(const uint32_t* registers, int matrices, bool transposed, void* row, Location at);

enum class Element { kBf16, kF16, kTf32 };
void mma(float* d, const uint32_t* a, const uint32_t* b, Element element, Location at);  // m16n8k16, m16n8k8 for tf32
uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c, Element element);  // a · b + c of both halves, rounded once

// ---- Hopper (mbarrier.cpp, tma.cpp, wgmma.cpp) --------------------------------------------------------------------------------

void mbarrier_init(uint64_t* mbarrier, unsigned count, Location at);
void mbarrier_invalidate(uint64_t* mbarrier, Location at);
void mbarrier_arrive(uint64_t* mbarrier, unsigned bytes, Location at);  // expects `bytes` first
void mbarrier_expect(uint64_t* mbarrier, unsigned bytes, Location at);  // without arriving
bool mbarrier_test(uint64_t* mbarrier, unsigned parity, Location at);
// `cluster`: also acquires what other blocks of the cluster released.
void mbarrier_wait(uint64_t* mbarrier, unsigned parity, bool cluster, Location at);
// At the barrier at this address in the block of a rank. `cluster`: a release at cluster scope, for waits of that scope. Else
// plain waits see it too; that stores are not ordered then is not modelled.
void mbarrier_arrive_cluster(uint64_t* mbarrier, unsigned rank, bool cluster, Location at);
void mbarrier_init_fence();
void proxy_fence(Space space);

// Of a dependent launch (dependent.cpp).
void wait_for_kernel_before(Location at);

// Clusters (cluster.cpp).
unsigned cluster_rank();
void cluster_arrive(Location at);  // release
void cluster_wait(Location at);    // acquire
void store_cluster(uint64_t* shared, unsigned rank, uint64_t value, Location at);

// Coordinates count elements, the innermost dimension first.
void tma_load(void* shared, const void* tensor_map, uint64_t* mbarrier, const int* coordinates, int rank, Location at);
// To the same addresses in all blocks of the cluster whose bit of `blocks` is set, and their mbarriers.
void tma_load_multicast(void* shared, const void* tensor_map, uint64_t* mbarrier, const int* coordinates, int rank,
                        unsigned blocks, Location at);
void tma_store(const void* tensor_map, const void* shared, const int* coordinates, int rank, Location at);
void bulk_load(void* shared, const void* global, unsigned size, uint64_t* mbarrier, Location at);
void bulk_commit(Location at);
void bulk_wait(unsigned groups_left, bool reads_only, Location at);

// Tensor maps in device memory (device_maps.cpp).
void replace_map_address(void* map, const void* address, Location at);
void replace_map_size(void* map, int dimension, uint32_t size, Location at);
void release_maps(Location at);
void acquire_map(const void* map, Location at);

void wgmma_fence(Location at);
// d[columns / 2] += a · b; `a` null: the left operand is in shared memory too.
struct WgmmaShape {
  int columns;
  Element element;
  bool a_transposed, b_transposed;
};
// Where a thread's accumulators are: first[i], or the halves of 8-byte slots that a list names.
struct AccumulatorRegisters {
  float* first = nullptr;
  const uint16_t* slots = nullptr;

  AccumulatorRegisters() = default;
  AccumulatorRegisters(float* first, const uint16_t* slots = nullptr) : first(first), slots(slots) {}
  float& operator[](size_t i) const { return slots == nullptr ? first[i] : first[2 * size_t{slots[i]}]; }
};
// Factors in registers, or null. `stay`: they can be read again at the wait, where they must be unchanged.
struct FactorRegisters {
  const uint32_t* values = nullptr;
  bool stay = true;

  FactorRegisters(std::nullptr_t) {}
  FactorRegisters(const uint32_t* values, bool stay = true) : values(values), stay(stay) {}
};
void wgmma(AccumulatorRegisters d, FactorRegisters a, uint64_t descriptor_a, uint64_t descriptor_b, bool accumulate,
           WgmmaShape shape, Location at);
void wgmma_commit(Location at);
void wgmma_wait(unsigned groups_left, Location at);
void set_max_registers(unsigned count, Location at);

}  // namespace simt
