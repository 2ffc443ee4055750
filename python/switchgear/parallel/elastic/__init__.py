# SPDX-License-Identifier: BSD-3-Clause
"""Training that continues when ranks are lost and when others join, and that moves experts between ranks.

steps.py       steps and moves that all ranks apply or none; training.py: what a training consists of; moves.py: what
               moves; transfer.py: values and gradients between ranks
membership.py  who is left; the only module here that an exchange needs, so names are imported when they are used
"""

from typing import TYPE_CHECKING

from switchgear.utils.moved import find_moved

if TYPE_CHECKING:
    from switchgear.parallel.elastic.steps import commit, elastic_step, join, rebalance, shrink
    from switchgear.parallel.elastic.training import Regrouped, Training

_PLACES = {
    **dict.fromkeys(("Regrouped", "Training"), "switchgear.parallel.elastic.training"),
    **dict.fromkeys(("commit", "elastic_step", "join", "rebalance", "shrink"), "switchgear.parallel.elastic.steps"),
}

__all__ = ["Regrouped", "Training", "commit", "elastic_step", "join", "rebalance", "shrink"]

if not TYPE_CHECKING:
    __getattr__ = find_moved(__name__, _PLACES)
