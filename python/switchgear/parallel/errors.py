# SPDX-License-Identifier: BSD-3-Clause
"""The one error of expert parallelism, and the failure that all ranks agree on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

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
        super().__init__(str(failure))
        self.failure = failure
        self.rank, self.kind, self.phase = failure.rank, failure.kind, failure.phase
        self.step, self.reason = failure.step, failure.reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failure,)
