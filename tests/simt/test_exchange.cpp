// SPDX-License-Identifier: BSD-3-Clause
// Ranks that send to each other through memory mapped by all of them. A grid of each rank is resident, and only flags
// synchronise them. Also tests the launcher, in several processes.
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <memory>
#include <vector>

#include "cuda/exchange.h"
#include "exchange.cuh"
#include "expect.h"
#include "support.h"

namespace switchgear::test {
namespace {

using cuda::ExchangeParams;
using Bytes = std::vector<unsigned char>;

unsigned char byte_of(int source, int target, uint32_t number, int64_t i) {
  return static_cast<unsigned char>(((number * 8 + static_cast<uint32_t>(source)) * 8 + static_cast<uint32_t>(target)) *
                                        31 +
                                    static_cast<uint32_t>(i) * 7 + static_cast<uint32_t>(i >> 8));
}

// What a rank sends and receives in one exchange. Its memory has exactly the needed size, so that the address sanitizer sees
// its ends. A nonzero `shift` makes rows start off multiples of 16 bytes.
struct Traffic {
  Traffic(int rank, uint32_t number, const std::vector<int64_t>& bytes, int W, int shift)
      : rank(rank), number(number), W(W), shift(static_cast<size_t>(shift)) {
    for (int r = 0; r < W; ++r) {
      send_bytes.push_back(bytes[static_cast<size_t>(rank * W + r)]);
      receive_bytes.push_back(bytes[static_cast<size_t>(r * W + rank)]);
    }
    rows.assign(this->shift, 0xee);
    for (int t = 0; t < W; ++t) {
      for (int64_t i = 0; i < send_bytes[static_cast<size_t>(t)]; ++i) rows.push_back(byte_of(rank, t, number, i));
    }
    rows.shrink_to_fit();
    int64_t total = shift;
    for (const int64_t count : receive_bytes) total += count;
    received.assign(static_cast<size_t>(total), 0xee);
  }

  // Describes the first wrong byte; empty if all are right.
  std::string wrong() const {
    size_t at = shift;
    for (int s = 0; s < W; ++s) {
      for (int64_t i = 0; i < receive_bytes[static_cast<size_t>(s)]; ++i, ++at) {
        if (received[at] != byte_of(s, rank, number, i)) return join("rank ", rank, " source ", s, " byte ", i);
      }
    }
    return "";
  }

  int rank;
  uint32_t number;
  int W;
  size_t shift;
  std::vector<int64_t> send_bytes, receive_bytes;
  Bytes rows, received;
};

// Adds the pieces of an exchange to the count of each pair of ranks.
void count_pieces(std::vector<uint32_t>& pieces, const std::vector<int64_t>& bytes, int64_t slot_bytes) {
  for (size_t r = 0; r < bytes.size(); ++r)
    pieces[r] += static_cast<uint32_t>((bytes[r] + slot_bytes - 1) / slot_bytes);
}

class Machine {
 public:
  Machine(int num_ranks, int64_t slot_bytes, uint32_t first = 0) : W(num_ranks), slot_bytes_(slot_bytes) {
    const auto size = static_cast<size_t>(cuda::exchange_segment_bytes(W, slot_bytes));
    for (int r = 0; r < W; ++r) {
      segments_.emplace_back(static_cast<unsigned char*>(std::aligned_alloc(16, size)));
      std::fill_n(segments_.back().get(), size, 0);
      sent_.emplace_back(static_cast<size_t>(W), first);
      received_.emplace_back(static_cast<size_t>(W), first);
      auto& flags = *reinterpret_cast<cuda::Flags*>(segments_.back().get());
      for (int o = 0; o < W; ++o) {  // as if after `first` pieces
        flags.arrived[o] = flags.read[o] = first;
        for (int slot = 0; slot < cuda::kSlots; ++slot) {
          flags.sent[o][slot] = flags.taken[o][slot] = first / cuda::kSlots * cuda::kLaneBlocks;
        }
      }
    }
  }

  std::vector<Traffic> make(const std::vector<int64_t>& bytes, int shift) {
    std::vector<Traffic> made;
    for (int r = 0; r < W; ++r) made.emplace_back(r, number_, bytes, W, shift);
    ++number_;
    return made;
  }

