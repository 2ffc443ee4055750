// SPDX-License-Identifier: BSD-3-Clause
// The reader of records: bytes, priorities, errors of files and of the system, and threads that close and cancel.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <thread>
#include <vector>

#include "check.h"
#include "reader.h"
#include "switchgear/check.h"

namespace switchgear::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr int64_t kChunk = 4096;

// A file of pseudo-random bytes that is gone after the test.
struct TemporaryFile {
  std::string path;
  std::vector<char> bytes;

  explicit TemporaryFile(int64_t size) : bytes(static_cast<size_t>(size)) {
    path = std::filesystem::temp_directory_path() / "switchgear_reader_XXXXXX";
    const int file = mkstemp(path.data());
    uint64_t state = 1;
    for (char& byte : bytes)
      byte = static_cast<char>((state = state * 6364136223846793005u + 1442695040888963407u) >> 56);
    CHECK(write(file, bytes.data(), bytes.size()) == static_cast<ssize_t>(size));
    close(file);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() { unlink(path.c_str()); }
};

struct Memory {
  char* data;
  explicit Memory(int64_t size) : data(static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(size)))) {
    std::memset(data, 0, static_cast<size_t>(size));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data); }
};

// ---- faults: replacements of pread --------------------------------------------------------------------------------------

std::atomic<bool> held{false};      // reads wait while it is set
std::atomic<int64_t> fails_at{-1};  // byte at which reads fail with EIO
std::atomic<int> calls{0};
std::atomic<int> order[64];  // offset / kChunk of each call, in order

ssize_t faulty(int file, void* to, size_t bytes, off_t at) {
  const int call = calls.fetch_add(1);
  if (call < 64) order[call] = static_cast<int>(at / kChunk);
  while (held) std::this_thread::sleep_for(milliseconds(1));
  if (call % 3 == 1) {
    errno = EINTR;
    return -1;
  }
  if (fails_at >= at && fails_at < at + static_cast<off_t>(bytes)) {
    errno = EIO;
    return -1;
  }
  return pread(file, to, bytes > 1000 ? bytes / 2 : bytes, at);  // fewer bytes than were requested, as a system may
}

ReaderOptions faulty_options(int threads) {
  held = false, fails_at = -1, calls = 0;
  return {.threads = threads, .direct = false, .chunk = kChunk, .pread = &faulty};
}

ReadStatus status_of(Reader& reader, int64_t ticket) { return reader.wait_for(ticket, seconds(60)).value().status; }

template <typename Error, typename Function>
bool throws(Function&& function) {
  try {
    function();
  } catch (const Error&) {
    return true;
  }
  return false;
}

// ---- tests --------------------------------------------------------------------------------------------------------------

TEST(checksums_depend_on_every_word_and_its_place) {
  std::vector<uint64_t> words(515);
  for (size_t i = 0; i < words.size(); ++i) words[i] = i % 7 == 0 ? 0 : i * i;
  const int64_t bytes = static_cast<int64_t>(words.size()) * 8;
  const uint64_t sum = checksum(words.data(), bytes);
  for (const size_t at : {size_t{0}, size_t{1}, size_t{300}, size_t{514}}) {
    for (int bit = 0; bit < 64; ++bit) {
      words[at] ^= uint64_t{1} << bit;
      CHECK(checksum(words.data(), bytes) != sum, "bit ", bit, " of word ", at);
      words[at] ^= uint64_t{1} << bit;
    }
    std::swap(words[at], words[200]);
    CHECK(checksum(words.data(), bytes) != sum, "swap of ", at);
    std::swap(words[at], words[200]);
  }
  std::vector<uint64_t> moved(words.begin() + 1, words.end());
  moved.push_back(words[0]);
  CHECK(checksum(moved.data(), bytes) != sum, "rotated by a word");
  std::vector<uint64_t> blocks(words);
  std::swap_ranges(blocks.begin(), blocks.begin() + 128, blocks.begin() + 256);
  CHECK(checksum(blocks.data(), bytes) != sum, "blocks are swapped");
  CHECK(checksum(words.data(), bytes - 1) != sum && checksum(words.data(), bytes - 8) != sum, "shorter");
  const std::vector<char> zeros(64);
  CHECK(checksum(zeros.data(), 56) != checksum(zeros.data(), 64), "zeros");
  const char* const data = reinterpret_cast<const char*>(words.data());
  for (const int64_t first : {int64_t{8}, int64_t{24}, int64_t{4096}}) {
    const uint64_t parts = checksum_part(data, first, 0) + checksum_part(data + first, bytes - 3 - first, first);
    CHECK(parts + checksum_of_length(bytes - 3) == checksum(data, bytes - 3), "parts of ", first);
  }
}

