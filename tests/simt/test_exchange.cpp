// SPDX-License-Identifier: BSD-3-Clause
// Ranks that exchange rows through each other's memory: a grid of each is resident, and only flags tell when.
#include <memory>
#include <vector>

#include "exchange.cuh"
#include "expect.h"
#include "support.h"

namespace switchgear::test {
namespace {

using cuda::ExchangeParams;
using cuda::Vector;

uint32_t word_of(int source, int target, uint32_t number, int64_t row, int vector) {
  return ((number * 8u + static_cast<uint32_t>(source)) * 8u + static_cast<uint32_t>(target)) * 4096u +
         static_cast<uint32_t>(row) * 16u + static_cast<uint32_t>(vector);
}

// The memory of one rank: every array has exactly the size that it needs, so that the address sanitizer sees its ends.
struct Rank {
  std::vector<std::unique_ptr<Vector[]>> inboxes;  // [s]
  std::vector<std::unique_ptr<uint32_t[]>> arrived_rows;
  std::unique_ptr<uint32_t[]> arrived, read, sent, taken;
  uint32_t stalled = 0;
};

struct Exchange {  // of one rank
  std::vector<Vector> rows, received;
  std::vector<int32_t> row_tokens, send_counts, receive_counts;
  ExchangeParams params{};
};

class Machine {
 public:
  Machine(int num_ranks, int num_chunks, int vectors, int window_rows)
      : W(num_ranks), C(num_chunks), vectors_(vectors), ranks_(static_cast<size_t>(num_ranks)) {
    for (Rank& rank : ranks_) {
      for (int s = 0; s < W; ++s) rank.inboxes.push_back(std::make_unique<Vector[]>(size_t(window_rows * vectors)));
      rank.arrived = std::make_unique<uint32_t[]>(size_t(W * C));
      rank.read = std::make_unique<uint32_t[]>(size_t(W));
      rank.sent = std::make_unique<uint32_t[]>(size_t(W * C));
      rank.taken = std::make_unique<uint32_t[]>(size_t(W));
    }
  }

  // counts[c][s][t]; the exchange of every rank. Tokens lie in reverse order, so that gathering shows.
  std::vector<Exchange> make(uint32_t number, const std::vector<int>& counts, int64_t patience = 1 << 24) {
    std::vector<Exchange> made(static_cast<size_t>(W));
    const auto count = [&](int c, int s, int t) { return counts[static_cast<size_t>((c * W + s) * W + t)]; };
    for (int r = 0; r < W; ++r) {
      Exchange& e = made[static_cast<size_t>(r)];
      std::vector<int64_t> place(static_cast<size_t>(W));
      int total = 0, incoming = 0;
      for (int c = 0; c < C; ++c) {
        for (int o = 0; o < W; ++o) {
          e.send_counts.push_back(count(c, r, o));
          e.receive_counts.push_back(count(c, o, r));
          total += count(c, r, o);
          incoming += count(c, o, r);
        }
      }
      e.rows.resize(static_cast<size_t>(total * vectors_));
      e.received.assign(static_cast<size_t>(incoming * vectors_), Vector{~0u, ~0u, ~0u, ~0u});
      for (int c = 0; c < C; ++c) {
        for (int t = 0; t < W; ++t) {
          for (int i = 0; i < count(c, r, t); ++i) {
            const int token = total - 1 - static_cast<int>(e.row_tokens.size());
            e.row_tokens.push_back(token);
            for (int v = 0; v < vectors_; ++v) {
              const uint32_t w = word_of(r, t, number, place[static_cast<size_t>(t)], v);
              e.rows[static_cast<size_t>(token * vectors_ + v)] = Vector{w, ~w, w ^ 0x5555u, w + 1};
            }
            ++place[static_cast<size_t>(t)];
          }
        }
      }
      Rank& own = ranks_[static_cast<size_t>(r)];
      ExchangeParams& p = e.params;
      p.rank = r, p.num_ranks = W, p.num_chunks = C, p.number = number, p.vectors = vectors_;
      p.rows = e.rows.data(), p.row_tokens = e.row_tokens.data();
      p.send_counts = e.send_counts.data(), p.receive_counts = e.receive_counts.data(), p.received = e.received.data();
      for (int o = 0; o < W; ++o) {
        Rank& other = ranks_[static_cast<size_t>(o)];
        p.windows[o] = other.inboxes[static_cast<size_t>(r)].get();
        p.inboxes[o] = own.inboxes[static_cast<size_t>(o)].get();
        p.arrived_there[o] = other.arrived.get() + r * C;
        p.read_there[o] = other.read.get() + r;
      }
      p.arrived_here = own.arrived.get(), p.read_here = own.read.get();
      p.sent = own.sent.get(), p.taken = own.taken.get(), p.stalled = &own.stalled, p.patience = patience;
    }
    return made;
  }

