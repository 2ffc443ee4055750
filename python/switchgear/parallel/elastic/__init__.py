# SPDX-License-Identifier: BSD-3-Clause
"""Training that continues when ranks are lost and when others join, and that moves experts between ranks.

steps.py       steps and moves that all ranks apply or none; training.py: what a training consists of; moves.py: what
               moves; transfer.py: values and gradients between ranks
"""

from switchgear.parallel.elastic.steps import commit, elastic_step, join, rebalance, shrink
from switchgear.parallel.elastic.training import Regrouped, Training

__all__ = ["Regrouped", "Training", "commit", "elastic_step", "join", "rebalance", "shrink"]