TEST(records_are_read_in_chunks_by_several_threads) {
  const TemporaryFile file(10 * kChunk + 77);
  for (const bool direct : {false, true}) {
    for (const int threads : {1, 4}) {
      Reader reader({file.path}, {.threads = threads, .direct = direct, .chunk = kChunk});
      Memory memory(16 * kChunk);
      std::vector<int64_t> tickets;
      const int64_t offsets[] = {0, kChunk, 3 * kChunk + 5, 9 * kChunk},
                    sizes[] = {kChunk, 5 * kChunk, 1000, kChunk + 77};
      int64_t at = 0;
      for (int i = 0; i < 4; ++i) {
        const uint64_t sum = checksum(file.bytes.data() + offsets[i], sizes[i]);
        tickets.push_back(reader.submit({0, offsets[i], sizes[i], memory.data + at, sum, i % 2 == 0}));
        at += (sizes[i] + kChunk - 1) / kChunk * kChunk;
      }
      at = 0;
      for (int i = 0; i < 4; ++i) {
        CHECK(status_of(reader, tickets[static_cast<size_t>(i)]) == ReadStatus::kDone, i, direct, threads);
        CHECK(std::memcmp(memory.data + at, file.bytes.data() + offsets[i], static_cast<size_t>(sizes[i])) == 0);
        at += (sizes[i] + kChunk - 1) / kChunk * kChunk;
      }
      const ReaderStatistics statistics = reader.statistics();
      CHECK(statistics.reads == 4 && statistics.bytes == 7 * kChunk + 1077 && statistics.busy_seconds > 0);
      CHECK(throws<ValueError>([&] { reader.wait_for(tickets[0], seconds(1)); }), "waited for twice");
    }
  }
}

TEST(a_read_that_fails_does_not_stop_others) {
  const TemporaryFile file(8 * kChunk);
  Memory memory(16 * kChunk);
  Reader reader({file.path}, faulty_options(3));
  fails_at = 2 * kChunk + 100;
  const int64_t failing = reader.submit({0, 0, 6 * kChunk, memory.data, std::nullopt, true});
  const int64_t good = reader.submit({0, 3 * kChunk, 4 * kChunk, memory.data + 8 * kChunk,
                                      checksum(file.bytes.data() + 3 * kChunk, 4 * kChunk), true});
  const int64_t changed = reader.submit({0, 7 * kChunk, kChunk, memory.data + 12 * kChunk, 1, false});
  const int64_t beyond = reader.submit({0, 7 * kChunk, 2 * kChunk, memory.data + 13 * kChunk, std::nullopt, false});
  const auto outcome = reader.wait_for(failing, seconds(60));
  CHECK(outcome && outcome->status == ReadStatus::kFailed && outcome->error == EIO);
  CHECK(outcome->at <= fails_at && outcome->at > 2 * kChunk - 1 && outcome->bytes == 6 * kChunk);
  CHECK(status_of(reader, good) == ReadStatus::kDone);
  CHECK(std::memcmp(memory.data + 8 * kChunk, file.bytes.data() + 3 * kChunk, 4 * kChunk) == 0);
  CHECK(status_of(reader, changed) == ReadStatus::kChecksum);
  const auto end = reader.wait_for(beyond, seconds(60));
  CHECK(end && end->status == ReadStatus::kShort && end->at == 8 * kChunk);
  CHECK(reader.statistics().reads == 4, "those that failed, too");
}

