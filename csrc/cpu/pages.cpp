// SPDX-License-Identifier: BSD-3-Clause
#include "pages.h"

#include <sys/mman.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <string>
#endif

namespace switchgear::cpu {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, which older headers lack

struct Pages {
  uintptr_t begin, end;  // the whole huge pages inside the memory
};

Pages whole_pages(const void* data, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  return {(begin + kHugePage - 1) / kHugePage * kHugePage,
          (begin + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage};
}

#ifdef __linux__
constexpr int kMostNodes = 1024;

struct Nodes {
  unsigned long mask[kMostNodes / (8 * sizeof(unsigned long))] = {};
  int count = 0;
};

// The nodes that have memory: "0" or "0-3,6".
Nodes nodes_with_memory() {
  Nodes nodes;
  std::ifstream file("/sys/devices/system/node/has_memory");
  constexpr int kBits = 8 * sizeof(unsigned long);
  for (std::string range; std::getline(file, range, ',');) {
    const size_t dash = range.find('-');
    const int first = std::atoi(range.c_str());
    const int last = dash == std::string::npos ? first : std::atoi(range.c_str() + dash + 1);
    for (int node = first; node <= last && node < kMostNodes; ++node, ++nodes.count)
      nodes.mask[node / kBits] |= 1ul << node % kBits;
  }
  return nodes;
}
#endif

}  // namespace

void advise_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto [begin, end] = whole_pages(data, bytes);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

int64_t collapse_into_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  advise_huge_pages(data, bytes);
  int64_t collapsed = 0;
  const auto [begin, end] = whole_pages(data, bytes);
  for (uintptr_t page = begin; page < end; page += kHugePage) {  // one by one: one that fails does not stop the others
    if (madvise(reinterpret_cast<void*>(page), kHugePage, kCollapse) == 0) collapsed += kHugePage;
  }
  return collapsed;
#else
  (void)data, (void)bytes;
  return 0;
#endif
}

int interleave_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr int kInterleave = 3;      // MPOL_INTERLEAVE
  constexpr unsigned kMove = 1 << 1;  // MPOL_MF_MOVE: pages that are in memory, too
  const Nodes nodes = nodes_with_memory();
  if (nodes.count == 0) return 0;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(data), begin = (first + page - 1) / page * page;
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes)) / page * page;
  if (end <= begin) return nodes.count;
  const long failed = syscall(SYS_mbind, begin, end - begin, kInterleave, nodes.mask, kMostNodes + 1ul, kMove);
  return failed == 0 ? nodes.count : 0;
#else
  (void)data, (void)bytes;
  return 0;
#endif
}

}  // namespace switchgear::cpu
