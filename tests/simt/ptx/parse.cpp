// SPDX-License-Identifier: BSD-3-Clause
#include "parse.h"

#include <cxxabi.h>

#include <cstdlib>
#include <unordered_map>

#include "roles.h"

namespace simt::ptx {

const std::string_view kSpecialNames[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",          "%ntid.y",
                                          "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z",         "%nctaid.x",
                                          "%nctaid.y", "%nctaid.z", "%laneid",  "%cluster_ctarank", "WARP_SZ"};

std::string readable(const std::string& symbol) {
  int status = 0;
  char* const text = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : symbol;
  std::free(text);
  const std::string_view anonymous = "(anonymous namespace)::", result = "void ";
  for (size_t at = 0; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
  if (starts_with(name, result)) name.erase(0, result.size());
  size_t end = name.size();  // the parenthesis that opens the parameters
  for (int depth = 0; end > 0 && name.back() == ')';) {
    const char c = name[--end];
    depth += c == ')' ? 1 : c == '(' ? -1 : 0;
    if (depth == 0) break;
  }
  return name.substr(0, end);
}

namespace {

// Names that are declared together, as by `.reg .b32 %r<132>`.
struct Range {
  Value first;
  uint32_t count;
};

// What a pair of braces declares.
struct Block {
  std::unordered_map<std::string_view, Value> registers;
  std::unordered_map<std::string_view, Range> ranges;  // by prefix
  std::unordered_map<std::string_view, int32_t> labels;
  int parent;
};

struct Branch {
  size_t statement;
  int block;
  std::string_view label;
};

class Parser {
 public:
  Parser(Scanner scan, const Files& files, const Globals& globals, Kernel& kernel)
      : scan_(scan), files_(files), globals_(globals), kernel_(kernel) {
    new_value("_");
    blocks_.push_back({{}, {}, {}, -1});
  }

  void run(const std::vector<Variable>& module_shared) {
    for (const Variable& variable : module_shared) add_shared(variable);
    parameters();
    limits();
    scan_.expect('{');
    while (block_ >= 0) {
      if (scan_.accept('{')) {
        blocks_.push_back({{}, {}, {}, block_});
        block_ = static_cast<int>(blocks_.size()) - 1;
      } else if (scan_.accept('}')) {
        block_ = blocks_[static_cast<size_t>(block_)].parent;
      } else if (!scan_.accept(';')) {
        statement();
      }
    }
    Statement end;  // a kernel may end without a return
    end.opcode = "ret";
    end.place = place_;
    end.place.kernel = kernel_.name.c_str();
    kernel_.statements.push_back(std::move(end));
    for (const Branch& branch : branches_) kernel_.statements[branch.statement].target = target_of(branch);
  }

 private:
  Value new_value(std::string name) {
    kernel_.value_names.push_back(std::move(name));
    return static_cast<Value>(kernel_.value_names.size() - 1);
  }

  void add_fixed(std::string_view name, Fixed::Kind kind, uint64_t data) {
    const Value value = new_value(std::string(name));
    kernel_.fixed.push_back({kind, value, data});
    names_.emplace(kernel_.value_names[value], value);
  }

  void add_shared(const Variable& variable) {
    if (variable.size == 0) return add_fixed(variable.name, Fixed::kDynamicShared, 0);
    add_fixed(variable.name, Fixed::kShared, kernel_.shared.size());
    kernel_.shared.push_back(variable);
  }

  void parameters() {
    if (!scan_.accept('(')) return;
    while (!scan_.accept(')')) {
      if (scan_.word() != ".param") scan_.error("expected a parameter");
      Variable parameter = parse_variable(scan_);
      parameter.offset =
          (kernel_.parameter_bytes + parameter.alignment - 1) / parameter.alignment * parameter.alignment;
      kernel_.parameter_bytes = parameter.offset + parameter.size;
      add_fixed(parameter.name, Fixed::kParameter, parameter.offset);
      kernel_.parameters.push_back(parameter);
      scan_.accept(',');
    }
  }

  // .maxntid x, y, z, and others
  void limits() {
    while (scan_.peek() != '{') {
      const bool threads = scan_.word() == ".maxntid";
      if (threads) kernel_.max_threads = 1;
      while (std::isdigit(static_cast<unsigned char>(scan_.peek())) != 0) {
        const auto number = static_cast<unsigned>(scan_.number());
        if (threads) kernel_.max_threads *= number;
        scan_.accept(',');
      }
    }
  }

  // ---- declarations -----------------------------------------------------------------------------------------------------

  void declare_registers() {
    scan_.word();  // the type
    do {
      const std::string_view name = scan_.word();
      Block& block = blocks_[static_cast<size_t>(block_)];
      if (scan_.accept('<')) {
        const auto count = static_cast<uint32_t>(scan_.number());
        scan_.expect('>');
        block.ranges[name] = {static_cast<Value>(kernel_.value_names.size()), count};
        for (uint32_t i = 0; i < count; ++i) new_value(std::string(name) + std::to_string(i));
      } else {
        block.registers[name] = new_value(std::string(name));
      }
    } while (scan_.accept(','));
  }

  void source_line() {
    // .loc file line column [, function_name label[+n], inlined_at file line column]
    const std::string line(scan_.rest_of_line());
    char* next = nullptr;
    auto read = [&] { return static_cast<uint32_t>(std::strtoul(next, &next, 10)); };
    next = const_cast<char*>(line.c_str());
    uint32_t file = read(), row = read(), column = read();
    // Wrappers of instructions count as their caller's line, as in the models.
    const size_t inlined = line.find("inlined_at");
    if (inlined != std::string::npos && is_wrapper(file_of(file))) {
      next = const_cast<char*>(line.c_str()) + inlined + std::string_view("inlined_at").size();
      file = read(), row = read(), column = read();
    }
    place_.file = file_of(file).c_str();
    place_.line = row;
    place_.column = column;
  }
  static bool is_wrapper(std::string_view file) {
    const auto ends = [&](std::string_view end) {
      return file.size() >= end.size() && file.substr(file.size() - end.size()) == end;
    };
    return ends(".hpp") || ends("/ptx.cuh") || ends("/hopper.cuh");
  }
  const std::string& file_of(uint32_t number) const {
    static const std::string none = "?";
    const auto found = files_.find(static_cast<int>(number));
    return found == files_.end() ? none : found->second;
  }

  bool directive() {
    if (scan_.peek() != '.') return false;
    const std::string_view word = scan_.word();
    if (word == ".loc") {
      source_line();
    } else if (word == ".pragma") {
      scan_.skip_past(';');
    } else if (word == ".reg") {
      declare_registers();
    } else if (word == ".shared") {
      add_shared(parse_variable(scan_));
    } else if (word == ".local") {
      const Variable variable = parse_variable(scan_);
      const size_t offset = (kernel_.local_bytes + variable.alignment - 1) / variable.alignment * variable.alignment;
      kernel_.local_bytes = offset + variable.size;
      add_fixed(variable.name, Fixed::kLocal, offset);
    } else {
      scan_.error("a statement that is not known: " + std::string(word));
    }
    return true;
  }

  // ---- instructions -----------------------------------------------------------------------------------------------------

  void statement() {
    if (directive()) return;
    const char* const start = scan_.position();
    Statement statement;
    statement.place = place_;
    statement.place.ptx_line = scan_.line();
    statement.place.kernel = kernel_.name.c_str();
    if (scan_.accept('@')) {
      statement.guard_negated = scan_.accept('!');
      statement.guard = static_cast<int32_t>(value(scan_.word()));
    }
    statement.opcode = scan_.word();
    if (scan_.peek() == ':') {
      scan_.accept(':');
      blocks_[static_cast<size_t>(block_)].labels[statement.opcode] = static_cast<int32_t>(kernel_.statements.size());
      return;
    }
    if (statement.opcode == "bra" || statement.opcode == "bra.uni") {
      branches_.push_back({kernel_.statements.size(), block_, scan_.word()});
    } else if (scan_.peek() != ';') {
      do {
        statement.operands.push_back(operand());
      } while (scan_.accept(','));
    }
    scan_.expect(';');
    std::string_view text(start, static_cast<size_t>(scan_.position() - start));
    statement.place.text = text.substr(0, 160);
    // Threads of a warp execute `.aligned` together: the same instruction, and not only one of the same line.
    if (statement.opcode.find(".aligned") != std::string_view::npos) statement.place.column = statement.place.ptx_line;
    kernel_.statements.push_back(std::move(statement));
  }

  int32_t target_of(const Branch& branch) const {
    for (int block = branch.block; block >= 0; block = blocks_[static_cast<size_t>(block)].parent) {
      const auto& labels = blocks_[static_cast<size_t>(block)].labels;
      if (const auto found = labels.find(branch.label); found != labels.end()) return found->second;
    }
    throw std::runtime_error("PTX: no label " + std::string(branch.label));
  }

  Operand operand() {
    Operand result;
    if (scan_.accept('{')) {
      list(result);
    } else if (scan_.accept('[')) {
      result.address = true;
      result.values.push_back(value(scan_.word()));
      if (scan_.accept('+')) result.offset = scan_.number();
      if (scan_.accept(',')) {  // the coordinates of a tensor
        scan_.expect('{');
        list(result);
      }
      scan_.expect(']');
    } else {
      if (scan_.accept('!')) scan_.error("a negated operand");
      result.values.push_back(value(scan_.word()));
      if (scan_.accept('|')) result.values.push_back(value(scan_.word()));
    }
    return result;
  }
  void list(Operand& into) {
    do {
      into.values.push_back(value(scan_.word()));
    } while (scan_.accept(','));
    scan_.expect('}');
  }

  Value value(std::string_view word) {
    if (word == "_") return kSink;
    const char first = word[0];
    if (std::isdigit(static_cast<unsigned char>(first)) != 0 || first == '-') return constant(word);
    if (const auto found = register_named(word); found >= 0) return static_cast<Value>(found);
    if (const auto found = names_.find(word); found != names_.end()) return found->second;
    for (size_t i = 0; i < std::size(kSpecialNames); ++i) {
      if (word != kSpecialNames[i]) continue;
      add_fixed(word, Fixed::kSpecial, i);
      return kernel_.fixed.back().value;
    }
    if (const auto found = globals_.find(word); found != globals_.end()) {
      add_fixed(word, Fixed::kConstant, found->second);
      return kernel_.fixed.back().value;
    }
    scan_.error("a name that is not known: " + std::string(word));
  }

  int64_t register_named(std::string_view word) const {
    size_t digits = word.size();
    while (digits > 0 && std::isdigit(static_cast<unsigned char>(word[digits - 1])) != 0) --digits;
    for (int b = block_; b >= 0; b = blocks_[static_cast<size_t>(b)].parent) {
      const Block& block = blocks_[static_cast<size_t>(b)];
      if (const auto found = block.registers.find(word); found != block.registers.end()) return found->second;
      if (digits == word.size()) continue;
      if (const auto found = block.ranges.find(word.substr(0, digits)); found != block.ranges.end()) {
        const unsigned long number = std::stoul(std::string(word.substr(digits)));
        if (number < found->second.count) return found->second.first + number;
      }
    }
    return -1;
  }

  // Integers, and the bits of floats: 0f3F800000, 0d3FF0000000000000.
  Value constant(std::string_view word) {
    uint64_t bits;
    const std::string text(word);
    if (text.size() > 2 && text[0] == '0' && (text[1] == 'f' || text[1] == 'F' || text[1] == 'd' || text[1] == 'D')) {
      bits = std::stoull(text.substr(2), nullptr, 16);
    } else if (text[0] == '-') {
      bits = static_cast<uint64_t>(std::stoll(text, nullptr, 0));
    } else {
      bits = std::stoull(text.back() == 'U' ? text.substr(0, text.size() - 1) : text, nullptr, 0);
    }
    const auto [known, is_new] = constants_.try_emplace(bits, 0);
    if (is_new) {
      known->second = new_value(text);
      kernel_.fixed.push_back({Fixed::kConstant, known->second, bits});
    }
    return known->second;
  }

  Scanner scan_;
  const Files& files_;
  const Globals& globals_;
  Kernel& kernel_;
  std::vector<Block> blocks_;
  int block_ = 0;
  PtxPlace place_;
  std::map<std::string, Value, std::less<>> names_;
  std::unordered_map<uint64_t, Value> constants_;
  std::vector<Branch> branches_;
};

}  // namespace

std::unique_ptr<Kernel> parse_kernel(const std::string& symbol, Scanner scan, const Files& files,
                                     const std::vector<Variable>& module_shared, const Globals& globals) {
  auto kernel = std::make_unique<Kernel>();
  kernel->symbol = symbol;
  kernel->name = readable(symbol);
  Parser(scan, files, globals, *kernel).run(module_shared);
  return kernel;
}

}  // namespace simt::ptx
