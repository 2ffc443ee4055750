# SPDX-License-Identifier: BSD-3-Clause
"""A model that is made on the meta device and then loaded trains like the one whose state it got."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from switchgear import reference
from switchgear.adapters import LowRankExperts
from switchgear.layers import HeterogeneousExperts, MergedExperts, SoftMoE, StratifiedMoE
from switchgear.routing import (
    AdaptiveCoefficient,
    AdaptiveSparsity,
    ClusterDropout,
    DeviceBalance,
    LocalizedBalance,
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
    "types": partial(MoE, 2, balance=[partial(LocalizedBalance, [0, 0, 0, 1, 1, 1])]),
    "widths": partial(MoE, 2, balance=[partial(ParamPenalty, range(E))]),
    "cap": partial(MoE, select=partial(RunningCap, TopK(2), 1.0)),
    "clusters": clustered,
    "stratified": partial(StratifiedMoE, H, I, [2, 2, 2], top_k=2),
    "heterogeneous": partial(HeterogeneousExperts, H, [8, 16, 24, 8, 16, 24]),
    "low rank": partial(LowRankExperts, H, H, E, [1, 2, 3, 1, 2, 3]),
}


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def trained(module: nn.Module, default: str = "cpu") -> list[Tensor]:
    """Outputs, losses and state of three steps under a default device; gradients exist from the second one on."""
    torch.manual_seed(1)
    found = []
    for _ in range(3):
        x = torch.randn(2, T, H)
        routes = isinstance(module, (HeterogeneousExperts, LowRankExperts))
        routed = () if not routes else (torch.randint(E, (2, T, 2), dtype=torch.int32), torch.rand(2, T, 2))
        types = {"embedding": torch.arange(2)} if isinstance(module, switchgear.MoE) else {}
        with torch.device(default):
            y = module(x, *routed, **types)
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


def merged(**options: Any) -> nn.Module:
    router, experts = switchgear.Router(H, E, 2, **options), switchgear.Experts(H, I, E, **options)
    return MergedExperts(router, experts, pooling="attention", bottleneck=4)


RESET = {
    **LAYERS,
    "virtual": partial(MoE, 2, null_experts=1, constant_experts=2, mix_constants=True),
    "merged": merged,
    "soft": lambda **options: SoftMoE(switchgear.Experts(H, I, E, **options), **options),
}


@pytest.mark.parametrize("name", RESET)
def test_reset_parameters_leaves_nothing_as_it_was(name: str) -> None:
    fresh, layer = RESET[name](), RESET[name](device="meta").to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 77)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for key, value in fresh.state_dict().items():
        assert bool(layer.state_dict()[key].isfinite().all()), key
        assert bool(value.any()) == bool(layer.state_dict()[key].any()), key
    trained(layer)


@pytest.mark.parametrize("name", RESET)
def test_a_default_device_does_not_matter_to_a_layer_elsewhere(name: str) -> None:
    layer = RESET[name]()
    other = copy.deepcopy(layer)
    wanted = trained(layer, "meta")
    for one, same in zip(trained(other), wanted, strict=True):
        assert torch.equal(one, same)


@torch.no_grad()
def test_a_default_device_does_not_matter_to_inference() -> None:
    moe, x = MoE(2, normalize=True, shared_intermediate_size=8), torch.randn(3, H)
    wanted = moe(x)
    with torch.device("meta"):
        assert torch.equal(moe(x), wanted)


@pytest.mark.parametrize("module", ["compact", "nf4"])
def test_tables_are_made_on_the_cpu(module: str) -> None:
    with torch.device("meta"):
        found = runpy.run_path(str(Path(reference.__file__).parent / f"{module}.py"))
    assert not any(value.is_meta for value in found.values() if isinstance(value, Tensor))
