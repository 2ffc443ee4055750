# SPDX-License-Identifier: BSD-3-Clause
"""Training goes on when ranks are lost and when others join: no step is half applied, and experts move with their
optimizer state."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_pool import Pool
from test_wrappers import wrapped
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear.adapters import add_lora
from switchgear.parallel import (
    ExpertParallel,
    ExpertParallelError,
    Placement,
    Training,
    checkpoint,
    elastic_step,
    join,
    rebalance,
    shrink,
)  # fmt: skip
from switchgear.parallel import elastic as elastic_steps
from switchgear.parallel.errors import Failure
from switchgear.parallel.moves import of_bytes, parallel_experts, to_bytes
from switchgear.parallel.placement import keep_experts
from switchgear.routing import LossFreeBias, RunningCap, TopK

EXPERTS, HIDDEN, TOKENS = 8, 16, 48  # tokens of a step, over all ranks
TIMEOUT = 8.0


class Model(nn.Module):
    def __init__(self, parallel: ExpertParallel | None, **more: Any) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        options = {"normalize": True, "bias": True, "parallel": parallel, **more}
        self.layers = nn.ModuleList(switchgear.MoE(HIDDEN, 8, EXPERTS, 2, **options) for _ in range(2))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def make(parallel: ExpertParallel, balance: Any = (), **options: Any) -> Training:
    torch.manual_seed(0)
    model = Model(parallel, balance=balance)
    return Training(model, torch.optim.AdamW(model.parameters(), lr=0.01), **options)


def closure(training: Training) -> Tensor:
    """The loss depends on the step, not on the number of ranks, except for rounding."""
    parallel = training.parallel
    generator = torch.Generator().manual_seed(training.steps)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    count = TOKENS // parallel.size
    mine = x[parallel.rank * count : (parallel.rank + 1) * count]
    loss = (training.model(mine) - mine.roll(1, 1)).square().mean()
    loss.backward()
    return loss


def run(training: Training, steps: int) -> None:
    while training.steps < steps:
        elastic_step(training, lambda: closure(training))


def digests(training: Training) -> dict[str, str]:
    """By name and expert: of parameters and of the optimizer's state."""
    entries = checkpoint.state_dict(training.model, training.optimizer)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in entries.items()}


def equal(seen: list[dict[str, str]]) -> set[str]:
    """All entries, which have the same digest wherever they are."""
    for name in set().union(*seen):
        assert len({entries[name] for entries in seen if name in entries}) == 1, name
    return set().union(*seen)


@pytest.fixture
def four() -> Iterator[Pool]:
    """Ranks that may be lost."""
    pool = Pool(4)
    yield pool
    pool.close()


def complete(seen: list[dict[str, str]]) -> None:
    names = equal(seen)
    for expert in range(EXPERTS):
        for layer in range(2):
            assert f"layers.{layer}.experts.down_proj[{expert}]" in names
            assert f"optimizer/layers.{layer}.experts.down_proj/exp_avg[{expert}]" in names


# ---- losses ----------------------------------------------------------------------------------------------------------


def loses(rank: int, culprit: int, options: dict[str, Any]) -> Any:
    """Rank `culprit` is killed in its fourth step; the others take eight."""
    seen: list[Any] = []
    placement, capacity = (options.pop(name, None) for name in ("placement", "capacity"))
    group = {"placement": placement, "capacity": capacity, "invariant": capacity is None}
    with ExpertParallel(timeout=TIMEOUT, **group) as parallel:
        training = make(parallel, [LossFreeBias], on_failure="continue", on_change=seen.append, **options)
        run(training, 3)
        if rank == culprit:
            os.kill(os.getpid(), signal.SIGKILL)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(training, 8)
        messages = [str(warning.message) for warning in caught if "experts" in str(warning.message)]
        for layer in training.model.layers:  # type: ignore[union-attr]
            counted = int(layer.gate.tokens_per_expert.sum())  # type: ignore[union-attr,operator]
            assert counted == 2 * (3 * TOKENS // 4 + 5 * TOKENS // 3)  # nothing of the step that was repeated
        chosen = training.model.layers[0].gate(torch.randn(1000, HIDDEN)).topk_ids  # type: ignore[index,union-attr]
        return digests(training), seen, messages, set(chosen.flatten().tolist())


TWICE = Placement(EXPERTS, ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 4, 5), (2, 3, 6, 7)))


