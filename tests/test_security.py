# SPDX-License-Identifier: BSD-3-Clause
"""Two published attacks through tokens that compete for experts. They succeed if a batch shares a capacity or an
expert's choice, and fail against the defaults and against isolation="sequence", bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import switchgear
from errors import raises
from switchgear import MoE, presets
from switchgear.routing import (
    BalancedAssignment,
    Capacity,
    CapacityByKind,
    Dense,
    DepthChoice,
    ExpertChoice,
    Positive,
    SkipBelow,
    Threshold,
    TopK,
    TopP,
)
from switchgear.testing import assert_batch_invariant

H, E, LENGTH = 16, 4, 6


def layer(**options: Any) -> MoE:
    torch.manual_seed(1)
    return MoE(H, 24, E, **options).eval()


# ---- buffer overflow (arXiv:2402.05526) ------------------------------------------------------------------------------


def victims_output(moe: MoE, attackers: Tensor, victim: Tensor) -> Tensor:
    """The victim's output, in the last position of a batch [B,LENGTH,H]."""
    with torch.no_grad():
        y: Tensor = moe(torch.cat((attackers, victim[None])))
    return y[-1]


def overflow(moe: MoE) -> bool:
    """The attack: sequences that use the victim's experts and fill them first. Whether it changes the victim's output,
    compared with a batch of harmless neighbours."""
    victim, harmless = torch.randn(LENGTH, H), torch.randn(5, LENGTH, H)
    attackers = victim.expand(5, -1, -1)
    return not torch.equal(victims_output(moe, attackers, victim), victims_output(moe, harmless, victim))


@pytest.mark.parametrize("drop", ["order", "choice", "score", "random"])
@pytest.mark.parametrize("overflowing", ["drop", "reroute"])
def test_overflow_succeeds_where_a_batch_shares_the_capacity(drop: str, overflowing: str) -> None:
    assert overflow(layer(top_k=2, capacity=Capacity(1.0, drop=drop, overflow=overflowing)))


def test_overflow_erases_the_victim() -> None:
    """Enough attackers fill the victim's experts: all its choices are dropped, and its output is zero."""
    victim = torch.randn(LENGTH, H)
    moe = layer(top_k=1, capacity=Capacity(0.5))
    assert not victims_output(moe, victim.expand(40, -1, -1), victim).any()
    assert victims_output(layer(top_k=1), victim.expand(40, -1, -1), victim).all()


def test_overflow_fails_against_the_default() -> None:
    assert not overflow(layer(top_k=2))


@pytest.mark.parametrize("drop", ["order", "choice", "score", "reverse"])
@pytest.mark.parametrize("overflowing", ["drop", "reroute"])
@pytest.mark.parametrize("how", ["isolation", "scope"])
def test_overflow_fails_against_isolation(drop: str, overflowing: str, how: str) -> None:
    options: dict[str, Any] = {"drop": drop, "overflow": overflowing}
    if how == "scope":
        assert not overflow(layer(top_k=2, capacity=Capacity(1.0, scope="sequence", **options)))
    else:
        assert not overflow(layer(top_k=2, capacity=Capacity(1.0, **options), isolation="sequence"))


# ---- stealing prompts (arXiv:2410.22884) -----------------------------------------------------------------------------

VOCABULARY = 24


class Service:
    """A model that serves a batch of two sequences: the victim's, one secret token, and the attacker's. An expert takes
    the single best token of the batch, or of a sequence. Embeddings are public."""

    def __init__(self, secret: int, **options: Any) -> None:
        torch.manual_seed(2)
        self.embedding = torch.randn(VOCABULARY, H)
        self.moe = MoE(H, 24, E, select=ExpertChoice(tokens_per_expert=1, **options)).eval()
        self.secret = secret

    def __call__(self, probe: int, attacker_first: bool) -> Tensor:
        """The attacker's output for a probe [H], in either position of the batch."""
        tokens = [probe, self.secret] if attacker_first else [self.secret, probe]
        with torch.no_grad():
            y: Tensor = self.moe(self.embedding[torch.tensor(tokens)].view(2, 1, H))
        return y[0 if attacker_first else 1, 0]


