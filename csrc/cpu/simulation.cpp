// SPDX-License-Identifier: BSD-3-Clause
#include "simulation.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "threads.h"

namespace switchgear::cpu {
namespace {

constexpr double kExact = 1e-6;  // of the part of its time in which a thread reads
constexpr int kMostRounds = 50;

struct Runner {
  int node = 0;
  int passed = 0;        // see Counter and Shares
  int64_t task = -1;     // -1: done
  double left = 0.0;     // seconds of it on one core
  double alone = 0.0;    // all its seconds on one core
  double bytes = 0.0;    // of it
  double fastest = 0.0;  // bytes/s while it reads, on one core
  double rate = 0.0;     // bytes/s while it reads, here
  double reading = 0.0;  // the part of its time in which it reads
  bool is_fixed = false;

  [[nodiscard]] bool reads() const { return task >= 0 && bytes > 0.0; }
  [[nodiscard]] double seconds() const { return bytes > 0.0 ? alone - bytes / fastest + bytes / rate : alone; }
};

// A resource that runners use: the memory of a node, or the link to a socket.
struct Resource {
  double capacity;
  std::vector<double> part;  // of the bytes of a runner on each node that pass here
};

std::vector<Resource> resources_of(const Machine& machine) {
  const auto nodes = static_cast<size_t>(machine.num_nodes);
  std::vector<Resource> resources;
  for (size_t memory = 0; memory < nodes; ++memory) {
    Resource resource{machine.node_bandwidth, std::vector<double>(nodes)};
    for (size_t reader = 0; reader < nodes; ++reader) {
      switch (machine.placement) {
        case Placement::kFirstNode: resource.part[reader] = memory == 0 ? 1.0 : 0.0; break;
        case Placement::kInterleaved: resource.part[reader] = 1.0 / machine.num_nodes; break;
        case Placement::kLocal: resource.part[reader] = memory == reader ? 1.0 : 0.0; break;
      }
    }
    resources.push_back(resource);
  }
  const auto socket_of = [&](size_t node) { return static_cast<int>(node) * machine.num_sockets / machine.num_nodes; };
  for (int socket = 0; socket < machine.num_sockets; ++socket) {
    Resource link{machine.link_bandwidth, std::vector<double>(nodes)};
    for (size_t reader = 0; reader < nodes; ++reader) {
      for (size_t memory = 0; memory < nodes && socket_of(reader) == socket; ++memory) {
        if (socket_of(memory) != socket) link.part[reader] += resources[memory].part[reader];
      }
    }
    resources.push_back(link);
  }
  return resources;
}

// E[min(n each, capacity)] over E[n each], for n of count readers, that read this part of their time.
double delivered_part(int count, double reading, double each, double capacity) {
  if (count * each <= capacity) return 1.0;
  if (reading > 1.0 - 1e-9) return capacity / (count * each);
  // Probabilities relative to that of the likeliest n: those of the tails may round to 0.
  const double odds = reading / (1.0 - reading);
  const int likeliest = static_cast<int>(reading * (count + 1));
  double requested = 0.0, delivered = 0.0;
  const auto add = [&](int n, double probability) {
    requested += probability * n * each;
    delivered += probability * std::min(n * each, capacity);
  };
  double probability = 1.0;
  for (int n = likeliest; n <= count; ++n) {
    add(n, probability);
    probability *= odds * (count - n) / (n + 1);
  }
  probability = 1.0;
  for (int n = likeliest; n > 0; --n) {
    probability *= n / (odds * (count - n + 1));
    add(n - 1, probability);
  }
  return delivered / requested;
}

// bytes/s that a resource delivers on average to runners that read parts of their time.
double mean_delivered(const Resource& resource, const std::vector<Runner>& runners) {
  int count = 0;
  double parts = 0.0, requested = 0.0;
  for (const Runner& runner : runners) {
    const double share = resource.part[static_cast<size_t>(runner.node)];
    if (!runner.reads() || share == 0.0) continue;
    ++count;
    parts += runner.reading;
    requested += runner.reading * share * runner.fastest;
  }
  return count == 0 ? 0.0 : requested * delivered_part(count, parts / count, requested / parts, resource.capacity);
}

// The rate λ at which min(fastest, λ) of the runners that are not fixed fills a resource; infinite if they never do.
double filling_rate(const Resource& resource, const std::vector<Runner>& runners, const std::vector<int>& by_fastest) {
  double room = mean_delivered(resource, runners), weight = 0.0;
  const auto weight_of = [&](const Runner& r) { return resource.part[static_cast<size_t>(r.node)] * r.reading; };
  for (const Runner& runner : runners) {
    if (!runner.reads()) continue;
    if (runner.is_fixed) {
      room -= weight_of(runner) * runner.rate;
    } else {
      weight += weight_of(runner);
    }
  }
  for (const int i : by_fastest) {  // ascending
    const Runner& runner = runners[static_cast<size_t>(i)];
    if (runner.is_fixed || weight_of(runner) == 0.0) continue;
    if (weight * runner.fastest > room) return std::max(room, 0.0) / weight;
    room -= weight_of(runner) * runner.fastest;
    weight -= weight_of(runner);
  }
  return std::numeric_limits<double>::infinity();
}

// Max-min fair rates by progressive filling: the resource that fills at the lowest rate fixes its runners, then the next.
void fill(const std::vector<Resource>& resources, std::vector<Runner>& runners, const std::vector<int>& by_fastest) {
  for (const int i : by_fastest) runners[static_cast<size_t>(i)].is_fixed = false;
  for (size_t round = 0; round < resources.size(); ++round) {
    double lowest = std::numeric_limits<double>::infinity();
    const Resource* first = nullptr;
    for (const Resource& resource : resources) {
      const double rate = filling_rate(resource, runners, by_fastest);
      if (rate < lowest) lowest = rate, first = &resource;
    }
    for (const int i : by_fastest) {
      Runner& runner = runners[static_cast<size_t>(i)];
      if (runner.is_fixed) continue;
      if (first != nullptr && first->part[static_cast<size_t>(runner.node)] == 0.0) continue;
      runner.rate = std::min(runner.fastest, lowest);
      runner.is_fixed = true;
    }
    if (first == nullptr) return;
  }
}

// Rates and the parts of time in which runners read, from those of before.
void share_bandwidth(const std::vector<Resource>& resources, std::vector<Runner>& runners) {
  std::vector<int> by_fastest;
  for (size_t i = 0; i < runners.size(); ++i) {
    if (runners[i].reads()) by_fastest.push_back(static_cast<int>(i));
  }
  std::sort(by_fastest.begin(), by_fastest.end(), [&](int a, int b) {
    return runners[static_cast<size_t>(a)].fastest < runners[static_cast<size_t>(b)].fastest;
  });
  for (int round = 0; round < kMostRounds; ++round) {
    fill(resources, runners, by_fastest);
    double change = 0.0;
    for (const int i : by_fastest) {
      Runner& runner = runners[static_cast<size_t>(i)];
      const double reading = runner.bytes / runner.rate / runner.seconds();
      change = std::max(change, std::abs(reading - runner.reading));
      runner.reading = reading;
    }
    if (change < kExact) return;
  }
}

template <typename Source>
SimulatedLoop simulate_with(const std::vector<SimulatedTask>& tasks, const Machine& machine) {
  const auto count = static_cast<int64_t>(tasks.size());
  const int num_threads = static_cast<int>(std::min<int64_t>(count, machine.num_threads));
  const std::vector<Resource> resources = resources_of(machine);
  const auto nodes = static_cast<size_t>(machine.num_nodes);
  SimulatedLoop loop;
  loop.bytes.resize(nodes);
  loop.threads.resize(tasks.size());
  if (count == 0) return loop;
  Source source(count, num_threads);
  std::vector<Runner> runners(static_cast<size_t>(num_threads));
  int running = num_threads;
  const auto start_next = [&](int thread) {
    Runner& runner = runners[static_cast<size_t>(thread)];
    runner.task = source.take(thread, runner.passed);
    if (runner.task < 0) {
      --running;
      return;
    }
    const SimulatedTask& task = tasks[static_cast<size_t>(runner.task)];
    const auto bytes = static_cast<double>(task.bytes);
    runner.bytes = bytes;
    runner.left = runner.alone = std::max(task.seconds, 1e-9);
    runner.fastest = runner.rate = std::max(machine.core_bandwidth, bytes / runner.alone);  // from a cache, perhaps
    runner.reading = bytes / runner.fastest / runner.alone;
    loop.threads[static_cast<size_t>(runner.task)] = thread;
    for (size_t memory = 0; memory < nodes; ++memory) {
      const double part = bytes * resources[memory].part[static_cast<size_t>(runner.node)];
      loop.bytes[memory] += part;
      if (memory != static_cast<size_t>(runner.node)) loop.remote_bytes += part;
    }
  };
  for (int i = 0; i < num_threads; ++i) {  // bound in the order of the nodes: a loop of few tasks is on the first
    runners[static_cast<size_t>(i)].node = i * machine.num_nodes / machine.num_threads;
    start_next(i);
  }
  while (running > 0) {
    share_bandwidth(resources, runners);
    const auto speed = [](const Runner& r) { return r.alone / r.seconds(); };
    double step = std::numeric_limits<double>::infinity();
    for (const Runner& runner : runners) {
      if (runner.task >= 0) step = std::min(step, runner.left / speed(runner));
    }
    loop.seconds += step;
    loop.busy += step * running;
    for (int i = 0; i < num_threads; ++i) {
      Runner& runner = runners[static_cast<size_t>(i)];
      if (runner.task < 0) continue;
      runner.left -= step * speed(runner);
      if (runner.left < 1e-12) start_next(i);
    }
  }
  return loop;
}

}  // namespace

SimulatedLoop simulate(const std::vector<SimulatedTask>& tasks, bool in_shares, const Machine& machine) {
  return in_shares ? simulate_with<Shares>(tasks, machine) : simulate_with<Counter>(tasks, machine);
}

}  // namespace switchgear::cpu
