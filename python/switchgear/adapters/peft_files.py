# SPDX-License-Identifier: BSD-3-Clause
"""load_peft and save_peft: adapters of experts in PEFT's own format.

A directory has adapter_config.json and adapter_model.safetensors. The adapter of a parameter with [E,out,in] (or of one
with [E,in,out] in a module with is_transposed) is

    base_model.model.<module>.lora_A.weight   [E·r,in]    the experts one below the other
    base_model.model.<module>.lora_B.weight   [out,r·E]   the expert is the fastest index

PEFT nests one wrapper per parameter around a module, in the order of its parameters, so all but the last have
`.base_layer` after <module>, once per wrapper outside theirs. Experts that are linear layers of their own have A [r,in]
and B [out,r] each.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.adapters.lora import attach
from switchgear.adapters.peft_format import (
    BASE,
    CONFIG,
    OURS,
    PREFIX,
    TENSORS,
    PeftConfig,
    import_safetensors,
    parse_config,
    read_config,
    read_tensors,
)
from switchgear.adapters.sites import Site, find_adapted_sites, find_sites, list_local_experts
from switchgear.checks import FloatDtype, checked
from switchgear.files import AnyPath, replacing
from switchgear.utils.modules import unwrap_peft
from switchgear.utils.packages import page
from switchgear.weights import Weight, stored_of
from switchgear.weights.adapted import adapters_of
from switchgear.weights.form import on_huge_pages
from switchgear.weights.state import Lora
from switchgear.weights.weight import OffloadedWeight

# Options of LoraConfig that change which tensors are meant or how they lie, and their values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {"fan_in_fan_out": (False,), "layers_to_transform": ([],), "megatron_config": ()}


@checked
def save_peft(model: nn.Module, path: AnyPath) -> None:
    """Writes the adapters of a model for PEFT and other readers of its files.

        save_peft(model, "adapters")
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "adapters")

    dropout is written as 0 unless experts are linear layers, since PEFT has none on parameters. If PEFT has wrapped the
    model for other modules, its own save_pretrained writes the adapters of these.

    The metadata of the tensors name the form of the experts, for `load_peft`: "plain" if their weights are not rounded.

    If experts are distributed over ranks, all ranks must call it. The first one writes the adapters of all; the others
    may return before the files exist.

    Raises:
        ValueError: no adapters, or only a routed mixture of some, which is saved with `Mixture(model).state_dict()`; a
            layout that PEFT cannot express: experts in one matrix (DBRX), one expert in a transposed module, or
            `Experts` without a module around it.
        ImportError: safetensors is not installed.
    """
    save_file = import_safetensors().save_file
    model = unwrap_peft(model)
    sites = find_adapted_sites(model)
    tensors: dict[str, Tensor] = {}
    for site, modules in _find_keys(sites):
        for module, (a, b) in zip(modules, _convert_to_file(site), strict=True):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"{PREFIX}{module}.lora_B.weight"] = b.detach().cpu().contiguous()
    groups = [group for site in sites if (group := getattr(site.module, "parallel", None)) is not None]
    if any(group.rank for group in groups):
        return
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", OURS: "1", BASE: _name_base(sites)}
    config = json.dumps(_build_config(model, sites), indent=2, sort_keys=True) + "\n"
    with replacing(folder / TENSORS) as tensors_file, replacing(folder / CONFIG) as config_file:
        save_file(tensors, tensors_file, metadata=metadata)
        config_file.write_text(config, encoding="utf-8")


@checked
def load_peft(model: nn.Module, path: AnyPath, *, dtype: FloatDtype | None = None) -> list[nn.Parameter]:
    """Adds the adapters of PEFT's file to a model, and freezes its other parameters. A failure changes nothing.

    Args:
        model: as for `add_lora`. Ranks with distributed experts read their own.
        path: a directory that PEFT or `save_peft` has written, with adapters of experts only. (Adapters of other
            modules, too, are for PEFT: PeftModel.from_pretrained(model, path). The experts still run on the kernels.)
        dtype: of the adapters; by default that of the weights.

    Returns the adapters. Warns (RuntimeWarning) if `save_peft` has written them from a model whose experts were rounded
    in another form.

    Raises:
        ValueError: another kind of adapter; adapters of another model (names, shapes, number of experts); missing or
            unknown tensors; numbers that are not finite; experts that have adapters. The message names the tensor.
        ImportError: safetensors is not installed.
    """
    folder = Path(path)
    config = parse_config(read_config(folder, "path"), str(folder / CONFIG), _PLAIN)
    tensors, metadata = read_tensors(folder, "path")
    sites = find_sites(unwrap_peft(model))
    targeted = [site for site in sites if _is_targeted(site, config, tensors)]
    made, used = [], set()
    for site, modules in _find_keys(targeted):
        layer = _list_pattern_names(site)[0]
        rank = config.rank_of(layer)
        if rank is None:
            raise ValueError(f"r: expected a positive integer in {folder / CONFIG}, got None")
        pairs = []
        for module in modules:
            names = [f"{PREFIX}{module}.lora_{letter}.weight" for letter in "AB"]
            used.update(names)
            pairs.append(_get_tensors(tensors, names))
        a, b = _convert_from_file(site, modules, pairs, rank, OURS not in metadata and _is_old(config))
        _check_finite(modules, pairs)
        device, kind = site.like.device, dtype or site.like.dtype
        options = Lora(rank, config.alpha_of(layer, rank), config.dropout)
        a, b = (on_huge_pages(tensor.to(device, kind)) for tensor in (a, b))
        made.append((site, a, b, options))
    if others := sorted(set(tensors) - used):
        raise ValueError(
            f"path: expected adapters of the experts of {type(model).__name__}, got {others[0]}, which is none of "
            "theirs; load adapters of other modules with PEFT"
        )
    if not made:
        raise ValueError(f"path: expected adapters of experts, got none for {type(model).__name__} in {folder}")
    base = _name_base(targeted)
    if (saved := metadata.get(BASE, base)) != base:
        warnings.warn(
            f"path: its adapters were saved with experts stored as {saved[:80]}, those of this model are stored as "
            f"{base}, for which the adapters were not trained; {page('adapters', 'merging')} says how to merge them",
            RuntimeWarning,
            stacklevel=3,
        )
    return attach(model, made)


# ---- names -----------------------------------------------------------------------------------------------------------


def _find_keys(sites: Iterable[Site]) -> Iterator[tuple[Site, Sequence[str]]]:
    """Each site, and the paths of PEFT's wrappers around its module: one, or one per expert."""
    for _, group in groupby(sites, key=lambda site: site.path):
        of_module = list(group)
        if of_module[0].linears:
            yield from ((s, [f"{s.path}.{linear}" for linear in s.linears]) for s in of_module)
            continue
        order = list(of_module[0].module._parameters)
        of_module.sort(key=lambda site: order.index(site.name))
        for outside, site in zip(reversed(range(len(of_module))), of_module, strict=True):
            if not site.path:
                raise ValueError("model: expected a module around the experts, which PEFT needs, got the experts")
            yield site, [site.path + ".base_layer" * outside]