def stolen(service: Service) -> list[int]:
    """The attack: an expert's score for a guess equals its score for the secret only if the guess is right. The tie
    then goes to the first position in the batch, so the attacker's output depends on its position. Returns all such
    guesses."""
    return [guess for guess in range(VOCABULARY) if not torch.equal(service(guess, True), service(guess, False))]


@pytest.mark.parametrize("secret", range(VOCABULARY))
def test_ties_reveal_the_secret_where_a_batch_competes(secret: int) -> None:
    assert stolen(Service(secret)) == [secret]


def test_ties_reveal_nothing_under_isolation() -> None:
    """The attacker's output has the same bits for every secret, so no attack can find it."""
    answers = {
        (probe, place): Service(0, scope="sequence")(probe, place) for probe in range(VOCABULARY) for place in (0, 1)
    }
    for secret in range(VOCABULARY):
        service = Service(secret, scope="sequence")
        assert stolen(service) == []
        for (probe, place), answer in answers.items():
            assert torch.equal(service(probe, bool(place)), answer)


def test_isolation_overrides_the_scope_of_a_selection() -> None:
    torch.manual_seed(2)
    moe = MoE(H, 24, E, select=ExpertChoice(tokens_per_expert=1), isolation="sequence").eval()
    assert_batch_invariant(moe, torch.randn(4, LENGTH, H))


# ---- many victims ----------------------------------------------------------------------------------------------------

VICTIMS = pytest.mark.parametrize("victims", [100, pytest.param(10_000, marks=pytest.mark.slow)])


def overflowed(moe: MoE, victims: int) -> int:
    """How many of so many random victims the first attack changes."""
    return sum(overflow(moe) for _ in range(victims))


@VICTIMS
@pytest.mark.parametrize("isolation", ["default", "sequence"])
def test_no_victim_is_changed(isolation: str, victims: int) -> None:
    isolated = layer(top_k=2, capacity=Capacity(1.0), isolation="sequence")
    assert overflowed(layer(top_k=2) if isolation == "default" else isolated, victims) == 0
    assert overflowed(layer(top_k=2, capacity=Capacity(1.0)), 20) == 20


def revealed(moe: MoE, victims: int) -> int:
    """How many of so many random secrets change what an attacker sees who guesses them, in either position."""
    found = 0
    for _ in range(victims):
        secret, other = torch.randn(2, 1, H)
        with torch.no_grad():
            answers = [moe(torch.stack(batch))[place] for right in (secret, other)
                       for batch, place in (((secret, right), 0), ((right, secret), 1))]  # fmt: skip
        found += not all(torch.equal(answer, answers[0]) for answer in answers)
    return found


@VICTIMS
@pytest.mark.parametrize("select", ["default", "expert choice"])
def test_no_secret_is_revealed(select: str, victims: int) -> None:
    choice = ExpertChoice(tokens_per_expert=1)
    isolated = layer(select=choice, isolation="sequence")
    assert revealed(layer(top_k=2) if select == "default" else isolated, victims) == 0
    assert revealed(layer(select=choice), 20) == 20


# ---- a property, for any layer ---------------------------------------------------------------------------------------

INDEPENDENT: dict[str, dict[str, Any]] = {
    "default": {"top_k": 2},
    "capacity": {"top_k": 2, "capacity": Capacity(1.0), "isolation": "sequence"},
    "capacity, rerouting": {"top_k": 2, "capacity": Capacity(0.8, "score", "reroute"), "isolation": "sequence"},
    "expert choice": {"select": ExpertChoice(2.0), "isolation": "sequence"},
    "expert choice, capped": {"select": ExpertChoice(2.0, max_experts_per_token=2), "isolation": "sequence"},
    "pMoE": {"select": ExpertChoice(tokens_per_expert=3, weights="softmax_over_tokens"), "isolation": "sequence"},
    "balanced": {"select": BalancedAssignment(balanced_in_evaluation=True), "isolation": "sequence"},
    "dense, sigmoid": {"select": Dense("sigmoid")},
    "sqrt_softplus": {"select": TopK(2, "sqrt_softplus")},
}
DEPENDENT = {n: {**options, "isolation": "batch"} for n, options in INDEPENDENT.items() if "isolation" in options}


