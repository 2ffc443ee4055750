# SPDX-License-Identifier: BSD-3-Clause
"""Experts distributed over processes, on torch.distributed; a failure raises the same error on every rank.

parallel = switchgear.parallel.ExpertParallel()                 # after torch.distributed.init_process_group
moe = switchgear.MoE(2048, 1024, 64, 8, parallel=parallel)      # each rank has its share of the 64 experts

training = switchgear.parallel.Training(model, optimizer, on_failure="continue")
loss = switchgear.parallel.elastic_step(training, closure)      # continues if ranks are lost

group.py       ExpertParallel, the ranks that share experts; experts.py: ParallelExperts; transformers.py: the
               exchange in Hugging Face models
exchange.py    an exchange in chunks; layout.py: which rows go where; header.py: what ranks compare first;
               local.py: what the experts of a rank compute; static.py: a fixed size per pair of ranks
rows.py        rows from rank to rank, their formats, and what was sent; two_level.py: once per node; nodes.py: which
               ranks share a node, and the transports within and between nodes
transport.py   asynchronous all-to-all; shared_memory.py: between processes of a machine; peer_memory.py: between GPUs
               of a machine
peers.py       which ranks are alive; connect.py: the connections for that, and steps that may block; errors.py: the
               error that all ranks raise
elastic.py     training that outlives a rank: steps and moves that all ranks apply or none; moves.py: what moves;
               membership.py: who is left
placement.py   which rank holds which experts; checkpoint.py: checkpoints of distributed experts
cost.py        a model of the cost of exchanges, and of failures
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
