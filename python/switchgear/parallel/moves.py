# SPDX-License-Identifier: BSD-3-Clause
"""What moves when ranks or placements change: experts and their optimizer state between ranks that stay, and everything
to ranks that join. First all is received, next to the old; then, on all ranks or none, it is put in place."""

from __future__ import annotations

import io
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from switchgear.files import bytes_of
from switchgear.parallel import checkpoint, header
from switchgear.parallel.errors import MORE_PHASES, ExpertParallelError, Failure
from switchgear.parallel.experts import ParallelExperts, expert_parameters
from switchgear.parallel.layout import PIECES
from switchgear.parallel.placement import Placement, keep_experts
from switchgear.parallel.rows import Transfers
from switchgear.routing.change import Change, Changed

if TYPE_CHECKING:
    from switchgear.parallel.elastic import Training
    from switchgear.parallel.group import ExpertParallel


Lost = dict[str, tuple[int, ...]]  # experts by layer


@dataclass(frozen=True)
class ExpertMoves:
    """Of a layer: who has which experts, who shall have them, and who sends them."""

    held: tuple[tuple[int, ...], ...]  # by rank
    placement: Placement

    def moved(self, source: int, target: int) -> list[int]:
        """The experts that `source` sends to `target`. The copies of an expert take turns."""
        if source == target:
            return []
        have, wanted = self.held[source], self.placement.experts_of_rank[target]
        return [e for e in wanted if e in have and e not in self.held[target] and self._source(e, target) == source]

    def _source(self, expert: int, target: int) -> int:
        ranks = [rank for rank, held in enumerate(self.held) if expert in held]
        return ranks[target % len(ranks)]

    def received(self, rank: int) -> list[int]:
        return [expert for source in range(len(self.held)) for expert in self.moved(source, rank)]

    def missing(self) -> list[int]:
        """Experts that no rank has."""
        return sorted(set(range(self.placement.num_experts)).difference(*self.held))

    def num_moves(self) -> int:
        return sum(len(self.received(rank)) for rank in range(len(self.held)))


@dataclass(frozen=True)
class Moved:
    """What moved: bytes over all ranks, and the experts without copies, by layer."""

    bytes: int
    restored: Lost  # from the checkpoint
    lost: Lost


def redistribute(
    training: Training, commit: Callable[[Callable[[], None]], object], wanted: Mapping[str, Placement] | None = None
) -> Moved:
    """Brings all ranks to the placements `wanted`, or else to ones that move little. Collective."""
    parallel, rank = training.parallel, training.parallel.rank
    layers = parallel_experts(training.model)
    states: list[dict[str, Any]] = gather(parallel, "move", _state(training, layers))
    source = next((r for r, state in enumerate(states) if not state["empty"]), -1)
    if source < 0:
        raise ExpertParallelError(Failure(-1, "lost", "move", parallel.peers.step, "no rank has the training's state"))
    if wanted is None and states[source]["backend"]:
        parallel.renew_default_group(states[source]["backend"])
    if training.membership.empty and states[source]["rows"]:
        checkpoint.init_optimizer(training.optimizer)
    plans = {}
    for name, module in layers.items():
        held = tuple(tuple(state["held"][name]) for state in states)
        placement = (wanted or {}).get(name) or keep_experts(held, module.num_experts, training.num_replicas)
        plans[name] = ExpertMoves(held, placement)

    num_bytes = 0
    incoming: dict[tuple[str, str, str], dict[int, Tensor]] = {}  # rows by (layer, parameter, state), then expert
    for key in states[source]["rows"]:
        layer, parameter, state = key
        plan, rows = plans[layer], _rows(training, *key)
        num_bytes += plan.num_moves() * rows.shape[1:].numel() * rows.element_size()
        incoming[layer, parameter, state] = _exchange_rows(training, plan, rows)
    ranks = range(parallel.size)
    joining = [r for r in ranks if states[r]["empty"]]
    own = to_bytes(_common(training)) if rank == source and joining else torch.empty(0, dtype=torch.uint8)
    common = None
    if joining:
        lengths = agree(parallel, "move", "common", len(own))
        to = [len(own) if r in joining else 0 for r in ranks]
        of = [lengths[source] if r == source and rank in joining else 0 for r in ranks]
        received = send_rows(parallel, "move", "moved", own.repeat(len(joining)), to, of)
        num_bytes += lengths[source] * len(joining)
        common = of_bytes(received) if rank in joining else None
    restored, lost = _restore(training, plans, incoming)
    is_lost = {name: tuple(sorted({*states[source]["lost"][name], *lost.get(name, ())})) for name in layers}

    def install() -> None:
        if common is not None:
            _install_common(training, common)
        for name, module in layers.items():
            _install_layer(training, name, module, plans[name], incoming, is_lost[name])

    commit(install)
    _complain(training, restored, lost)
    return Moved(num_bytes, restored, lost)


