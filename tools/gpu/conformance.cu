// SPDX-License-Identifier: BSD-3-Clause
// Every wrapper of ptx.cuh, and with -DHOPPER of hopper.cuh, on the same pseudo-random data. Compiled by nvcc it runs on the
// device; compiled in tests/simt it runs the C++ models.
//
//   conformance                                         prints a line per case: its name, a tab, its words
//   conformance --expected FILE [--group G] [--from N]  compares with such a file, and prints lines.py's lines
//
// Factors are small integers, whose products and sums are exact in all types, so the order of sums does not matter.
// Layouts need no second description here: shared memory is filled word by word, and wgmma, ldmatrix, … read it. Cases with a
// check of their own are not in the file: a memory model has no words to compare, nor has the order of sums in an instruction.
#include "conformance_approximate.cuh"
#include "conformance_basic.cuh"
#include "conformance_data.cuh"
#include "conformance_memory.cuh"
#if defined(HOPPER)
#include "conformance_cluster.cuh"
#include "conformance_hopper.cuh"
#include "conformance_ring.cuh"
#include "conformance_tma.cuh"
#include "conformance_wgmma.cuh"
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using namespace switchgear::cuda::conformance;

namespace {

// Names the group of the cases that were added since the last call.
void end_group(std::vector<Case>& cases, const char* group) {
  for (Case& one : cases) {
    if (one.group.empty()) one.group = group;
  }
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  add_basic(cases);
  end_group(cases, "basic");
  add_lanes(cases);
  end_group(cases, "lanes");
  add_memory(cases);
  add_approximate(cases);
  end_group(cases, "memory");
#if defined(HOPPER)
  add_hopper(cases);
  end_group(cases, "hopper");
  add_tma(cases);
  end_group(cases, "tma");
  add_clusters(cases);
  end_group(cases, "clusters");
  add_wgmma(cases);
  end_group(cases, "wgmma");
  add_far(cases);
  end_group(cases, "far");
  add_rings(cases);
  end_group(cases, "ring");
  add_order(cases);
  end_group(cases, "order");
#endif
  return cases;
}

// The words of a case, up to the last one written.
Numbers words_of(const Case& one, Words& in, Words& out) {
  in.fill([](uint32_t i) { return mix(i + 1000003); });
  out.fill([](uint32_t) { return kPoison; });
  one.run(in.data(), out.data());
  Numbers words = out.read();
  while (!words.empty() && words.back() == kPoison) words.pop_back();
  return words;
}

void print_words(const Numbers& words) {
  for (size_t i = 0; i < words.size(); ++i) std::printf("%s%x", i == 0 ? "" : " ", words[i]);
  std::printf("\n");
}

// The cases of a file that this program printed.
std::map<std::string, Numbers> read_words(const char* path) {
  std::map<std::string, Numbers> cases;
  std::ifstream file(path);
  if (!file) {
    std::fprintf(stderr, "%s: cannot be read\n", path);
    std::exit(2);
  }
  for (std::string line; std::getline(file, line);) {
    const size_t tab = line.find('\t');
    std::istringstream numbers(line.substr(tab + 1));
    Numbers& words = cases[line.substr(0, tab)];
    for (uint32_t word = 0; numbers >> std::hex >> word;) words.push_back(word);
  }
  return cases;
}

// What is wrong with the words of a case, or nothing.
std::string complaint(const Case& one, const Numbers& got, const std::map<std::string, Numbers>& expected) {
  if (one.check) return one.check(got);
  const auto found = expected.find(one.name);
  if (found == expected.end()) return "the model has no such case";
  const Numbers& want = found->second;
  if (got.size() != want.size()) {
    return std::to_string(got.size()) + " words, the model writes " + std::to_string(want.size());
  }
  size_t wrong = 0, first = 0;
  for (size_t i = got.size(); i-- > 0;) {
    if (got[i] != want[i]) first = i, ++wrong;
  }
  if (wrong == 0) return "";
  char text[160];
  std::snprintf(text, sizeof text, "%zu of %zu words differ, first word %zu: 0x%x, the model has 0x%x", wrong,
                got.size(), first, got[first], want[first]);
  return text;
}

// A line of lines.py. Names and texts have no characters that JSON escapes.
void say(const std::string& line) {
  std::printf("@gpu {%s}\n", line.c_str());
  std::fflush(stdout);
}

int compare(const std::vector<Case>& cases, const char* path, size_t first) {
  const std::map<std::string, Numbers> expected = read_words(path);
  std::string names;
  for (const Case& one : cases) names += (names.empty() ? "\"" : ", \"") + one.name + "\"";
  say("\"cases\": [" + names + "]");
  Words in(kIn), out(kOut);
  bool failed = false;
  for (size_t number = first; number < cases.size(); ++number) {
    say("\"starts\": " + std::to_string(number));
    std::string wrong;
    try {
      wrong = complaint(cases[number], words_of(cases[number], in, out), expected);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      wrong = "it throws";
    }
    failed = failed || (!wrong.empty() && !cases[number].finding);
    const char* const verdict = wrong.empty() ? "passed" : cases[number].finding ? "finding" : "failed";
    say("\"ends\": " + std::to_string(number) + ", \"verdict\": \"" + verdict + "\", \"detail\": \"" + wrong + "\"");
  }
  return failed ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) {
  const auto option = [&](const char* name) -> const char* {
    for (int i = 1; i + 1 < count; ++i) {
      if (std::strcmp(arguments[i], name) == 0) return arguments[i + 1];
    }
    return nullptr;
  };
  if (const char* const handle = option("--ipc")) return write_shared_memory(handle);
  std::vector<Case> cases = all_cases();
  if (const char* const group = option("--group")) {
    std::erase_if(cases, [&](const Case& one) { return one.group != group; });
  }
  if (const char* const expected = option("--expected")) {
    const char* const first = option("--from");
    return compare(cases, expected, first == nullptr ? 0 : std::strtoul(first, nullptr, 10));
  }
  Words in(kIn), out(kOut);
  for (const Case& one : cases) {
    const Numbers words = words_of(one, in, out);
    if (one.check) {
      const std::string wrong = one.check(words);
      if (wrong.empty()) continue;
      std::fprintf(stderr, "%s: %s\n", one.name.c_str(), wrong.c_str());
      return 1;
    }
    std::printf("%s\t", one.name.c_str());
    print_words(words);
  }
  return 0;
}