  ExchangeParams params(Traffic& traffic) {
    const auto r = static_cast<size_t>(traffic.rank);
    ExchangeParams p{};
    p.rank = traffic.rank, p.num_ranks = W, p.slot_bytes = slot_bytes_;
    p.rows = traffic.rows.data() + traffic.shift, p.received = traffic.received.data() + traffic.shift;
    for (size_t o = 0; o < static_cast<size_t>(W); ++o) {
      p.send_begin[o + 1] = p.send_begin[o] + traffic.send_bytes[o];
      p.receive_begin[o + 1] = p.receive_begin[o] + traffic.receive_bytes[o];
      p.first_sent[o] = sent_[r][o], p.first_received[o] = received_[r][o];
      p.segments[o] = segments_[o].get();
    }
    p.stop = &stop;
    count_pieces(sent_[r], traffic.send_bytes, slot_bytes_);
    count_pieces(received_[r], traffic.receive_bytes, slot_bytes_);
    return p;
  }

  const int W;
  uint32_t stop = 0;

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  int64_t slot_bytes_;
  uint32_t number_ = 0;
  std::vector<std::unique_ptr<unsigned char, Free>> segments_;
  std::vector<std::vector<uint32_t>> sent_, received_;
};

__global__ void exchange_once(ExchangeParams params) { cuda::exchange(params); }

// Two exchanges in one kernel: one rank may be in the second while another is in the first.
__global__ void exchange_twice(ExchangeParams first, ExchangeParams second) {
  cuda::exchange(first);
  cuda::exchange(second);
}

__global__ void stop_later(uint32_t* stop, int polls) {
  for (int i = 0; i < polls; ++i) cuda::ptx::ld_relaxed_sys(stop);
  cuda::ptx::st_relaxed_sys(stop, 1);
}

dim3 blocks(int num_ranks) { return dim3(static_cast<unsigned>(cuda::exchange_blocks(num_ranks))); }

std::vector<int64_t> random_bytes(Random& random, int num_ranks, int64_t most, int64_t unit) {
  std::vector<int64_t> bytes;
  for (int i = 0; i < num_ranks * num_ranks; ++i) {
    bytes.push_back(
        random.below(4) == 0 ? 0 : static_cast<int64_t>(random.below(static_cast<int>(most / unit) + 1)) * unit);
  }
  return bytes;
}

constexpr unsigned kThreads = 32;  // per block: fewer fibers

void exchange_often(Machine& machine, Random& random, int64_t most, int64_t unit, int shift) {
  for (int round = 0; round < 3; ++round) {
    auto first = machine.make(random_bytes(random, machine.W, most, unit), shift);
    auto second = machine.make(random_bytes(random, machine.W, most, unit), shift);
    std::vector<simt::Grid> grids;
    for (int r = 0; r < machine.W; ++r) {
      const auto i = static_cast<size_t>(r);
      const ExchangeParams p = machine.params(first[i]), q = machine.params(second[i]);
      grids.push_back({blocks(machine.W), kThreads, 0, simt::bind_kernel(exchange_twice, p, q)});
    }
    simt::run(grids);
    for (const auto* made : {&first, &second}) {
      for (const Traffic& traffic : *made) CHECK(traffic.wrong().empty(), "round ", round, " ", traffic.wrong());
    }
  }
}

// Up to eight pieces per pair, of rows in vectors of 16 bytes, of words, and of any size.
TEST(exchange_of_four_ranks) {
  for (int trial = 0; trial < 6; ++trial) {
    note = join("trial ", trial);
    Random random(static_cast<uint64_t>(trial));
    const int unit = trial % 3 == 0 ? 16 : trial % 3 == 1 ? 4 : 1;
    const int64_t slot_bytes = trial < 3 ? 64 : 1040;
    Machine machine(trial == 0 ? 2 : trial == 1 ? 3 : 4, slot_bytes);
    exchange_often(machine, random, trial < 3 ? 8 * slot_bytes : 2 * slot_bytes, unit, unit == 16 ? 0 : unit);
  }
}

// Pieces long enough for batches of loads, with a rest after the batches and one before the vectors end.
TEST(exchange_of_long_pieces) {
  const int64_t batch = int64_t{cuda::kBatch} * cuda::kLaneBlocks * kThreads * 16;  // bytes in flight of a lane
  for (const int unit : {16, 4}) {
    note = join("unit ", unit);
    Random random(static_cast<uint64_t>(unit));
    Machine machine(2, 2 * batch + 16 * 40);
    exchange_often(machine, random, 3 * batch, unit, unit == 16 ? 0 : unit);
  }
}

// The numbers of pieces wrap at 2^32.
TEST(exchange_after_many_pieces) {
  Machine machine(3, 32, 0xfffffffcu);
  Random random(1);
  exchange_often(machine, random, 96, 16, 0);
}

TEST(exchange_without_rows) {
  Machine machine(4, 16);
  for (int round = 0; round < 2; ++round) {
    auto made = machine.make(std::vector<int64_t>(16, 0), 0);
    std::vector<simt::Grid> grids;
    for (Traffic& traffic : made)
      grids.push_back({blocks(4), kThreads, 0, simt::bind_kernel(exchange_once, machine.params(traffic))});
    simt::run(grids);
  }
}

// Rank 2 never starts: the others end when *stop is set.
TEST(exchange_with_a_rank_that_is_gone) {
  Machine machine(4, 32);
  auto made = machine.make(std::vector<int64_t>(16, 80), 0);
  std::vector<simt::Grid> grids;
  for (int r = 0; r < 4; ++r) {
    if (r == 2) continue;
    grids.push_back(
        {blocks(4), kThreads, 0, simt::bind_kernel(exchange_once, machine.params(made[static_cast<size_t>(r)]))});
  }
  grids.push_back({1, 1, 0, simt::bind_kernel(stop_later, &machine.stop, 300)});
  simt::run(grids);
}

__global__ void wait_for(const uint32_t* flag, const uint32_t* stop, bool* reached) {
  *reached = cuda::reaches(flag, 1, stop);
}

__global__ void raise_later(uint32_t* flag, int polls) {
  for (int i = 0; i < polls; ++i) cuda::ptx::ld_relaxed_sys(flag);
  cuda::ptx::st_release_sys(flag, 1);
}

// *stop is in host memory, so a short wait does not read it; a long one does.
TEST(waits_read_stop_rarely) {
  const uint32_t stop = 1;
  for (const bool raises : {true, false}) {
    uint32_t flag = 0;
    bool reached = !raises;
    std::vector<simt::Grid> grids{{1, 1, 0, simt::bind_kernel(wait_for, &flag, &stop, &reached)}};
    if (raises) grids.push_back({1, 1, 0, simt::bind_kernel(raise_later, &flag, 20)});
    simt::options().other_processes = !raises;  // so that a long wait is no livelock
    simt::run(grids);
    simt::options().other_processes = false;
    CHECK(reached == raises, "raises ", raises);
  }
}

// ---- the launcher --------------------------------------------------------------------------------------------------------

// Runs one rank in its own process. Returns 0 if all was right.
int run_rank(int rank, int W, int64_t slot_bytes, const std::vector<uintptr_t>& segments, const uint32_t* stop) {
  simt::options().other_processes = true;
  std::vector<uint32_t> sent(static_cast<size_t>(W)), received(static_cast<size_t>(W));
  for (uint32_t number = 0; number < 4; ++number) {
    Random random(number);
    Traffic traffic(rank, number, random_bytes(random, W, 3 * slot_bytes, 4), W, 4);
    cuda::exchange({.rank = rank,
                    .rows = traffic.rows.data() + traffic.shift,
                    .received = traffic.received.data() + traffic.shift,
                    .send_bytes = traffic.send_bytes,
                    .receive_bytes = traffic.receive_bytes,
                    .first_sent = sent,
                    .first_received = received,
                    .segments = segments,
                    .slot_bytes = slot_bytes,
                    .stop = stop},
                   {});
    count_pieces(sent, traffic.send_bytes, slot_bytes);
    count_pieces(received, traffic.receive_bytes, slot_bytes);
    if (!traffic.wrong().empty()) {
      std::fprintf(stderr, "%s\n", traffic.wrong().c_str());
      return 1;
    }
  }
  return 0;
}

TEST(exchange_between_processes) {
  const int W = 3;
  const int64_t slot_bytes = 1024;
  const auto size = static_cast<size_t>(cuda::exchange_segment_bytes(W, slot_bytes));
  std::vector<uintptr_t> segments;
  for (int r = 0; r <= W; ++r) {  // the last one is for `stop`
    void* const memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED, "mmap");
    segments.push_back(reinterpret_cast<uintptr_t>(memory));
  }
  const auto* const stop = reinterpret_cast<const uint32_t*>(segments.back());
  segments.pop_back();
  std::vector<pid_t> processes;
  for (int r = 0; r < W; ++r) {
    const pid_t process = fork();
    if (process == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);  // a rank does not outlive the test
      int status = 2;
      try {
        status = run_rank(r, W, slot_bytes, segments, stop);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", r, error.what());
      }
      _exit(status);
    }
    processes.push_back(process);
  }
  for (const pid_t process : processes) {
    int status = 0;
    waitpid(process, &status, 0);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a process ended with status ", status);
  }
}

