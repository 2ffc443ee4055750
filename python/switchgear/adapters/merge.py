# SPDX-License-Identifier: BSD-3-Clause
"""merge and unmerge: W + scale · B·A in place of W, expert by expert, and the original bits of W again.

W' = round(W + D) loses bits of W, so unmerging keeps what W'' = round(W' − D) lacks: the difference of the bits of W
and W'', as int8, and W itself where the difference does not fit. That is a byte per weight, or none for an expert where
W'' = W. D is computed anew, by a product whose bits depend on nothing but its operands and the ISA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from switchgear import ops
from switchgear.adapters.lora import detach
from switchgear.adapters.sites import Site, find_adapted_sites
from switchgear.backends import backend, without_autocast
from switchgear.checks import checked
from switchgear.functional import grouped_gemm
from switchgear.reference import weight_dtype
from switchgear.weights import Form, Weight, stored_of
from switchgear.weights.adapted import adapters_of
from switchgear.weights.state import Lora, set_state
from switchgear.weights.weight import OffloadedWeight

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_INT8 = torch.iinfo(torch.int8)

Written = list[tuple[Site, int, Callable[[], Tensor]]]  # experts that are written, and what they had before


class Lost(NamedTuple):
    """What W'' lacks of an expert's W."""

    difference: Tensor | None  # [N,C] int8 of the bits; None: all zero
    places: Tensor  # indices of the weights whose difference does not fit
    weights: Tensor  # the weights there


@dataclass(frozen=True)
class Merged:
    """What unmerging a projection needs."""

    a: Tensor  # A and B when they were merged
    b: Tensor
    lost: list[Lost]
    sum_of_bits: Tensor  # sums over W', which show whether it has changed since
    arithmetic: tuple[str, str]


@checked
def merge(model: nn.Module, *, keep_adapters: bool = True) -> int:
    """Adds the adapters of `add_lora` and `load_peft` to the weights, in place, expert by expert. Forward then runs as
    without adapters. Returns the number of merged projections.

    keep_adapters: `unmerge` restores the original weights bit for bit. It keeps up to a byte per weight for that. A
        failure changes nothing. Otherwise the adapters are removed, and merging needs no memory beyond one expert: an
        interruption leaves some experts merged, with a B of zeros, so that the model computes the same.

    While merged, adapters are not trained, and a state dict has both the merged weights and the adapters: `unmerge`
    before saving it. `save_peft` can be called at any time.

    Raises:
        ValueError: no adapters, or only a routed mixture of some (`LoRAExperts.merge`); weights that are stored in
            another form (`switchgear.restore` first), shared by several projections or computed; a sum that is not
            finite.
    """
    sites = [site for site in find_adapted_sites(model) if _get_options(site).merged is None]
    _check(sites)
    for site in sites:
        for e in range(site.shape[0]):
            if not torch.isfinite(_add_delta(site, e, *site.adapter())).all():
                raise ValueError(
                    f"model: expected finite sums of weights and adapters, got others in {site.where}[{e}]"
                )
    if not keep_adapters:
        for site in sites:
            for e in range(site.shape[0]):
                _absorb(site, e)
        detach(model)
        return len(sites)
    kept: list[Merged] = []
    with _all_or_none([(site, None) for site in sites]) as written:
        for site in sites:
            a, b = (parameter.detach().clone() for parameter in site.adapter())
            lost: list[Lost] = []
            for e in range(site.shape[0]):
                merged = _add_delta(site, e, a, b)
                lost.append(_find_lost(site, e, merged, a, b))
                _replace(written, site, e, merged, partial(_recover, site, e, a, b, lost[e]))
            kept.append(Merged(a, b, lost, _sum_bits(site), _name_arithmetic()))
        for site, state in zip(sites, kept, strict=True):
            _set_merged(site, state)
    return len(sites)


@checked
def unmerge(model: nn.Module) -> int:
    """Undoes `merge`: the weights have their original bits, and the adapters act again. A failure changes nothing.
    Returns the number of projections.

    Raises:
        ValueError: no merged adapters; weights that have changed since, or were stored in another form; another ISA or
            backend than at the merge.
    """
    found = [(site, merged) for site in find_adapted_sites(model) if (merged := _get_options(site).merged) is not None]
    if not found:
        raise ValueError("model: expected merged adapters, got none that are merged")
    for site, merged in found:
        _check([site])
        if merged.arithmetic != _name_arithmetic():
            raise ValueError(
                f"model: expected the backend and the ISA of the merge, {', '.join(merged.arithmetic)}, got "
                f"{', '.join(_name_arithmetic())}"
            )
        if not torch.equal(merged.sum_of_bits, _sum_bits(site)):
            raise ValueError(
                f"model: expected weights as they were merged, got others in {site.where}, changed or converted since; "
                "call merge(model, keep_adapters=False), which keeps them as they are and removes the adapters"
            )
    with _all_or_none(found) as written:
        for site, merged in found:
            for e in range(site.shape[0]):
                weight = _recover(site, e, merged.a, merged.b, merged.lost[e])
                _replace(written, site, e, weight, partial(_add_delta, site, e, merged.a, merged.b))
        for site, _ in found:
            _set_merged(site, None)
    return len(found)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(sites: Sequence[Site]) -> None:
    seen: set[int] = set()
    for site in sites:
        if isinstance(site.weight, (Weight, OffloadedWeight)):
            stored = stored_of(site.module)
            held = site.weight.weight if isinstance(site.weight, OffloadedWeight) else site.weight
            form, undo = (held.format, Form.undo) if stored is None else (stored.form, stored.form.undo)
            raise ValueError(
                f"model: expected plain weights to merge into, got {site.where} stored as {form}; call {undo} first"
            )
        if not site.linears and type(site.module._parameters.get(site.name)) is not nn.Parameter:
            raise ValueError(f"model: expected a parameter to merge into, got a computed {site.where}")
        if (first := site.like.data_ptr()) in seen:  # type: ignore[union-attr]
            raise ValueError(f"model: expected weights of one projection each, got {site.where} shared with another")
        seen.add(first)


