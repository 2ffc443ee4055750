# SPDX-License-Identifier: BSD-3-Clause
"""Experts distributed over processes, on torch.distributed; a failure raises the same error on every rank.

parallel = switchgear.parallel.ExpertParallel()                 # after torch.distributed.init_process_group
moe = switchgear.MoE(2048, 1024, 64, 8, parallel=parallel)      # each rank has its share of the 64 experts

training = switchgear.parallel.Training(model, optimizer, on_failure="continue")
loss = switchgear.parallel.elastic_step(training, closure)      # goes on if ranks are lost
"""

from switchgear.parallel.elastic import Regrouped, Training, elastic_step, join, rebalance, shrink
from switchgear.parallel.errors import ExpertParallelError, Failure
from switchgear.parallel.experts import ParallelExperts, expert_parameters
from switchgear.parallel.group import ExpertParallel
from switchgear.parallel.placement import Placement, place_experts

__all__ = [
    "ExpertParallel",
    "ExpertParallelError",
    "Failure",
    "ParallelExperts",
    "Placement",
    "Regrouped",
    "Training",
    "elastic_step",
    "expert_parameters",
    "join",
    "place_experts",
    "rebalance",
    "shrink",
]
