// SPDX-License-Identifier: BSD-3-Clause
#include "workspace.h"

#include <pthread.h>

#include <algorithm>
#include <cassert>
#include <iterator>
#include <mutex>
#include <new>
#include <vector>

#include "pages.h"

namespace switchgear::cpu {
namespace {

constexpr size_t kMaxIdle = 4;  // concurrent callers keep one block each; more are returned to the system

struct Block {
  char* data;
  int64_t size;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> idle;  // workspaces, the one that was used last at the end

  std::vector<Block> idle_buffers;  // oldest first
  int64_t idle_bytes = 0, live_bytes = 0, most_live_bytes = 0;
};

// Never destroyed: threads may still hold workspaces while the process exits.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

// A fork must not leave the child with a pool that another thread has locked.
[[maybe_unused]] const int fork_handlers =
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });

void free_block(Block block) { ::operator delete(block.data, std::align_val_t{64}); }

// Makes room for one more idle workspace. The oldest goes: if the newest went, blocks of calls of long ago would stay, and
// each further call would have to fault in its pages again.
void drop_oldest(Pool& p) {
  if (p.idle.size() < kMaxIdle) return;
  free_block(p.idle.front());
  p.idle.erase(p.idle.begin());
}

// A call that has outgrown all idle workspaces replaces the largest: calls that grow would keep each of their sizes.
void drop_largest(Pool& p) {
  const auto largest =
      std::max_element(p.idle.begin(), p.idle.end(), [](const Block& a, const Block& b) { return a.size < b.size; });
  if (largest == p.idle.end()) return;
  free_block(*largest);
  p.idle.erase(largest);
}

char* allocate(int64_t bytes) {
  auto* const data = static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64}));
  advise_huge_pages(data, bytes);  // one page fault instead of 512
  return data;
}

}  // namespace

Workspace::Workspace(int64_t bytes) : size_(padded(bytes)) {
  Pool& p = pool();
  Block reuse{nullptr, 0};
  {
    const std::lock_guard lock(p.mutex);
    auto best = p.idle.end();  // the smallest that fits, so nested calls find their own blocks again
    for (auto it = p.idle.begin(); it != p.idle.end(); ++it) {
      if (it->size >= size_ && (best == p.idle.end() || it->size < best->size)) best = it;
    }
    if (best != p.idle.end()) {
      reuse = *best;
      p.idle.erase(best);
    } else {
      drop_largest(p);
    }
  }
  if (reuse.data == nullptr) {
    reuse.size = size_;
    reuse.data = allocate(size_);
  }
  block_ = reuse.data;
  size_ = reuse.size;
}

Workspace::~Workspace() {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  drop_oldest(p);
  p.idle.push_back({block_, size_});
}

void* Workspace::take_bytes(int64_t bytes) {
  char* const data = block_ + used_;
  used_ += padded(bytes);
  assert(used_ <= size_);
  return data;
}

Buffer::Buffer(int64_t bytes) : size_(bytes) {
  Pool& p = pool();
  int64_t most_before = 0;
  {
    const std::lock_guard lock(p.mutex);
    most_before = p.most_live_bytes;
    p.live_bytes += bytes;
    p.most_live_bytes = std::max(p.most_live_bytes, p.live_bytes);
    auto& idle = p.idle_buffers;
    const auto same_size = std::find_if(idle.rbegin(), idle.rend(), [&](const Block& b) { return b.size == bytes; });
    if (same_size != idle.rend()) {
      data_ = same_size->data;
      p.idle_bytes -= bytes;
      idle.erase(std::next(same_size).base());
      return;
    }
    while (!idle.empty() && p.idle_bytes + p.live_bytes > p.most_live_bytes) {
      p.idle_bytes -= idle.front().size;
      free_block(idle.front());
      idle.erase(idle.begin());
    }
  }
  try {
    data_ = allocate(bytes);
  } catch (...) {
    const std::lock_guard lock(p.mutex);
    p.live_bytes -= bytes;
    p.most_live_bytes = std::max(most_before, p.live_bytes);  // otherwise idle buffers would never be freed again
    throw;
  }
}

Buffer::~Buffer() {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  p.live_bytes -= size_;
  p.idle_bytes += size_;
  p.idle_buffers.push_back({data_, size_});
}

int64_t kept_bytes() {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  return p.idle_bytes;
}

int64_t idle_workspace_bytes() {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  int64_t bytes = 0;
  for (const Block& block : p.idle) bytes += block.size;
  return bytes;
}

void release_workspaces() {
  Pool& p = pool();
  const std::lock_guard lock(p.mutex);
  for (auto* blocks : {&p.idle, &p.idle_buffers}) {
    for (const Block& block : *blocks) free_block(block);
    blocks->clear();
  }
  p.idle_bytes = 0;
  p.most_live_bytes = p.live_bytes;
}

}  // namespace switchgear::cpu