def _get_options(site: Site) -> Lora:
    return adapters_of(site.module)[site.name]


def _set_merged(site: Site, merged: Merged | None) -> None:
    options = dataclasses.replace(_get_options(site), merged=merged)
    set_state(site.module, adapters={**adapters_of(site.module), site.name: options})


def _name_arithmetic() -> tuple[str, str]:
    return backend(), ops.cpu_isa()


# ---- one expert ------------------------------------------------------------------------------------------------------


def _get_matrix(site: Site, e: int) -> Tensor:
    weight = site.weight
    assert not isinstance(weight, (Weight, OffloadedWeight))
    return weight[e].detach()


@torch.no_grad()
def _compute_delta(site: Site, e: int, a: Tensor, b: Tensor) -> Tensor:
    """D = scale · B·A [N,C] in float32, or float64 for float64 weights."""
    dtype = weight_dtype(site.like.dtype)
    rows, columns = b[e].to(dtype).contiguous(), a[e].to(dtype).contiguous()
    offsets = torch.tensor([0, len(rows)], dtype=torch.int32, device=rows.device)
    with without_autocast(rows.device.type):
        return grouped_gemm(rows, columns.mT[None], offsets) * _get_options(site).scale


def _add_delta(site: Site, e: int, a: Tensor, b: Tensor) -> Tensor:
    weight, delta = _get_matrix(site, e), _compute_delta(site, e, a, b)
    return (weight.to(delta.dtype) + delta).to(weight.dtype)


def _write(site: Site, e: int, weight: Tensor) -> None:
    with torch.no_grad():
        _get_matrix(site, e).copy_(weight)


def _absorb(site: Site, e: int) -> None:
    """Merges an expert and makes its B zero: both or none."""
    a, b = (parameter.detach() for parameter in site.adapter())
    weight, factor = _get_matrix(site, e).clone(), b[e].clone()
    try:
        _write(site, e, _add_delta(site, e, a, b))
        b[e].zero_()
    except BaseException:
        _write(site, e, weight)
        b[e].copy_(factor)
        raise


def _replace(written: Written, site: Site, e: int, weight: Tensor, before: Callable[[], Tensor]) -> None:
    """Writes a weight; `before` computes the old one from it. Wherever that is interrupted, `written` can restore."""
    copy = _get_matrix(site, e).clone()
    written.append((site, e, lambda: copy))
    _write(site, e, weight)
    written[-1] = (site, e, before)


@contextmanager
def _all_or_none(states: Sequence[tuple[Site, Merged | None]]) -> Iterator[Written]:
    """If the block fails, what it has written is restored, and so are the states of the sites."""
    written: Written = []
    try:
        yield written
    except BaseException:
        for site, e, before in reversed(written):
            _write(site, e, before())
        for site, merged in states:
            _set_merged(site, merged)
        raise


def _view_bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(_INTEGERS[weight.element_size()])


def _find_lost(site: Site, e: int, merged: Tensor, a: Tensor, b: Tensor) -> Lost:
    weight = _get_matrix(site, e)
    difference = _view_bits(weight) - _view_bits(_subtract_delta(site, e, merged, a, b))  # wraps around
    fits = (difference >= _INT8.min) & (difference <= _INT8.max)
    places = (~fits).flatten().nonzero().squeeze(1)
    small = torch.where(fits, difference, 0).to(torch.int8)
    return Lost(small if small.any() else None, places, weight.flatten()[places])


def _subtract_delta(site: Site, e: int, merged: Tensor, a: Tensor, b: Tensor) -> Tensor:
    delta = _compute_delta(site, e, a, b)
    return (merged.to(delta.dtype) - delta).to(merged.dtype)


def _recover(site: Site, e: int, a: Tensor, b: Tensor, lost: Lost) -> Tensor:
    near = _view_bits(_subtract_delta(site, e, _get_matrix(site, e), a, b))
    if lost.difference is not None:
        near = near + lost.difference.to(near.dtype)
    weight = near.view(site.like.dtype).flatten()
    weight[lost.places] = lost.weights
    return weight.view(site.shape[1:])


def _sum_bits(site: Site) -> Tensor:
    """[E]"""
    return torch.stack([_view_bits(_get_matrix(site, e)).sum(dtype=torch.int64) for e in range(site.shape[0])])
