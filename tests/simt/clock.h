// SPDX-License-Identifier: BSD-3-Clause
// Vector clocks. A point in time is (block, slot, time). Slots are the threads of a block and its asynchronous engines. A clock
// holds one vector of times per block, copied on write: after a barrier all threads share the same vector.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace simt::race {

struct Moment {
  uint32_t block = 0, slot = 0, time = 0;
};

class Clock {
 public:
  bool covers(Moment moment) const {
    for (const Part& part : parts_) {
      if (part.block != moment.block) continue;
      return moment.slot < part.times->size() && (*part.times)[moment.slot] >= moment.time;
    }
    return false;
  }
  void set(Moment moment);        // at least this moment
  void join(const Clock& other);  // at least as late as `other` in every slot
  void clear() { parts_.clear(); }
  bool empty() const { return parts_.empty(); }

 private:
  using Times = std::vector<uint32_t>;
  struct Part {
    uint32_t block;
    std::shared_ptr<Times> times;
    std::shared_ptr<Times> joined;  // the last vector joined: joining it again changes nothing
  };
  Part& part(uint32_t block);
  static void make_own(Part& part, size_t size);

  std::vector<Part> parts_;
};

}  // namespace simt::race
