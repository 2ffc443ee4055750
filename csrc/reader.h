// SPDX-License-Identifier: BSD-3-Clause
// Reads records of files into memory on threads of its own: experts that a cache loads (docs/offload.md).
//
// A read is split into chunks, which all threads share, so that one record gets the whole bandwidth of the device. Urgent
// reads go first, chunk by chunk: a guessed read in progress yields after its current chunk. Files are opened with O_DIRECT
// where the file system takes it, so that records go past the page cache, which would hold them a second time.
#pragma once
#include <sys/types.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace switchgear {

// The checksum of a record is the sum, modulo 2^64, of a value of each 8-byte word that depends on the word and on its
// index, plus one of the length. So chunks may be summed in any order, by any thread, and moved or swapped words differ.
uint64_t checksum(const void* data, int64_t bytes);

// The part of a chunk that starts at byte `offset` of its record; `offset` is a multiple of 8. The sum of all parts plus
// checksum_of_length is the checksum.
uint64_t checksum_part(const void* data, int64_t bytes, int64_t offset);
uint64_t checksum_of_length(int64_t bytes);

enum class ReadStatus {
  kDone,
  kShort,      // the file ends before the record does
  kFailed,     // the system reported an error, `error`
  kChecksum,   // the bytes are not those that were written
  kReplaced,   // as one of the three above, and the file at this path is another one than was opened, or was changed
  kCancelled,  // by `cancel`
  kClosed,     // by `close`, before its last chunk began
};

struct ReadOutcome {
  ReadStatus status = ReadStatus::kDone;
  int error = 0;   // errno of kFailed
  int64_t at = 0;  // byte of the file of kShort and kFailed
  int file = 0;    // the request's
  int64_t offset = 0;
  int64_t bytes = 0;
};

struct ReadRequest {
  int file = 0;  // index
  int64_t offset = 0;
  int64_t bytes = 0;
  void* address = nullptr;  // valid until the read is done, cancelled, or the reader is closed
  std::optional<uint64_t> checksum;
  bool urgent = true;
};

struct ReaderOptions {
  int threads = 4;
  bool direct = true;
  int64_t chunk = int64_t{1} << 20;                        // bytes, a multiple of 4096
  ssize_t (*pread)(int, void*, size_t, off_t) = &::pread;  // for tests
};

struct ReaderStatistics {
  int64_t bytes = 0;        // that were read
  int64_t reads = 0;        // that are done, failed ones included
  double busy_seconds = 0;  // in which at least one thread was reading
};

struct ReaderState;
struct Read;

// All functions may be called from any thread. In a forked child, which has no copies of the threads, they throw
// ReaderOfOtherProcess, and the destructor only closes the files.
class Reader {
 public:
  static constexpr int kMostThreads = 64;
  static constexpr int kMostTickets = 1 << 16;  // not waited for yet

  Reader(std::vector<std::string> files, ReaderOptions options = {});
  ~Reader();  // as close()
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  int64_t submit(const ReadRequest& request);

  std::shared_ptr<Read> find(int64_t ticket);  // a read that was not waited for yet
  // Its outcome, or nothing if it is not done in time. The first outcome ends the ticket; others that have found the read
  // before still get it.
  std::optional<ReadOutcome> wait_for(const std::shared_ptr<Read>& read, std::chrono::nanoseconds timeout);
  std::optional<ReadOutcome> wait_for(int64_t ticket, std::chrono::nanoseconds timeout) {
    return wait_for(find(ticket), timeout);
  }

  bool is_done(int64_t ticket);
  void promote(int64_t ticket);  // a guessed read becomes an urgent one
  bool cancel(int64_t ticket);   // true if it had not begun, and will not
  ReaderStatistics statistics();
  bool is_direct(int file);  // whether reads go past the page cache
  const std::string& file(int index) const;
  void close();  // reads no further chunk, waits for those that threads are reading, and ends the threads

 private:
  void check_process() const;
  std::unique_ptr<ReaderState> state_;
};

struct ReaderOfOtherProcess : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct ReaderClosed : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct TooManyTickets : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct UnreadableFile : std::runtime_error {  // at the construction
  UnreadableFile(std::string path, int error, const std::string& what)
      : std::runtime_error(what), path(std::move(path)), error(error) {}
  std::string path;
  int error;
};

}  // namespace switchgear