def _name_base(sites: Iterable[Site]) -> str:
    """The form that rounds the experts of the sites, or the forms; "plain" if none does."""
    forms = set()
    for site in sites:
        weight = site.weight.weight if isinstance(site.weight, OffloadedWeight) else site.weight
        if not isinstance(weight, Weight) or weight.is_exact:
            forms.add("plain")
        else:
            form: Any = getattr(stored_of(site.module), "form", None)  # that of offloaded experts is another
            forms.add(str(form) if getattr(form, "name", None) == weight.format else weight.format)
    return ", ".join(sorted(forms))


def _is_targeted(site: Site, config: PeftConfig, tensors: Mapping[str, Tensor]) -> bool:
    if site.linears:  # any of them, so that a missing one is noticed
        return any(f"{PREFIX}{site.path}.{linear}.lora_A.weight" in tensors for linear in site.linears)
    return any(site.where == name or site.where.endswith(f".{name}") for name in config.target_parameters)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _is_crossed(site: Site) -> bool:
    """Whether PEFT's A is our B: it takes a parameter [E,in,out] for [E,out,in] unless the module is_transposed."""
    return site.transposed and not getattr(site.module, "is_transposed", False)


def _count_experts(site: Site) -> int:
    """The number of experts in PEFT's tensors: those of all ranks, and those of the parameter that no token reaches."""
    count, _ = list_local_experts(site.module, site.shape[0])
    parameter = site.module._parameters.get(site.name)
    if parameter is not None and parameter.dim() == 2:
        raise ValueError(f"model: expected a matrix per expert, as PEFT adapts, got one of all experts, {site.where}")
    if parameter is not None and not hasattr(site.module, "placement"):
        count = parameter.shape[0]
    if count == 1 and site.transposed and not _is_crossed(site):
        raise ValueError(
            f"model: expected several experts, as PEFT needs in a transposed module, got one, {site.where}"
        )
    return count


