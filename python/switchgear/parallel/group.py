# SPDX-License-Identifier: BSD-3-Clause
"""ExpertParallel: the ranks that share the experts, and the options they have agreed on."""

from __future__ import annotations

import atexit
import contextlib
import json
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Literal, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from switchgear.checks import Seconds, Size, checked
from switchgear.parallel import peer_memory, shared_memory
from switchgear.parallel import transport as transports
from switchgear.parallel.connect import Background, own_client, share
from switchgear.parallel.cost import CHUNKS, Link
from switchgear.parallel.header import digest
from switchgear.parallel.membership import SLACK_SECONDS, Membership
from switchgear.parallel.nodes import CHANNELS, Nodes, NodesOption, node_label, nodes_of, open_channel, open_on_host
from switchgear.parallel.peers import Outside, Peers
from switchgear.parallel.placement import Placement
from switchgear.parallel.rows import Record
from switchgear.parallel.static import Overflow

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
        wire: of rows on their way: "exact"; "fp8", 8 bits with a scale per row (rows.py states the error); or
            "fp8_dispatch", the rows to the experts only.
        capacity: rows that a rank sends to each rank, filled up with zeros, so that no host waits for sizes and shapes
            are static, for torch.compile and CUDA graphs (static.py). Not with invariant, tp_group, copies of
            experts, a wire that is not exact, and chunks; nodes are then not told apart.
        overflow: what happens to a token that does not fit: "raise" an error, or "drop" its choices on that rank.
            `overflow.count()` tells how many did not.
        name: of this group, for processes that join it. No two groups of a store may have the same.
        outside: this process is not in the group of this name, but joins it by switchgear.parallel.join.
        store: where the group of this name is found. If None, that of torch.distributed, or else of torchrun.

    Raises:
        ExpertParallelError: a rank did not connect, or left; see there. The object is then unusable.
        ValueError: an option is out of range. TypeError: one has another type.

    Attribute `record`: bytes sent to other ranks, by kind, and seconds spent waiting.
    """

    experts_class: ClassVar[type[Any]]  # ParallelExperts, whose module imports this one and sets it

    @checked
    def __init__(
        self,
        group: dist.ProcessGroup | Sequence[int] | None = None,
        *,
        timeout: Seconds = 120.0,
        num_chunks: Size | None = None,
        invariant: bool = False,
        average_gradients: bool = True,
        placement: Placement | None = None,
        transport: Literal["auto", "gloo", "shared_memory"] = "auto",
        device_transport: Literal["group", "peer_memory"] = "group",
        tp_group: dist.ProcessGroup | Sequence[int] | None = None,
        host: str | None = None,
        link: Link | None = None,
        nodes: NodesOption = "auto",
        wire: Literal["exact", "fp8", "fp8_dispatch"] = "exact",
        capacity: Size | None = None,
        overflow: Literal["raise", "drop"] = "raise",
        name: str | None = None,
        outside: bool = False,
        store: Store | None = None,
    ) -> None:
        if num_chunks not in (None, *CHUNKS):
            raise ValueError(f"num_chunks: expected one of {', '.join(map(str, CHUNKS))}, got {num_chunks}")
        others = {"invariant": invariant, "tp_group": tp_group is not None, "wire": wire != "exact",
                  "num_chunks": (num_chunks or 1) > 1}  # fmt: skip
        if capacity is not None and (excluded := [name for name, given in others.items() if given]):
            raise ValueError(f"capacity: expected None with {', '.join(excluded)}, got {capacity}")
        self.capacity, self.overflow = capacity, Overflow(capacity, overflow)
        self.timeout, self.num_chunks, self.invariant = timeout, num_chunks, invariant
        self.wire, self._nodes_option = wire, nodes
        self._network: transports.Network | None = None
        self._node: str | None = None  # the label of this rank's, also after it moved to another group
        self.average_gradients, self.link = average_gradients, link or Link()
        self.record = Record()
        self.group = None if isinstance(group, Sequence) else group
        self._num_layers, self._placement = 0, None if outside else placement
        self._transport, self._device_transport, self._host = transport, device_transport, host
        self._transports: dict[str, transports.Transport] = {}
        self.default_backend = ""  # of torch.distributed's default group, if it has the same ranks
        if outside:
            self._stay_outside(name, store)
            return
        ranks = [0]
        if group is None and not dist.is_initialized():
            rank, size, store = 0, 1, HashStore() if store is None else store
        else:
            ranks = _ranks_of(group)
            if dist.get_rank() not in ranks:
                raise ValueError(f"group: expected one with this process (rank {dist.get_rank()}), got ranks {ranks}")
            rank, size = ranks.index(dist.get_rank()), len(ranks)
            store = _store_of(ranks, name, store)
            if size == dist.get_world_size():
                self.default_backend = str(dist.get_backend())
        if placement is not None and placement.num_ranks != size:
            raise ValueError(f"placement: expected {size} ranks, got {placement.num_ranks}")
        self.membership = Membership(PrefixStore("members", store), size, rank)
        self._ids = self.membership.generation.ids
        self._connect(rank, size, store, ranks, tp_group)
        _alive.add(self)

    def _connect(
        self, rank: int, size: int, store: Any, ranks: list[int], tp_group: Any = None,
        lost: Callable[[], int] = lambda: -1,
    ) -> None:  # fmt: skip
        self.rank, self.size = rank, size
        self._transports = {}
        self._device_store, self._channel_store = PrefixStore("devices", store), PrefixStore("channels", store)
        self.peers: Peers = Peers(rank, size, PrefixStore("peers", store), self.timeout, self._host, lost)
        self.peers.on_failure.append(self._abort)
        try:
            self.twins = self._find_twins(ranks, tp_group, PrefixStore("tokens", store))
            self.own_twins = next(twins for twins in self.twins if rank in twins)
            self.sharing_digest = digest((self.twins, self.nodes.node_of, repr(self._nodes_option)))
            if size > 1:
                self._transports["cpu"] = self._open_on_host(PrefixStore("data", store))
            self.peers.constructed()
        except BaseException:
            self.close()
            raise

    def _stay_outside(self, name: str | None, store: Any) -> None:
        """As a rank without experts, until it joins."""
        if not name:
            raise ValueError("name: expected that of the group to join, got none")
        self.rank, self.size = 1, 2
        self.peers, self._ids = cast(Peers, Outside()), ()
        self.twins, self.own_twins = ((0,), (1,)), (1,)
        self.nodes, self.levels = Nodes((0, 0)), 1
        self.sharing_digest = 0
        self.membership = Membership(PrefixStore("members", _named_store(name, store)), 0, None)

    def move(self) -> None:
        """Connects to the ranks of the generation that `membership` has agreed on, and then leaves the old ones.
        Nothing changes if it fails, but the generation is then lost."""
        generation = self.membership.generation
        new = object.__new__(ExpertParallel)
        new.__dict__.update(self.__dict__)
        size = len(generation.members)
        store = PrefixStore(f"generation/{generation.number}/group", self.membership.store)

        def lost() -> int:  # the old connections may tell
            gone = [self._ids[rank] for rank in self.peers.gone(with_left=False)]
            return next((generation.ids.index(id) for id in gone if id in generation.ids), -1)

        new._connect(self.membership.rank(), size, store, list(range(size)), lost=lost)
        peers, old = self.peers, self._transports
        self.__dict__.update(new.__dict__, _placement=None, _ids=generation.ids)
        _leave(peers, old)
        _alive.add(self)

    def renew_default_group(self, backend: str) -> None:
        """Replaces torch.distributed's default group by one of the present ranks. Collective."""
        number, rank, size = self.membership.generation.number, self.rank, self.size
        store = PrefixStore(f"generation/{number}/default", self.membership.store)

        def renew() -> None:
            if dist.is_initialized():
                dist.destroy_process_group()
            _made.clear()  # processes that have joined count from 0 too
            dist.distributed_c10d._world.group_count = 0  # names groups; an attempt that failed has counted
            seconds = timedelta(seconds=self.timeout)
            dist.init_process_group(backend, store=own_client(store), rank=rank, world_size=size, timeout=seconds)

        work = Background(renew)
        try:
            self.peers.wait(work)
        except BaseException:
            with contextlib.suppress(RuntimeError, ValueError):
                work.wait_for(self.timeout + SLACK_SECONDS)  # it cannot be interrupted, and must not set a group later
            raise
        self.group, self.default_backend = None, backend

    def leave(self) -> None:
        """Becomes a process outside."""
        _leave(self.peers, self._transports)
        self.rank, self.size, self.peers, self._transports, self._ids = 1, 2, cast(Peers, Outside()), {}, ()
        self.membership.leave()

    def gone(self) -> set[int]:
        """Ids of members that are known to be lost. Of an older generation, whoever has left may have moved on."""
        is_latest = self._ids == self.membership.generation.ids
        return {self._ids[rank] for rank in self.peers.gone(with_left=is_latest)}

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
        mine = json.dumps([own, self._node]), self.peers.is_over()
        shared = [
            json.loads(text) for text in self.peers.run(lambda: share(store, "twins", self.rank, self.size, *mine))
        ]
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
        if not self._ids:  # outside: none here
            return Placement(num_experts, (tuple(range(num_experts)), ()))
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
        channel of a two-level exchange (nodes.py)."""
        if channel and f"{device.type} {channel}" not in self._transports:
            store = PrefixStore(device.type, self._channel_store)
            way = "gloo" if self._transport == "gloo" else "auto"

            around = self.peers, self.nodes, device, store, way
            made = self.peers.run(lambda: {name: open_channel(name, *around) for name in CHANNELS})
            for name, transport in made.items():
                self._transports[f"{device.type} {name}"] = self._throttled(transport)
        if not channel and device.type not in self._transports:
            if self._device_transport == "peer_memory":
                self._check_one_machine("device_transport", "group")
                there = peer_memory.CudaDevice(device)
                self._transports[device.type] = self.peers.run(lambda: self._map_peers(there))
            elif self.membership.generation.number and not self.default_backend:
                raise ValueError("device_transport: expected a default group of the same ranks, got others")
            else:
                self._transports[device.type] = transports.GroupTransport(
                    dist.group.WORLD if self.group is None else self.group
                )
        return self._transports[f"{device.type} {channel}" if channel else device.type]

    def _open_on_host(self, store: Any) -> transports.Transport:
        if self._transport == "shared_memory":
            if not shared_memory.available():
                raise ValueError("transport: expected 'gloo' or 'auto', shared_memory needs Linux on x86-64")
            self._check_one_machine("transport", "'gloo' or 'auto'")
        opening = self.peers, range(self.size), store, self._transport
        return self.peers.run(lambda: open_on_host(*opening), lambda transport: transport.close())

    def _map_peers(self, device: peer_memory.CudaDevice) -> transports.Transport:
        is_over = self.peers.is_over()
        with torch.cuda.device(device.index):  # a thread begins on device 0
            return peer_memory.PeerMemoryTransport(self.rank, self.size, self._device_store, device, is_over=is_over)

    def _check_one_machine(self, name: str, others: str) -> None:
        machines = len(set(self.peers.hosts))
        if machines > 1:
            raise ValueError(f"{name}: expected {others}, ranks are on {machines} machines")

    def throttle(self, bandwidth: float, near_bandwidth: float | None = None) -> None:
        """Limits this rank's transfers to a link of `bandwidth` bytes/s, and those within its node to another one of
        near_bandwidth if given: for measurements on one machine."""
        near = [node == self.nodes.node_of[self.rank] for node in self.nodes.node_of]
        self._network = transports.Network(near, bandwidth, near_bandwidth)
        for device, transport in self._transports.items():
            below = transport.below if isinstance(transport, transports.ThrottledTransport) else transport
            self._transports[device] = self._throttled(below)

    def _throttled(self, transport: transports.Transport) -> transports.Transport:
        return transports.ThrottledTransport(transport, self.rank, self._network) if self._network else transport

    def close(self) -> None:
        """Leaves the group: closes connections, ends threads. Ranks that need this one raise ExpertParallelError."""
        _leave(self.peers, self._transports)
        _alive.discard(self)

    def __enter__(self) -> ExpertParallel:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, (OSError, RuntimeError)):
            self.peers.settle()
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertParallel:
        return self  # a copied layer talks to the same ranks

    def __reduce__(self) -> Any:
        raise TypeError("ExpertParallel: expected a state dict to be saved, not the module: connections cannot be")

    def __repr__(self) -> str:
        where = f"rank {self.rank} of {self.size}" if self._ids else "outside"
        return f"ExpertParallel({where})"

    def _abort(self) -> None:
        for transport in list(self._transports.values()):
            transport.abort()


def _ranks_of(group: Any) -> list[int]:
    return list(group) if isinstance(group, Sequence) else dist.get_process_group_ranks(group)


def _store_of(ranks: list[int], name: str | None, store: Any) -> Any:
    """A part of torch.distributed's store for a group of this name, or else the n-th one of these ranks."""
    key = name or ",".join(map(str, ranks))
    _made[key] = number = _made.get(key, -1) + 1
    if not name:
        return PrefixStore(f"switchgear/{key}/{number}", dist.distributed_c10d._get_default_store())
    if number:
        raise ValueError(f"name: expected one that no earlier ExpertParallel had, got {name!r}")
    return _named_store(name, store)


def _named_store(name: str, store: Any) -> Any:
    """The same for members and for processes outside, which do not know the prefixes that torch adds to its store."""
    if store is None and dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
    elif store is None:
        store = next(rendezvous("env://"))[0]
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return PrefixStore(f"switchgear/named/{name}", store)


def _leave(peers: Peers, connections: dict[str, transports.Transport]) -> None:
    peers.close()
    for transport in connections.values():
        transport.close()
    connections.clear()


@atexit.register
def _close_all() -> None:
    for parallel in list(_alive):
        parallel.close()
