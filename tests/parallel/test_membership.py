# SPDX-License-Identifier: BSD-3-Clause
"""Members agree on who is left: threads with a store, without torch.distributed."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore, HashStore, TCPStore

from errors import raises
from switchgear.parallel import ExpertParallelError
from switchgear.parallel.membership import Membership

SIZE = 4


class Gone(Exception):
    pass


def members(store: Any, size: int = SIZE) -> list[Membership]:
    return [Membership(store, size, rank) for rank in range(size)]


def agree(some: list[Membership], gone: set[int] = frozenset(), timeout: float = 5.0) -> None:  # type: ignore[assignment]
    with ThreadPoolExecutor(len(some)) as pool:
        list(pool.map(lambda member: member.agree(lambda: set(gone), timeout), some))


def test_all_are_here() -> None:
    everyone = members(HashStore())
    agree(everyone)
    assert {member.generation for member in everyone} == {everyone[0].generation}
    assert everyone[0].generation.ids == (0, 1, 2, 3)
    assert [member.rank() for member in everyone] == [0, 1, 2, 3]
    agree(everyone)
    assert everyone[3].generation.number == 2


def test_a_lost_member_is_not_awaited() -> None:
    everyone = members(HashStore())
    begin = time.monotonic()
    agree([everyone[0], everyone[2], everyone[3]], {1})
    assert time.monotonic() - begin < 2
    assert everyone[3].generation.ids == (0, 2, 3)
    assert everyone[3].rank() == 2


def test_a_silent_member_is_excluded_and_learns_it() -> None:
    everyone = members(HashStore())
    agree(everyone[:3], timeout=0.2)
    assert everyone[0].generation.ids == (0, 1, 2)
    agree(everyone[3:])
    assert everyone[3].generation == everyone[0].generation
    assert everyone[3].rank() == -1


def test_one_member_may_be_left() -> None:
    everyone = members(HashStore())
    agree(everyone[3:], {0, 1, 2})
    assert everyone[3].generation.ids == (3,)


def store_of(kind: str, folder: Path) -> Any:
    if kind == "file":
        return FileStore(str(folder / "store"), -1)
    return HashStore() if kind == "hash" else TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_a_minority_lets_the_others_come_first() -> None:
    """A rank whose connections all fail believes that all others are gone."""
    everyone = members(HashStore())
    with ThreadPoolExecutor(1) as pool:
        alone = pool.submit(everyone[3].agree, lambda: {0, 1, 2}, 5.0)
        time.sleep(0.3)
        agree(everyone[:3], {3})
        alone.result()
    assert everyone[3].generation.ids == (0, 1, 2)
    assert everyone[3].rank() == -1


@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
@pytest.mark.parametrize("seed", range(8))
def test_all_read_the_same_whatever_they_believe(seed: int, kind: str, tmp_path: Path) -> None:
    """Members come at random times and disagree on who is gone: whoever is in the generation has the same one."""
    numbers = random.Random(seed)
    everyone = members(store_of(kind, tmp_path))
    beliefs = [{peer for peer in range(SIZE) if peer != rank and numbers.random() < 0.2} for rank in range(SIZE)]
    delays = [numbers.random() * 0.02 for _ in range(SIZE)]

    def run(rank: int) -> None:
        time.sleep(delays[rank])
        everyone[rank].agree(lambda: beliefs[rank], 0.05)

    with ThreadPoolExecutor(SIZE) as pool:
        list(pool.map(run, range(SIZE)))
    assert len({member.generation for member in everyone}) == 1
    assert any(member.rank() >= 0 for member in everyone)


# ---- changes ---------------------------------------------------------------------------------------------------------


def prepared(everyone: list[Membership]) -> list[int]:
    applied: list[int] = []
    for rank, member in enumerate(everyone):
        member.prepare(lambda rank=rank: applied.append(rank))  # type: ignore[misc]
    return applied


@pytest.mark.parametrize("first", [[], [0], [3], [1, 2], [0, 1, 2, 3]])
def test_a_change_is_applied_by_all_or_none(first: list[int]) -> None:
    everyone = members(HashStore())
    applied = prepared(everyone)
    for rank in first:
        everyone[rank].complete()
    agree(everyone)
    for member in everyone:
        member.settle()
    assert sorted(applied) == ([0, 1, 2, 3] if first else [])
    assert {member.done for member in everyone} == {int(bool(first))}
    assert not any(member.here().prepared for member in everyone)


def test_the_dead_do_not_count() -> None:
    """The only one that had applied the change is lost with it: the others repeat it."""
    everyone = members(HashStore())
    applied = prepared(everyone)
    everyone[1].complete()
    left = [everyone[0], everyone[2], everyone[3]]
    agree(left, {1})
    for member in left:
        member.settle()
    assert applied == [1]
    assert {member.done for member in left} == {0}


def test_a_member_whose_change_fails_has_no_state() -> None:
    member = members(HashStore())[0]

    def fail() -> None:
        raise Gone

    member.prepare(fail)
    with pytest.raises(Gone):
        member.complete()
    assert member.empty
    assert member.done == 0


# ---- joining ---------------------------------------------------------------------------------------------------------


def waiting(member: Membership) -> int:
    end = time.monotonic() + 5
    while not (found := member.num_waiting()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_joining() -> None:
    store = HashStore()
    everyone = members(store)
    store.add("tickets", 1)  # of a process that died before it announced itself: it holds up nobody
    newcomer = Membership(store, 0, None)
    assert newcomer.rank() == -1
    everyone[0].publish("like this")
    assert newcomer.published(5.0) == "like this"
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(newcomer.join, 5.0)
        assert waiting(everyone[0]) == 1
        agree(everyone, {2} - {2})
        joined.result()
    assert newcomer.generation == everyone[0].generation
    assert newcomer.generation.ids == (0, 1, 2, 3, 5)
    assert newcomer.rank() == 4
    newcomer.settle()
    assert newcomer.done == 0
    assert newcomer.here().empty
    assert newcomer.generation.members[4].empty
    newcomer.prepare(lambda: None)
    newcomer.commit()
    assert not newcomer.here().empty
    assert not newcomer.generation.members[4].empty
    assert newcomer.done == 1
    time.sleep(0.2)
    assert everyone[0].num_waiting() == 0
    everyone.append(newcomer)
    agree(everyone, {0})  # those who are in it are not taken in twice
    assert everyone[4].generation.ids == (1, 2, 3, 5)


def test_a_process_that_gave_up_is_not_awaited() -> None:
    store = HashStore()
    everyone = members(store)
    newcomer = Membership(store, SIZE, None)
    with raises(ExpertParallelError):
        newcomer.join(0.05)
    agree(everyone)
    assert everyone[0].generation.ids == (0, 1, 2, 3)


def test_members_without_state_propose_nothing() -> None:
    """Otherwise the training would be lost if they are the first to lose their patience."""
    store = HashStore()
    everyone = members(store)
    everyone[0].empty = everyone[1].empty = True
    with ThreadPoolExecutor(2) as pool:
        early = [pool.submit(member.agree, set, 0.3) for member in everyone[:2]]
        time.sleep(0.6)
        assert not store.check(["generation/1/members"])
        everyone[2].agree(lambda: {3}, 5.0)
        for one in early:
            one.result()
    assert everyone[0].generation.ids == (0, 1, 2)


def test_joining_what_is_not_there() -> None:
    with raises(ExpertParallelError):
        Membership(HashStore(), SIZE, None).published(0.05)


class Stuck:
    """The store of a stopped process."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: time.sleep(3)


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchgear.parallel.membership.SLACK_SECONDS", 0.1)
    begin = time.monotonic()
    with raises(ExpertParallelError) as error:
        Membership(Stuck(), SIZE, 1).agree(set, 0.1)
    assert time.monotonic() - begin < 2.5  # the store sleeps for 3
    assert error.value.rank == 1


@pytest.mark.parametrize("reason", ["connection reset", "\nconnection reset", ""])
def test_a_store_that_fails(reason: str) -> None:
    class Failing:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(reason)

    with raises(ExpertParallelError):
        Membership(Failing(), SIZE, 1).agree(set, 0.1)
