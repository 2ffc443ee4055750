// SPDX-License-Identifier: BSD-3-Clause
// Calls an op of the CUDA backend as a caller on a device would. The allocator gives poisoned memory of exactly the requested
// size, once. All work must be queued on the given stream.
#pragma once
#include <cstdlib>
#include <memory>

#include "api.h"
#include "cuda/ops.h"
#include "runtime.h"
#include "support.h"

namespace switchgear::test {

class OpMemory {
 public:
  explicit OpMemory(uint8_t poison) : poison_(poison) {}
  ~OpMemory() { check_streams(); }
  OpMemory(const OpMemory&) = delete;
  // On a stream of its own: see check_streams.
  Execution execution() {
    simt::options().any_shared_base = true;
    simt::forget_streams();
    latest_ = this;
    return {.stream = this, .allocator = {&OpMemory::allocate, this}};
  }
  // All work since execution() was queued on its stream, and nothing waited.
  void check_streams() const {
    if (latest_ != this) return;
    for (const void* used : simt::used_streams()) CHECK(used == this, "queued on another stream");
    CHECK(simt::host_waits() == 0, "waits for the device");
  }
  int calls() const { return calls_; }

 private:
  static void* allocate(void* context, int64_t bytes) {
    auto* self = static_cast<OpMemory*>(context);
    ++self->calls_;
    self->bytes_.reset(static_cast<uint8_t*>(std::aligned_alloc(256, static_cast<size_t>((bytes + 255) / 256 * 256))));
    std::fill_n(self->bytes_.get(), bytes, self->poison_);
    return self->bytes_.get();
  }
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };

  static inline const OpMemory* latest_ = nullptr;

  uint8_t poison_;
  int calls_ = 0;
  std::unique_ptr<uint8_t[], Free> bytes_;
};

// Runs run(exec) over outputs and memory of `poison` bytes: it writes nothing behind the rows of the outputs.
template <typename Run>
void run_over(uint8_t poison, std::initializer_list<Array*> outputs, Run&& run) {
  for (Array* output : outputs) output->poison(poison);
  OpMemory memory(poison);
  run(memory.execution());
  CHECK(memory.calls() <= 1, memory.calls(), " allocations");
  for (Array* output : outputs) CHECK(output->padding_holds(poison), "wrote behind a row");
}

// Checks that run(exec) writes all elements of `outputs` and nothing else: runs twice, over 0xFF and 0x00, for the same bits.
template <typename Run>
void run_op(std::initializer_list<Array*> outputs, Run&& run) {
  std::vector<Array> first;
  for (const uint8_t poison : {0xff, 0x00}) {
    run_over(poison, outputs, run);
    if (first.empty()) {
      for (Array* output : outputs) first.push_back(*output);
    }
  }
  for (size_t i = 0; i < first.size(); ++i) CHECK(same_bits(first[i], *outputs.begin()[i]), "output ", i);
}

// Whether this program runs the variant of a test with this number. Under sanitizers each of the three thread orders runs every
// third variant, so together they run all; or every SWITCHGEAR_SIMT_SHARES-th, a prime which is not the length of an inner loop, so
// that each value of a loop has its turn.
inline bool takes_variant(int64_t variant) {
#if defined(SIMT_PLAIN)
  return variant >= 0;
#else
  const char* const shares = std::getenv("SWITCHGEAR_SIMT_SHARES");
  return variant % (shares == nullptr ? 3 : std::atoll(shares)) == static_cast<int64_t>(simt::options().order);
#endif
}

// Memory layouts: rows at any address, or at multiples of 16 bytes.
enum class Rows { kAnywhere, kAligned };

inline Array make_rows(Rows rows, DType dtype, int64_t num_rows, int64_t width) {
  if (rows == Rows::kAnywhere) return Array(dtype, {num_rows, width}, 3, 1);
  const int64_t vector = 16 / size_of(dtype);
  return Array(dtype, {num_rows, width}, (vector - width % vector) % vector, 0);
}

inline Array random_rows(Rows rows, Random& random, DType dtype, int64_t num_rows, int64_t width, double scale = 1.0) {
  Array array = make_rows(rows, dtype, num_rows, width);
  array.fill([&](int64_t) { return random.normal() * scale; });
  return array;
}

}  // namespace switchgear::test