TEST(files_that_are_replaced_or_truncated_are_named) {
  const TemporaryFile file(4 * kChunk), other(4 * kChunk);
  Memory memory(4 * kChunk);
  Reader reader({file.path}, {.threads = 1});
  CHECK(truncate(file.path.c_str(), kChunk) == 0);
  CHECK(status_of(reader, reader.submit({0, 0, 4 * kChunk, memory.data, std::nullopt, true})) == ReadStatus::kReplaced);
  CHECK(throws<UnreadableFile>([&] { Reader({"/tmp"}, {}); }), "a directory");
  CHECK(throws<UnreadableFile>([&] { Reader({other.path, other.path + ".none"}, {}); }), "no file");
}

TEST(urgent_reads_overtake_guessed_ones) {
  const TemporaryFile file(40 * kChunk);
  Memory memory(40 * kChunk);
  Reader reader({file.path}, faulty_options(1));
  const auto submit = [&](int64_t first, int64_t chunks, bool urgent) {
    return reader.submit({0, first * kChunk, chunks * kChunk, memory.data + first * kChunk, std::nullopt, urgent});
  };
  held = true;
  const int64_t begun = submit(0, 4, false);  // its first chunk is in progress
  while (calls == 0) std::this_thread::yield();
  const int64_t guessed = submit(10, 1, false), promoted = submit(20, 1, false), dropped = submit(5, 1, false);
  const int64_t urgent = submit(30, 2, true);
  reader.promote(promoted);
  reader.promote(begun);
  CHECK(!reader.cancel(begun) && reader.cancel(dropped) && !reader.is_done(guessed));
  CHECK(!reader.wait_for(urgent, milliseconds(5)), "in time");
  held = false;
  for (const int64_t ticket : {begun, guessed, promoted, urgent}) CHECK(status_of(reader, ticket) == ReadStatus::kDone);
  std::vector<int> seen;
  for (int i = 0; i < std::min(calls.load(), 64); ++i) {
    if (seen.empty() || seen.back() != order[i]) seen.push_back(order[i]);
  }
  CHECK((seen == std::vector<int>{0, 30, 31, 20, 1, 2, 3, 10}));
}

TEST(close_cancels_and_joins) {
  const TemporaryFile file(8 * kChunk);
  Memory memory(8 * kChunk);
  for (int round = 0; round < 20; ++round) {
    Reader reader({file.path}, faulty_options(2));
    held = true;
    std::vector<int64_t> tickets;
    for (int i = 0; i < 8; ++i) {
      tickets.push_back(reader.submit({0, i * kChunk, kChunk, memory.data + i * kChunk, std::nullopt, i % 2 == 0}));
    }
    while (calls < 2) std::this_thread::yield();
    std::atomic<int> done{0}, closed{0};
    std::vector<std::thread> waiting;
    const auto last = reader.find(tickets[7]);
    for (int i = 0; i < 2; ++i) {
      waiting.emplace_back([&] { closed += reader.wait_for(last, seconds(60))->status == ReadStatus::kClosed; });
    }
    std::thread closing([&] { reader.close(); });
    for (std::thread& thread : waiting) thread.join();
    held = false;
    closing.join();
    CHECK(closed == 2, "both that wait for a read");
    for (int i = 0; i < 7; ++i) {
      const ReadStatus status = status_of(reader, tickets[static_cast<size_t>(i)]);
      done += status == ReadStatus::kDone;
      CHECK(status == ReadStatus::kDone || status == ReadStatus::kClosed);
    }
    CHECK(done == 2, "those that were in progress");
    CHECK(throws<ReaderClosed>([&] { reader.submit({0, 0, kChunk, memory.data, std::nullopt, true}); }), "closed");
    reader.close();
  }
}

