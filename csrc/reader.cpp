// SPDX-License-Identifier: BSD-3-Clause
#include "reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "switchgear/check.h"

namespace switchgear {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kAlignment = 4096;  // of addresses, offsets and sizes with O_DIRECT: enough for every common device
constexpr uint64_t kStep = 0x9e3779b97f4a7c15;  // odd: keys of different words differ

// ---- files -----------------------------------------------------------------------------------------------------------

struct File {
  std::string path;
  int direct = -1;  // descriptors; -1 for none
  int buffered = -1;
  struct stat at_open = {};
  std::atomic<bool> takes_direct{false};

  File() = default;
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (direct >= 0) ::close(direct);
    if (buffered >= 0) ::close(buffered);
  }
};

void open(File& file, bool direct) {
  const auto fail = [&](int error, const std::string& what) { throw UnreadableFile(file.path, error, what); };
  file.buffered = ::open(file.path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // O_NONBLOCK: a FIFO would wait
  if (file.buffered < 0) fail(errno, std::strerror(errno));
  if (fstat(file.buffered, &file.at_open) != 0) fail(errno, std::strerror(errno));
  if (!S_ISREG(file.at_open.st_mode)) fail(EINVAL, "expected a regular file");
#ifdef O_DIRECT
  if (direct) file.direct = ::open(file.path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
#endif
  file.takes_direct = file.direct >= 0;
#ifdef POSIX_FADV_RANDOM
  posix_fadvise(file.buffered, 0, 0, POSIX_FADV_RANDOM);  // records are read whole: reading ahead would read others
#endif
}

bool was_replaced(const File& file) {
  struct stat now = {}, opened = {};
  if (stat(file.path.c_str(), &now) != 0 || fstat(file.buffered, &opened) != 0) return true;
  const struct stat& then = file.at_open;
  const bool is_same_file = now.st_dev == then.st_dev && now.st_ino == then.st_ino;
  return !is_same_file || opened.st_size != then.st_size || opened.st_mtim.tv_sec != then.st_mtim.tv_sec ||
         opened.st_mtim.tv_nsec != then.st_mtim.tv_nsec;
}

// ---- reads -----------------------------------------------------------------------------------------------------------

}  // namespace

struct Read {
  ReadRequest request;
  int64_t ticket = 0;
  int64_t next = 0;  // byte at which the next chunk starts
  int running = 0;   // chunks that threads read now
  bool is_done = false;
  uint64_t sum = 0;  // of the chunks that are done
  ReadOutcome outcome;

  bool has_failed() const { return outcome.status != ReadStatus::kDone; }
  bool has_begun() const { return next > 0; }
};

namespace {

struct ChunkResult {
  ReadStatus status = ReadStatus::kDone;
  int error = 0;
  int64_t at = 0;
  int64_t bytes = 0;
  uint64_t sum = 0;
};

bool is_aligned(const ReadRequest& request) {
  return (reinterpret_cast<uintptr_t>(request.address) | static_cast<uintptr_t>(request.offset) |
          static_cast<uintptr_t>(request.bytes)) %
             kAlignment ==
         0;
}

ChunkResult read_chunk(File& file, const ReaderOptions& options, const ReadRequest& request, int64_t begin,
                       int64_t bytes) {
  ChunkResult result;
  char* const to = static_cast<char*>(request.address) + begin;
  bool direct = file.takes_direct.load(std::memory_order_relaxed) && is_aligned(request);
  while (result.bytes < bytes) {
    const int64_t at = request.offset + begin + result.bytes;
    const ssize_t got = options.pread(direct ? file.direct : file.buffered, to + result.bytes,
                                      static_cast<size_t>(bytes - result.bytes), at);
    if (got > 0) {
      result.bytes += got;
      direct = direct && got % kAlignment == 0;  // the end of a file that is not padded
    } else if (got < 0 && errno == EINTR) {
      continue;
    } else if (got < 0 && direct && errno == EINVAL) {  // a file system that opens with O_DIRECT, but wants more
      file.takes_direct.store(direct = false, std::memory_order_relaxed);
    } else {
      result.status = got == 0 ? ReadStatus::kShort : ReadStatus::kFailed;
      result.error = got == 0 ? 0 : errno;
      result.at = at;
      return result;
    }
  }
#ifdef POSIX_FADV_DONTNEED
  if (!direct) posix_fadvise(file.buffered, request.offset + begin, bytes, POSIX_FADV_DONTNEED);
#endif
  if (request.checksum) result.sum = checksum_part(to, bytes, begin);
  return result;
}

}  // namespace

struct ReaderState {
  std::deque<File> files;  // which do not move
  ReaderOptions options;
  const pid_t process = getpid();

  std::mutex mutex;
  std::condition_variable work, done;
  std::deque<std::shared_ptr<Read>> urgent, guessed;  // in order of submission; a read leaves with its last chunk
  std::unordered_map<int64_t, std::shared_ptr<Read>> tickets;
  int64_t last_ticket = 0;
  bool is_closed = false;
  int reading = 0;  // threads
  Clock::time_point busy_since;
  ReaderStatistics statistics;
  std::vector<std::thread> threads;
  std::mutex joining;

  void run();
  void begin_reading();
  void end_reading();
  void finish(Read& read);
  const std::shared_ptr<Read>& find(int64_t ticket);
  void take_out(const Read& read);
};

void ReaderState::begin_reading() {
  if (reading++ == 0) busy_since = Clock::now();
}

void ReaderState::end_reading() {
  if (--reading == 0) statistics.busy_seconds += std::chrono::duration<double>(Clock::now() - busy_since).count();
}

void ReaderState::finish(Read& read) {
  read.is_done = true;
  statistics.reads += 1;
  done.notify_all();
}

const std::shared_ptr<Read>& ReaderState::find(int64_t ticket) {
  const auto found = tickets.find(ticket);
  SWITCHGEAR_CHECK(ValueError, found != tickets.end(), "ticket: expected one that was not waited for yet, got ",
                   ticket);
  return found->second;
}

void ReaderState::take_out(const Read& read) {
  for (auto* queue : {&urgent, &guessed}) std::erase_if(*queue, [&](const auto& one) { return one.get() == &read; });
}

void ReaderState::run() {
  std::unique_lock lock(mutex);
  for (;;) {
    work.wait(lock, [&] { return is_closed || !urgent.empty() || !guessed.empty(); });
    auto& queue = !urgent.empty() ? urgent : guessed;
    if (queue.empty()) return;  // closed, and close() has emptied both
    const std::shared_ptr<Read> read = queue.front();
    const ReadRequest request = read->request;
    const int64_t begin = read->next, bytes = std::min(options.chunk, request.bytes - begin);
    read->next += bytes;
    read->running += 1;
    if (read->next == request.bytes) queue.pop_front();
    File& file = files[static_cast<size_t>(request.file)];
    begin_reading();
    lock.unlock();
    ChunkResult result = read_chunk(file, options, request, begin, bytes);
    if (result.status != ReadStatus::kDone && was_replaced(file)) result.status = ReadStatus::kReplaced;
    lock.lock();
    end_reading();
    statistics.bytes += result.bytes;
    read->running -= 1;
    read->sum += result.sum;
    if (result.status != ReadStatus::kDone && !read->has_failed()) {
      read->outcome.status = result.status;
      read->outcome.error = result.error;
      read->outcome.at = result.at;
      take_out(*read);  // its other chunks are not read
      read->next = request.bytes;
    }
    if (read->running > 0 || read->next < request.bytes) continue;
    if (!read->has_failed() && request.checksum && read->sum + checksum_of_length(request.bytes) != *request.checksum) {
      lock.unlock();
      const bool replaced = was_replaced(file);
      lock.lock();
      read->outcome.status = replaced ? ReadStatus::kReplaced : ReadStatus::kChecksum;
    }
    finish(*read);
  }
}

Reader::Reader(std::vector<std::string> files, ReaderOptions options) : state_(std::make_unique<ReaderState>()) {
  SWITCHGEAR_CHECK(ValueError, options.threads >= 1 && options.threads <= kMostThreads, "threads: expected 1 to ",
                   kMostThreads, ", got ", options.threads);
  SWITCHGEAR_CHECK(ValueError, options.chunk >= kAlignment && options.chunk % kAlignment == 0,
                   "chunk: expected a multiple of ", kAlignment, ", got ", options.chunk);
  SWITCHGEAR_CHECK(ValueError, !files.empty(), "files: expected at least one, got none");
  state_->options = options;
  for (std::string& path : files) {
    File& file = state_->files.emplace_back();
    file.path = std::move(path);
    open(file, options.direct);
  }
  try {
    for (int i = 0; i < options.threads; ++i) {
      state_->threads.emplace_back([state = state_.get()] { state->run(); });
    }
  } catch (...) {  // no more threads: those that run end
    close();
    throw;
  }
}

Reader::~Reader() {
  if (getpid() != state_->process) {
    state_->files.clear();
    state_.release();  // NOLINT: its threads are not here, and its mutex may be held by one of them
    return;
  }
  close();
}

void Reader::check_process() const {
  if (getpid() == state_->process) return;
  throw ReaderOfOtherProcess(join("reader: expected one of process ", getpid(), ", this one belongs to process ",
                                  state_->process, "; open another after a fork"));
}

int64_t Reader::submit(const ReadRequest& request) {
  check_process();
  const auto count = static_cast<int64_t>(state_->files.size());
  SWITCHGEAR_CHECK(ValueError, request.file >= 0 && request.file < count, "file: expected 0 to ", count - 1, ", got ",
                   request.file);
  SWITCHGEAR_CHECK(ValueError, request.offset >= 0, "offset: expected at least 0, got ", request.offset);
  SWITCHGEAR_CHECK(ValueError, request.bytes > 0 && request.bytes <= INT64_MAX - request.offset,
                   "nbytes: expected at least 1, and an end below 2^63, got ", request.bytes);
  SWITCHGEAR_CHECK(ValueError, request.address != nullptr, "address: expected one of memory, got 0");
  const auto read = std::make_shared<Read>();
  read->request = request;
  read->outcome.file = request.file;
  read->outcome.offset = request.offset;
  read->outcome.bytes = request.bytes;
  const std::lock_guard lock(state_->mutex);
  if (state_->is_closed) throw ReaderClosed("reader: expected an open one, got one that is closed");
  if (state_->tickets.size() >= kMostTickets) {
    throw TooManyTickets(join("reader: expected at most ", kMostTickets, " reads that were not waited for, got more"));
  }
  const int64_t ticket = read->ticket = ++state_->last_ticket;
  state_->tickets.emplace(ticket, read);
  (request.urgent ? state_->urgent : state_->guessed).push_back(read);
  if (request.bytes > state_->options.chunk) {
    state_->work.notify_all();
  } else {
    state_->work.notify_one();
  }
  return ticket;
}

std::shared_ptr<Read> Reader::find(int64_t ticket) {
  check_process();
  const std::lock_guard lock(state_->mutex);
  return state_->find(ticket);
}

std::optional<ReadOutcome> Reader::wait_for(const std::shared_ptr<Read>& read, std::chrono::nanoseconds timeout) {
  check_process();
  std::unique_lock lock(state_->mutex);
  // A cap: condition variables overflow at times beyond the clock's range.
  const auto until = Clock::now() + std::min<std::chrono::nanoseconds>(timeout, std::chrono::hours(24));
  if (!state_->done.wait_until(lock, until, [&] { return read->is_done; })) return std::nullopt;
  state_->tickets.erase(read->ticket);
  return read->outcome;
}

bool Reader::is_done(int64_t ticket) {
  check_process();
  const std::lock_guard lock(state_->mutex);
  return state_->find(ticket)->is_done;
}

void Reader::promote(int64_t ticket) {
  check_process();
  const std::lock_guard lock(state_->mutex);
  const std::shared_ptr<Read>& read = state_->find(ticket);
  if (std::erase(state_->guessed, read) != 0) state_->urgent.push_back(read);
}

bool Reader::cancel(int64_t ticket) {
  check_process();
  const std::lock_guard lock(state_->mutex);
  const std::shared_ptr<Read> read = state_->find(ticket);
  if (read->is_done || read->has_begun()) return false;
  read->outcome.status = ReadStatus::kCancelled;
  read->is_done = true;
  state_->take_out(*read);
  state_->tickets.erase(ticket);
  state_->done.notify_all();
  return true;
}

ReaderStatistics Reader::statistics() {
  check_process();
  const std::lock_guard lock(state_->mutex);
  ReaderStatistics now = state_->statistics;
  if (state_->reading > 0) {
    now.busy_seconds += std::chrono::duration<double>(Clock::now() - state_->busy_since).count();
  }
  return now;
}

bool Reader::is_direct(int file) {
  check_process();
  const auto count = static_cast<int64_t>(state_->files.size());
  SWITCHGEAR_CHECK(ValueError, file >= 0 && file < count, "file: expected 0 to ", count - 1, ", got ", file);
  return state_->files[static_cast<size_t>(file)].takes_direct;
}

const std::string& Reader::file(int index) const { return state_->files.at(static_cast<size_t>(index)).path; }

void Reader::close() {
  check_process();
  {
    const std::lock_guard lock(state_->mutex);
    state_->is_closed = true;
    for (auto* queue : {&state_->urgent, &state_->guessed}) {
      for (const auto& read : *queue) {
        if (!read->has_failed()) read->outcome.status = ReadStatus::kClosed;
        read->next = read->request.bytes;
        if (read->running == 0) read->is_done = true;
      }
      queue->clear();
    }
    state_->work.notify_all();
    state_->done.notify_all();
  }
  const std::lock_guard lock(state_->joining);
  for (std::thread& thread : state_->threads) thread.join();
  state_->threads.clear();
}

// ---- checksum --------------------------------------------------------------------------------------------------------

namespace {

// A product of the halves of the keyed word, which depends on the word's index in no linear way, plus the keyed word. A
// change of one half of the keyed word always changes it: by d (other half + 1), or d (other half + 2^32), never 0 modulo
// 2^64. A change of the lower half of the word may carry into the upper half of the keyed word, and change both.
inline uint64_t value_of(uint64_t word, uint64_t key) {
  const uint64_t keyed = word + key;
  return (keyed & 0xffffffff) * (keyed >> 32) + keyed;
}

inline uint64_t word_at(const char* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

}  // namespace

uint64_t checksum_part(const void* data, int64_t bytes, int64_t offset) {
  const char* from = static_cast<const char*>(data);
  uint64_t key = (static_cast<uint64_t>(offset) / 8 + 1) * kStep;
  uint64_t sums[4] = {};
  int64_t at = 0;
  for (; at + 32 <= bytes; at += 32, key += 4 * kStep) {
    for (uint64_t i = 0; i < 4; ++i) sums[i] += value_of(word_at(from + at + 8 * i), key + i * kStep);
  }
  for (; at < bytes; at += 8, key += kStep) {
    uint64_t word = 0;
    std::memcpy(&word, from + at, static_cast<size_t>(std::min<int64_t>(8, bytes - at)));
    sums[0] += value_of(word, key);
  }
  return sums[0] + sums[1] + sums[2] + sums[3];
}

uint64_t checksum_of_length(int64_t bytes) { return value_of(static_cast<uint64_t>(bytes), 0x2545f4914f6cdd1d); }

uint64_t checksum(const void* data, int64_t bytes) { return checksum_part(data, bytes, 0) + checksum_of_length(bytes); }

}  // namespace switchgear
