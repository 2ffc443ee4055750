# SPDX-License-Identifier: BSD-3-Clause
"""The sub-groups of a two-level exchange: for each kind of transfer a transport between the ranks that take part."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from switchgear.parallel import shared_memory
from switchgear.parallel import transport as transports
from switchgear.parallel.nodes import Nodes
from switchgear.parallel.peers import Peers
from switchgear.parallel.transport import Transport, Work

CHANNELS = ("between dispatch", "within dispatch", "within combine", "between combine")


class Part:
    """A transport between some ranks of a group, which gets and sends counts of all ranks."""

    def __init__(self, below: Transport, ranks: Sequence[int]) -> None:
        self.below, self._ranks = below, ranks

    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        counts = ([rows[rank] for rank in self._ranks] for rows in (output_rows, input_rows))
        return self.below.all_to_all(output, input, *counts)

    def abort(self) -> None:
        self.below.abort()

    def close(self) -> None:
        self.below.close()


def open_channel(
    channel: str, peers: Peers, nodes: Nodes, device: torch.device, store: Any, *, share_memory: bool
) -> Transport:
    """Collective: all ranks open the same channels in the same order.

    share_memory: whether ranks of one machine may send rows through shared memory; else by gloo.
    """
    rank = peers.rank
    ranks = nodes.same(rank) if channel.startswith("within") else nodes.rail(rank)
    if len(ranks) == 1:
        return Part(_Copy(), ranks)
    # Ranks of another sub-group have keys of their own.
    own = PrefixStore(f"{channel}/{','.join(map(str, ranks))}", store)
    if device.type == "cpu":
        return Part(_on_host(peers, ranks, own, share_memory), ranks)
    # dist.new_group takes all processes of the job, or names groups by their number, which may differ between ranks.
    if device.type != "cuda":
        raise ValueError(f"nodes: expected None for tensors on {device.type}")
    backend = dist.ProcessGroupNCCL(own, ranks.index(rank), len(ranks), dist.ProcessGroupNCCL.Options())
    return Part(transports.BackendTransport(backend), ranks)


class _Copy:
    """The transport of a single rank."""

    def all_to_all(self, output: Tensor, input: Tensor, output_rows: Sequence[int], input_rows: Sequence[int]) -> Work:
        output.copy_(input)
        return transports.Done()

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def _on_host(peers: Peers, ranks: Sequence[int], store: Any, share_memory: bool) -> Transport:
    rank, size, is_over = ranks.index(peers.rank), len(ranks), peers.is_over()
    together = len({peers.hosts[r] for r in ranks}) == 1
    if share_memory and together and shared_memory.available():
        made = shared_memory.SharedMemoryTransport(rank, size, store, is_over)
        if not made.problem:
            return made
        made.discard()
        warnings.warn(f"rows are sent by gloo, since shared memory cannot be opened: {made.problem}", stacklevel=2)
    return transports.GlooTransport(rank, size, PrefixStore("instead", store), peers.timeout, is_over)