TEST(many_threads_share_a_reader) {
  const TemporaryFile file(16 * kChunk);
  Reader reader({file.path}, {.threads = 4, .chunk = kChunk});
  std::vector<std::thread> users;
  std::atomic<int> good{0};
  for (int user = 0; user < 4; ++user) {
    users.emplace_back([&, user] {
      Memory memory(4 * kChunk);
      for (int i = 0; i < 50; ++i) {
        const int64_t offset = (user + i) % 12 * kChunk;
        const uint64_t sum = checksum(file.bytes.data() + offset, 4 * kChunk);
        const int64_t ticket = reader.submit({0, offset, 4 * kChunk, memory.data, sum, i % 2 == 0});
        if (i % 3 == 0) reader.promote(ticket);
        if (i % 5 == 0 && reader.cancel(ticket)) {
          ++good;
          continue;
        }
        good += status_of(reader, ticket) == ReadStatus::kDone;
      }
    });
  }
  for (std::thread& thread : users) thread.join();
  CHECK(good == 200);
}

TEST(bad_requests_are_refused) {
  const TemporaryFile file(kChunk);
  Memory memory(kChunk);
  Reader reader({file.path}, {.threads = 1});
  const ReadRequest good{0, 0, kChunk, memory.data, std::nullopt, true};
  const auto refused = [&](auto change) {
    ReadRequest request = good;
    change(request);
    CHECK(throws<ValueError>([&] { reader.submit(request); }), "refused");
  };
  refused([](ReadRequest& r) { r.file = 1; });
  refused([](ReadRequest& r) { r.file = -1; });
  refused([](ReadRequest& r) { r.offset = -1; });
  refused([](ReadRequest& r) { r.bytes = 0; });
  refused([](ReadRequest& r) { r.offset = INT64_MAX - 1; });
  refused([](ReadRequest& r) { r.address = nullptr; });
  CHECK(throws<ValueError>([&] { Reader({}, {}); }), "no files");
  CHECK(throws<ValueError>([&] { Reader({file.path}, {.threads = 0}); }), "threads");
  CHECK(throws<ValueError>([&] { Reader({file.path}, {.chunk = 1000}); }), "chunk");
  CHECK(throws<ValueError>([&] { reader.wait_for(77, seconds(1)); }), "no ticket");
}

TEST(tickets_are_bounded) {
  const TemporaryFile file(kChunk);
  Memory memory(kChunk);
  Reader reader({file.path}, {.threads = 1});
  const auto submit = [&] { return reader.submit({0, 0, 1, memory.data, std::nullopt, true}); };
  const int64_t first = submit();
  for (int i = 1; i < Reader::kMostTickets; ++i) submit();
  CHECK(throws<TooManyTickets>([&] { submit(); }), "too many");
  CHECK(status_of(reader, first) == ReadStatus::kDone);
  submit();
}

#if !defined(__SANITIZE_THREAD__)  // it does not follow the threads of a child
TEST(a_forked_child_is_refused) {
  const TemporaryFile file(kChunk);
  Memory memory(kChunk);
  auto reader = std::make_unique<Reader>(std::vector<std::string>{file.path}, ReaderOptions{.threads = 2});
  const pid_t child = fork();
  if (child == 0) {
    int code = 1;
    try {
      reader->submit({0, 0, kChunk, memory.data, std::nullopt, true});
    } catch (const ReaderOfOtherProcess& error) {
      code = std::string(error.what()).find("belongs to process") == std::string::npos ? 2 : 0;
    }
    reader.reset();
    _exit(code);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, status);
  CHECK(status_of(*reader, reader->submit({0, 0, kChunk, memory.data, std::nullopt, true})) == ReadStatus::kDone);
}
#endif

}  // namespace
}  // namespace switchgear::test
