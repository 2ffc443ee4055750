// SPDX-License-Identifier: BSD-3-Clause
// What stands outside of kernels: files, variables, and where each kernel begins.
#include <stdexcept>

#include "parse.h"
#include "program.h"

namespace simt::ptx {
namespace {

std::string file_name(std::string_view line) {
  const size_t first = line.find('"'), last = line.rfind('"');
  return std::string(line.substr(first + 1, last - first - 1));
}

// The values of a variable in global memory: a number, or several in braces.
void initialise(Scanner& scan, char* memory, size_t size) {
  const bool braces = scan.accept('{');
  std::vector<uint64_t> values;
  do {
    values.push_back(std::stoull(std::string(scan.word()), nullptr, 0));
  } while (braces && scan.accept(','));
  if (braces) scan.expect('}');
  const size_t element = size / values.size();
  for (size_t i = 0; i < values.size(); ++i) std::memcpy(memory + i * element, &values[i], element);
}

}  // namespace

Variable parse_variable(Scanner& scan) {
  Variable variable;
  size_t element = 1;
  variable.alignment = 0;
  while (scan.peek() == '.') {
    const std::string_view word = scan.word();
    if (word == ".align") {
      variable.alignment = static_cast<size_t>(scan.number());
    } else if (word == ".pred") {
      element = 1;
    } else if (word != ".ptr" && word != ".global" && word != ".shared") {
      element = std::stoul(std::string(word.substr(word.find_first_of("0123456789")))) / 8;
    }
  }
  variable.name = scan.word();
  variable.size = element;
  if (scan.accept('[')) {
    variable.size = scan.peek() == ']' ? 0 : element * static_cast<size_t>(scan.number());
    scan.expect(']');
  }
  if (variable.alignment == 0) variable.alignment = element;
  return variable;
}

Module::Module(std::string_view text) : text_(text) {
  Scanner scan(text_, 1);
  while (scan.peek() != '\0') {
    const std::string_view word = scan.word();
    if (word == ".version" || word == ".target" || word == ".address_size") {
      scan.rest_of_line();
    } else if (word == ".file") {
      const std::string_view line = scan.rest_of_line();
      files_[std::stoi(std::string(line))] = file_name(line);
    } else if (word == ".section") {
      scan.skip_past('{');
      scan.skip_braces();
    } else if (word == ".visible" || word == ".weak" || word == ".extern" || word == ".common") {
      // What it qualifies follows.
    } else if (word == ".shared") {
      shared_.push_back(parse_variable(scan));
      scan.expect(';');
    } else if (word == ".global" || word == ".const") {
      const Variable variable = parse_variable(scan);
      memory_.push_back(std::make_unique<char[]>(variable.size + 256));
      char* memory = memory_.back().get();
      memory += (256 - reinterpret_cast<uintptr_t>(memory) % 256) % 256;
      if (scan.accept('=')) initialise(scan, memory, variable.size);
      scan.expect(';');
      globals_[variable.name] = reinterpret_cast<uint64_t>(memory);
    } else if (word == ".entry") {
      const std::string symbol(scan.word());
      const char* const start = scan.position();
      const uint32_t line = scan.line();
      scan.skip_past('{');
      scan.skip_braces();
      entries_[symbol] = {{start, static_cast<size_t>(scan.position() - start)}, line, nullptr};
    } else {
      scan.error("a directive that is not known: " + std::string(word));
    }
  }
}

std::vector<std::string> Module::symbols() const {
  std::vector<std::string> names;
  for (const auto& [symbol, entry] : entries_) names.push_back(symbol);
  return names;
}

const Kernel& Module::kernel(const std::string& symbol) {
  const auto found = entries_.find(symbol);
  if (found == entries_.end()) throw std::runtime_error("no PTX of a kernel " + symbol);
  Entry& entry = found->second;
  if (!entry.kernel) entry.kernel = parse_kernel(symbol, Scanner(entry.text, entry.line), files_, shared_, globals_);
  return *entry.kernel;
}

}  // namespace simt::ptx