  void check(const std::vector<Exchange>& made) {
    for (int r = 0; r < W; ++r) {
      const Exchange& e = made[static_cast<size_t>(r)];
      CHECK(ranks_[static_cast<size_t>(r)].stalled == 0, "rank ", r, " waited in vain");
      std::vector<int64_t> place(static_cast<size_t>(W));
      size_t at = 0;
      for (int c = 0; c < C; ++c) {
        for (int s = 0; s < W; ++s) {
          for (int i = 0; i < e.receive_counts[static_cast<size_t>(c * W + s)]; ++i) {
            for (int v = 0; v < vectors_; ++v, ++at) {
              const uint32_t w = word_of(s, r, e.params.number, place[static_cast<size_t>(s)], v);
              const Vector got = e.received[at];
              CHECK(got.x == w && got.y == ~w && got.z == (w ^ 0x5555u) && got.w == w + 1, "rank ", r, " source ", s,
                    " chunk ", c, " row ", i);
            }
            ++place[static_cast<size_t>(s)];
          }
        }
      }
    }
  }

  uint32_t stalled(int rank) const { return ranks_[static_cast<size_t>(rank)].stalled; }

  const int W, C;

 private:
  int vectors_;
  std::vector<Rank> ranks_;
};

// Two exchanges in one kernel: a rank may be in the second while another is in the first.
__global__ void exchange_twice(ExchangeParams first, ExchangeParams second) {
  cuda::exchange(first);
  cuda::exchange(second);
}

dim3 blocks(int num_ranks) { return dim3(static_cast<unsigned>(cuda::exchange_blocks(num_ranks))); }

std::vector<int> random_counts(Random& random, int num_ranks, int num_chunks, int most) {
  std::vector<int> counts;
  for (int i = 0; i < num_chunks * num_ranks * num_ranks; ++i) {
    counts.push_back(random.below(4) == 0 ? 0 : static_cast<int>(random.below(most + 1)));
  }
  return counts;
}

constexpr unsigned kThreads = 32;  // of a block: fewer fibers

TEST(exchange_of_four_ranks) {
  for (int trial = 0; trial < 6; ++trial) {
    Random random(static_cast<uint64_t>(trial));
    const int W = trial == 0 ? 2 : trial == 1 ? 3 : 4, C = 1 + trial % 4, most = 5;
    Machine machine(W, C, trial % 2 == 0 ? 3 : 40, C * most);
    for (uint32_t number = 0; number < 6; number += 2) {
      note = join("trial ", trial, " exchange ", number);
      auto first = machine.make(number, random_counts(random, W, C, most));
      auto second = machine.make(number + 1, random_counts(random, W, C, most));
      std::vector<simt::Grid> grids;
      for (int r = 0; r < W; ++r) {
        const auto i = static_cast<size_t>(r);
        grids.push_back({blocks(W), kThreads, 0, simt::bind_kernel(exchange_twice, first[i].params, second[i].params)});
      }
      simt::run(grids);
      machine.check(first);
      machine.check(second);
    }
  }
}

TEST(exchange_without_rows) {
  Machine machine(4, 2, 1, 1);
  for (uint32_t number = 0; number < 2; ++number) {
    auto made = machine.make(number, std::vector<int>(2 * 4 * 4, 0));
    std::vector<simt::Grid> grids;
    for (const Exchange& e : made)
      grids.push_back({blocks(4), kThreads, 0, simt::bind_kernel(cuda::exchange_kernel, e.params)});
    simt::run(grids);
    machine.check(made);
  }
}

// Rank 2 never starts: the others end and name it, or one that itself waited for it.
TEST(exchange_with_a_rank_that_is_gone) {
  Machine machine(4, 2, 2, 8);
  auto made = machine.make(0, std::vector<int>(2 * 4 * 4, 3), 2000);
  std::vector<simt::Grid> grids;
  for (int r = 0; r < 4; ++r) {
    if (r == 2) continue;
    grids.push_back(
        {blocks(4), kThreads, 0, simt::bind_kernel(cuda::exchange_kernel, made[static_cast<size_t>(r)].params)});
  }
  simt::run(grids);
  for (int r = 0; r < 4; ++r) {
    if (r != 2) CHECK(machine.stalled(r) == 3, "rank ", r, " says ", machine.stalled(r));
  }
}

}  // namespace
}  // namespace switchgear::test
