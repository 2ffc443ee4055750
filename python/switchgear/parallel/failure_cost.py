# SPDX-License-Identifier: BSD-3-Clause
"""What failures of ranks cost a training run, by a model of a few rates and times."""

from __future__ import annotations

from typing import NamedTuple

from switchgear.parallel.placement import Placement

_DAY = 86400.0


class Rates(NamedTuple):
    """Of a job; times in seconds."""

    ranks: int  # all of them, those that do not share experts too
    mtbf: float  # between failures of one rank
    step: float
    restart: float  # from a failure to the first step of the restarted job, with the weights of the checkpoint
    checkpoint: float  # between checkpoints
    shrink: float  # from a failure to the first step of the remaining ranks
    join: float  # for which all wait when a rank joins
    repair: float  # until it does


class Losses(NamedTuple):
    """Expected numbers per day."""

    failures: float
    steps_restarting: float  # lost if the job restarts from the last checkpoint
    steps_continuing: float  # lost if the remaining ranks continue, and the lost one joins later
    fraction_restarting: float  # of the day
    fraction_continuing: float
    experts_without_copy: float  # on a lost rank, per failure: they come from the checkpoint


def expected_losses(rates: Rates, placement: Placement) -> Losses:
    """A restart repeats on average half the time between checkpoints. Continuing repeats one step, of which half was
    done, and the batch lacks the tokens of the lost rank until it joins. Failures are independent and rare: their
    costs add up."""
    failures = rates.ranks * _DAY / rates.mtbf
    restarting = failures * (rates.restart + rates.checkpoint / 2)
    continuing = failures * (rates.step / 2 + rates.shrink + rates.join + rates.repair / rates.ranks)
    alone = placement.num_experts - len(placement.replicated)
    return Losses(
        failures, restarting / rates.step, continuing / rates.step, min(1.0, restarting / _DAY),
        min(1.0, continuing / _DAY), alone / placement.num_ranks,
    )  # fmt: skip
