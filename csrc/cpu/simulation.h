// SPDX-License-Identifier: BSD-3-Clause
// A recorded loop on more threads and memory nodes than this machine has, in simulated time.
//
// Threads take their tasks by the rules of threads.h, from the same objects.
//
// Memory. A core reads and computes in turns. Of the d seconds that a task took on one core, it read its b bytes for b/R,
// where R is what one core reads alone; more cores only slow this part. Each thread reads a part u of its time, so of P
// threads a binomial number n reads at a time. n of them request n R bytes/s, and a memory of bandwidth B delivers
// E[min(n R, B)] on average: less than B, since sometimes few read. u follows from the rates and the rates from u, which is
// solved by iteration. A node's memory, and the link that brings bytes of other sockets to one, are shared max-min fairly.
// Nodes of one socket read each other's memory as fast as their own.
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
  double core_bandwidth;  // bytes/s that one core reads alone
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
