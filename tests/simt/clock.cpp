// SPDX-License-Identifier: BSD-3-Clause
#include "clock.h"

#include <algorithm>

namespace simt::race {

Clock::Part& Clock::part(uint32_t block) {
  for (Part& part : parts_) {
    if (part.block == block) return part;
  }
  return parts_.emplace_back(Part{block, nullptr, nullptr});
}

void Clock::make_own(Part& part, size_t size) {
  if (!part.times) {
    part.times = std::make_shared<Times>(size);
  } else if (part.times.use_count() > 1) {
    part.times = std::make_shared<Times>(*part.times);
  }
  if (part.times->size() < size) part.times->resize(size);
}

void Clock::set(Moment moment) {
  Part& mine = part(moment.block);
  if (mine.times && moment.slot < mine.times->size() && (*mine.times)[moment.slot] >= moment.time) return;
  make_own(mine, moment.slot + 1);
  (*mine.times)[moment.slot] = moment.time;
}

void Clock::join(const Clock& other) {
  for (const Part& theirs : other.parts_) {
    Part& mine = part(theirs.block);
    if (mine.times == theirs.times || mine.joined == theirs.times) continue;
    mine.joined = theirs.times;
    if (!mine.times) {
      mine.times = theirs.times;
      continue;
    }
    const Times& times = *theirs.times;
    make_own(mine, times.size());
    Times& own = *mine.times;
    for (size_t i = 0; i < times.size(); ++i) own[i] = std::max(own[i], times[i]);
  }
}

}  // namespace simt::race
