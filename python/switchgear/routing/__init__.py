# SPDX-License-Identifier: BSD-3-Clause
"""Who goes where. A router is a score, a selection, a capacity limit and balance; see context.py for how they are called.

Scores:      Linear, Cosine, GroupedAvgPool, SwitchMixture, Uniform, Sum; of experts ActivationNorm, SparsityAware,
             Gaussian, Domain, PosthocGate; of something larger than a token FromEmbedding, PerSequence, ClusterPrior
Selections:  TopK, TopP, Threshold, Grouped, RankK, Dense, SkipBelow, Broadcast; ExpertChoice, BalancedAssignment;
             SampledTopK, SparseMixer, GumbelSoftmax, Random; Masked with TokenIdMask or ExpertDropout; Lookup
Capacity:    Dropless, Capacity
"""

from switchgear.routing.assignment import BalancedAssignment
from switchgear.routing.balance import load_balancing_loss, z_loss
from switchgear.routing.capacity import Capacity, Dropless
from switchgear.routing.context import Balance, Context, Limit, Score, Select
from switchgear.routing.expert_choice import ExpertChoice
from switchgear.routing.masks import ExpertDropout, Lookup, Masked, TokenIdMask
from switchgear.routing.pairs import from_pairs
from switchgear.routing.router import Router
from switchgear.routing.scores import Cosine, GroupedAvgPool, Linear, Sum, SwitchMixture, Uniform
from switchgear.routing.scores_of_context import ClusterPrior, FromEmbedding, PerSequence
from switchgear.routing.scores_of_experts import ActivationNorm, Domain, Gaussian, PosthocGate, SparsityAware
from switchgear.routing.selection import Broadcast, Dense, Grouped, RankK, SkipBelow, Threshold, TopK, TopP
from switchgear.routing.stochastic import GumbelSoftmax, Random, SampledTopK, SparseMixer

__all__ = [
    "ActivationNorm",
    "Balance",
    "BalancedAssignment",
    "Broadcast",
    "Capacity",
    "ClusterPrior",
    "Context",
    "Cosine",
    "Dense",
    "Domain",
    "Dropless",
    "ExpertChoice",
    "ExpertDropout",
    "FromEmbedding",
    "Gaussian",
    "Grouped",
    "GroupedAvgPool",
    "GumbelSoftmax",
    "Limit",
    "Linear",
    "Lookup",
    "Masked",
    "PerSequence",
    "PosthocGate",
    "Random",
    "RankK",
    "Router",
    "SampledTopK",
    "Score",
    "Select",
    "SkipBelow",
    "SparseMixer",
    "SparsityAware",
    "Sum",
    "SwitchMixture",
    "Threshold",
    "TokenIdMask",
    "TopK",
    "TopP",
    "Uniform",
    "from_pairs",
    "load_balancing_loss",
    "z_loss",
]
