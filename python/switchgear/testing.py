# SPDX-License-Identifier: BSD-3-Clause
"""Test cases, and error bounds derived from the number formats. Shared by tests and benchmarks.

The bounds are a running error analysis. A Bounded holds a float64 value and a bound on the error of the value computed
in low precision; each operation below propagates both. The analysis uses two facts, with u the unit roundoff (half the
machine epsilon) of a format and u32 that of float32:

    a sum of n products in float32, in any order, is off by at most C · n · u32 · Σ |a||b|           (C = 2)
    rounding a result to a dtype adds at most 2 · u · |value| + the smallest subnormal number

Intermediate results (h, a and their gradients) may or may not be rounded to the dtype of the tensors; the bounds allow
both. No bound is tuned: if one fails, a kernel or the analysis has a bug.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import backends, reference
from switchgear.ops import GluOptions

__all__ = [
    "Bounded", "Case", "Layer", "assert_batch_invariant", "assert_close", "combine", "exact", "gemm",
    "glu", "glu_backward", "make_layer", "moe_backward", "moe_forward", "row_dot", "times", "topk_ids_of", "wgrad",
]  # fmt: skip

C = 2  # the constant in front of every float32 bound
EVALUATION = 8  # rounded float32 operations of an activation, exponentials included, on values no larger than its scale
U32 = torch.finfo(torch.float32).eps / 2


# ---- cases ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A shape and a routing pattern; see topk_ids_of."""

    name: str
    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    pattern: str = "uniform"

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("plain", 37, 2, 8, 64, 32),
    Case("odd_sizes", 13, 3, 5, 37, 19),
    Case("several_panels", 29, 2, 3, 275, 131),
    Case("many_tokens_per_expert", 210, 2, 3, 48, 40),
    Case("many_experts", 21, 8, 130, 16, 8),
    Case("empty_experts", 9, 2, 16, 24, 16, "few"),
    Case("all_to_last", 33, 1, 4, 32, 16, "last"),
    Case("holes", 19, 4, 6, 33, 24, "holes"),
    Case("a_warp_of_experts", 19, 4, 32, 16, 8, "holes"),
    Case("two_warps_of_experts", 11, 3, 64, 24, 16, "holes"),
    Case("only_holes", 5, 2, 4, 16, 8, "nothing"),
    Case("repeated_ids", 8, 3, 4, 16, 8, "repeated"),
    Case("top_k_is_num_experts", 6, 4, 4, 20, 12),
    Case("one_expert", 7, 1, 1, 32, 24),
    Case("one_token", 1, 2, 8, 64, 32),
    Case("no_tokens", 0, 2, 8, 64, 32),
    Case("all_sizes_one", 1, 1, 1, 1, 1),
)


def topk_ids_of(case: Case) -> Tensor:
    """topk_ids [T,K] int32, drawn from torch's generator.

    uniform: K distinct experts per token · few: only experts 1 and E-2 · last: only expert E-1 · holes: a third of the
    ids is -1 · nothing: all ids are -1 · repeated: independent draws, so that a token may choose an expert twice
    """
    shape = (case.num_tokens, case.top_k)
    ids = torch.rand(case.num_tokens, case.num_experts).argsort(-1)[:, : case.top_k]
    if case.pattern == "few":
        ids = torch.tensor([1, case.num_experts - 2]).expand(shape)
    elif case.pattern == "last":
        ids = torch.full(shape, case.num_experts - 1)
    elif case.pattern == "holes":
        ids = ids.masked_fill(torch.rand(shape) < 1 / 3, -1)
    elif case.pattern == "nothing":
        ids = torch.full(shape, -1)
    elif case.pattern == "repeated":
        ids = torch.randint(case.num_experts, shape)
    return ids.to(torch.int32).contiguous()