# ---- what ranks tell and send each other besides the rows of layers --------------------------------------------------


def agree(parallel: ExpertParallel, phase: str, what: object, number: int = 0) -> list[int]:
    """Checks that all ranks are here with an equal `what`. Returns the numbers, >= 0, of all.

    It uses the header of an exchange, so a rank that runs a layer meanwhile disagrees, before data is sent.
    """
    size = parallel.size
    with parallel.peers.exchange():
        parallel.peers.enter(phase)
        fields = dict.fromkeys(header.Terms._fields, 0)
        fields |= {"magic": header.MAGIC, "exchange": parallel.peers.step, "layer": -1 - MORE_PHASES.index(phase)}
        fields |= {"options": header.digest(what), "sharing": parallel.sharing_digest}
        sent = header.encode(header.Terms(**fields), number, [0] * size, [[0] * size for _ in range(PIECES)])
        received = Transfers(parallel, sent.device).exchange("header", sent, [1] * size, [1] * size)
        terms, sizes = header.decode(received)
        failure = header.disagreement(terms)
        if failure is not None:
            parallel.peers.fail(failure)
        return [size.num_tokens for size in sizes]


def gather(parallel: ExpertParallel, phase: str, value: Any) -> list[Any]:
    """The values of all ranks; of JSON's types."""
    data = json.dumps(value).encode()
    lengths = agree(parallel, phase, "gather", len(data))
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8).repeat(parallel.size)
    received = send_rows(parallel, phase, "values", own, [len(data)] * parallel.size, lengths)
    return [json.loads(bytes(bytes_of(part))) for part in torch.split(received, lengths)]


def send_rows(
    parallel: ExpertParallel, phase: str, kind: str, rows: Tensor, to: Sequence[int], of: Sequence[int]
) -> Tensor:
    """Sends to[r] rows to each rank r, in order, and returns the of[r] rows of each. All know the numbers already."""
    with parallel.peers.exchange():
        parallel.peers.enter(phase)
        return Transfers(parallel, rows.device).exchange(kind, rows.contiguous(), of, to)