// The other rank never starts. The report has the waiting line.
TEST(exchange_between_processes_reports_a_hang) {
  const int W = 2;
  const int64_t slot_bytes = 64;
  std::vector<unsigned char> memory[2], rows(256);
  std::vector<uintptr_t> segments;
  for (auto& segment : memory) {
    segment.resize(static_cast<size_t>(cuda::exchange_segment_bytes(W, slot_bytes)) + 16);
    segments.push_back((reinterpret_cast<uintptr_t>(segment.data()) + 15) / 16 * 16);
  }
  const uint32_t stop = 0;
  const simt::Options before = simt::options();
  simt::options().other_processes = true;
  simt::options().patience = 0.05;
  const std::vector<int64_t> bytes = {0, 256};
  CHECK_FAILS("in a loop that polls at exchange.cuh:", cuda::exchange({.rank = 0,
                                                                       .rows = rows.data(),
                                                                       .received = rows.data(),
                                                                       .send_bytes = bytes,
                                                                       .receive_bytes = bytes,
                                                                       .first_sent = {0, 0},
                                                                       .first_received = {0, 0},
                                                                       .segments = segments,
                                                                       .slot_bytes = slot_bytes,
                                                                       .stop = &stop},
                                                                      {}));
  simt::options() = before;
}

// 2048 threads of a multiprocessor of the model are eight blocks; the kernel has four for each rank.
TEST(the_kernel_fills_whole_multiprocessors) {
  CHECK(cuda::exchange_multiprocessors(1) == 1);
  CHECK(cuda::exchange_multiprocessors(3) == 2);
  CHECK(cuda::exchange_multiprocessors(16) == 8);
  CHECK_FAILS("segments: expected 1 to 16 ranks, got 17", cuda::exchange_multiprocessors(17));
}

