# SPDX-License-Identifier: BSD-3-Clause
"""Which ranks share a node, and the transports within and between nodes of a two-level exchange."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from switchgear.parallel import shared_memory
from switchgear.parallel import transport as transports
from switchgear.parallel.peers import Peers
from switchgear.parallel.transport import Transport, Work


@dataclass(frozen=True)
class Nodes:
    """node_of[r]: the node of rank r; nodes are numbered by their lowest ranks."""

    node_of: tuple[int, ...]

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each node, ascending."""
        ranks: list[list[int]] = [[] for _ in range(max(self.node_of) + 1)]
        for rank, node in enumerate(self.node_of):
            ranks[node].append(rank)
        return tuple(map(tuple, ranks))

    @property
    def has_levels(self) -> bool:
        """Whether two levels differ from one: several nodes, one of them with several ranks."""
        return 1 < len(self.members) < len(self.node_of)

    @cached_property
    def are_equal(self) -> bool:
        """Whether all nodes have as many ranks."""
        return len(set(map(len, self.members))) == 1

    def same(self, rank: int) -> tuple[int, ...]:
        """The ranks of the rank's node."""
        return self.members[self.node_of[rank]]

    def relay(self, source: int, target: int) -> int:
        """The rank through which rows of `source` reach rank `target`: in its own node the source, in another one the
        rank with the same index there (modulo their number), so that all links between nodes are used."""
        if self.node_of[source] == self.node_of[target]:
            return source
        members = self.same(target)
        return members[self.same(source).index(source) % len(members)]

    def rail(self, rank: int) -> tuple[int, ...]:
        """The ranks that `rank` exchanges rows with between nodes: those of its index if nodes are equal, else all."""
        if not self.are_equal:
            return tuple(range(len(self.node_of)))
        index = self.same(rank).index(rank)
        return tuple(members[index] for members in self.members)


NodesOption = str | int | Sequence[Sequence[int]] | None


def node_label(nodes: NodesOption, rank: int, machines: Sequence[str]) -> str:
    """A name of the rank's node, equal on its ranks. nodes: a number of consecutive ranks per node; the ranks of each
    node; "auto", the ranks of each machine, or, if each seems to have its own (as in containers), torchrun's
    LOCAL_WORLD_SIZE; None: one node.

    Raises:
        ValueError: nodes is something else, or does not have each rank once.
    """
    size = len(machines)
    if nodes is None:
        return ""
    if nodes == "auto":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if len(set(machines)) < size or local <= 1 or size % local:
            return machines[rank]
        nodes = local
    if isinstance(nodes, int) and not isinstance(nodes, bool):
        if nodes < 1:
            raise ValueError(f"nodes: expected at least 1 rank per node, got {nodes}")
        return f"node {rank // nodes}"
    if isinstance(nodes, str) or not isinstance(nodes, Sequence):
        raise ValueError(f"nodes: expected 'auto', None, ranks per node, or the ranks of each node, got {nodes!r}")
    if sorted(each for ranks in nodes for each in ranks) != list(range(size)):
        raise ValueError(f"nodes: expected each of {size} ranks once, got {list(map(list, nodes))}")
    return f"node {next(number for number, ranks in enumerate(nodes) if rank in ranks)}"


def nodes_of(labels: Sequence[str]) -> Nodes:
    """From the labels of all ranks."""
    order = list(dict.fromkeys(labels))
    return Nodes(tuple(order.index(label) for label in labels))


def find_nodes(nodes: NodesOption, machines: Sequence[str]) -> Nodes:
    """The nodes of the ranks of these machines; see node_label."""
    return nodes_of([node_label(nodes, rank, machines) for rank in range(len(machines))])


# ---- Sub-groups of ranks ---------------------------------------------------------------------------------------------


CHANNELS = ("between dispatch", "within dispatch", "within combine", "between combine")


class Part(transports.Around):
    """A transport between some ranks of a group, which gets and sends counts of all ranks."""

    def __init__(self, below: Transport, ranks: Sequence[int]) -> None:
        super().__init__(below)
        self._ranks = ranks

    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        counts = ([rows[rank] for rank in self._ranks] for rows in (output_rows, input_rows))
        return self.below.all_to_all(output, input, *counts)


def open_channel(channel: str, peers: Peers, nodes: Nodes, device: torch.device, store: Any, way: str) -> Transport:
    """Collective: all ranks open the same channels in the same order. way: that of `open_on_host`."""
    rank = peers.rank
    ranks = nodes.same(rank) if channel.startswith("within") else nodes.rail(rank)
    if len(ranks) == 1:
        return Part(_Copy(), ranks)
    # Ranks of another sub-group have keys of their own.
    own = PrefixStore(f"{channel}/{','.join(map(str, ranks))}", store)
    if device.type == "cpu":
        return Part(open_on_host(peers, ranks, own, way), ranks)
    # dist.new_group takes all processes of the job, or names groups by their number, which may differ between ranks.
    if device.type != "cuda":
        raise ValueError(f"nodes: expected None for tensors on {device.type}")
    backend = dist.ProcessGroupNCCL(own, ranks.index(rank), len(ranks), dist.ProcessGroupNCCL.Options())
    return Part(transports.GroupTransport(backend, is_own=True), ranks)


class _Copy(Transport):
    """The transport of a single rank."""

    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        output.copy_(input)
        return transports.Done()


def open_on_host(peers: Peers, ranks: Sequence[int], store: Any, way: str) -> Transport:
    """Of CPU tensors, between these ranks. way: "gloo"; "shared_memory"; or "auto", shared memory if it can be opened.

    Raises:
        ValueError: shared memory was asked for and cannot be opened, on all ranks alike.
    """
    rank, size, is_over = ranks.index(peers.rank), len(ranks), peers.is_over()
    together = len({peers.hosts[r] for r in ranks}) == 1
    if way != "gloo" and together and shared_memory.available():
        made = shared_memory.SharedMemoryTransport(rank, size, store, is_over)
        if not made.problem:
            return made
        made.discard()
        if way == "shared_memory":
            peers.finish()
            raise ValueError(f"transport: expected 'gloo' or 'auto', shared memory cannot be opened: {made.problem}")
        warnings.warn(f"rows are sent by gloo, since shared memory cannot be opened: {made.problem}", stacklevel=2)
    return transports.GlooTransport(rank, size, PrefixStore("instead", store), peers.timeout, is_over)
