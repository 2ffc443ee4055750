# SPDX-License-Identifier: BSD-3-Clause
"""Levels of matrices by rounding or by GPTQ (arXiv:2210.17323): columns are quantized one after the other, and each
one's error is compensated by those that follow, such that the output on the calibration data changes least. The levels
of a layer's projections, each expert with its own number of bits. expert_errors: what each layer's output loses if one
expert alone is quantized."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.checks import Count, FiniteTensor, NotEmpty, NotNegative, Range, Shape, checked
from switchgear.compress.bits import ExpertErrors
from switchgear.compress.calibration import Calibration, check_finite
from switchgear.compress.sums import Domains, Hessians
from switchgear.integrations.blocks import ExpertLayer, expert_layers
from switchgear.reference import groups
from switchgear.weights.integers import Groups

Method = Literal["rtn", "gptq"]
Width = Annotated[int, Range(1, 8)]
Widths = Annotated[Sequence[Width], NotEmpty]
Bits = Width | Mapping[str, Width | Sequence[Width]] | Sequence[Width]
_TOGETHER = 8  # experts: bounds the memory of float32 copies and factors
BLOCK = 128  # columns whose updates of the rest are applied together


class Levels(NamedTuple):
    """Levels of matrices [n,N,C] with one number of bits; see reference/groups.py."""

    q: Tensor  # [n,N,C] uint8
    scales: Tensor  # [n,N,G] float16
    zeros: Tensor  # [n,N,G] uint8


def round_to_nearest(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Levels:
    """Round to nearest, with the scales of `groups.fit`."""
    levels = groups.quantize(weight, (bits,) * len(weight), group_size, symmetric)
    zeros = levels.zeros
    if zeros is None or bits == 1:
        zeros = torch.full_like(levels.scales, 2 ** (bits - 1), dtype=torch.uint8)
    return Levels(levels.q, levels.scales, zeros)


def decode(quantized: Levels, bits: int, group_size: int) -> Tensor:
    """[n,N,C] float32."""
    return groups.dequantize(groups.Levels(*quantized, (bits,) * len(quantized.q)), group_size)


@checked
def gptq(
    weight: Annotated[FiniteTensor, Shape("n", "N", "C")],
    hessian: Annotated[FiniteTensor, Shape("n", "C", "C")],
    bits: Width,
    group_size: Count,
    *,
    symmetric: bool = True,
    damping: NotNegative = 0.01,
    act_order: bool = False,
) -> Levels:
    """Quantizes weight [n,N,C] for Hessians Xᵀ X [n,C,C].

    Args:
        bits: 1 to 8.
        group_size: columns that share a scale; 0 for the whole row.
        symmetric: levels around zero; otherwise each group has a zero point, too.
        damping: this share of the mean of a Hessian's diagonal is added to it.
        act_order: columns with the largest diagonal first; groups and their scales are then computed before.

    Returns:
        Levels. A row is independent of the others, and gets the plain rounding if that has the smaller error: GPTQ is
        greedy.

    Raises TypeError or ValueError for an option out of range, another shape, or numbers that are not finite.
    """
    if 0 in weight.shape:
        raise ValueError(f"weight: expected sizes of at least 1, got {list(weight.shape)}")
    plain = round_to_nearest(weight, bits, group_size, symmetric)
    target = weight.float()
    hessian = hessian.float()
    order = torch.arange(hessian.shape[1], device=hessian.device).expand(len(hessian), -1)
    if act_order:  # [n,C]: the columns in the order in which they are quantized
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    factor = _factorize(hessian, order, damping)
    found = _compensate(
        _reorder(target, order), factor, bits, group_size, symmetric, plain if act_order else None, order
    )
    if act_order:
        back = order.argsort(1)
        found = found._replace(q=found.q.gather(2, back[:, None].expand_as(found.q)))
    better = sum_row_errors(target - decode(found, bits, group_size), hessian) < sum_row_errors(
        target - decode(plain, bits, group_size), hessian
    )
    return Levels(*(torch.where(better[..., None], new, old) for new, old in zip(found, plain, strict=True)))


def sum_row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """‖X dᵀ‖² of each row d of [n,N,C], [n,N]."""
    errors: Tensor = torch.einsum("enc,enc->en", difference @ hessian.to(difference.dtype), difference)
    return errors


def _reorder(matrix: Tensor, order: Tensor) -> Tensor:
    return matrix.gather(2, order[:, None].expand(-1, matrix.shape[1], -1))


def _factorize(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of each damped Hessian, in order of the columns. A Hessian that is not
    positive definite in float32 is damped more. Raises ValueError if that does not help."""
    hessian = _reorder(hessian, order).transpose(1, 2)
    hessian = _reorder(hessian, order)
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    diagonal[diagonal == 0] = 1  # an input that is always zero; its column is independent of all others
    mean = diagonal.mean(1, keepdim=True)
    result = torch.empty_like(hessian)
    for expert, matrix in enumerate(hessian):
        for share in _try_shares(damping):
            damped = matrix + torch.diag(share * mean[expert].expand(len(matrix)))
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                inverse = torch.cholesky_inverse(lower)
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                result[expert] = upper
                break
        else:
            raise ValueError("hessian: expected Xᵀ X of finite inputs, got one that damping does not make definite")
    return result


