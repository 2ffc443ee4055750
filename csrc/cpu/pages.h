// SPDX-License-Identifier: BSD-3-Clause
// Huge pages. Weights that are read once per token cost a walk of the page tables every 4 KB, which hardware prefetching does
// not cross either: 2 MB pages read up to twice as fast. Linux gives them to those who ask (transparent huge pages in mode
// "madvise"); on other systems, and where there are none, all of this does nothing.
#pragma once
#include <cstdint>

namespace switchgear::cpu {

// Memory that nobody has touched yet: its first touch gets huge pages.
void advise_huge_pages(void* data, int64_t bytes);

// Memory in use: moves its contents onto huge pages, about 1 s per GB. Returns the bytes that then lie on huge pages.
int64_t collapse_into_huge_pages(void* data, int64_t bytes);

}  // namespace switchgear::cpu
