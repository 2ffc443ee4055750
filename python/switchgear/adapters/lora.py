# SPDX-License-Identifier: BSD-3-Clause
"""Low-rank adapters of experts (LoRA, arXiv:2106.09685): y = W·x + alpha/rank · B·(A·x) for each expert, W frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from switchgear.adapters.sites import TARGETS, Site, allocate, find_sites, guard, list_local_experts, unguard
from switchgear.checks import Finite, FloatDtype, Share, Size, checked, list_of_names
from switchgear.utils.modules import is_sharded
from switchgear.weights.adapted import adapters_of, notice_wrappers
from switchgear.weights.module import freeze_stored
from switchgear.weights.selected import selection_of
from switchgear.weights.state import Lora, set_state


class ExpertAdapter(NamedTuple):
    """The adapters of all experts of a projection, as `lora_of` returns them. (`LowRank` is one of a Linear.)"""

    a: nn.Parameter  # [E,r,in]
    b: nn.Parameter  # [E,out,r]
    options: Lora


@checked
def add_lora(
    model: nn.Module,
    rank: Size,
    *,
    alpha: Finite | None = None,
    dropout: Share = 0.0,
    targets: str | Iterable[str] = TARGETS,
    dtype: FloatDtype | None = None,
) -> list[nn.Parameter]:
    """Adds an adapter to projections of every expert, and freezes all other parameters of `model`. A failure
    changes nothing.

        adapters = add_lora(model, rank=16, alpha=32, dropout=0.05)
        optimizer = torch.optim.AdamW(adapters)

    Args:
        model: `Experts`, or any model that has some, stored in any form or distributed over ranks (each rank adapts its
            own experts); or a Hugging Face model after `switchgear.accelerate(model)`. To train other parameters too,
            pass only the experts, or call requires_grad_ on those parameters afterwards.
        rank: r of the adapters A [E,r,in] (uniform within ±1/√in) and B [E,out,r] (zeros, so outputs do not change).
        alpha: adapters are scaled by alpha / rank; by default alpha is rank.
        dropout: probability with which a feature of A's input is dropped, in train() only.
        targets: "gate_up_proj", the first projection of each layer, "down_proj", the second, or names of parameters.
        dtype: of the adapters; by default that of the weights. Plain weights cast the adapters to their own at each
            call; with stored weights it must be the dtype of activations, or float32 if these have 16 bits.

    Returns the adapters, for an optimizer. The projection <name> has them as <name>_lora_A and <name>_lora_B, in its
    module and in state dicts.

    Raises:
        TypeError: an argument of another type.
        ValueError: an option out of range, an unknown target, no experts, or a projection that has an adapter or is
            sharded.
    """
    alpha = float(rank) if alpha is None else float(alpha)
    sites = choose_sites(find_sites(model), targets)
    return attach(model, [(site, *_initialize(site, rank, dtype), Lora(rank, alpha, dropout)) for site in sites])


def choose_sites(sites: Sequence[Site], targets: str | Iterable[str]) -> list[Site]:
    """The sites that `targets` name. Raises ValueError for an unknown one."""
    wanted = list_of_names("targets", targets)
    known = {*TARGETS, *(site.name for site in sites)}
    for target in wanted:
        if target not in known:
            raise ValueError(f"targets: expected some of {', '.join(sorted(known))}, got {target!r}")
    found = [site for site in sites if site.target in wanted or site.name in wanted]
    if not found:
        raise ValueError(f"targets: expected some of {', '.join(sorted(known))}, got {wanted}, none of this model")
    return found


def attach(model: nn.Module, made: Sequence[tuple[Site, Tensor, Tensor, Lora]]) -> list[nn.Parameter]:
    """Registers adapters and freezes the rest of the model. Raises ValueError before anything changes."""
    for site, *_ in made:
        if isinstance(site.like, Tensor) and is_sharded(site.module, site.like):
            raise ValueError(
                f"model: expected parameters that are not sharded, got {site.where}, which FSDP shards; "
                "add adapters before fully_shard"
            )
        if site.name in adapters_of(site.module):
            raise ValueError(
                f"model: expected no adapters yet, got those of {site.where}; call remove_lora(model) first"
            )
        if selection_of(site.module) is not None:
            raise ValueError(
                f"model: expected no experts that train alone, got those of {site.where}; "
                "call finetune.unfreeze(model) first"
            )
    notice_wrappers()
    adapters = [(site, nn.Parameter(a), nn.Parameter(b), lora) for site, a, b, lora in made]
    kept = {id(parameter) for adapter in lora_of(model).values() for parameter in adapter[:2]}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    for module in model.modules():
        freeze_stored(module)
    for site, a, b, lora in adapters:
        site.module.register_parameter(f"{site.name}_lora_A", a)
        site.module.register_parameter(f"{site.name}_lora_B", b)
        set_state(site.module, adapters={**adapters_of(site.module), site.name: lora})
        guard(site)
    return [parameter for _, a, b, _ in adapters for parameter in (a, b)]


def _initialize(site: Site, rank: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """All ranks draw the numbers of all experts and keep their own, so that an expert has the same on any rank."""
    count, rows, cols = site.shape
    a = allocate(site, count, rank, cols, dtype=dtype)
    other = allocate(site, rank, cols, dtype=dtype)
    total, mine = list_local_experts(site.module, count)
    number_of = {expert: number for number, expert in enumerate(mine)}
    for expert in range(total):
        nn.init.uniform_(a[number_of[expert]] if expert in number_of else other, -(cols**-0.5), cols**-0.5)
    return a, allocate(site, count, rows, rank, dtype=a.dtype).zero_()


@checked
def remove_lora(model: nn.Module) -> int:
    """Removes the adapters of `add_lora` and `load_peft`; the other parameters stay frozen. Returns their number.

    Raises ValueError if adapters are merged (`unmerge` first, or keep the merged weights with `merge(model,
    keep_adapters=False)`).
    """
    modules = [module for module in model.modules() if adapters_of(module)]
    for module in modules:
        if any(lora.merged is not None for lora in adapters_of(module).values()):
            raise ValueError(
                "model: expected adapters that are not merged; call unmerge(model) first, or "
                "merge(model, keep_adapters=False) instead"
            )
    return detach(model)


def detach(model: nn.Module) -> int:
    """Removes all adapters of a model, without a look at its weights. Returns their number."""
    count = 0
    for module in model.modules():
        for name in adapters_of(module):
            count += 1
            for letter in "AB":
                del module._parameters[f"{name}_lora_{letter}"]
        set_state(module, adapters={})
        if selection_of(module) is None:  # experts that train alone stay guarded
            unguard(module)
    return count


@checked
def lora_of(model: nn.Module) -> dict[str, ExpertAdapter]:
    """The adapters of a module or model, by the path of their projections; see `add_lora`, `load_peft`."""
    return {
        f"{path}.{name}" if path else name: ExpertAdapter(
            module.get_parameter(f"{name}_lora_A"), module.get_parameter(f"{name}_lora_B"), lora
        )
        for path, module in model.named_modules()
        for name, lora in adapters_of(module).items()
    }