@pytest.mark.parametrize("culprit", [0, 2])
def test_copies_survive(four: Pool, culprit: int) -> None:
    four.start(loses, culprit, {"placement": TWICE, "num_replicas": EXPERTS})
    seen = four.results([rank for rank in range(4) if rank != culprit])
    complete([digest for digest, *_ in seen])
    for _, (change,), messages, _ in seen:
        assert (change.left, change.joined, change.ranks) == ((culprit,), (), 3)
        assert not change.lost
        assert not change.restored
        assert not messages
        assert change.bytes > 0
        assert change.step == 3


@pytest.mark.parametrize(("lost", "capacity"), [("reroute", None), ("empty", None), ("reroute", TOKENS)])
def test_lost_experts_are_declared(four: Pool, lost: str, capacity: int | None) -> None:
    four.start(loses, 1, {"lost": lost, "capacity": capacity})
    seen = four.results([0, 2, 3])
    complete([digest for digest, *_ in seen])
    assert [change.lost for _, (change,), _, _ in seen] == 3 * [
        {"layers.0.experts": (2, 3), "layers.1.experts": (2, 3)}
    ]
    assert sorted(len(messages) for _, _, messages, _ in seen) == [0, 0, 1]  # said once
    assert "experts are lost" in seen[0][2][0]
    for *_, chosen in seen:  # whoever asks for them gets nothing, or the next best
        assert chosen == {0, 1, 4, 5, 6, 7} | ({2, 3} if lost == "empty" else set())


def saves_and_loses(rank: int, folder: str) -> Any:
    """The checkpoint is of step 2; rank 3 is lost before step 4 is applied."""
    with ExpertParallel(timeout=TIMEOUT) as parallel:
        training = make(parallel, on_failure="continue", checkpoint=folder)
        run(training, 2)
        checkpoint.save(training.model, folder, training.optimizer)
        saved = digests(training)
        run(training, 3)
        if rank == 3:
            return saved
        changes: list[Any] = []
        object.__setattr__(training, "on_change", lambda change: changes.append((change, digests(training))))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(training, 5)
        messages = [str(warning.message) for warning in caught if "may be older" in str(warning.message)]
        return saved, changes[0], messages


def test_lost_experts_come_from_the_checkpoint(four: Pool, tmp_path: Path) -> None:
    """Weights and optimizer state of experts without a copy are those that were saved."""
    seen = four.run(saves_and_loses, str(tmp_path))
    saved = seen.pop()
    restored = {"layers.0.experts": (6, 7), "layers.1.experts": (6, 7)}
    found = {}
    for _, (change, after), _ in seen:
        assert change.restored == restored
        assert not change.lost
        found |= after
    complete([after for _, (_, after), _ in seen])
    for name in saved:
        if name.endswith(("[6]", "[7]")):
            assert found[name] == saved[name], name
    assert sorted(len(messages) for *_, messages in seen) == [0, 0, 1]


# ---- steps -----------------------------------------------------------------------------------------------------------


def half_commits(rank: int, who: str) -> Any:
    """Rank 3 is killed in the commit of the fourth step. who: which others hear in time that all have prepared it."""
    with ExpertParallel(timeout=TIMEOUT, invariant=True, placement=TWICE) as parallel:
        training = make(parallel, on_failure="continue", num_replicas=EXPERTS)
        run(training, 3)
        agree, calls = elastic_steps.agree, []

        def late(*args: Any) -> list[int]:
            if args[1] == "commit" and rank == 3 and who == "nobody":
                os.kill(os.getpid(), signal.SIGKILL)
            numbers = agree(*args)
            if args[1] == "commit" and not calls:
                calls.append(1)
                if rank == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                if rank != 0:
                    time.sleep(0.5)
                    parallel.peers.check()  # as if the last header had not arrived
            return numbers

        elastic_steps.agree = late  # type: ignore[assignment]
        try:
            run(training, 4)
        finally:
            elastic_steps.agree = agree
        steps, size = training.steps, training.parallel.size
        run(training, 6)
        return digests(training), training.membership.done, steps, size


