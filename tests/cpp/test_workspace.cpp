// SPDX-License-Identifier: BSD-3-Clause
// Memory that is kept: which blocks are reused, and how many bytes stay.
#include <new>

#include "check.h"
#include "cpu/workspace.h"

namespace switchgear::test {
namespace {

using cpu::Buffer;
using cpu::kept_bytes;
using cpu::Workspace;

TEST(workspaces_give_aligned_parts_in_order) {
  cpu::release_workspaces();
  CHECK(Workspace::padded(0) == 0 && Workspace::padded(1) == 64 && Workspace::padded(64) == 64);
  CHECK(Workspace::padded(65) == 128);
  const void* first = nullptr;
  {
    Workspace workspace(3 * 64 + 200);
    first = workspace.take_bytes(1);
    const char* const start = static_cast<const char*>(first);
    CHECK(reinterpret_cast<uintptr_t>(first) % 64 == 0);
    CHECK(reinterpret_cast<const char*>(workspace.take<int32_t>(17)) == start + 64);
    CHECK(reinterpret_cast<const char*>(workspace.take<double>(8)) == start + 192);
    Workspace other(64);
    CHECK(other.take_bytes(64) != first, "in use");
  }
  {
    Workspace same(3 * 64 + 200), larger(1 << 20), smaller(64);
    CHECK(same.take_bytes(0) == first, "the smallest that fits");
    CHECK(larger.take_bytes(0) != first && smaller.take_bytes(0) != first);
  }
  CHECK(kept_bytes() == 0, "of buffers alone");
  cpu::release_workspaces();
}

// Blocks of earlier, smaller calls must not take the place of those that calls need now.
TEST(nested_workspaces_are_reused_after_many_smaller_ones) {
  cpu::release_workspaces();
  {
    const Workspace a(64), b(128), c(192), d(256);
  }
  const void *outer = nullptr, *inner = nullptr;
  for (int call = 0; call < 4; ++call) {
    Workspace first(8 << 20), second(4 << 20);
    const void *const here = first.take_bytes(1), *const there = second.take_bytes(1);
    CHECK(call < 2 || (here == outer && there == inner), "call ", call);
    outer = here, inner = there;
  }
  cpu::release_workspaces();
}

TEST(calls_that_grow_keep_the_last_size) {
  cpu::release_workspaces();
  const void* before = nullptr;
  for (int call = 1; call <= 8; ++call) {
    Workspace outer(call << 20), inner(64);
    const void* const here = inner.take_bytes(1);
    CHECK(call == 1 || here == before, "call ", call);  // the smaller block stays
    before = here;
  }
  CHECK(cpu::idle_workspace_bytes() == (8 << 20) + 64);
  cpu::release_workspaces();
}

TEST(buffers_are_reused_by_size) {
  cpu::release_workspaces();
  const void *a = nullptr, *b = nullptr;
  {
    const Buffer first(1000), second(2000);
    a = first.data(), b = second.data();
    CHECK(first.size() == 1000 && reinterpret_cast<uintptr_t>(a) % 64 == 0 && a != b && kept_bytes() == 0);
  }
  CHECK(kept_bytes() == 3000);
  {
    const Buffer second(2000);
    CHECK(second.data() == b && kept_bytes() == 1000);
    const Buffer first(1000);
    CHECK(first.data() == a && kept_bytes() == 0);
  }
  CHECK(kept_bytes() == 3000);
  {
    const Buffer other(999);  // with both idle ones more than was ever live: the oldest goes
    CHECK(kept_bytes() == 2000, kept_bytes());
  }
  CHECK(kept_bytes() == 2999, kept_bytes());
  {
    const Buffer large(4000);
    CHECK(kept_bytes() == 0, kept_bytes());
    const Buffer small(10);
    CHECK(kept_bytes() == 0);
  }
  CHECK(kept_bytes() == 4010);
  {
    const Buffer live(5);  // 4015 bytes would be more than 4010: the oldest goes
    cpu::release_workspaces();
    CHECK(kept_bytes() == 0);
  }
  CHECK(kept_bytes() == 5, "most_live_bytes is that of the live one");
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // whose operator new ends the process instead
  bool failed = false;
  try {
    const Buffer impossible(int64_t{1} << 60);
  } catch (const std::bad_alloc&) {
    failed = true;
  }
  {
    const Buffer other(6);
    CHECK(failed && kept_bytes() == 0, "what could not be allocated was never live");
  }
#endif
  cpu::release_workspaces();
  CHECK(kept_bytes() == 0);
}

}  // namespace
}  // namespace switchgear::test
