# SPDX-License-Identifier: BSD-3-Clause
"""ExpertParallel: the ranks that share the experts, and the options they have agreed on."""

from __future__ import annotations

import atexit
import json
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore

from switchgear.parallel import peer_memory, shared_memory
from switchgear.parallel import transport as transports
from switchgear.parallel.channels import CHANNELS, open_channel
from switchgear.parallel.cost import CHUNKS, Link
from switchgear.parallel.header import digest
from switchgear.parallel.nodes import NodesOption, node_label, nodes_of
from switchgear.parallel.overflow import Overflow
from switchgear.parallel.peers import Peers
from switchgear.parallel.placement import Placement
from switchgear.parallel.record import Record
from switchgear.parallel.rendezvous import get
from switchgear.parallel.wire import WIRES

_alive: weakref.WeakSet[ExpertParallel] = weakref.WeakSet()
_made: dict[str, int] = {}


class ExpertParallel:
    """Experts distributed over the ranks of a process group: `MoE(..., parallel=ExpertParallel(group))`.

    One object serves all layers of a model. Its constructor is collective, and so is every forward and backward of its
    layers: ranks without tokens or experts must take part too.

    Args:
        group: a torch.distributed group, or a list of ranks (after a failure, those that remain); all if None. Without
            torch.distributed: this process only.
        timeout: seconds after which a rank that others wait for counts as stalled. Also limits this constructor.
        num_chunks: 1, 2, 4 or 8 chunks of rows, so that experts work on one while others are transferred; if None,
            chosen for each call from the number of tokens.
        invariant: outputs and gradients have the same bits for any number of ranks, in float32 on the CPU. Then a row
            is returned for every choice of a token, instead of one for all its choices on a rank.
        average_gradients: divide the gradients of experts by the number of ranks, as DistributedDataParallel does for
            other parameters: right for a loss that is a mean over a rank's tokens. Otherwise they are sums.
        placement: which rank holds which experts, for layers with that many experts; consecutive ones if None.
        transport: of CPU tensors: "gloo"; "shared_memory", for ranks of one machine; or "auto", shared memory where
            possible. If it is not, a warning says why.
        device_transport: of tensors on other devices: "group", the group's backend; or "peer_memory", a kernel that
            writes into the memory of the other GPUs of this machine. Neither has run on GPUs yet.
        tp_group: the ranks, all within group, that hold the same tokens as this one (tensor parallelism). Each sends
            only its share of them and gets the results of all (arXiv:2303.06318). These ranks must have equal inputs
            and output gradients, and get equal outputs and input gradients.
        host: the address of this machine on which it listens for the other ranks, if automatic detection is wrong.
        link: speed of the connections, for choosing the number of chunks.
        nodes: which ranks share a node: "auto", those of one machine; a number of consecutive ranks; or the ranks of
            each node. With several nodes of several ranks, a token is sent once to each node, and its results are
            summed there before they return. None: once to each rank.
        wire: of rows on their way: "exact"; "fp8", 8 bits with a scale per row (wire.py states the error); or
            "fp8_dispatch", the rows to the experts only.
        capacity: rows that a rank sends to each rank, filled up with zeros, so that no host waits for sizes and shapes
            are static, for torch.compile and CUDA graphs (static.py). Not beside invariant, tp_group, copies of
            experts, a wire that is not exact, and chunks; nodes are then not told apart.
        overflow: what happens to a token that does not fit: "raise" an error, or "drop" its choices on that rank.
            `overflow.count()` tells how many did not.

    Raises:
        ExpertParallelError: a rank did not connect, or left; see there. The object is then unusable.
        ValueError: an option is out of range.

    Attribute `record`: bytes sent to other ranks, by kind, and seconds spent waiting.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | Sequence[int] | None = None,
        *,
        timeout: float = 120.0,
        num_chunks: int | None = None,
        invariant: bool = False,
        average_gradients: bool = True,
        placement: Placement | None = None,
        transport: str = "auto",
        device_transport: str = "group",
        tp_group: dist.ProcessGroup | Sequence[int] | None = None,
        host: str | None = None,
        link: Link | None = None,
        nodes: NodesOption = "auto",
        wire: str = "exact",
        capacity: int | None = None,
        overflow: str = "raise",
    ) -> None:
        if num_chunks is not None and num_chunks not in CHUNKS:
            raise ValueError(f"num_chunks: expected one of {', '.join(map(str, CHUNKS))}, got {num_chunks}")
        if not timeout > 0:
            raise ValueError(f"timeout: expected a positive number of seconds, got {timeout}")
        if transport not in TRANSPORTS:
            raise ValueError(f"transport: expected one of {', '.join(TRANSPORTS)}, got {transport!r}")
        if device_transport not in ("group", "peer_memory"):
            raise ValueError(f"device_transport: expected group or peer_memory, got {device_transport!r}")
        if wire not in WIRES:
            raise ValueError(f"wire: expected one of {', '.join(WIRES)}, got {wire!r}")
        if capacity is not None and not (isinstance(capacity, int) and capacity > 0):
            raise ValueError(f"capacity: expected a positive number of rows, got {capacity}")
        if overflow not in ("raise", "drop"):
            raise ValueError(f"overflow: expected raise or drop, got {overflow!r}")
        others = {"invariant": invariant, "tp_group": tp_group is not None, "wire": wire != "exact",
                  "num_chunks": (num_chunks or 1) > 1}  # fmt: skip
        if capacity is not None and (beside := [name for name, given in others.items() if given]):
            raise ValueError(f"capacity: expected None beside {', '.join(beside)}, got {capacity}")
        self.capacity, self.overflow = capacity, Overflow(capacity, overflow)
        self.timeout, self.num_chunks, self.invariant = timeout, num_chunks, invariant
        self.transport, self.wire = transport, wire
        self._nodes_option = nodes
        self._node: str | None = None  # the label of this rank's, also after it moved to another group
        self.average_gradients, self.link = average_gradients, link or Link()
        self.record = Record()
        self.group = None if isinstance(group, Sequence) else group
        self._num_layers = 0
        store: Any = None
        ranks = [0]
        if group is None and not dist.is_initialized():
            self.rank, self.size = 0, 1
            store = HashStore()
        else:
            ranks = _ranks_of(group)
            if dist.get_rank() not in ranks:
                raise ValueError(f"group: expected one with this process (rank {dist.get_rank()}), got ranks {ranks}")
            self.rank, self.size = ranks.index(dist.get_rank()), len(ranks)
            store = _store_of(ranks)
        if placement is not None and placement.num_ranks != self.size:
            raise ValueError(f"placement: expected {self.size} ranks, got {placement.num_ranks}")
        self._placement = placement
        self._network: transports.Network | None = None
        self._channel_store = PrefixStore("channels", store)
        self._transports: dict[str, transports.Transport] = {}
        self._device_transport, self._device_store = device_transport, PrefixStore("devices", store)
        self.peers = Peers(self.rank, self.size, PrefixStore("peers", store), timeout, host)
        self.peers.on_failure.append(self._abort)
        try:
            self.twins = self._find_twins(ranks, tp_group, PrefixStore("tokens", store))
            self.own_twins = next(twins for twins in self.twins if self.rank in twins)
            self.sharing_digest = digest((self.twins, self.nodes.node_of, repr(nodes)))
            if self.size > 1:
                self._transports["cpu"] = TRANSPORTS[transport](self, PrefixStore("data", store))
            self.peers.constructed()
        except BaseException:
            self.close()
            raise
        _alive.add(self)

    def _find_twins(self, ranks: list[int], tp_group: Any, store: Any) -> tuple[tuple[int, ...], ...]:
        """All sets of ranks (in the group) that hold the same tokens. Also finds the nodes."""
        own = [self.rank]
        if tp_group is not None:
            twins = _ranks_of(tp_group)
            if not set(twins) <= set(ranks) or dist.get_rank() not in twins:
                raise ValueError(f"tp_group: expected ranks of {ranks}, this one too, got {twins}")
            own = sorted(ranks.index(rank) for rank in twins)
        if self._node is None:
            self._node = node_label(self._nodes_option, self.rank, self.peers.hosts)
        is_over = self.peers.is_over()

        def share() -> list[list[Any]]:
            store.set(f"twins/{self.rank}", json.dumps([own, self._node]))
            return [json.loads(get(store, f"twins/{rank}", is_over)) for rank in range(self.size)]

        shared = self.peers.run(share)
        found = [tuple(twins) for twins, _ in shared]
        self.nodes = nodes_of([node for _, node in shared])
        self.levels = 2 if self.nodes.has_levels and self.capacity is None else 1
        if any(found[rank] != found[twins[0]] for twins in found for rank in twins):
            self.peers.finish()
            raise ValueError(f"tp_group: expected the same ranks on each of them, got {found}")
        return tuple(sorted(set(found)))

    def placement(self, num_experts: int) -> Placement:
        """The placement for a layer with this many experts."""
        if self._placement is not None and self._placement.num_experts == num_experts:
            return self._placement
        return Placement.contiguous(num_experts, self.size)

    def next_layer(self) -> int:
        """The number of a new layer; all ranks must create layers in the same order."""
        self._num_layers += 1
        return self._num_layers - 1

    @property
    def num_stops(self) -> int:
        """The number of nodes if a token is sent once to each, or else of ranks."""
        return len(self.nodes.members) if self.levels == 2 else self.size

    def transport_for(self, device: torch.device, channel: str = "") -> transports.Transport:
        """What moves rows between ranks for tensors on `device`, connected at the first call: of all ranks, or of a
        channel of a two-level exchange (channels.py)."""
        if channel and f"{device.type} {channel}" not in self._transports:
            store = PrefixStore(device.type, self._channel_store)
            made = self.peers.run(lambda: {c: open_channel(self, device, c, store) for c in CHANNELS})
            for name, transport in made.items():
                self._transports[f"{device.type} {name}"] = self._throttled(transport)
        if not channel and device.type not in self._transports:
            if self._device_transport == "peer_memory":
                self._check_one_machine("device_transport", "group")
                there = peer_memory.CudaDevice(device)
                self._transports[device.type] = self.peers.run(lambda: self._map_peers(there))
            else:
                self._transports[device.type] = transports.GroupTransport(self.group)
        return self._transports[f"{device.type} {channel}" if channel else device.type]

    def _map_peers(self, device: peer_memory.CudaDevice) -> transports.Transport:
        is_over = self.peers.is_over()
        with torch.cuda.device(device.index):  # a thread begins on device 0
            return peer_memory.PeerMemoryTransport(self.rank, self.size, self._device_store, device, is_over=is_over)

    def _check_one_machine(self, name: str, others: str) -> None:
        machines = len(set(self.peers.hosts))
        if machines > 1:
            raise ValueError(f"{name}: expected {others}, ranks are on {machines} machines")

    def throttle(self, bandwidth: float, latency: float = 0.0, near_bandwidth: float | None = None) -> None:
        """Limits this rank's transfers to a link of `bandwidth` bytes/s, and those within its node to another one of
        near_bandwidth if given: for measurements on one machine."""
        near = [node == self.nodes.node_of[self.rank] for node in self.nodes.node_of]
        self._network = transports.Network(near, bandwidth, near_bandwidth, latency)
        for device, transport in self._transports.items():
            below = transport.below if isinstance(transport, transports.ThrottledTransport) else transport
            self._transports[device] = self._throttled(below)

    def _throttled(self, transport: transports.Transport) -> transports.Transport:
        return transports.ThrottledTransport(transport, self.rank, self._network) if self._network else transport

    def close(self) -> None:
        """Leaves the group: closes connections, ends threads. Ranks that need this one raise ExpertParallelError."""
        self.peers.close()
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()
        _alive.discard(self)

    def __enter__(self) -> ExpertParallel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        return self  # a copied layer talks to the same ranks

    def __reduce__(self) -> Any:
        raise TypeError("ExpertParallel: expected a state dict to be saved, not the module: connections cannot be")

    def __repr__(self) -> str:
        return f"ExpertParallel(rank {self.rank} of {self.size})"

    def _abort(self) -> None:
        for transport in list(self._transports.values()):
            transport.abort()


def _shared_memory(parallel: ExpertParallel, store: Any) -> transports.Transport:
    if not shared_memory.available():
        raise ValueError("transport: expected 'gloo' or 'auto', shared_memory needs Linux on x86-64")
    parallel._check_one_machine("transport", "'gloo' or 'auto'")
    made = _opened_shared_memory(parallel, store)
    if made.problem:
        parallel.peers.finish()
        raise ValueError(f"transport: expected 'gloo' or 'auto', shared memory cannot be opened: {made.problem}")
    return made


def _opened_shared_memory(parallel: ExpertParallel, store: Any) -> shared_memory.SharedMemoryTransport:
    """The transport, discarded again if it has a problem, on all ranks alike."""
    is_over = parallel.peers.is_over()
    made = parallel.peers.run(
        lambda: shared_memory.SharedMemoryTransport(parallel.rank, parallel.size, store, is_over),
        shared_memory.SharedMemoryTransport.discard,
    )
    if made.problem:
        made.discard()
    return made


def _auto(parallel: ExpertParallel, store: Any) -> transports.Transport:
    if not shared_memory.available() or len(set(parallel.peers.hosts)) > 1:
        return _gloo(parallel, store)
    made = _opened_shared_memory(parallel, store)
    if made.problem:
        warnings.warn(f"rows are sent by gloo, since shared memory cannot be opened: {made.problem}", stacklevel=3)
        return _gloo(parallel, PrefixStore("instead", store))
    return made


def _gloo(parallel: ExpertParallel, store: Any) -> transports.Transport:
    seconds, is_over = parallel.timeout, parallel.peers.is_over()
    return parallel.peers.run(
        lambda: transports.GlooTransport(parallel.rank, parallel.size, store, seconds, is_over),
        transports.GlooTransport.close,
    )


TRANSPORTS = {"auto": _auto, "gloo": _gloo, "shared_memory": _shared_memory}


def _ranks_of(group: Any) -> list[int]:
    return list(group) if isinstance(group, Sequence) else dist.get_process_group_ranks(group)


def _store_of(ranks: list[int]) -> Any:
    """A part of torch.distributed's store for the n-th ExpertParallel of these ranks."""
    name = "switchgear/" + ",".join(map(str, ranks))
    _made[name] = number = _made.get(name, -1) + 1
    store = dist.distributed_c10d._get_default_store()
    return PrefixStore(f"{name}/{number}", store)


@atexit.register
def _close_all() -> None:
    for parallel in list(_alive):
        parallel.close()