@pytest.mark.parametrize("who", ["rank 0", "nobody"])
def test_no_step_is_half_applied(four: Pool, who: str) -> None:
    """If one rank has applied it, all do; if none has, it is repeated by those who are left."""
    four.start(half_commits, who)
    seen = four.results([0, 1, 2])
    complete([digest for digest, *_ in seen])
    assert {done for _, done, *_ in seen} == {7}  # six steps and a move
    assert {steps for *_, steps, _ in seen} == {4}
    # With `rank 0`, it goes on with four ranks until its next step.
    assert [size for *_, size in seen] == ([4, 3, 3] if who == "rank 0" else [3, 3, 3])


@pytest.mark.parametrize(
    ("outcome", "steps", "tokens", "total"),
    [("repeated", 2, 10, 10.0), ("applied", 2, 10, 10.0), ("joined", 2, 10, 5.0 + 7), ("raised", 1, 5, 5.0)],
)
def test_a_failed_attempt_counts_nothing(
    outcome: str, steps: int, tokens: int, total: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless its step is applied after all. A rank that joins again has the buffers of the others, here a seven."""
    with ExpertParallel(timeout=TIMEOUT) as parallel:
        select = partial(RunningCap, TopK(2, normalize=True), margin=1e9)
        moe = switchgear.MoE(HIDDEN, 8, EXPERTS, select=select, balance=[LossFreeBias], parallel=parallel)
        on_failure = "raise" if outcome == "raised" else "continue"
        training = Training(moe, torch.optim.SGD(moe.parameters(), lr=0.1), on_failure=on_failure)
        gate, membership, failures = moe.gate, training.membership, [Failure(0, "lost", "commit", 1)]
        commit = elastic_steps.commit

        def commits(*args: Any) -> int:
            if membership.steps == 1 and failures:
                raise ExpertParallelError(failures.pop())
            return commit(*args)

        def attempt() -> Tensor:
            loss = moe(torch.ones(5, HIDDEN)).square().sum()
            loss.backward()
            return loss

        def shrinks(training: Training) -> SimpleNamespace:
            membership.steps += outcome == "applied"
            if outcome == "joined":
                gate.select.totals.copy_(torch.eye(EXPERTS)[0] * 7)
            return SimpleNamespace(joined=(membership.id,) if outcome == "joined" else ())

        monkeypatch.setattr(elastic_steps, "commit", commits)
        monkeypatch.setattr(elastic_steps, "shrink", shrinks)
        elastic_step(training, attempt)
        with pytest.raises(ExpertParallelError) if outcome == "raised" else nullcontext():
            elastic_step(training, attempt)
        assert membership.steps == steps
        assert int(gate.tokens_per_expert.sum()) == 2 * tokens
        assert float(gate.select.totals.sum()) == pytest.approx(total, rel=1e-5)


def undisturbed(rank: int, steps: int) -> Any:
    with ExpertParallel(timeout=TIMEOUT, invariant=True, placement=TWICE) as parallel:
        training = make(parallel)
        losses = []
        while training.steps < steps:
            losses.append(float(elastic_step(training, lambda: closure(training))))
        return digests(training), losses


def clips(rank: int) -> Any:
    placement = Placement(EXPERTS, ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 4, 5), (2, 3, 6, 7)))
    with ExpertParallel(timeout=TIMEOUT, placement=placement) as parallel:
        training = make(parallel, max_norm=1e-3)
        elastic_step(training, lambda: closure(training))
        return {name: parameter.grad for name, parameter in training.model.named_parameters()}, placement


def test_the_norm_counts_every_expert_once(pool: Pool) -> None:
    """Against one process: its gradients, scaled by clip_grad_norm_."""
    seen = pool.run(clips)
    torch.manual_seed(0)
    alone = Model(None)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))
    (alone(x) - x.roll(1, 1)).square().mean().backward()
    norm = float(torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e-3))
    assert norm > 1e-2
    for rank, (grads, placement) in enumerate(seen):
        for name, parameter in alone.named_parameters():
            assert parameter.grad is not None
            expected = parameter.grad[list(placement.experts_of_rank[rank])] if ".experts." in name else parameter.grad
            torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("seed", range(50))
def test_placements_that_keep_experts(seed: int) -> None:
    numbers = random.Random(seed)
    num_ranks, num_experts = numbers.randint(1, 6), numbers.randint(1, 12)
    replicas = numbers.randint(0, num_experts * 2)
    holders = [[e for e in range(num_experts) if numbers.random() < 0.3] for _ in range(num_ranks)]
    placement = keep_experts(holders, num_experts, replicas)
    copies = min(num_experts + replicas, num_experts * num_ranks)
    assert sum(map(len, placement.experts_of_rank)) == copies
    assert max(map(len, placement.experts_of_rank)) <= -(-copies // num_ranks)
    again = keep_experts(placement.experts_of_rank, num_experts, replicas)
    assert again == placement  # nothing moves without a reason


# ---- by hand ---------------------------------------------------------------------------------------------------------


def by_hand(rank: int, folder: str) -> Any:
    """The error is the default. Whoever catches it may shrink."""
    with ExpertParallel(timeout=TIMEOUT) as parallel:
        training = make(parallel)
        run(training, 2)
        if rank == 0:
            os._exit(0)
        with raises(ExpertParallelError):
            run(training, 3)
        change = shrink(training)
        run(training, 4)
        assert (dist.get_rank(), dist.get_world_size()) == (parallel.rank, parallel.size)
        checkpoint.save(training.model, folder, training.optimizer)  # torch.distributed works again
        dist.barrier()
        return digests(training), change.left, parallel.rank, parallel.size


@pytest.mark.filterwarnings("ignore:experts are lost")
def test_shrink_by_hand(four: Pool, tmp_path: Path) -> None:
    four.start(by_hand, str(tmp_path))
    seen = four.results([1, 2, 3])
    complete([digest for digest, *_ in seen])
    assert [entry[1:] for entry in seen] == [((0,), rank, 3) for rank in range(3)]


# ---- joining ---------------------------------------------------------------------------------------------------------


def joins(rank: int, name: str) -> Any:
    """Rank 3 is not in the group at first."""
    options = {"timeout": TIMEOUT, "name": name, "invariant": True}
    if rank < 3:
        with ExpertParallel([0, 1, 2], **options) as parallel:
            training = make(parallel, on_failure="continue")
            while parallel.size < 4 or training.steps < 6:
                elastic_step(training, lambda: closure(training))
                time.sleep(0.02)
            run(training, max(6, training.steps) + 3)
            return digests(training), 0.01
    with ExpertParallel(outside=True, **options) as parallel:
        torch.manual_seed(5)
        model = Model(parallel)
        training = Training(model, torch.optim.AdamW(model.parameters(), lr=0.5), on_failure="continue")
        with raises(ValueError):
            elastic_step(training, lambda: closure(training))
        change = join(training)
        assert (change.joined, change.ranks, parallel.rank) == ((3,), 4, 3)
        rate = training.optimizer.param_groups[0]["lr"]
        run(training, max(6, training.steps) + 3)
        return digests(training), rate


def test_a_process_joins(pool: Pool) -> None:
    seen = pool.run(joins, uuid.uuid4().hex)
    complete([digest for digest, _ in seen])
    assert {len([name for name in digest if "layers.0.experts.down_proj[" in name]) for digest, _ in seen} == {2}
    assert {rate for _, rate in seen} == {0.01}  # the newcomer's is that of the others


def rebalances(rank: int) -> Any:
    """Two trainings, one of which moves its experts twice."""
    with ExpertParallel(timeout=TIMEOUT, invariant=True) as parallel:
        plain, moving = make(parallel), make(parallel)
        run(plain, 6)
        before = digests(plain)
        parallel.membership.steps = 0
        run(moving, 2)
        load = {
            name: [float(100 * (e == 5) + e + rank) for e in range(EXPERTS)] for name in parallel_experts(moving.model)
        }
        changes = [rebalance(moving, load)]
        run(moving, 4)
        with switchgear.RoutingTrace(moving.model) as trace:
            run(moving, 5)
        changes.append(rebalance(moving, trace))
        run(moving, 6)
        with raises(ValueError, "load"):
            rebalance(moving, {})
        return before, digests(moving), changes, moving.model.layers[0].experts.placement


def test_moving_experts_changes_no_bit(pool: Pool) -> None:
    seen = pool.run(rebalances)
    assert len({str(placement) for *_, placement in seen}) == 1
    before, after = {}, {}
    for one, other, _, _ in seen:
        before |= one
        after |= other
    assert before == after
    assert all(change.bytes > 0 for _, _, changes, _ in seen for change in changes)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(rank: int, name: str) -> None:
    with ExpertParallel(timeout=TIMEOUT, name=name) as parallel:
        model = Model(parallel)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for options, message in (
            ({"on_failure": "ignore"}, "on_failure"),
            ({"lost": "forget"}, "lost"),
            ({"num_replicas": -1}, "num_replicas"),
            ({"max_norm": -1.0}, "max_norm"),
            ({"max_norm": float("nan")}, "max_norm"),
        ):
            with raises(ValueError, message):
                Training(model, optimizer, **options)  # type: ignore[arg-type]
        with raises(ValueError):
            Training(nn.Linear(2, 2), optimizer)
        with raises(ValueError):
            join(Training(model, optimizer))
        with raises(ValueError, "name"):
            ExpertParallel(timeout=TIMEOUT, name=name)
        with raises(ValueError, "name"):
            ExpertParallel(outside=True)
        wide = switchgear.MoE(HIDDEN, 12, EXPERTS, 2, widths=[1, 2] * 4, parallel=parallel)
        with raises(ValueError):
            Training(wide, optimizer)
        for change in (partial(switchgear.store, form="int8"), partial(add_lora, rank=2)):
            changed = Model(parallel).requires_grad_(False)
            change(changed)
            with raises(ValueError):
                Training(changed, optimizer)
        for wrapper in ("ddp", "fsdp"):
            with raises(ValueError, "model"):
                Training(wrapped(Model(parallel), wrapper), optimizer)
        outside = ExpertParallel(timeout=TIMEOUT, name=name, outside=True)
        other = switchgear.MoE(HIDDEN, 8, EXPERTS, 2, parallel=outside)
        assert len(other.experts.down_proj) == 0  # nothing is allocated before it joins
        with raises(ValueError):
            join(Training(other, torch.optim.SGD(other.parameters(), lr=0.1)))
        dist.barrier()
    with ExpertParallel(timeout=TIMEOUT, tp_group=[0, 1] if rank < 2 else [2, 3]) as parallel:
        model = Model(parallel)
        with raises(ValueError):
            Training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with ExpertParallel(timeout=TIMEOUT, capacity=8) as parallel:
        model = Model(parallel)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with raises(ValueError, "num_replicas"):
            Training(model, optimizer, num_replicas=1)
        training = Training(model, optimizer)
        with raises(ValueError, "num_replicas"):
            rebalance(training, {}, num_replicas=2)


def test_what_cannot_go_on_is_refused(pool: Pool) -> None:
    pool.run(refused, uuid.uuid4().hex)


def without_peers(rank: int) -> list[float]:
    """An order of calls that differs between ranks is an error, not a loss: nobody is left out."""
    with ExpertParallel(timeout=TIMEOUT) as parallel:
        training = make(parallel, on_failure="continue")
        run(training, 1)
        load = {name: [1.0] * EXPERTS for name in parallel_experts(training.model)}
        x = torch.zeros(4, HIDDEN)
        with raises(ExpertParallelError):
            training.model(x) if rank == 2 else rebalance(training, load)
        return [float(training.steps)]


def test_disagreement_is_not_a_loss(pool: Pool) -> None:
    assert pool.run(without_peers) == 4 * [[1.0]]


def test_states_are_sent_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(tensor: Tensor) -> None:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", missing)
    assert of_bytes(to_bytes({"step": 3, "share": [0.5]})) == {"step": 3, "share": [0.5]}


def test_states_above_two_gigabytes_arrive_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, size = torch.zeros(1, dtype=torch.uint8), 2**32 + 5  # of which nothing is read
    data: Any = SimpleNamespace(data_ptr=memory.data_ptr, numel=lambda: size, nbytes=size)
    monkeypatch.setattr("switchgear.parallel.moves.io.BytesIO", len)
    monkeypatch.setattr(torch, "load", lambda length, **options: length)
    assert of_bytes(data) == size
