# SPDX-License-Identifier: BSD-3-Clause
"""Who is alive: the sets of ranks that follow one another, agreed on through a store of torch.distributed.

A *generation* is a set of members, in the order of their ranks. Members keep their id when ranks change. After a loss,
or when a process wants to join, each member of generation g writes that it is here, and what it has done. Once all have
that are not known to be gone, or the time is over, each proposes those it has seen as generation g + 1. The store takes
the first proposal (compare_set), so all read the same one. It need not be a majority: there is one store, and so one
successor of each generation. A member that is not in it is excluded, and may join again.

If a member of g + 1 is lost before its group is connected, its members agree on g + 2 in the same way.

A change of the training's state (a step of the optimizer, or experts that move) is *committed*: every member prepares
it, they tell each other, and a member that has heard from all applies it. If a member is lost in between, some may have
applied it and others not. A member that has applied it has heard from all: so all others have prepared it, and apply it
before they continue. If none of the survivors has applied it, all drop it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from switchgear.parallel.connect import Background, get
from switchgear.parallel.errors import ExpertParallelError, Failure
from switchgear.utils.packages import first_line

_FIRST_PAUSE, _LONGEST_PAUSE = 1e-3, 0.03
SLACK_SECONDS = 2.0  # for a store that answers late
_PATIENCE = 1.0  # seconds for members without state, and of a minority
_POLL_SECONDS = 0.1  # between looks for processes that want to join
_WAITS = "waits"


@dataclass(frozen=True)
class Member:
    """What a member says when the next generation is agreed on."""

    id: int
    done: int  # changes that it has applied
    prepared: bool  # whether it has prepared the next one
    empty: bool  # whether it has yet to receive the state of the training


@dataclass(frozen=True)
class Generation:
    number: int
    members: tuple[Member, ...]  # by rank

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(member.id for member in self.members)

    @staticmethod
    def decode(text: str) -> Generation:
        values = json.loads(text)
        members = tuple(Member(**member) for member in values["members"])
        return Generation(values["number"], members)


class Membership:
    """A process's view: the generation that it is in, and the changes that it has applied."""

    def __init__(self, store: Any, size: int, rank: int | None) -> None:
        """store: of this group only. size and rank: of the first generation; None for a process outside, which learns
        the size when it looks up what is `published`."""
        self.store, self.first_size = store, size
        self.id = -1 if rank is None else rank
        self.empty = rank is None
        self.done = self.steps = 0
        self._apply: Callable[[], None] | None = None
        members = tuple(Member(number, 0, False, False) for number in range(size))
        self.generation = Generation(0, members)
        self._look: Background[list[int]] | None = None
        self._looked = 0.0
        self._answered: set[int] = set()

    # ---- changes of the state ----------------------------------------------------------------------------------------

    def prepare(self, apply: Callable[[], None]) -> None:
        """All that the change needs is here. `apply` must not communicate, nor fail."""
        self._apply = apply

    def complete(self) -> None:
        """Applies the prepared change."""
        apply, self._apply = self._apply, None
        assert apply is not None
        try:
            apply()
        except BaseException:
            self.empty = True  # half of it may be applied
            raise
        self.done += 1
        self.empty = False

    def commit(self) -> None:
        """Applies the prepared change, which all members have prepared: those who had joined now have state."""
        self.complete()
        members = tuple(replace(member, empty=False) for member in self.generation.members)
        self.generation = replace(self.generation, members=members)

    def settle(self) -> None:
        """Applies the prepared change if another member of the generation has, drops it otherwise."""
        done = max(member.done for member in self.generation.members)
        if self.empty and self._apply is None:
            self.done = done
        if self.done < done:
            self.complete()
        self._apply = None

    def leave(self) -> None:
        """The process is no longer a member; what it knows is out of date."""
        self._apply, self.empty, self.id = None, True, -1

    def here(self) -> Member:
        return Member(self.id, self.done, self._apply is not None, self.empty)

    # ---- generations -------------------------------------------------------------------------------------------------

    def agree(self, gone: Callable[[], set[int]], timeout: float) -> None:
        """Moves on to the next generation; this process may not be in it. gone: ids that are known to be lost.

        Raises:
            ExpertParallelError: the store does not answer.
        """
        self._look = None  # what it finds is out of date
        now, own = self.generation, self.here()
        self.generation = self._in_time(lambda: self._find_next(now, own, gone, timeout), timeout)

    def _find_next(self, now: Generation, own: Member, gone: Callable[[], set[int]], timeout: float) -> Generation:
        """Proposes the next generation once all members are here or gone, and returns the one that the store took.

        Members without state propose nothing, and are awaited for a short time only: at worst they ask to join again.
        Less than half of the members wait as long before they propose, so that the others come first if a rank loses
        all its connections.
        """
        name = f"generation/{now.number + 1}"
        self.store.set(f"{name}/here/{own.id}", json.dumps(asdict(own)))
        begin, pause = time.monotonic(), _FIRST_PAUSE
        while not self.store.check([f"{name}/members"]):
            left = [member for member in now.members if member.id not in gone()]
            here = [member.id for member in left if self.store.check([f"{name}/here/{member.id}"])]
            waited = time.monotonic() - begin
            missing = [member for member in left if member.id not in here
                       and waited < (min(_PATIENCE, timeout) if member.empty else timeout)]  # fmt: skip
            if own.empty and waited > timeout + SLACK_SECONDS:
                raise TimeoutError
            is_early = 2 * len(here) < len(now.members) and waited < min(_PATIENCE, timeout)
            if not own.empty and not missing and not is_early:
                members = [Member(**json.loads(_text(self.store, f"{name}/here/{member}"))) for member in here]
                newcomers = (self.first_size + ticket for ticket in self._find_waiting())
                members += [Member(id, -1, False, True) for id in newcomers if id not in now.ids]
                proposal = Generation(now.number + 1, tuple(members))
                self.store.compare_set(f"{name}/members", "", json.dumps(asdict(proposal)))
                break
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE)
        taken = Generation.decode(_text(self.store, f"{name}/members"))
        for id in set(taken.ids) - set(now.ids):
            self.store.set(f"ticket/{id - self.first_size}", "answered")
        return taken

    def _find_waiting(self) -> list[int]:
        """The tickets of processes that wait to join. A ticket with an answer is looked at once."""
        found = []
        for ticket in range(int(self.store.add("tickets", 0))):
            if ticket not in self._answered and self.store.check([f"ticket/{ticket}"]):  # otherwise it is about to wait
                if _text(self.store, f"ticket/{ticket}") == _WAITS:
                    found.append(ticket)
                else:
                    self._answered.add(ticket)
        return found

    def join(self, timeout: float) -> None:
        """Asks the members to take this process in, and waits until they have.

        Raises:
            ExpertParallelError: they did not, or the store does not answer.
        """
        over = time.monotonic() + timeout
        self.generation = self._in_time(lambda: self._admitted(over), timeout)

    def _admitted(self, over: float) -> Generation:
        ticket = self.store.add("tickets", 1) - 1
        self.id = self.first_size + ticket
        self.store.set(f"ticket/{ticket}", _WAITS)
        number, pause = 0, _FIRST_PAUSE
        while True:
            if self.store.check([f"generation/{number + 1}/members"]):
                number += 1
                found = Generation.decode(_text(self.store, f"generation/{number}/members"))
                if self.id in found.ids:
                    return found
            elif time.monotonic() > over:
                self.store.set(f"ticket/{ticket}", "gave up")
                self.fail("stalled", f"generation {number} has not let it join")
            else:
                time.sleep(pause)
                pause = min(1.5 * pause, _LONGEST_PAUSE)

    def num_waiting(self) -> int:
        """How many processes wait to join. Looks now and then, in the background: it costs a step nothing."""
        now = time.monotonic()
        if self._look is None and now >= self._looked + _POLL_SECONDS:
            self._looked, self._look = now, Background(self._find_waiting)
        if self._look is None or not self._look.wait_for(0):
            return 0
        found, self._look = self._look.result, None
        return len(found)

    def publish(self, structure: Any) -> None:
        """Tells processes that want to join what the model must be like."""
        self.store.set("structure", json.dumps([self.first_size, structure]))

    def published(self, timeout: float) -> Any:
        over = time.monotonic() + timeout
        text: str = self._in_time(lambda: get(self.store, "structure", lambda: time.monotonic() > over), timeout)
        self.first_size, structure = json.loads(text)
        return structure

    def rank(self) -> int:
        return self.generation.ids.index(self.id) if self.id in self.generation.ids else -1

    def fail(self, kind: str, reason: str) -> None:
        raise ExpertParallelError(Failure(self.rank(), kind, "members", self.generation.number, reason))

    def _in_time(self, function: Callable[[], Any], timeout: float) -> Any:
        """A store may live in a process that is stopped."""
        work = Background(function)
        reason = "the store does not answer"
        try:
            # If it was stopped meanwhile, only the second one waits.
            if work.wait_for(timeout + SLACK_SECONDS) or work.wait_for(2 * SLACK_SECONDS):
                return work.result
        except TimeoutError:
            reason = "no member has answered"
        except (RuntimeError, OSError) as error:
            if isinstance(error, ExpertParallelError):
                raise
            reason = f"the store fails: {first_line(error)}"
        work.give_up()
        self.fail("lost", reason)


def _text(store: Any, key: str) -> str:
    return bytes(store.get(key)).decode()