def _convert_to_file(site: Site) -> list[tuple[Tensor, Tensor]]:
    a, b = site.adapter()
    if site.linears:
        return list(zip(a, b, strict=True))
    if (gathered := getattr(site.module, "gathered", None)) is not None:
        a, b = gathered(a.detach()), gathered(b.detach())
    missing = _count_experts(site) - len(a)
    first, second = (b.mT, a.mT) if _is_crossed(site) else (a, b)
    first, second = (torch.cat((t, t.new_zeros(missing, *t.shape[1:]))) if missing else t for t in (first, second))
    return [(first.flatten(0, 1), second.permute(1, 2, 0).flatten(1))]


def _convert_from_file(
    site: Site, modules: Sequence[str], pairs: Sequence[tuple[Tensor, Tensor]], rank: int, is_old: bool
) -> tuple[Tensor, Tensor]:
    """A [E,r,in] and B [E,out,r]. is_old: written by PEFT before 0.19, which took every parameter for [E,in,out]."""
    experts, rows, cols = site.shape
    if site.linears:
        for module, (a, b) in zip(modules, pairs, strict=True):
            _check_shapes(module, (a, b), [((rank, cols), (rows, rank))])
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
    count, crossed = _count_experts(site), _is_crossed(site)
    if is_old and (crossed or not site.transposed):
        crossed = not crossed
    direct, other = ((count * rank, cols), (rows, rank * count)), ((count * rank, rows), (cols, rank * count))
    _check_shapes(modules[0], pairs[0], [direct, other])
    first, second = pairs[0]
    if rows != cols:  # the shapes say more than the version
        crossed = tuple(first.shape) == other[0]
    first = first.view(count, rank, first.shape[1])
    second = second.view(second.shape[0], rank, count).permute(2, 0, 1)
    mine = list_local_experts(site.module, experts)[1]
    first, second = (t[mine] if hasattr(site.module, "placement") else t[:experts] for t in (first, second))
    a, b = (second.mT, first.mT) if crossed else (first, second)
    return a.contiguous(), b.contiguous()


def _check_shapes(
    module: str, pair: tuple[Tensor, Tensor], wanted: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    got = tuple(pair[0].shape), tuple(pair[1].shape)
    if got not in wanted:
        (a, b), *_ = wanted
        raise ValueError(
            f"{PREFIX}{module}: expected lora_A {list(a)} and lora_B {list(b)} of this model and rank, got "
            f"{list(got[0])} and {list(got[1])}"
        )


def _check_finite(modules: Sequence[str], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for module, pair in zip(modules, pairs, strict=True):
        for letter, tensor in zip("AB", pair, strict=True):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{PREFIX}{module}.lora_{letter}.weight: expected finite numbers, got NaN or infinity")


# ---- files -----------------------------------------------------------------------------------------------------------


def _is_old(config: PeftConfig) -> bool:
    """Whether PEFT before 0.19 wrote the file."""
    version = re.match(r"(\d+)\.(\d+)", config.version)
    return version is None or (int(version[1]), int(version[2])) < (0, 19)


def _get_tensors(tensors: Mapping[str, Tensor], names: list[str]) -> tuple[Tensor, Tensor]:
    for name in names:
        if name not in tensors:
            raise ValueError(f"path: expected {name} in {TENSORS}, which the configuration targets, got none")
        if not tensors[name].is_floating_point() or tensors[name].dim() != 2:
            raise ValueError(f"{name}: expected a matrix of a floating dtype, got {list(tensors[name].shape)}")
    return tensors[names[0]], tensors[names[1]]


def _build_config(model: Any, sites: Sequence[Site]) -> dict[str, Any]:
    options = [adapters_of(site.module)[site.name] for site in sites]
    rank, alpha = options[0].rank, options[0].alpha
    of_sites = list(zip(sites, options, strict=True))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": options[0].dropout if sites[0].linears else 0.0,
        "bias": "none",
        "target_modules": _name_target_modules(sites),
        "target_parameters": [site.where for site in sites if not site.linears] or None,
        "rank_pattern": {name: o.rank for s, o in of_sites if o.rank != rank for name in _list_pattern_names(s)},
        "alpha_pattern": {name: o.alpha for s, o in of_sites if o.alpha != alpha for name in _list_pattern_names(s)},
    }


def _name_target_modules(sites: Sequence[Site]) -> str | list[str]:
    """A regular expression for linear layers: a list of suffixes could match others in the model."""
    modules = [
        re.escape(f"{site.path}.") + re.sub(r"(?<![a-zA-Z])\d+", r"\\d+", re.escape(site.linears[0]))
        for site in sites
        if site.linears
    ]
    return "|".join(modules) or []


def _list_pattern_names(site: Site) -> list[str]:
    return [f"{site.path}.{linear}" for linear in site.linears] or [site.where]