def average(parallel: ExpertParallel, tensors: Sequence[Tensor]) -> None:
    """Replaces each by its mean over the ranks, with the same bits on all: ranks are summed in ascending order. A rank
    sends 2 (W-1)/W of their bytes."""
    size = parallel.size
    if size == 1 or not tensors:
        return
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.device, tensor.dtype].append(tensor)
    for group in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        share = -(-len(flat) // size)
        padded = torch.nn.functional.pad(flat, (0, share * size - len(flat))).view(size, share)
        parts = send_rows(parallel, "gradients", "gradients", padded, [1] * size, [1] * size)
        total = parts[0]
        for part in parts[1:]:
            total += part
        total /= size
        whole = send_rows(parallel, "gradients", "gradients", total.repeat(size, 1), [1] * size, [1] * size).flatten()
        for tensor, part in zip(group, torch.split(whole[: len(flat)], [t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def to_bytes(value: Any) -> Tensor:
    """For values that torch.load(weights_only=True) reads."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8)


def of_bytes(data: Tensor) -> Any:
    """Runs no code from the data."""
    return torch.load(io.BytesIO(bytes_of(data)), weights_only=True, map_location="cpu")


# ---- what there is ---------------------------------------------------------------------------------------------------


def parallel_experts(model: nn.Module) -> dict[str, ParallelExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ParallelExperts)}


def row_keys(training: Training, layers: dict[str, ParallelExperts]) -> list[list[str]]:
    """(layer, parameter, state) of all tensors with a row per expert; the state "" is the parameter itself. Raises
    ValueError for a state of experts that can neither move nor stay."""
    found = []
    for name, module in layers.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            state = training.optimizer.state.get(parameter, {})
            found.append([name, parameter_name, ""])
            rows = checkpoint.row_states(f"{name}.{parameter_name}".lstrip("."), parameter, state)
            found += [[name, parameter_name, key] for key in sorted(rows)]
    return found


def _state(training: Training, layers: dict[str, ParallelExperts]) -> dict[str, Any]:
    """What the others must know about this rank, of JSON's types."""
    empty = training.membership.empty
    return {
        "empty": empty,
        "backend": training.parallel.default_backend,
        "held": {name: [] if empty else list(module._mine) for name, module in layers.items()},
        "lost": {name: list(module.lost) for name, module in layers.items()},
        "rows": [] if empty else row_keys(training, layers),
    }


def _rows(training: Training, layer: str, parameter_name: str, state: str) -> Tensor:
    parameter = training.model.get_submodule(layer).get_parameter(parameter_name)
    rows: Tensor = training.optimizer.state[parameter][state] if state else parameter
    return rows.detach()


def _common(training: Training) -> dict[str, Any]:
    """Everything that all ranks have alike."""
    model, optimizer, experts = training.model, training.optimizer, expert_parameters(training.model)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = chain(model.named_parameters(), model.named_buffers())

    def shared(name: str, parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        rows = checkpoint.row_states(name, parameter, state) if name in experts else ()
        return {key: value for key, value in state.items() if key not in rows}

    return {
        "model": {name: tensor.detach() for name, tensor in tensors if name not in experts},
        "optimizer": {
            names[parameter]: shared(names[parameter], parameter, state)
            for parameter, state in optimizer.state.items() if parameter in names
        },
        "groups": [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ],
        "extra": [item.state_dict() for item in training.extra],
        "steps": training.membership.steps,
    }  # fmt: skip


# ---- what comes ------------------------------------------------------------------------------------------------------


def _exchange_rows(training: Training, plan: ExpertMoves, rows: Tensor) -> dict[int, Tensor]:
    if not plan.num_moves():
        return {}
    parallel, rank = training.parallel, training.parallel.rank
    number = {expert: place for place, expert in enumerate(plan.held[rank])}
    sent = [plan.moved(rank, target) for target in range(parallel.size)]
    places = torch.tensor([number[e] for experts in sent for e in experts], dtype=torch.int64, device=rows.device)
    to, of = map(len, sent), (len(plan.moved(source, rank)) for source in range(parallel.size))
    received = send_rows(parallel, "move", "moved", rows[places], list(to), list(of))
    return dict(zip(plan.received(rank), received, strict=True))


def _restore(
    training: Training, plans: dict[str, ExpertMoves], incoming: dict[tuple[str, str, str], dict[int, Tensor]]
) -> tuple[Lost, Lost]:
    """Experts that no rank has: read from the checkpoint by those that get them, or lost. By layer, on all ranks."""
    missing = {name: plan.missing() for name, plan in plans.items() if plan.missing()}
    if not missing:
        return {}, {}
    rank, reason = training.parallel.rank, ""
    entries: dict[str, Tensor] = {}
    for (layer, parameter, state), found in incoming.items():
        for expert in set(missing.get(layer, ())) & set(plans[layer].placement.experts_of_rank[rank]):
            rows = _rows(training, layer, parameter, state)
            found[expert] = rows.new_zeros(rows.shape[1:])
            name = f"{layer}.{parameter}".lstrip(".")
            entries[f"optimizer/{name}/{state}[{expert}]" if state else f"{name}[{expert}]"] = found[expert]
    if training.checkpoint is None:
        reason = "there is no checkpoint"
    elif entries:
        try:
            checkpoint.load_entries(entries, training.checkpoint)
        except (ValueError, OSError) as error:
            reason = str(error)
    # All of a layer's experts are restored or none, so that one message tells it.
    reasons: list[str] = gather(training.parallel, "move", reason)
    experts = {name: tuple(ids) for name, ids in missing.items()}
    if not any(reasons):
        return experts, {}
    for tensor in entries.values():
        tensor.zero_()
    return {}, experts


# ---- putting it in place ---------------------------------------------------------------------------------------------


def _install_common(training: Training, common: Mapping[str, Any]) -> None:
    parameters = dict(training.model.named_parameters())
    tensors = {**parameters, **dict(training.model.named_buffers())}
    with torch.no_grad():
        for name, value in common["model"].items():
            tensors[name].copy_(value)
    if not common["optimizer"]:
        training.optimizer.state.clear()
    for name, state in common["optimizer"].items():
        own = training.optimizer.state[parameters[name]]
        for key, value in state.items():
            if isinstance(value, Tensor) and isinstance(own.get(key), Tensor):
                own[key].copy_(value)
            else:
                own[key] = value
    for group, options in zip(training.optimizer.param_groups, common["groups"], strict=True):
        group.update(options)
    for item, state in zip(training.extra, common["extra"], strict=True):
        item.load_state_dict(state)
    training.membership.steps = common["steps"]


def _install_layer(
    training: Training, name: str, module: ParallelExperts, plan: ExpertMoves,
    incoming: dict[tuple[str, str, str], dict[int, Tensor]], lost: tuple[int, ...],
) -> None:  # fmt: skip
    rank = training.parallel.rank
    number = {expert: place for place, expert in enumerate(plan.held[rank])}
    mine = plan.placement.experts_of_rank[rank]
    weights: dict[str, Tensor] = {}
    for (layer, parameter_name, state), received in incoming.items():
        if layer != name:
            continue
        rows = _rows(training, layer, parameter_name, state)
        if mine == plan.held[rank]:
            new = rows
        else:
            new = rows.new_empty(len(mine), *rows.shape[1:])
            for place, expert in enumerate(mine):
                new[place] = received[expert] if expert in received else rows[number[expert]]
        if state:
            training.optimizer.state[module.get_parameter(parameter_name)][state] = new
        else:
            weights[parameter_name] = new
    module.place(plan.placement, weights, lost)
    if lost and training.lost == "reroute":
        _reroute(training.model, module)


class _Rerouting:
    """Wraps a router's selection, so that it does not choose the experts that its layer has lost."""

    def __init__(self, experts: ParallelExperts) -> None:
        self.experts = experts

    def __call__(self, select: Any) -> Any:
        return Changed(select, Change(disable=self.experts.lost))


def _reroute(model: nn.Module, experts: ParallelExperts) -> None:
    for module in model.modules():
        gate: Any = getattr(module, "gate", None)
        if (
            getattr(module, "experts", None) is experts
            and hasattr(gate, "overrides")
            and not any(isinstance(wrapper, _Rerouting) for wrapper in gate.overrides)
        ):
            gate.overrides.append(_Rerouting(experts))


def _complain(training: Training, restored: Lost, lost: Lost) -> None:
    if training.parallel.rank:  # said once
        return
    if restored:
        warnings.warn(
            f"experts without a copy were read from {training.checkpoint}, and may be older: {_show(restored)}",
            stacklevel=4,
        )
    if lost:
        how = "their tokens go to other experts" if training.lost == "reroute" else "their choices count as empty"
        warnings.warn(f"experts are lost, since they had no copy and no checkpoint; {how}: {_show(lost)}", stacklevel=4)


def _show(experts: Mapping[str, Sequence[int]]) -> str:
    alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, ids in experts.items():
        alike[tuple(ids)].append(name)
    return "; ".join(f"{list(ids)} of {', '.join(names)}" for ids, names in alike.items())