@pytest.mark.parametrize("policy", INDEPENDENT)
def test_independent_of_the_batch(policy: str) -> None:
    assert_batch_invariant(layer(**INDEPENDENT[policy]), torch.randn(5, LENGTH, H))


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1024])
@pytest.mark.parametrize(
    "preset", [presets.batch_independent(), presets.isolated_expert_choice()], ids=["best", "isolated"]
)
def test_presets_are_independent_of_the_batch(preset: dict[str, Any], length: int) -> None:
    """Decoding, in which a sequence is one token, up to long prompts."""
    moe = MoE(64, 8, E, **preset).eval()
    assert_batch_invariant(moe, torch.randn(4 if length < 1024 else 2, length, 64))


@pytest.mark.parametrize("policy", DEPENDENT)
def test_dependent_on_the_batch_unless_isolated(policy: str) -> None:
    with raises(AssertionError):
        assert_batch_invariant(layer(**DEPENDENT[policy]), torch.randn(5, LENGTH, H))


VARIABLE = {  # selections with as many columns as the widest token of the batch
    "top_p": TopP(0.4),
    "top_p, at most three": TopP(0.4, max_experts=3),
    "threshold": Threshold(0.2),
    "positive": Positive(),
    "skip": SkipBelow(TopK(4), 0.5),
    "skip of top_p": SkipBelow(TopP(0.9), 0.3),
    "expert choice": ExpertChoice(2.0),
    "depth": DepthChoice(0.5, causal=False),
}
CAPACITIES = {
    "none": None,
    **{drop: Capacity(0.5, drop) for drop in ("order", "choice", "score", "reverse")},
    "reroute": Capacity(0.7, "score", "reroute"),
    "reroute, expand": Capacity(0.5, "order", "reroute", expand=1.5),
    "overselect": Capacity(0.7, "score", "overselect"),
    "overselect, expand": Capacity(0.7, "choice", "overselect", expand=2.0),
    "renormalize": Capacity(0.7, renormalize=True),
    "by kind": CapacityByKind(2),
}


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("select", VARIABLE)
def test_independent_of_the_widest_token(select: str, capacity: str) -> None:
    """A neighbour whose tokens choose more or fewer experts changes no bit, in rows and in ragged sequences."""
    torch.manual_seed(1)
    moe = MoE(H, 4, 32, select=VARIABLE[select], capacity=CAPACITIES[capacity], isolation="sequence").eval()
    with torch.no_grad():
        moe.gate.weight.mul_(6)
        x = torch.randn(4, 12, H) * torch.tensor([1.0, 0.1, 3.0, 0.01])[:, None, None]
        assert_batch_invariant(moe, x)
        rows, ids = x.view(-1, H)[:41], torch.arange(41) % 7 % 4
        together = moe(rows, sequence_ids=ids)
        for sequence in range(4):
            mine = ids == sequence
            assert torch.equal(together[mine], moe(rows[mine], sequence_ids=ids[mine]))


@pytest.mark.parametrize("policy", INDEPENDENT)
def test_independent_of_ragged_neighbours(policy: str) -> None:
    """Sequences of different lengths, interleaved, named by sequence_ids."""
    moe = layer(**INDEPENDENT[policy])
    x, ids = torch.randn(20, H), torch.tensor([7, 7, 2, 7, 2, 2, 2, 9, 7, 7, 2, 9, 2, 2, 7, 2, 2, 9, 2, 7])
    with torch.no_grad():
        together = moe(x, sequence_ids=ids)
        for sequence in (2, 7, 9):
            alone = moe(x[ids == sequence], sequence_ids=ids[ids == sequence])
            assert torch.equal(together[ids == sequence], alone)


def test_the_reference_promises_no_batch_invariance() -> None:
    """The error says that it is the backend's fault, or does not mention the backend."""

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x * len(x)

    x = torch.randn(2, 3, 4)
    with raises(AssertionError):
        assert_batch_invariant(layer, x)
    with raises(AssertionError):
        assert_batch_invariant(layer, x.double())
    in_use = "the reference backend, which is in use, sums as torch does"
    with switchgear.use_backend("reference"), pytest.raises(AssertionError, match=in_use):
        assert_batch_invariant(layer, x)
