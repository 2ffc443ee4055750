// SPDX-License-Identifier: BSD-3-Clause
// Readable names for places in the program. addr2line looks up code addresses when a report is written.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <string>
#include <tuple>

#include "race.h"
#include "scheduler.h"

namespace simt {
namespace {

std::string output_of(const std::string& command) {
  std::string output;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return output;
  char buffer[512];
  while (const size_t count = std::fread(buffer, 1, sizeof buffer, pipe)) output.append(buffer, count);
  pclose(pipe);
  return output;
}

std::string without_directories(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string text_of(const void* address) {
  char text[64];
  std::snprintf(text, sizeof text, "code at %p", address);
  return text;
}

// Empty if addr2line finds nothing.
struct Place {
  std::string function, line;
};

std::string without_parameters(std::string function) {
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t at = 0; (at = function.find(anonymous)) != std::string::npos;) function.erase(at, anonymous.size());
  return function.substr(0, function.find('('));
}

Place look_up(const void* address) {
  Dl_info info{};
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return {};
  const size_t offset =
      static_cast<size_t>(static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase));
  // dladdr knows the program itself by argv[0], which may no longer lead to it.
  char program[4096];
  const ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
  std::string file = info.dli_fname;
  if (length > 0 && access(file.c_str(), R_OK) != 0) file.assign(program, static_cast<size_t>(length));
  char command[5000];
  std::snprintf(command, sizeof command, "addr2line -f -i -C -e '%s' 0x%zx 2>/dev/null", file.c_str(), offset);
  // Pairs of lines: function, then file:line; the innermost inlined call first.
  const std::string output = output_of(command);
  const size_t first = output.find('\n');
  if (first == std::string::npos) return {};
  const std::string function = without_parameters(output.substr(0, first));
  std::string line = without_directories(output.substr(first + 1, output.find('\n', first + 1) - first - 1));
  line = line.substr(0, line.find(" (discriminator"));
  return {function.rfind("??", 0) == 0 ? "" : function, line.rfind("??", 0) == 0 ? "" : line};
}

}  // namespace

std::string describe_code(const void* address) {
  const auto [function, line] = look_up(address);
  if (function.empty()) return text_of(address);
  return line.empty() ? function : line + " (" + function + ")";
}

std::string function_name(const void* address) { return look_up(address).function; }

namespace race {
namespace {

// Sites in models are numbered, outside the range of code addresses.
constexpr Site kNumbered = uint64_t{1} << 63;
std::vector<std::string> lines;

}  // namespace

Site site_of(Location at) {
  static std::map<std::tuple<const char*, uint32_t, const PtxPlace*>, Site> known;
  Site& site = known[{at.file_name(), at.line(), at.ptx()}];
  if (site == 0) {
    lines.push_back(describe(at));
    site = kNumbered | (lines.size() - 1);
  }
  return site;
}

std::string describe_site(Site site) {
  if (site & kNumbered) return lines[site & ~kNumbered];
  // A return address: the call is just before it.
  return describe_code(reinterpret_cast<const char*>(site) - 1);
}

}  // namespace race
}  // namespace simt
