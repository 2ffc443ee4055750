// SPDX-License-Identifier: BSD-3-Clause
// PTX as text: what the parser makes of it, and what analysis and decoding read.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "location.h"

namespace simt::ptx {

// Something that an operand names: a virtual register, or a fixed value.
using Value = uint32_t;
constexpr Value kSink = 0;  // `_`

struct Operand {
  std::vector<Value> values;  // several for {a, b}, for d|p, and for an address with coordinates
  int64_t offset = 0;         // of an address
  bool address = false;
};

struct Statement {
  std::string_view opcode;
  std::vector<Operand> operands;
  int32_t guard = -1;  // the predicate's Value
  bool guard_negated = false;
  int32_t target = -1;  // of a branch: the index of a statement
  PtxPlace place;
};

enum class Special : uint8_t {
  kThreadX,
  kThreadY,
  kThreadZ,
  kBlockSizeX,
  kBlockSizeY,
  kBlockSizeZ,
  kBlockX,
  kBlockY,
  kBlockZ,
  kGridX,
  kGridY,
  kGridZ,
  kLane,
  kClusterRank,
  kWarpSize,
  kCount
};
extern const std::string_view kSpecialNames[static_cast<size_t>(Special::kCount)];

// A value that does not change while a thread runs.
struct Fixed {
  enum Kind : uint8_t { kConstant, kSpecial, kParameter, kShared, kDynamicShared, kLocal } kind;
  Value value;
  uint64_t data;  // the constant; the Special; an offset in the parameters or in local memory; an index of `shared`
};

struct Variable {
  std::string name;
  size_t size = 0, alignment = 1;
  size_t offset = 0;  // of a parameter, or of an array in local memory
};

struct Kernel {
  std::string symbol;  // mangled
  std::string name;    // readable, without parameters
  std::vector<Statement> statements;
  std::vector<Fixed> fixed;
  std::vector<std::string> value_names;  // by Value
  std::vector<Variable> parameters;
  size_t parameter_bytes = 0;
  std::vector<Variable> shared;  // static arrays
  size_t local_bytes = 0;
  unsigned max_threads = 1024;  // of a block
};

std::string readable(const std::string& symbol);  // without parameters, and without anonymous namespaces

// The PTX of one source file. Kernels are parsed when they are first needed.
class Module {
 public:
  explicit Module(std::string_view text);
  std::vector<std::string> symbols() const;  // of its kernels
  const Kernel& kernel(const std::string& symbol);

 private:
  struct Entry {
    std::string_view text;  // from the kernel's name on
    uint32_t line;
    std::unique_ptr<Kernel> kernel;
  };
  std::string text_;
  std::map<int, std::string> files_;
  std::map<std::string, Entry> entries_;
  std::vector<Variable> shared_;  // declared outside of kernels; size 0: the dynamic array
  std::map<std::string, uint64_t, std::less<>> globals_;
  std::deque<std::unique_ptr<char[]>> memory_;
};

}  // namespace simt::ptx
