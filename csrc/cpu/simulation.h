// SPDX-License-Identifier: BSD-3-Clause
// A recorded loop on more threads and memory nodes than this machine has, in simulated time.
//
// Threads take their tasks by the rules of threads.h, from the same objects. A task whose bytes b took d seconds on one core
// demands b/d bytes/s, and runs at that speed while memory delivers them. A node's memory, and the link that brings bytes of
// other sockets to one, are shared max-min fairly: a task that demands less than its share is not slowed. Nodes of one socket
// read each other's memory as fast as their own.
#pragma once
#include <cstdint>
#include <vector>

namespace switchgear::cpu {

enum class Placement : uint8_t {
  kFirstNode,    // all bytes on node 0, as one thread touches them first
  kInterleaved,  // pages in turns on all nodes
  kLocal,        // on the node of the thread that reads them
};

struct Machine {
  int num_threads;  // spread evenly over the nodes, thread 0 on node 0
  int num_nodes;
  int num_sockets;        // of equally many nodes
  double node_bandwidth;  // bytes/s of a node's memory
  double link_bandwidth;  // bytes/s from all other sockets to one
  Placement placement;
};

struct SimulatedTask {
  double seconds;  // on one core
  int64_t bytes;
};

struct SimulatedLoop {
  double seconds = 0.0;       // of all threads, without starting and joining them
  double busy = 0.0;          // Σ over threads of the seconds that their tasks took
  std::vector<double> bytes;  // read from each node
  double remote_bytes = 0.0;  // of these, by threads of other nodes
  std::vector<int> threads;   // of each task
};

SimulatedLoop simulate(const std::vector<SimulatedTask>& tasks, bool in_shares, const Machine& machine);

}  // namespace switchgear::cpu
