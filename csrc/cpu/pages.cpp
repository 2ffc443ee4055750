// SPDX-License-Identifier: BSD-3-Clause
#include "pages.h"

#include <sys/mman.h>

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
  for (uintptr_t page = begin; page < end;
       page += kHugePage) {  // one by one: a page that fails does not stop the others
    if (madvise(reinterpret_cast<void*>(page), kHugePage, kCollapse) == 0) collapsed += kHugePage;
  }
  return collapsed;
#else
  (void)data, (void)bytes;
  return 0;
#endif
}

}  // namespace switchgear::cpu
