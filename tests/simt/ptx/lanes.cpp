// SPDX-License-Identifier: BSD-3-Clause
// Exchanges between the lanes of a warp.
#include "lanes.h"

#include "decode.h"

namespace simt::ptx {
namespace {

enum class Shuffle : uint32_t { kUp, kDown, kButterfly, kIndex };

// shfl: d{|p}, a, b, c, mask. c holds the last lane of a segment in bits 0 to 4, and the mask of segments in bits 8 to 12.
struct Source {
  int lane;
  bool inside;
};
Source source_of(Shuffle shuffle, int lane, int b, uint32_t c) {
  const int segments = static_cast<int>(c >> 8 & 31), clamp = static_cast<int>(c & 31);
  const int first = lane & segments, last = first | (clamp & ~segments & 31);
  switch (shuffle) {
    case Shuffle::kUp: return {lane - b, lane - b >= last};
    case Shuffle::kDown: return {lane + b, lane + b <= last};
    case Shuffle::kButterfly: return {lane ^ b, (lane ^ b) <= last};
    case Shuffle::kIndex: break;
  }
  const int index = first | (b & ~segments & 31);
  return {index, index <= last};
}

template <Shuffle kShuffle>
const Instruction* shuffle(Thread& t, const Instruction& i) {
  const bool has_predicate = i.detail->operand_sizes[0] == 2;
  const uint16_t* const operand = i.slot + 1 + has_predicate;
  const int lane = lane_index(), b = static_cast<int>(get<uint32_t>(t, operand[1]) & 31);
  const Source source = source_of(kShuffle, lane, b, get<uint32_t>(t, operand[2]));
  const uint32_t mask = get<uint32_t>(t, operand[3]);
  const uint32_t value = get<uint32_t>(t, operand[0]);
  set<uint32_t>(t, i.slot[0], exchange("shfl.sync", mask, value, source.inside ? source.lane : lane, i.detail->at));
  if (has_predicate && i.slot[1] != kSink) set<bool>(t, i.slot[1], source.inside);
  return next(i);
}

enum class Vote : uint32_t { kBallot, kAny, kAll, kUniform };

template <Vote kVote>
const Instruction* vote_of(Thread& t, const Instruction& i) {
  const uint32_t mask = get<uint32_t>(t, i.slot[2]);
  const uint32_t lanes =
      vote<bool, uint32_t, lanes_that_hold>("vote.sync", mask, get<bool>(t, i.slot[1]), i.detail->at);
  switch (kVote) {
    case Vote::kBallot: set<uint32_t>(t, i.slot[0], lanes); break;
    case Vote::kAny: set<bool>(t, i.slot[0], lanes != 0); break;
    case Vote::kAll: set<bool>(t, i.slot[0], lanes == mask); break;
    case Vote::kUniform: set<bool>(t, i.slot[0], lanes == 0 || lanes == mask); break;
  }
  return next(i);
}

template <typename T>
const Instruction* match_any(Thread& t, const Instruction& i) {
  const T value = get<T>(t, i.slot[1]);
  const uint32_t mask = get<uint32_t>(t, i.slot[2]);
  set<uint32_t>(t, i.slot[0], vote<T, uint32_t, lanes_that_match<T>>("match.any.sync", mask, value, i.detail->at));
  return next(i);
}

template <typename T, T (*combine)(T, T)>
const Instruction* reduce(Thread& t, const Instruction& i) {
  const uint32_t mask = get<uint32_t>(t, i.slot[2]);
  set<T>(t, i.slot[0], vote<T, T, reduce_lanes<T, combine>>("redux.sync", mask, get<T>(t, i.slot[1]), i.detail->at));
  return next(i);
}

const Instruction* wait_for_lanes(Thread& t, const Instruction& i) {
  warp_barrier(get<uint32_t>(t, i.slot[0]), i.detail->at);
  return next(i);
}

// elect.sync d|p, mask
const Instruction* elect_one(Thread& t, const Instruction& i) {
  if (get<uint32_t>(t, i.slot[2]) != 0xffffffffu) fail("elect.sync of some lanes is not modelled", i.detail->at);
  const bool elected = elect(i.detail->at);
  if (i.slot[0] != kSink) fail("elect.sync: the elected lane is not modelled", i.detail->at);
  set<bool>(t, i.slot[1], elected);
  return next(i);
}

Step decode_shuffle(const Opcode& opcode) {
  if (opcode.type() != Type::kU32 || opcode.part(1) != "sync") unknown();
  const std::string_view kind = opcode.part(2);
  if (kind == "up") return shuffle<Shuffle::kUp>;
  if (kind == "down") return shuffle<Shuffle::kDown>;
  if (kind == "bfly") return shuffle<Shuffle::kButterfly>;
  if (kind == "idx") return shuffle<Shuffle::kIndex>;
  unknown();
}

Step decode_vote(const Opcode& opcode) {
  if (opcode.text() == "vote.sync.ballot.b32") return vote_of<Vote::kBallot>;
  if (opcode.text() == "vote.sync.any.pred") return vote_of<Vote::kAny>;
  if (opcode.text() == "vote.sync.all.pred") return vote_of<Vote::kAll>;
  if (opcode.text() == "vote.sync.uni.pred") return vote_of<Vote::kUniform>;
  unknown();
}

template <typename T>
Step decode_reduction(std::string_view kind) {
  if (kind == "add") return reduce<T, sum_of<T>>;
  if (kind == "min") return reduce<T, least_of<T>>;
  if (kind == "max") return reduce<T, greatest_of<T>>;
  if (kind == "and") return reduce<T, and_of<T>>;
  if (kind == "or") return reduce<T, or_of<T>>;
  if (kind == "xor") return reduce<T, xor_of<T>>;
  unknown();
}

}  // namespace

Step decode_lanes(const Opcode& opcode, Instruction&) {
  const std::string_view stem = opcode.stem();
  if (stem == "shfl") return decode_shuffle(opcode);
  if (stem == "vote") return decode_vote(opcode);
  if (opcode.starts("match.any.sync.b")) {
    return opcode.type() == Type::kU64 ? Step(match_any<uint64_t>) : Step(match_any<uint32_t>);
  }
  if (opcode.starts("redux.sync.")) {
    if (opcode.type() == Type::kS32) return decode_reduction<int32_t>(opcode.part(2));
    if (opcode.type() == Type::kU32) return decode_reduction<uint32_t>(opcode.part(2));
    unknown();
  }
  if (opcode.text() == "bar.warp.sync") return wait_for_lanes;
  if (opcode.text() == "elect.sync") return elect_one;
  return nullptr;
}

}  // namespace simt::ptx