def _try_shares(damping: float) -> Iterator[float]:
    """The damping, and what is tried if that is not enough: powers of ten up to the mean of the diagonal."""
    yield damping
    share = max(10 * damping, 1e-6)
    while share < 1:
        yield share
        share *= 10
    yield 1.0


def _compensate(
    weight: Tensor,
    factor: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    static: Levels | None,
    order: Tensor,
) -> Levels:
    """weight [n,N,C], which is overwritten, in the order of the columns. static: scales of the columns before that."""
    count, rows, columns = weight.shape
    size = group_size or columns
    q = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    blocks = -(-columns // size)
    scales = weight.new_empty(count, rows, blocks, dtype=torch.float16)
    zeros = weight.new_full((count, rows, blocks), 2 ** (bits - 1), dtype=torch.uint8)
    if static is not None:
        scales, zeros = static.scales, static.zeros
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors = weight.new_empty(count, rows, end - begin)
        for column in range(begin, end):
            if static is None and column % size == 0:
                # The rest of the group has no update of this block yet: apply it first.
                last = min(column + size, columns)
                group = weight[:, :, column:last].clone()
                if last > end and column > begin:
                    group[:, :, end - column :] -= torch.bmm(
                        errors[:, :, : column - begin], factor[:, begin:column, end:last]
                    )
                scale, zero = _fit(group, bits, symmetric)
                scales[..., column // size], zeros[..., column // size] = scale, zero
            if static is None:
                scale, zero = scales[..., column // size], zeros[..., column // size]
            else:
                at = (order[:, column] // size)[:, None, None].expand(-1, rows, 1)
                scale, zero = scales.gather(2, at)[..., 0], zeros.gather(2, at)[..., 0]
            values = weight[:, :, column]
            level = groups.round_to_levels(values[..., None], scale, zero, bits)[..., 0]
            q[:, :, column] = level
            value = (2 * level.float() - 1 if bits == 1 else level.float() - zero.float()) * scale.float()
            error = (values - value) / factor[:, column, column, None]
            weight[:, :, column:end] -= error[..., None] * factor[:, column, None, column:end]
            errors[:, :, column - begin] = error
        if end < columns:
            weight[:, :, end:] -= torch.bmm(errors, factor[:, begin:end, end:])
    return Levels(q, scales, zeros)


def _fit(group: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros [n,N] of a group [n,N,g]."""
    present = torch.ones(1, group.shape[2], dtype=torch.bool, device=group.device)
    scale, zero = groups.fit(group[:, :, None], present, bits, symmetric)
    return scale[..., 0], zero[..., 0]


# ---- the levels of a layer -------------------------------------------------------------------------------------------


def choose_form(bits: Bits, group_size: int, symmetric: bool, store: bool) -> Groups:
    """The form of the levels. Raises ValueError for a group size that it does not have, and for more bits than it has
    if they are to be stored."""
    given = list(bits.values()) if isinstance(bits, Mapping) else [bits]
    most = max((width for each in given for width in (each if isinstance(each, Sequence) else [each])), default=0)
    if store and most > 4:
        more = "up to 8 with store=False, or switchgear.store(model, 'int8')"
        raise ValueError(f"bits: expected 1 to 4, got {most}; {more}")
    return Groups(4, group_size, symmetric)


def read_widths(layer: ExpertLayer, bits: Bits) -> list[int]:
    """Bits of each expert of a layer."""
    given = bits[layer.name] if isinstance(bits, Mapping) else bits
    widths = list(given) if isinstance(given, Sequence) else [given] * layer.num_experts
    if len(widths) != layer.num_experts:
        raise ValueError(f"bits: expected {layer.num_experts} numbers for {layer.name}, got {len(widths)}")
    return [int(width) for width in widths]


def find_hessians(
    model: nn.Module, layers: Mapping[str, ExpertLayer], method: str, calibration: Calibration | None
) -> dict[str, Hessians]:
    if calibration is None:
        if method == "gptq":
            raise ValueError("calibration: expected one with hessians=True for method='gptq', got None")
        return {}
    calibration.check(model, layers)
    found = {}
    for name in layers:
        hessians = calibration.layers[name].hessians
        if hessians is not None:
            check_finite(name, hessians.inputs, hessians.hidden)
            found[name] = hessians
        elif method == "gptq":
            raise ValueError(f"calibration: expected one with hessians=True, got none of {name}")
    return found


def find_starved(layer: ExpertLayer, calibration: Calibration | None, min_tokens: int) -> list[int]:
    assert calibration is not None
    counts = calibration.layers[layer.name].sums().counts
    return (counts < max(min_tokens, 1)).nonzero().flatten().tolist()


def quantize_projection(
    layer: ExpertLayer,
    index: int,
    widths: Sequence[int],
    form: Groups,
    hessians: Hessians | None,
    method: str,
    few: Collection[int],
    damping: float = 0.01,
    act_order: bool = False,
) -> list[Levels]:
    """The levels [1,N,C] of each expert. Experts of one width are quantized together, a few at a time."""
    weight = layer.projection(index)
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{layer.name}: expected finite weights, got NaN or infinities")
    found: dict[int, Levels] = {}
    for width in sorted(set(widths)):
        mine = [expert for expert, bits in enumerate(widths) if bits == width]
        for expert in mine if method == "rtn" else [e for e in mine if e in few]:
            one = weight[expert : expert + 1].contiguous()
            found[expert] = round_to_nearest(one, width, form.group_size, form.symmetric)
        rest = [expert for expert in mine if expert not in found]
        for some in (rest[at : at + _TOGETHER] for at in range(0, len(rest), _TOGETHER)):
            assert hessians is not None
            matrices = (hessians.inputs, hessians.hidden)[index][some].to(weight.device)
            levels = gptq(
                weight[some], matrices, width, form.group_size,
                symmetric=form.symmetric, damping=damping, act_order=act_order,
            )  # fmt: skip
            for at, expert in enumerate(some):
                found[expert] = Levels(*(tensor[at : at + 1] for tensor in levels))
    return [found[expert] for expert in range(len(widths))]


# ---- expert_errors ---------------------------------------------------------------------------------------------------


@checked
@torch.no_grad()
def expert_errors(
    model: nn.Module,
    calibration: Calibration,
    bits: Widths = (1, 2, 3),
    *,
    group_size: int = 128,
    method: Method = "rtn",
    symmetric: bool = True,
    domains: Domains = None,
    layers: Collection[str] | None = None,
) -> ExpertErrors:
    """What each layer's output loses if one expert alone is quantized: ‖F(x) − F'(x)‖ over the calibration's sample,
    for each expert and width (MC-MoE, arXiv:2410.06270, eq. 3). For `allocate_bits`.

    Args:
        bits: the widths to try, each 1 to 8, in any order.
        group_size, method, symmetric: as for `quantize`. The paper's code rounds asymmetrically by default.
        domains: where the calibration's sample is taken from; by default all.
        layers: names of blocks; by default all.

    Returns:
        ExpertErrors, whose errors [E,B] float64, by layer, have a column per width, ascending.

    Raises ValueError for a calibration of another model, or without a sample (or Hessians, for method="gptq").
    """
    bits = sorted(set(bits))
    form = Groups(4, group_size, symmetric)
    parts = expert_layers(model, layers)
    calibration.check(model, parts, domains)
    hessians = find_hessians(model, parts, method, calibration)
    result = ExpertErrors(tuple(bits), {}, {}, {})
    for name, layer in parts.items():
        known = calibration.layers[name]
        sample, sums = known.sample(domains), known.sums(domains)
        if sample is None:
            raise ValueError(f"calibration: expected a sample of tokens of {name}, got none (samples=0)")
        check_finite(name, sample.x, sample.topk_weights, sums.weights)
        device = layer.projection(0).device
        rows = layer.rows(sample.x.to(device), sample.topk_ids.to(device), sample.topk_weights.to(device))
        few = find_starved(layer, calibration, 1) if method == "gptq" else []
        columns = []
        for width in bits:
            widths = [width] * layer.num_experts
            weights = []
            for index in (0, 1):
                found = quantize_projection(layer, index, widths, form, hessians.get(name), method, few)
                decoded = torch.cat([decode(levels, width, group_size) for levels in found])
                weights.append(decoded.to(layer.projection(index).dtype))
            _, outputs = layer.apply(rows.inputs, rows.offsets, *weights)
            change = ((outputs.double() - rows.outputs.double()) * rows.weights[:, None]).square().sum(1)
            total = change.new_zeros(layer.num_experts).index_add_(0, rows.experts, change)
            columns.append(total.sqrt().cpu())
        tokens = sums.tokens.clamp(min=1).double()
        result.errors[name] = torch.stack(columns, 1)
        result.frequencies[name] = sums.counts.double() / tokens
        result.weights[name] = sums.weights / tokens
    return result
