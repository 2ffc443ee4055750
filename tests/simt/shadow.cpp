// SPDX-License-Identifier: BSD-3-Clause
// Memory is divided into cells of 8 bytes. A cell lists its accesses, except superseded ones. A later access that is ordered
// after one supersedes it if it covers its bytes and writes if it does. What races with that one then races with the later one.
#include "shadow.h"

#include "shared_memory.h"

#include <bit>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>

namespace simt::race {
namespace {

struct Record {
  Site site;
  Moment moment;
  uint32_t device;
  uint8_t bytes;  // bit i: byte i of the cell
  Access kind;
};

// Readers and atomic writers of one cell may be as many as there are threads. The flags say what could conflict, so that a
// uniform crowd, the usual case, need not be searched.
struct Crowd {
  std::map<std::pair<uint64_t, uint32_t>, Record> records;  // by thread and kind
  bool reads = false, atomics = false, narrow_scopes = false;
};

struct Cell {
  std::vector<Record> records;
  std::unique_ptr<Crowd> crowd;
};

constexpr size_t kPageCells = 512;
constexpr size_t kMaxRecords = 12;  // beyond this, readers and atomics join the crowd
constexpr int kMaxTexts = 4;

std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages;
uintptr_t last_page_number = ~uintptr_t{0};
Cell* last_page = nullptr;

struct Label {
  std::string block;
  uint32_t size_x, size_y, num_threads;
  std::vector<std::string> engines;  // the slots after the threads'
};
std::vector<Label> labels;  // by block
std::optional<Moment> end_of_kernel_before;
Findings found;
std::set<std::pair<Site, Site>> told;
Scope widest_needed = Scope::kDevice;  // among the threads of this run

Cell& cell_at(uintptr_t address) {
  const uintptr_t number = address / (8 * kPageCells);
  if (number != last_page_number) {
    std::unique_ptr<Cell[]>& page = pages[number];
    if (!page) page = std::make_unique<Cell[]>(kPageCells);
    last_page_number = number;
    last_page = page.get();
  }
  return last_page[address / 8 % kPageCells];
}

std::string describe(Moment moment) {
  const Label& label = labels[moment.block];
  const uint32_t slot = moment.slot;
  if (slot >= label.num_threads) return label.block + " " + label.engines[slot - label.num_threads];
  return label.block + " thread (" + std::to_string(slot % label.size_x) + "," +
         std::to_string(slot / label.size_x % label.size_y) + "," + std::to_string(slot / label.size_x / label.size_y) +
         ")";
}

std::string describe(const Record& record) {
  std::string what = record.kind.async       ? "asynchronous "
                     : record.kind.atomic    ? "atomic "
                     : record.kind.read_only ? "read-only "
                                             : "";
  what += record.kind.write ? "write" : "read";
  return what + " by " + describe(record.moment) + " at " + describe_site(record.site);
}

void report(const char* what, const Record& earlier, const Record& later, uintptr_t cell) {
  ++found.count;
  if (!told.insert({earlier.site, later.site}).second || told.size() > kMaxTexts) return;
  const int first = std::countr_zero(static_cast<unsigned>(earlier.bytes & later.bytes));
  found.text += std::string("\n") + what + " on " + describe_address(cell + static_cast<uintptr_t>(first)) + ":\n  " +
                describe(later) + "\n  after " + describe(earlier);
}

void report_unawaited(const Record& before, const Record& later, uintptr_t address) {
  ++found.count;
  if (!told.insert({before.site, later.site}).second || told.size() > kMaxTexts) return;
  found.text += "\nbefore griddepcontrol.wait, global memory that the kernel before may still write, " +
                describe_address(address) + ":\n  " + describe(later);
}

bool scopes_include_each_other(const Record& a, const Record& b) {
  const Scope needed = a.moment.block == b.moment.block ? Scope::kBlock
                       : a.device == b.device           ? Scope::kDevice
                                                        : Scope::kSystem;
  return a.kind.scope >= needed && b.kind.scope >= needed;
}

bool ordered_before(const Record& earlier, const Actor& actor) {
  const bool own = earlier.moment.block == actor.now.block && earlier.moment.slot == actor.now.slot;
  return own || actor.view.seen.covers(earlier.moment);
}

// Reports a conflict; returns true if the later access supersedes the earlier one.
bool compare(const Record& earlier, const Record& later, const Actor& actor, uintptr_t cell) {
  const bool ordered = ordered_before(earlier, actor);
  if (earlier.bytes & later.bytes) {
    const bool conflict = earlier.kind.write || later.kind.write;
    const bool both_atomic = earlier.kind.atomic && later.kind.atomic;
    if (conflict && (earlier.kind.read_only || later.kind.read_only)) {
      report("a read through the read-only cache of what this kernel writes", earlier, later, cell);
    } else if (conflict && !ordered && !both_atomic) {
      report("data race", earlier, later, cell);
    } else if (conflict && !ordered && !scopes_include_each_other(earlier, later)) {
      report("atomics whose scopes do not include each other", earlier, later, cell);
    } else if (later.kind.async && earlier.kind.write && !earlier.kind.async &&
               !actor.view.async[static_cast<size_t>(later.kind.space)].covers(earlier.moment)) {
      report("missing fence.proxy.async between two accesses", earlier, later, cell);
    }
  }
  const bool stronger = later.kind.write || (!earlier.kind.write && later.kind.read_only >= earlier.kind.read_only);
  return ordered && !(earlier.bytes & ~later.bytes) && stronger;
}

bool is_narrow(const Access& kind) { return kind.atomic && kind.scope < widest_needed; }

void join_crowd(Crowd& crowd, const Record& record) {
  crowd.reads |= !record.kind.atomic;
  crowd.atomics |= record.kind.atomic;
  crowd.narrow_scopes |= is_narrow(record.kind);
  const uint32_t kind = record.bytes | record.kind.write << 8 | record.kind.atomic << 9 | record.kind.async << 10 |
                        record.kind.read_only << 11 | static_cast<uint32_t>(record.kind.scope) << 12;
  crowd.records[{uint64_t{record.moment.block} << 32 | record.moment.slot, kind}] = record;
}

void add(Cell& cell, const Record& record) {
  if (cell.records.size() >= kMaxRecords) {
    if (!cell.crowd) cell.crowd = std::make_unique<Crowd>();
    std::erase_if(cell.records, [&](const Record& old) {
      if (old.kind.write && !old.kind.atomic) return false;
      join_crowd(*cell.crowd, old);
      return true;
    });
  }
  cell.records.push_back(record);
}

bool may_conflict(const Crowd& crowd, const Access& kind) {
  if (!kind.atomic) return kind.write || kind.read_only || crowd.atomics;
  return crowd.reads || crowd.narrow_scopes || is_narrow(kind);
}

void access_cell(const Actor& actor, const Record& record, uintptr_t address) {
  Cell& cell = cell_at(address);
  bool known = false;  // the same thread made the same access at the same time
  size_t kept = 0;
  for (size_t i = 0; i < cell.records.size(); ++i) {
    const Record& old = cell.records[i];
    known |= old.moment.time == record.moment.time && old.moment.slot == record.moment.slot &&
             old.moment.block == record.moment.block && old.kind.write == record.kind.write &&
             old.kind.atomic == record.kind.atomic && old.kind.read_only == record.kind.read_only &&
             old.kind.scope == record.kind.scope && !(record.bytes & ~old.bytes);
    if (known || !compare(old, record, actor, address)) {
      if (kept != i) cell.records[kept] = old;
      ++kept;
    }
  }
  cell.records.resize(kept);
  if (cell.crowd && may_conflict(*cell.crowd, record.kind)) {
    std::erase_if(cell.crowd->records, [&](const auto& old) { return compare(old.second, record, actor, address); });
    if (cell.crowd->records.empty()) cell.crowd.reset();
  }
  if (!known) add(cell, record);
}

}  // namespace

void access(const Actor& actor, Moment as, const void* start, size_t size, Access kind, Site site) {
  uintptr_t address = reinterpret_cast<uintptr_t>(start);
  if (end_of_kernel_before && !actor.view.seen.covers(*end_of_kernel_before) && !is_shared(start)) {
    const Record before{0, *end_of_kernel_before, actor.device, 0xff, {.write = true}};
    report_unawaited(before, {site, as, actor.device, 0xff, kind}, address);
  }
  while (size > 0) {
    const unsigned offset = address % 8;
    const unsigned count = size < 8 - offset ? static_cast<unsigned>(size) : 8 - offset;
    const uint8_t bytes = static_cast<uint8_t>(((1u << count) - 1) << offset);
    access_cell(actor, {site, as, actor.device, bytes, kind}, address - offset);
    address += count;
    size -= count;
  }
}

void begin_kernel_before() { end_of_kernel_before = Moment{begin_block("the kernel before", 1, 1, 1, 0), 0, 1}; }

void acquire_kernel_before(Actor& actor) {
  if (end_of_kernel_before) actor.view.seen.set(*end_of_kernel_before);
}

uint32_t begin_block(const std::string& name, uint32_t size_x, uint32_t size_y, uint32_t num_threads, uint32_t device) {
  if (device > 0) widest_needed = Scope::kSystem;
  labels.push_back({name, size_x, size_y, num_threads, {}});
  return static_cast<uint32_t>(labels.size() - 1);
}

uint32_t new_slot(uint32_t block, const std::string& name) {
  Label& label = labels[block];
  label.engines.push_back(name);
  return label.num_threads + static_cast<uint32_t>(label.engines.size()) - 1;
}

namespace shadow {

void clear() {
  pages.clear();
  last_page_number = ~uintptr_t{0};
  labels.clear();
  end_of_kernel_before.reset();
  widest_needed = Scope::kDevice;
  found = {};
  told.clear();
}

void forget(uintptr_t start, size_t size) {
  for (uintptr_t address = start & ~uintptr_t{7}; address < start + size; address += 8) {
    const auto page = pages.find(address / (8 * kPageCells));
    if (page != pages.end()) page->second[address / 8 % kPageCells] = {};
  }
}

Findings findings() { return found; }

}  // namespace shadow
}  // namespace simt::race
