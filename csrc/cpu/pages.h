// SPDX-License-Identifier: BSD-3-Clause
// Pages of weights, huge ones and those of NUMA nodes.
//
// Weights that are read once per token cost a page-table walk every 4 KB, where hardware prefetching also stops:
// 2 MB pages read up to 2× faster. Linux grants them on request (transparent huge pages in mode "madvise"). On other systems,
// and where there are none, these functions do nothing.
#pragma once
#include <cstdint>

namespace switchgear::cpu {

// For memory that is not touched yet: its first touch gets huge pages.
void advise_huge_pages(void* data, int64_t bytes);

// For memory in use: moves its contents onto huge pages, about 1 s per GB. Returns the bytes on huge pages afterwards.
int64_t collapse_into_huge_pages(void* data, int64_t bytes);

// Spreads the pages of memory over all NUMA nodes, in turns, wherever they are now: about 1 s per GB. Returns the number of
// nodes, 0 if the system does not allow it.
int interleave_pages(void* data, int64_t bytes);

}  // namespace switchgear::cpu
