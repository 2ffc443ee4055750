// SPDX-License-Identifier: BSD-3-Clause
#include "coverage.h"

#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "program.h"

namespace simt::ptx {
namespace {

// Written when the program ends.
struct Table {
  std::set<std::string, std::less<>> executed;
  std::vector<Module*> modules;

  ~Table() {
    const char* const path = std::getenv("SWITCHGEAR_PTX_TABLE");
    if (path == nullptr) return;
    std::set<std::string_view> seen;
    for (Module* module : modules) {
      for (const std::string& symbol : module->symbols()) {
        for (const Statement& statement : module->kernel(symbol).statements) seen.insert(statement.opcode);
      }
    }
    std::string text;  // appended at once: other programs append too
    for (const std::string_view opcode : seen) {
      text += executed.count(opcode) != 0 ? "executed " : "seen ";
      text += opcode;
      text += '\n';
    }
    for (const std::string& opcode : executed) {
      if (seen.count(opcode) == 0) text += "tested " + opcode + '\n';
    }
    std::FILE* const file = std::fopen(path, "a");
    if (file == nullptr) return;
    std::setvbuf(file, nullptr, _IOFBF, text.size() + 1);
    std::fwrite(text.data(), 1, text.size(), file);
    std::fclose(file);
  }
};

Table& table() {
  static Table table;
  return table;
}

}  // namespace

void mark_executed(std::string_view opcode) { table().executed.emplace(opcode); }

void watch_coverage(Module& module) { table().modules.push_back(&module); }

}  // namespace simt::ptx
