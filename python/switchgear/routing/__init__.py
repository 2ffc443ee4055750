# SPDX-License-Identifier: BSD-3-Clause
"""Routing policies. A router combines a score, a selection, a capacity limit and balance terms; context.py defines
their signatures, and docs/routing.md lists all of them.

Scores:      Linear, Cosine, GroupedAvgPool, SwitchMixture, GatingResidual, Uniform, Sum; per expert ActivationNorm,
             SparsityAware, Gaussian, Domain, PosthocGate; per task or sequence FromEmbedding, PerSequence, ClusterPrior
Selections:  TopK, TopP, Threshold, Grouped, RankK, Dense, Positive, SkipBelow, Broadcast; ExpertChoice, DepthChoice,
             BalancedAssignment; SampledTopK, NoisyTopK, SparseMixer, GumbelSoftmax, Random; Lookup; RunningCap;
             Masked with TokenIdMask, ExpertDropout or ClusterDropout; Temperature
Capacity:    Dropless, Capacity, CapacityByKind
Losses:      SwitchLoss, NullAwareSwitchLoss, ZLoss, ImportanceLoad, EntropyLoss, BatchEntropy, ParamPenalty,
             DeviceBalance, AlignmentLoss, LocalityLoss, ClusterVariance, LocalizedBalance, ChoiceLoss
Controllers: LossFreeBias, AdaptiveCoefficient, AdaptiveSparsity
Known early: pregate(model), PreRouter, decouple(model, pre_router, …)
Temporary:   override(model, …), Router.intervene; record(model) and replay(model, record) of choices
For a trainer: GradientConflict, anchor_loss, consistency_loss, output_regularization, load_balancing_loss, z_loss,
             max_violation

router.py         Router; context.py: what its parts get besides tokens, and their signatures
scores.py         scores of a token; scores_of_context.py: of a task or a sequence; scores_of_experts.py: from what each
                  expert has
selection.py      choices token by token; expert_choice.py: expert by expert; assignment.py: balanced;
                  stochastic.py: random; masks.py: wrappers of selections, and tables
ranking.py        the steps that selections share; widths.py: choices of different widths; pairs.py: from pairs
capacity.py       how many tokens an expert accepts
losses.py         losses as options of a router; balance.py: the functions; auxiliary.py: losses that a trainer calls
controllers.py    balance without a loss; counting.py: what is counted in training
pre_router.py     a router outside the model; decoupled.py: its choices in the model; pregate.py: routers that choose by
                  the block before; handover.py: what a router leaves for the next one
interventions.py  override; change.py: the change that an override makes to a choice
recording.py      record; records.py: RoutingRecord; replaying.py: replay; routed_layers.py: the layers of all three;
                  batches.py: sequence and position of each token
"""

from switchgear.routing.assignment import BalancedAssignment
from switchgear.routing.auxiliary import GradientConflict, anchor_loss, consistency_loss, output_regularization
from switchgear.routing.balance import load_balancing_loss, max_violation, z_loss
from switchgear.routing.capacity import Capacity, CapacityByKind, Dropless, min_capacity
from switchgear.routing.context import Balance, Context, Limit, Score, Select
from switchgear.routing.controllers import AdaptiveCoefficient, AdaptiveSparsity, LossFreeBias, RunningCap
from switchgear.routing.decoupled import decouple
from switchgear.routing.expert_choice import DepthChoice, ExpertChoice
from switchgear.routing.interventions import override
from switchgear.routing.losses import (
    AlignmentLoss,
    BatchEntropy,
    ChoiceLoss,
    ClusterVariance,
    DeviceBalance,
    EntropyLoss,
    ImportanceLoad,
    LocalityLoss,
    LocalizedBalance,
    NullAwareSwitchLoss,
    ParamPenalty,
    SwitchLoss,
    ZLoss,
)
from switchgear.routing.masks import ClusterDropout, ExpertDropout, Lookup, Masked, Temperature, TokenIdMask
from switchgear.routing.pairs import from_pairs
from switchgear.routing.pre_router import PreRouter
from switchgear.routing.pregate import pregate
from switchgear.routing.recording import record
from switchgear.routing.records import RoutingRecord
from switchgear.routing.replaying import replay
from switchgear.routing.router import Router
from switchgear.routing.scores import Cosine, GatingResidual, GroupedAvgPool, Linear, Sum, SwitchMixture, Uniform
from switchgear.routing.scores_of_context import ClusterPrior, FromEmbedding, PerSequence
from switchgear.routing.scores_of_experts import ActivationNorm, Domain, Gaussian, PosthocGate, SparsityAware
from switchgear.routing.selection import Broadcast, Dense, Grouped, Positive, RankK, SkipBelow, Threshold, TopK, TopP
from switchgear.routing.stochastic import GumbelSoftmax, NoisyTopK, Random, SampledTopK, SparseMixer

__all__ = [
    "ActivationNorm",
    "AdaptiveCoefficient",
    "AdaptiveSparsity",
    "AlignmentLoss",
    "Balance",
    "BalancedAssignment",
    "BatchEntropy",
    "Broadcast",
    "Capacity",
    "CapacityByKind",
    "ChoiceLoss",
    "ClusterDropout",
    "ClusterPrior",
    "ClusterVariance",
    "Context",
    "Cosine",
    "Dense",
    "DepthChoice",
    "DeviceBalance",
    "Domain",
    "Dropless",
    "EntropyLoss",
    "ExpertChoice",
    "ExpertDropout",
    "FromEmbedding",
    "GatingResidual",
    "Gaussian",
    "GradientConflict",
    "Grouped",
    "GroupedAvgPool",
    "GumbelSoftmax",
    "ImportanceLoad",
    "Limit",
    "Linear",
    "LocalityLoss",
    "LocalizedBalance",
    "Lookup",
    "LossFreeBias",
    "Masked",
    "NoisyTopK",
    "NullAwareSwitchLoss",
    "ParamPenalty",
    "PerSequence",
    "Positive",
    "PosthocGate",
    "PreRouter",
    "Random",
    "RankK",
    "Router",
    "RoutingRecord",
    "RunningCap",
    "SampledTopK",
    "Score",
    "Select",
    "SkipBelow",
    "SparseMixer",
    "SparsityAware",
    "Sum",
    "SwitchLoss",
    "SwitchMixture",
    "Temperature",
    "Threshold",
    "TokenIdMask",
    "TopK",
    "TopP",
    "Uniform",
    "ZLoss",
    "anchor_loss",
    "consistency_loss",
    "decouple",
    "from_pairs",
    "load_balancing_loss",
    "max_violation",
    "min_capacity",
    "output_regularization",
    "override",
    "pregate",
    "record",
    "replay",
    "z_loss",
]
