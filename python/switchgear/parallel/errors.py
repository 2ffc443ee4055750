# SPDX-License-Identifier: BSD-3-Clause
"""The one error of expert parallelism, the failure that all ranks agree on, and what a program prints that it ends."""

from __future__ import annotations

import sys
import time
import weakref
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Protocol

from switchgear.utils.packages import page

PHASES = (
    "agree", "dispatch", "experts", "combine",
    "backward agree", "backward dispatch", "backward experts", "backward combine",
)  # fmt: skip
MORE_PHASES = ("gradients", "commit", "move")  # of a step of training, and of experts that move
KINDS = {
    "died": "its process is gone",
    "exited": "it left the group while others still needed it",
    "stalled": "it did not get there in time",
    "raised": "it raised an exception",
    "disagrees": "it was called with something else",
    "lost": "its connection failed",
}
REMEDIES = {  # what to look at first
    "died": "its own output says why, or the system's log (dmesg) if it was killed, as for lack of memory",
    "exited": "its own output says why",
    "stalled": "it is stopped, or slower than timeout= of ExpertParallel",
    "raised": "the traceback is in its own output",
    "disagrees": "call it alike on all ranks",
    "lost": "look at the network between the ranks",
}
SETTLE_SECONDS = 0.35  # within which ranks agree on a failure that another channel has shown first


@dataclass(frozen=True)
class Failure:
    """A failure, identical on every rank: `rank` (in the group) failed in `phase` of exchange number `step`."""

    rank: int
    kind: str  # one of KINDS
    phase: str  # one of PHASES or MORE_PHASES, "between layers", "connect", or "members"
    step: int
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.rank >= 0 else "this process"
        where = f"phase '{self.phase}' of exchange {self.step}"
        if self.phase == "members":
            where = f"generation {self.step} of the members"
        text = f"{who} {self.kind} in {where}: "
        return text + (self.reason or KINDS[self.kind])


class ExpertParallelError(RuntimeError):
    """The exchange failed. Every surviving rank raises the same message, and the ExpertParallel is unusable until the
    remaining ranks call switchgear.parallel.shrink. Or they create a new one.

    Attributes: rank (in the group), phase, kind, step, reason; see Failure.
    """

    def __init__(self, failure: Failure) -> None:
        again = f"the other ranks can continue without it: {page('parallel', 'continuing-after-a-loss')}"
        super().__init__(f"{failure}; {REMEDIES[failure.kind]}" + (f"; {again}" if failure.rank >= 0 else ""))
        self.failure = failure
        self.rank, self.kind, self.phase = failure.rank, failure.kind, failure.phase
        self.step, self.reason = failure.step, failure.reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failure,)


# ---- uncaught failures -----------------------------------------------------------------------------------------------


class Group(Protocol):
    """What a rank knows of its group."""

    rank: int
    failure: Failure | None
    has_decided: bool  # whether this rank speaks for the others
    has_raised: bool  # whether the program has got the failure


_groups: weakref.WeakSet[Any] = weakref.WeakSet()


def explain_uncaught(group: Group) -> None:
    """If another rank of the group fails, and an exception that follows from it ends this program, the failure is
    printed first. One rank also prints its traceback: ranks often share an output, and their tracebacks are alike.
    Channels of torch raise other errors, before or after the ranks have agreed."""
    _groups.add(group)
    if not hasattr(sys.excepthook, "explains"):
        sys.excepthook = _extend(sys.excepthook)


def _extend(before: Any) -> Any:
    def explain(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if (group := _find_failed(error)) is not None:
            print(ExpertParallelError(group.failure), file=sys.stderr, flush=True)
            if not group.has_decided:
                return
        before(kind, error, traceback)

    explain.explains = True  # type: ignore[attr-defined]
    return explain


def _find_failed(error: BaseException) -> Any:
    """The group whose other rank has failed, if the error follows from that."""
    if isinstance(error, ExpertParallelError):
        return next((group for group in list(_groups) if group.failure == error.failure), None)
    until = time.monotonic() + SETTLE_SECONDS
    while isinstance(error, (OSError, RuntimeError)) and _groups:
        for group in list(_groups):
            if group.failure is not None and not group.has_raised and group.failure.rank != group.rank:
                return group
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    return None
