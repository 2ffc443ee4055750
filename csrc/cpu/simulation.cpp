// SPDX-License-Identifier: BSD-3-Clause
#include "simulation.h"

#include <algorithm>
#include <limits>

#include "threads.h"

namespace switchgear::cpu {
namespace {

struct Runner {
  int node = 0;
  int passed = 0;       // see Counter and Shares
  int64_t task = -1;    // -1: done
  double left = 0.0;    // seconds of it on one core
  double demand = 0.0;  // bytes/s
  double rate = 0.0;    // bytes/s that it gets
  bool is_fixed = false;
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

// The rate λ at which min(demand, λ) of the runners that are not fixed fills a resource; infinite if they never do.
double filling_rate(const Resource& resource, const std::vector<Runner>& runners, const std::vector<int>& by_demand) {
  double room = resource.capacity, weight = 0.0;
  for (const Runner& runner : runners) {
    if (runner.task < 0) continue;
    const double part = resource.part[static_cast<size_t>(runner.node)];
    if (runner.is_fixed) {
      room -= part * runner.rate;
    } else {
      weight += part;
    }
  }
  for (const int i : by_demand) {  // ascending
    const Runner& runner = runners[static_cast<size_t>(i)];
    const double part = resource.part[static_cast<size_t>(runner.node)];
    if (runner.task < 0 || runner.is_fixed || part == 0.0) continue;
    if (weight * runner.demand > room) return std::max(room, 0.0) / weight;
    room -= part * runner.demand;
    weight -= part;
  }
  return std::numeric_limits<double>::infinity();
}

// Max-min fair rates by progressive filling: the resource that fills at the lowest rate fixes its runners, then the next.
void share_bandwidth(const std::vector<Resource>& resources, std::vector<Runner>& runners) {
  std::vector<int> by_demand;
  for (size_t i = 0; i < runners.size(); ++i) {
    runners[i].rate = runners[i].demand;
    runners[i].is_fixed = runners[i].task < 0 || runners[i].demand == 0.0;
    if (!runners[i].is_fixed) by_demand.push_back(static_cast<int>(i));
  }
  std::sort(by_demand.begin(), by_demand.end(), [&](int a, int b) {
    return runners[static_cast<size_t>(a)].demand < runners[static_cast<size_t>(b)].demand;
  });
  for (size_t round = 0; round < resources.size(); ++round) {
    double lowest = std::numeric_limits<double>::infinity();
    const Resource* first = nullptr;
    for (const Resource& resource : resources) {
      const double rate = filling_rate(resource, runners, by_demand);
      if (rate < lowest) lowest = rate, first = &resource;
    }
    if (first == nullptr) return;
    for (Runner& runner : runners) {
      if (runner.is_fixed || first->part[static_cast<size_t>(runner.node)] == 0.0) continue;
      runner.rate = std::min(runner.demand, lowest);
      runner.is_fixed = true;
    }
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
    runner.left = std::max(task.seconds, 1e-9);
    runner.demand = bytes / runner.left;
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
    const auto speed = [](const Runner& r) { return r.demand == 0.0 ? 1.0 : r.rate / r.demand; };
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
