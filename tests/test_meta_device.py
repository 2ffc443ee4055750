# SPDX-License-Identifier: BSD-3-Clause
"""A model that is made on the meta device and then loaded trains like the one whose state it got."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from switchgear.adapters import LowRankExperts
from switchgear.layers import HeterogeneousExperts, StratifiedMoE
from switchgear.routing import (
    AdaptiveCoefficient,
    AdaptiveSparsity,
    ClusterDropout,
    DeviceBalance,
    LossFreeBias,
    Masked,
    ParamPenalty,
    RunningCap,
    SwitchLoss,
    TopK,
)

H, I, E, T = 20, 12, 6, 64  # noqa: E741
MoE = partial(switchgear.MoE, H, I, E)


def adaptive(**options: Any) -> nn.Module:
    return MoE(2, balance=[SwitchLoss(AdaptiveCoefficient())], **options)


def clustered(**options: Any) -> nn.Module:
    dropout = ClusterDropout(2, interval=2, num_experts=E)
    return MoE(select=Masked(TopK(2), dropout), balance=[LossFreeBias(0.1)], **options)


LAYERS: dict[str, Callable[..., nn.Module]] = {
    "loss-free": partial(MoE, 2, score_function="sigmoid", balance=[LossFreeBias(0.1)]),
    "coefficient": adaptive,
    "sparsity": partial(MoE, 2, balance=[partial(AdaptiveSparsity, 2)]),
    "devices": partial(MoE, 2, balance=[partial(DeviceBalance, 2)]),
    "widths": partial(MoE, 2, balance=[partial(ParamPenalty, range(E))]),
    "cap": partial(MoE, select=partial(RunningCap, TopK(2), 1.0)),
    "clusters": clustered,
    "stratified": partial(StratifiedMoE, H, I, [2, 2, 2], top_k=2),
    "heterogeneous": partial(HeterogeneousExperts, H, [8, 16, 24, 8, 16, 24]),
    "low rank": partial(LowRankExperts, H, H, E, [1, 2, 3, 1, 2, 3]),
}


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def trained(module: nn.Module) -> list[Tensor]:
    """Outputs, losses and state of three steps."""
    torch.manual_seed(1)
    found = []
    for _ in range(3):
        x = torch.randn(T, H)
        router = () if hasattr(module, "losses") else (torch.randint(E, (T, 2), dtype=torch.int32), torch.rand(T, 2))
        y = module(x, *router)
        losses = getattr(module, "losses", {}).values()
        sum(losses, y.square().sum()).backward()
        switchgear.after_step(module)
        found += [y, *losses]
    return [*found, *module.state_dict().values()]


@pytest.mark.parametrize("within", [False, True], ids=["device=", "with"])
@pytest.mark.parametrize("how", ["assign", "to_empty"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_loaded_layer_trains_like_the_original(name: str, how: str, within: bool) -> None:
    original = LAYERS[name]()
    if within:
        with torch.device("meta"):
            loaded = LAYERS[name]()
    else:
        loaded = LAYERS[name](device="meta")
    if how == "to_empty":
        torch.use_deterministic_algorithms(True)  # fills memory without values with NaN or the largest integer
        try:
            loaded.to_empty(device="cpu")
        finally:
            torch.use_deterministic_algorithms(False)
    loaded.load_state_dict(values(original), assign=how == "assign")
    for one, other in zip(trained(loaded), trained(original), strict=True):
        assert torch.equal(one, other)
