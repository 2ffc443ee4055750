# SPDX-License-Identifier: BSD-3-Clause
"""Routing policies. A router combines a score, a selection, a capacity limit and balance terms; context.py defines
their signatures, and docs/routing.md lists all of them.

router.py         Router; context.py: what its parts get besides tokens, and their signatures
scores.py         scores of a token
selection.py      choices token by token; expert_choice.py: expert by expert
ranking.py        the steps that selections share
capacity.py       how many tokens an expert accepts
losses.py         losses and LossFreeBias as options of a router; balance.py: the losses as functions
counting.py       what is counted in training
change.py         the change that an intervention makes to a choice

What only papers use is in switchgear.papers.parts; what sees and steers the routers of a model is in switchgear.trace.
"""

from typing import TYPE_CHECKING

from switchgear.routing.balance import load_balancing_loss, max_violation, z_loss
from switchgear.routing.capacity import Capacity, Dropless
from switchgear.routing.context import Balance, Context, Limit, Score, Select
from switchgear.routing.expert_choice import ExpertChoice
from switchgear.routing.losses import ImportanceLoad, LossFreeBias, SwitchLoss, ZLoss
from switchgear.routing.ranking import from_pairs
from switchgear.routing.router import Router
from switchgear.routing.scores import Cosine, Linear, Sum, Uniform
from switchgear.routing.selection import Dense, Grouped, RankK, Threshold, TopK, TopP
from switchgear.utils.packages import find_moved

if TYPE_CHECKING:
    from switchgear.papers.parts.auxiliary import *  # noqa: F403
    from switchgear.papers.parts.controllers import *  # noqa: F403
    from switchgear.papers.parts.losses import *  # noqa: F403
    from switchgear.papers.parts.masks import *  # noqa: F403
    from switchgear.papers.parts.scores import *  # noqa: F403  # noqa: F403
    from switchgear.papers.parts.selections import *  # noqa: F403
    from switchgear.papers.parts.stochastic import *  # noqa: F403
    from switchgear.trace.override import *  # noqa: F403
    from switchgear.trace.pre_router import *  # noqa: F403
    from switchgear.trace.record import *  # noqa: F403
    from switchgear.trace.replay import *  # noqa: F403
    from switchgear.trace.routing_record import *  # noqa: F403

# What only papers use, and what sees and steers the routers of a model, is defined elsewhere.
MOVED = {
    "ActivationNorm": "switchgear.papers.parts.scores",
    "AdaptiveCoefficient": "switchgear.papers.parts.controllers",
    "AdaptiveSparsity": "switchgear.papers.parts.controllers",
    "AlignmentLoss": "switchgear.papers.parts.losses",
    "BalancedAssignment": "switchgear.papers.parts.selections",
    "BatchEntropy": "switchgear.papers.parts.losses",
    "Broadcast": "switchgear.papers.parts.selections",
    "CapacityByKind": "switchgear.papers.parts.controllers",
    "ChoiceLoss": "switchgear.papers.parts.losses",
    "ClusterDropout": "switchgear.papers.parts.masks",
    "ClusterPrior": "switchgear.papers.parts.scores",
    "ClusterVariance": "switchgear.papers.parts.losses",
    "DepthChoice": "switchgear.papers.parts.selections",
    "DeviceBalance": "switchgear.papers.parts.losses",
    "Domain": "switchgear.papers.parts.scores",
    "EntropyLoss": "switchgear.papers.parts.losses",
    "ExpertDropout": "switchgear.papers.parts.masks",
    "FromEmbedding": "switchgear.papers.parts.scores",
    "GatingResidual": "switchgear.papers.parts.scores",
    "Gaussian": "switchgear.papers.parts.scores",
    "GradientConflict": "switchgear.papers.parts.auxiliary",
    "GroupedAvgPool": "switchgear.papers.parts.scores",
    "GumbelSoftmax": "switchgear.papers.parts.stochastic",
    "LocalityLoss": "switchgear.papers.parts.losses",
    "LocalizedBalance": "switchgear.papers.parts.losses",
    "Lookup": "switchgear.papers.parts.masks",
    "Masked": "switchgear.papers.parts.masks",
    "NoisyTopK": "switchgear.papers.parts.stochastic",
    "NullAwareSwitchLoss": "switchgear.papers.parts.losses",
    "ParamPenalty": "switchgear.papers.parts.losses",
    "PerSequence": "switchgear.papers.parts.scores",
    "Positive": "switchgear.papers.parts.selections",
    "PosthocGate": "switchgear.papers.parts.scores",
    "PreRouter": "switchgear.trace.pre_router",
    "QuantileBias": "switchgear.papers.parts.controllers",
    "Random": "switchgear.papers.parts.stochastic",
    "RoutingRecord": "switchgear.trace.routing_record",
    "RunningCap": "switchgear.papers.parts.controllers",
    "RunningThreshold": "switchgear.papers.parts.controllers",
    "SampledTopK": "switchgear.papers.parts.stochastic",
    "SkipBelow": "switchgear.papers.parts.selections",
    "SparseMixer": "switchgear.papers.parts.stochastic",
    "SparsityAware": "switchgear.papers.parts.scores",
    "SwitchMixture": "switchgear.papers.parts.scores",
    "Temperature": "switchgear.papers.parts.masks",
    "TokenIdMask": "switchgear.papers.parts.masks",
    "anchor_loss": "switchgear.papers.parts.auxiliary",
    "consistency_loss": "switchgear.papers.parts.auxiliary",
    "decouple": "switchgear.trace.pre_router",
    "min_capacity": "switchgear.papers.parts.controllers",
    "output_regularization": "switchgear.papers.parts.auxiliary",
    "override": "switchgear.trace.override",
    "pregate": "switchgear.trace.pre_router",
    "record": "switchgear.trace.record",
    "replay": "switchgear.trace.replay",
}
if not TYPE_CHECKING:
    __getattr__ = find_moved(__name__, MOVED)

__all__ = [
    "Balance",
    "Capacity",
    "Context",
    "Cosine",
    "Dense",
    "Dropless",
    "ExpertChoice",
    "Grouped",
    "ImportanceLoad",
    "Limit",
    "Linear",
    "LossFreeBias",
    "RankK",
    "Router",
    "Score",
    "Select",
    "Sum",
    "SwitchLoss",
    "Threshold",
    "TopK",
    "TopP",
    "Uniform",
    "ZLoss",
    "from_pairs",
    "load_balancing_loss",
    "max_violation",
    "z_loss",
    *MOVED,
]