class Layer(NamedTuple):
    """The tensors of one call of moe."""

    x: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of ops.moe_forward, without its options."""
        return (self.x, [self.gate_up_proj], (), [self.down_proj], (), *self[3:])

    def double(self) -> Layer:
        """The same numbers in float64."""
        changes = {name: t.double() for name, t in self._asdict().items() if t is not None and t.is_floating_point()}
        return self._replace(**changes)


def make_layer(
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    gated: bool = True,
    bias: bool = False,
    transposed: bool = False,
) -> Layer:
    """Normally distributed tensors; h has about unit variance. transposed: projections are stored as [E,in,out]."""
    width = case.intermediate_size * (2 if gated else 1)

    def weight(size_out: int, size_in: int) -> Tensor:
        values = torch.randn(case.num_experts, size_out, size_in, dtype=torch.float64) / math.sqrt(size_in)
        values = values.to(dtype)
        return values.mT.contiguous().mT if transposed else values

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    return Layer(
        x=draw(case.num_tokens, case.hidden_size),
        gate_up_proj=weight(width, case.hidden_size),
        down_proj=weight(case.hidden_size, case.intermediate_size),
        gate_up_bias=draw(case.num_experts, width) if bias else None,
        down_bias=draw(case.num_experts, case.hidden_size) if bias else None,
        topk_ids=topk_ids_of(case),
        topk_weights=torch.rand(case.num_tokens, case.top_k).to(reference.weight_dtype(dtype)),
    )


# ---- bounds --------------------------------------------------------------------------------------------------------


class Bounded(NamedTuple):
    """A float64 value, and a bound on the error of the computed one."""

    value: Tensor
    error: Tensor

    def rounded(self, dtype: torch.dtype) -> Bounded:
        """The value rounded to `dtype`: the error grows by eps of its size, and by the smallest denormal."""
        limits = torch.finfo(dtype)
        return Bounded(self.value, self.error + limits.eps * self.size() + limits.tiny * limits.eps)

    def size(self) -> Tensor:
        """The largest magnitude that a computed value may have."""
        return self.value.abs() + self.error


def exact(tensor: Tensor) -> Bounded:
    """An input tensor, which has no error."""
    return Bounded(tensor.double(), torch.zeros_like(tensor, dtype=torch.float64))


def times(a: Bounded, b: Bounded) -> Bounded:
    """The elementwise float32 product."""
    error = a.error * b.size() + a.value.abs() * b.error
    return Bounded(a.value * b.value, error + C * U32 * a.size() * b.size())


def row_dot(a: Bounded, b: Bounded) -> Bounded:
    """[S] sums over the columns of a ⊙ b."""
    error = a.error * b.size() + a.value.abs() * b.error + C * a.value.shape[-1] * U32 * a.size() * b.size()
    return Bounded((a.value * b.value).sum(-1), error.sum(-1))


def gemm(
    x: Bounded,
    weight: Tensor | list[Tensor],
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None = None,
) -> Bounded:
    """grouped_gemm with float32 sums; the bias is one more term."""
    weights = [weight.double()] if isinstance(weight, Tensor) else [matrix.double() for matrix in weight]
    sizes = [matrix.abs() for matrix in weights]
    bias64 = None if bias is None else bias.double()
    num_terms = x.value.shape[1] + (bias is not None)

    def product(rows: Tensor, matrices: list[Tensor], bias: Tensor | None) -> Tensor:
        return reference.grouped_gemm(rows, matrices, (), bias, expert_offsets, token_indices)

    value = product(x.value, weights, bias64)
    size = product(x.size(), sizes, None if bias64 is None else bias64.abs())
    return Bounded(value, product(x.error, sizes, None) + C * num_terms * U32 * size)


def wgrad(grad: Bounded, x: Bounded, expert_offsets: Tensor, token_indices: Tensor | None = None) -> Bounded:
    """grouped_gemm_wgrad; the number of terms is the number of rows of the busiest expert."""
    num_terms = int(expert_offsets.diff().max())

    def product(rows: Tensor, other: Tensor) -> Tensor:
        return reference.grouped_gemm_wgrad(rows, other, expert_offsets, token_indices, False)

    error = product(grad.error, x.size()) + product(grad.value.abs(), x.error)
    error = error + C * num_terms * U32 * product(grad.size(), x.size())
    return Bounded(product(grad.value, x.value), error)


def combine(permuted_y: Bounded, plan: tuple[Tensor, Tensor, Tensor], topk_weights: Tensor | None) -> Bounded:
    """combine; each term is a product and an addition."""
    weights = None if topk_weights is None else topk_weights.double()
    sizes = None if weights is None else weights.abs()
    num_terms = plan[2].shape[1] + 1
    error = reference.combine(permuted_y.error, *plan, sizes)
    error = error + C * num_terms * U32 * reference.combine(permuted_y.size(), *plan, sizes)
    return Bounded(reference.combine(permuted_y.value, *plan, weights), error)


def _sensitivity(gate: Tensor, error: Tensor, options: GluOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """act(gate), its error bound, act'(gate), and its error bound, for gates with an error of at most `error`.

    The slope between gate - error and gate + error is at most that at the middle or the ends, plus the curvature (at
    most 2 · max(alpha, 1)) times half the distance. Intermediate results are at most |gate| (relu2: gate²); those of
    the slope are at most 1 + |gate|, plus the cubic term for gelu_tanh.
    """
    activation, alpha = options.activation, options.alpha

    def slope(at: Tensor) -> Tensor:
        return reference.activate(at, activation, alpha)[1]

    value, middle = reference.activate(gate, activation, alpha)
    steepest = torch.stack((middle, slope(gate - error), slope(gate + error))).abs().amax(0)
    curvature = 2 * max(alpha, 1.0)
    size = gate.abs() + error
    scale = size.square() if activation == "relu2" else size
    slope_scale = 1 + size + (0.06 * size**3 if activation == "gelu_tanh" else 0)
    value_error = (steepest + curvature * error) * error + C * EVALUATION * U32 * scale
    kink = activation == "relu"  # its slope is discontinuous at 0
    slope_error = curvature * error + C * EVALUATION * U32 * slope_scale + (gate.abs() <= error) * float(kink)
    return value, value_error, middle, slope_error


def _parts(h: Bounded, options: GluOptions) -> tuple[Bounded, Bounded]:
    """Gate and up, clamped; up is 1 for experts without gates."""
    if not options.gated:
        gate, up = h, exact(torch.ones_like(h.value))
    else:
        values, errors = (reference.halves(part, options.interleaved) for part in h)
        gate, up = (Bounded(value, error) for value, error in zip(values, errors, strict=True))
    if options.limit > 0:
        gate = gate._replace(value=gate.value.clamp(max=options.limit))
        up = up._replace(value=up.value.clamp(-options.limit, options.limit)) if options.gated else up
    if options.activation == "swiglu_oai":
        up = Bounded(up.value + 1, up.error + U32 * (up.value.abs() + 1))
    return gate, up


def glu(h: Bounded, options: GluOptions) -> Bounded:
    """The activation of bounded h [S,N], with the error that passes through it."""
    gate, up = _parts(h, options)
    value, error, _, _ = _sensitivity(gate.value, gate.error, options)
    return times(Bounded(value, error), up)


def glu_backward(grad_a: Bounded, h: Tensor, options: GluOptions) -> Bounded:
    """h is exact: backward reads the h that forward saved."""
    gate, up = _parts(exact(h), options)
    value, value_error, slope, slope_error = _sensitivity(gate.value, gate.error, options)
    grad_gate = times(times(grad_a, up), Bounded(slope, slope_error))
    grad_up = times(grad_a, Bounded(value, value_error))
    error = grad_gate.error
    if options.interleaved:
        error = torch.stack((grad_gate.error, grad_up.error), -1).flatten(1)
    elif options.gated:
        error = torch.cat((grad_gate.error, grad_up.error), -1)
    return Bounded(reference.glu_backward(grad_a.value, h.double(), *options), error)


def moe_forward(layer: Layer, options: GluOptions) -> tuple[Bounded, Bounded]:
    """y and h."""
    dtype = layer.x.dtype
    plan = reference.plan(layer.topk_ids, layer.gate_up_proj.shape[0])
    expert_offsets, token_indices, _ = plan
    h = gemm(exact(layer.x), layer.gate_up_proj, layer.gate_up_bias, expert_offsets, token_indices).rounded(dtype)
    a = glu(h, options).rounded(dtype)
    permuted_y = gemm(a, layer.down_proj, layer.down_bias, expert_offsets).rounded(dtype)
    return combine(permuted_y, plan, layer.topk_weights).rounded(dtype), h


def moe_backward(grad_y: Tensor, h: Tensor, layer: Layer, options: GluOptions) -> tuple[Bounded, ...]:
    """The gradients in the order of the op, from the h that forward saved."""
    dtype = layer.x.dtype
    plan = reference.plan(layer.topk_ids, layer.gate_up_proj.shape[0])
    expert_offsets, token_indices, slot_indices = plan
    rows = exact(reference.gather_rows(grad_y, token_indices))
    weights = exact(reference.to_slots(layer.topk_weights, slot_indices)[:, None])
    a = glu(exact(h), options).rounded(dtype)
    weighted = times(rows, weights).rounded(dtype)
    grad_a_each = gemm(rows, layer.down_proj.mT, None, expert_offsets).rounded(dtype)
    grad_slot = row_dot(grad_a_each, a)
    if layer.down_bias is not None:
        expert = torch.bucketize(torch.arange(len(rows.value)), expert_offsets[1:], right=True)
        bias = exact(layer.down_bias[expert.clamp(max=layer.down_bias.shape[0] - 1)])
        grad_slot = Bounded(*(slot + extra for slot, extra in zip(grad_slot, row_dot(rows, bias), strict=True)))
        grad_slot = Bounded(grad_slot.value, grad_slot.error + C * U32 * grad_slot.size())
    grad_weights = Bounded(*(reference.gather_rows(part, slot_indices) for part in grad_slot))
    grad_h = glu_backward(times(grad_a_each, weights).rounded(dtype), h, options).rounded(dtype)
    grad_x_slots = gemm(grad_h, layer.gate_up_proj.mT, None, expert_offsets).rounded(dtype)
    ones = exact(torch.ones(len(rows.value), 1))
    return (
        combine(grad_x_slots, plan, None).rounded(dtype),
        wgrad(grad_h, exact(reference.gather_rows(layer.x, token_indices)), expert_offsets).rounded(dtype),
        wgrad(weighted, a, expert_offsets).rounded(dtype),
        Bounded(*(part.squeeze(-1) for part in wgrad(grad_h, ones, expert_offsets))).rounded(dtype),
        Bounded(*(part.squeeze(-1) for part in wgrad(weighted, ones, expert_offsets))).rounded(dtype),
        grad_weights.rounded(torch.float32),
    )


def assert_close(actual: Tensor, wanted: Bounded, name: str = "result") -> None:
    """Raises AssertionError with the worst element unless all of `actual` is within the bound."""
    if actual.shape != wanted.value.shape:
        raise AssertionError(f"{name}: expected shape {list(wanted.value.shape)}, got {list(actual.shape)}")
    if not actual.numel():
        return
    distance = (actual.double() - wanted.value).abs()
    excess = (distance - wanted.error).nan_to_num(nan=torch.inf)
    if bool((excess > 0).any()):
        worst = int(excess.argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
        want, error = float(wanted.value[index]), float(wanted.error[index])
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {actual.numel()} elements out of bounds, worst at {index}: "
            f"expected {want:.9g} ± {error:.3g}, got {float(actual[index]):.9g}"
        )


# ---- layers ----------------------------------------------------------------------------------------------------------


def assert_batch_invariant(layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Raises AssertionError unless the output for each sequence of x [B,S,H] has the same bits alone, at another
    position of the batch, among other sequences, and among copies of itself, which choose the same experts.

    The kernels promise this, for dropless routing per token. The reference does not: the error then says so."""
    with torch.no_grad():
        for index, sequence in enumerate(x):
            alone = layer(sequence[None])[0]
            copies = x.clone()
            copies[:] = sequence
            batches = {"the batch": (x, index), "the batch reversed": (x.flip(0), len(x) - 1 - index)}
            batches["copies of itself"] = (copies, len(x) - 1)
            for name, (batch, place) in batches.items():
                together = layer(batch)[place]
                if not torch.equal(together, alone):
                    difference = float((together - alone).abs().max())
                    raise AssertionError(
                        f"sequence {index}: expected the bits that it has alone, got a difference of {difference:.3g} "
                        f"in {name}{_no_promise(x.dtype)}"
                    )


def _no_promise(dtype: torch.dtype) -> str:
    """Why the ops promise no batch invariance; empty if they do."""
    if backends.runs_natively(dtype):
        return ""
    cause = "which is in use" if backends.backend() == "reference" else f"which runs {dtype}"
    return f"; the reference backend, {cause}, sums as torch does, in an order that depends on the number of rows"