TEST(launcher_names_what_does_not_fit) {
  uint32_t stop = 0;
  const cuda::ExchangeArgs good{.send_bytes = {0, 16},
                                .receive_bytes = {0, 16},
                                .first_sent = {0, 0},
                                .first_received = {0, 0},
                                .segments = {0, 0},
                                .slot_bytes = 16,
                                .stop = &stop};
  const auto with = [&](auto change) {
    cuda::ExchangeArgs args = good;
    change(args);
    return args;
  };
  const auto refuses = [](const cuda::ExchangeArgs& args, const char* expected) {
    CHECK_FAILS(expected, cuda::exchange(args, {}));
  };
  refuses(with([](auto& a) { a.slot_bytes = 24; }), "slot_bytes: expected a positive multiple of 16, got 24");
  refuses(with([](auto& a) { a.rank = 2; }), "rank: expected 0 to 1, got 2");
  refuses(with([](auto& a) { a.send_bytes = {1}; }), "send_bytes: expected 2 values, got 1");
  refuses(with([](auto& a) { a.receive_bytes = {0, -1}; }), "receive_bytes: expected none negative, got -1");
  refuses(with([](auto& a) { a.send_bytes = {8, 0}; }), "receive_bytes: expected 8 of the rank itself");
  refuses(with([](auto& a) { a.segments.clear(); }), "segments: expected 1 to 16 ranks, got 0");
}

}  // namespace
}  // namespace switchgear::test
