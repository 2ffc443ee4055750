# SPDX-License-Identifier: BSD-3-Clause
"""Distance of results from the exact ones: each element has its own bound, derived below and not tuned.

u = 2^-24 is the unit roundoff of float32, v that of the tensors' dtype. A float32 sum of n products, in any order,
fused or not, has an error of at most γ(n)·Σ|a||b| with γ(n) = n·u / (1 - n·u) (Higham, Accuracy and Stability of
Numerical Algorithms, §3.1). The layer rounds to the dtype only as follows:

    forward    a once, y once                                                     (the reference does not round a)
    backward   grad_h and w·a once, every gradient once

so the error δ of each intermediate follows from that of the previous one. A result below the normal range may be
flushed to zero, which `TINY` covers.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from problems import (
    ACTIVATIONS,
    DTYPES,
    activate,
    affine,
    counts,
    random_ids,
    random_layer,
    random_options,
    slots_of,
    split,
    stages,
    sum_by,
    times,
)
from torch import Tensor

from switchgear import ops
from switchgear.testing import GluOptions, Layer

U = 2.0**-24
ROUNDOFF = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Rounding below the normal range costs half of the smallest float16. The other two have the range of float32, and
# products of bfloat16 pairs (vdpbf16ps) flush smaller numbers.
TINY = {torch.float32: 2.0**-125, torch.bfloat16: 2.0**-125, torch.float16: 2.0**-25}


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


class Activation:
    """Error bounds of an activation act(g) in float32; |g| is the argument.

        |act_computed - act| <= value·u·size(|g|)         |slope_computed - act'| <= slope·u·steepness(|g|)

    where size bounds |act|, and steepness bounds |act'| and the terms of its sum. The rounding errors, in units of u:
        exp      3    reduced argument 0.9, polynomial 1.5, fit 0.1
        sigmoid  5    1 + exp(-g) adds (3e + 1)/(1 + e), the division 1
        silu     8    sigmoid, 2 products; and for swiglu_oai alpha·g: s(1-s)|αg| <= 0.23, plus 1 for (up + 1)
        gelu    12    Φ: the fit's polynomial, with coefficients that sum to 2.7, by Horner 9; exp(-g²/2) adds g²
                      for the argument's error, and g²·Φ(-|g|) <= 0.2; 2 products. torch's own erf stays below
        gelu_tanh 8   the argument of the sigmoid has 6, and s(1-s)|2u| <= 0.23
    The slopes contain a term g·s·(1 - s), where 1 - s has the absolute error of s, hence |g| (for gelu_tanh times the
    derivative of its cubic).
    """

    def __init__(self, options: GluOptions) -> None:
        name = options.activation
        self.value = {"silu": 8, "gelu": 12, "gelu_tanh": 8, "relu": 1, "relu2": 2, "swiglu_oai": 10}[name]
        self.slope = {"silu": 10, "gelu": 14, "gelu_tanh": 10, "relu": 1, "relu2": 2, "swiglu_oai": 12}[name]
        self.squared = name == "relu2"
        self.cubic = name == "gelu_tanh"

    def size(self, gate: Tensor) -> Tensor:
        return gate.square() if self.squared else gate.abs()

    def steepness(self, gate: Tensor) -> Tensor:
        gate = gate.abs()
        return 1 + 2 * gate + (gate.pow(3) if self.cubic else 0)

    def lipschitz(self, gate: Tensor) -> Tensor | float:
        """A bound on |act'| up to |gate|: silu' <= 1.0998, gelu' <= 1.1290."""
        return 2 * gate.abs() if self.squared else 1.13


# ---- forward ---------------------------------------------------------------------------------------------------------


def activation_error(h: Tensor, error_h: Tensor, options: GluOptions) -> Tensor:
    """The error of act(gate)·up in float32 for an error of error_h in h. Clamps only reduce it."""
    bound = Activation(options)
    gate, up = split(h, options)
    plain = options._replace(limit=0.0, activation="relu")
    error_gate, error_up = split(error_h, plain)
    if not options.gated:
        error_up = torch.zeros_like(error_up)
    gate_range = gate.abs() + error_gate
    rounding = (bound.value + 1) * U * bound.size(gate_range) * (up.abs() + error_up)
    act = ACTIVATIONS[options.activation](gate, options.alpha).abs()
    propagated = bound.lipschitz(gate_range) * error_gate * (up.abs() + error_up) + act * error_up
    return propagated + rounding + TINY[torch.float32] * (1 + up.abs())


def forward_bound(layer: Layer, options: GluOptions, dtype: torch.dtype) -> Tensor:
    """The bound on |y - exact y| of a float64 layer computed in `dtype`."""
    s = slots_of(layer.topk_ids)
    v, tiny = ROUNDOFF[dtype], TINY[dtype]
    x, weight = layer.x[s.token], layer.topk_weights[s.token, s.choice, None].abs()
    hidden_size, intermediate_size = layer.down_proj.shape[1:]
    h, a, y = stages(layer, options)

    sizes = affine(x.abs(), s.expert, layer.gate_up_proj.abs(), absolute(layer.gate_up_bias))
    error_h = gamma(hidden_size + 1) * sizes + hidden_size * TINY[torch.float32]
    error_a = activation_error(h, error_h, options)
    error_a = error_a + v * (a.abs() + error_a) + tiny

    z = affine(a, s.expert, layer.down_proj, layer.down_bias)
    sizes = affine(a.abs() + error_a, s.expert, layer.down_proj.abs(), absolute(layer.down_bias))
    error_z = times(layer.down_proj.abs()[s.expert], error_a) + gamma(intermediate_size + 1) * sizes
    error_z = error_z + intermediate_size * TINY[torch.float32]

    num_tokens, top_k = layer.topk_ids.shape
    error_y = sum_by(s.token, weight * error_z, num_tokens)
    error_y = error_y + gamma(top_k + 1) * sum_by(s.token, weight * (z.abs() + error_z), num_tokens)
    return error_y + v * (y.abs() + error_y) + tiny


def absolute(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.abs()


@functools.cache
def forward_problems(seed: int) -> tuple[Layer, GluOptions, Tensor, Tensor]:
    """100 problems of a random width, with y and its bound; every tenth call has two problems deeper than a panel."""
    rng = np.random.default_rng(seed)
    long = seed % 10 == 9
    hidden_size, intermediate_size = (int(n) for n in rng.integers(1, [1200, 300] if long else [70, 50]))
    options = random_options(rng)
    layer = random_layer(
        rng, DTYPES[seed % 3], options, hidden_size, intermediate_size, random_ids(rng, 2 if long else 100)
    )
    wide = layer.double()
    return layer, options, stages(wide, options).y, forward_bound(wide, options, layer.x.dtype)


@counts(ci=2_000, full=20_000)
def test_forward_within_bound(backend: str, count: int) -> None:
    for seed in range(count // 90):
        layer, options, y, bound = forward_problems(seed)
        computed, _ = ops.moe_forward(*layer.arguments(), *options, False)
        worst = ((computed.double() - y).abs() / bound).max()
        assert worst <= 1, f"seed {seed}: an error of {worst:.3g} bounds, {options}, {layer.x.dtype}"


# ---- backward --------------------------------------------------------------------------------------------------------

GRADIENTS = ("x", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias", "topk_weights")


@functools.cache
def backward_problems(seed: int) -> tuple[Layer, GluOptions, Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Problems with a random h (in the dtype, as forward saves it), and each gradient with its bound."""
    rng = np.random.default_rng([1, seed])
    hidden_size, intermediate_size = (int(n) for n in rng.integers(1, [60, 40], 2))
    options = random_options(rng)
    layer = random_layer(rng, DTYPES[seed % 3], options, hidden_size, intermediate_size, random_ids(rng, 50))
    slots = (layer.topk_ids >= 0).sum()
    h = torch.from_numpy(rng.standard_normal((layer.topk_ids.numel(), layer.gate_up_proj.shape[1]), np.float32))
    h[slots:] = 0
    h, grad_y = h.to(layer.x.dtype), torch.randn(layer.x.shape, generator=torch.Generator().manual_seed(seed))
    grad_y = grad_y.to(layer.x.dtype)
    return layer, options, h, grad_y, gradients(layer.double(), options, h.double(), grad_y.double(), layer.x.dtype)


def gradients(
    layer: Layer, options: GluOptions, h: Tensor, grad_y: Tensor, dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each gradient of a float64 layer whose pre-activations are h, in slot order, with its bound."""
    order = slots_of(layer.topk_ids)
    by_expert = torch.argsort(order.expert, stable=True)  # tokens and choices already ascend
    token, choice, expert = (index[by_expert] for index in order)
    v, tiny = ROUNDOFF[dtype], TINY[dtype]
    most_slots = int(torch.bincount(expert).max())
    num_tokens, top_k = layer.topk_ids.shape
    num_experts, hidden_size, intermediate_size = layer.down_proj.shape
    x, dy = layer.x[token], grad_y[token]
    w = layer.topk_weights[token, choice, None]
    down, gate_up = layer.down_proj[expert], layer.gate_up_proj[expert]
    bound = Activation(options)

    h = h[: len(token)].requires_grad_()
    a = activate(h, options)
    gate, up = (t.detach() for t in split(h, options))
    act = ACTIVATIONS[options.activation](gate, options.alpha).abs()
    error_a = activation_error(h.detach(), torch.zeros_like(h), options)
    g = times(down.mT, dy)
    error_g = gamma(hidden_size) * times(down.mT.abs(), dy.abs()) + hidden_size * TINY[torch.float32]
    (grad_h,) = torch.autograd.grad(a, h, w * g)
    a = a.detach()

    # grad_h: (w·g)·(act'·up) and (w·g)·act, four more products
    wg, error_wg = (w * g).abs(), w.abs() * error_g
    steepness = bound.steepness(gate)
    error_gate = up.abs() * (bound.lipschitz(gate) * error_wg + (bound.slope + 5) * U * steepness * (wg + error_wg))
    error_up = act * error_wg + (bound.value + 4) * U * bound.size(gate) * (wg + error_wg)
    if not options.gated:
        error_h = error_gate
    elif options.interleaved:
        error_h = torch.stack((error_gate, error_up), -1).flatten(1)
    else:
        error_h = torch.cat((error_gate, error_up), 1)
    error_h = error_h + v * (grad_h.abs() + error_h) + tiny
    sizes_h = grad_h.abs() + error_h

    # w·a, rounded
    wa = w * a
    error_wa = w.abs() * (error_a + 2 * U * (a.abs() + error_a))
    error_wa = error_wa + v * (wa.abs() + error_wa) + tiny

    def rounded(exact: Tensor, error: Tensor, unit: float = v) -> tuple[Tensor, Tensor]:
        return exact, error + unit * (exact.abs() + error) + tiny

    def outer(left: Tensor, error_left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Σ left ⊗ right of each expert, a sum over its slots."""
        exact = sum_by(expert, left[:, :, None] * right[:, None, :], num_experts)
        sizes = sum_by(expert, (left.abs() + error_left)[:, :, None] * right.abs()[:, None, :], num_experts)
        error = sum_by(expert, error_left[:, :, None] * right.abs()[:, None, :], num_experts)
        return exact, error + gamma(most_slots) * sizes + most_slots * TINY[torch.float32]

    def total(rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        sizes = sum_by(expert, rows.abs() + error, num_experts)
        return sum_by(expert, rows, num_experts), sum_by(expert, error, num_experts) + gamma(most_slots + 1) * sizes

    grad_x = sum_by(token, times(gate_up.mT, grad_h), num_tokens)
    error_x = sum_by(token, times(gate_up.mT.abs(), error_h), num_tokens)
    error_x = error_x + gamma(h.shape[1] + top_k) * sum_by(token, times(gate_up.mT.abs(), sizes_h), num_tokens)
    error_x = error_x + h.shape[1] * TINY[torch.float32]
    grad_down, error_down = outer(wa, error_wa, dy)

    b = torch.zeros_like(dy) if layer.down_bias is None else layer.down_bias[expert]
    grad_w = (g * a).sum(1) + (dy * b).sum(1)
    sizes_w = ((g.abs() + error_g) * (a.abs() + error_a)).sum(1)
    error_w = (error_g * (a.abs() + error_a) + g.abs() * error_a).sum(1) + gamma(intermediate_size + 1) * sizes_w
    sizes_w = sizes_w + (dy * b).abs().sum(1)
    error_w = error_w + gamma(hidden_size + intermediate_size + 1) * sizes_w

    def per_choice(values: Tensor) -> Tensor:
        return values.new_zeros(num_tokens, top_k).index_put((token, choice), values)

    result = {
        "x": rounded(grad_x, error_x),
        "gate_up_proj": rounded(*outer(grad_h, error_h, x)),
        "down_proj": rounded(grad_down.mT, error_down.mT),
        "topk_weights": rounded(per_choice(grad_w), per_choice(error_w), U),
    }
    if layer.gate_up_bias is not None:
        result["gate_up_bias"] = rounded(*total(grad_h, error_h))
    if layer.down_bias is not None:
        result["down_bias"] = rounded(*total(w * dy, 2 * U * (w * dy).abs()))
    return result


@counts(ci=1_000, full=10_000)
def test_gradients_within_bound(backend: str, count: int) -> None:
    for seed in range(count // 50):
        layer, options, h, grad_y, expected = backward_problems(seed)
        needs = [name in expected for name in GRADIENTS]
        grads = ops.moe_backward(grad_y, layer.x, h, *layer.arguments()[1:], *options, needs)
        for name, grad in zip(GRADIENTS, grads[: len(GRADIENTS)], strict=True):
            if name not in expected:
                continue
            exact, bound = expected[name]
            worst = ((grad.double() - exact).abs() / bound).max()
            assert worst <= 1, f"seed {seed}: grad_{name} off by {worst:.3g} bounds, {options}, {layer.x.dtype}"


# ---- glu only, over the whole range ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_within_bound(backend: str, activation: str, dtype: torch.dtype) -> None:
    """Gates from -60 to 60 and powers of ten towards 0; value and slope."""
    fine, powers = torch.linspace(-60, 60, 24_001), 10.0 ** torch.linspace(-30, 1, 2_000)
    gate = torch.cat((fine, powers, -powers)).to(dtype)
    up = torch.linspace(-2, 2, len(gate)).to(dtype)
    options = GluOptions(activation)
    h = torch.stack((gate, up), 1)
    wide = h.double().requires_grad_()
    exact = activate(wide, options)
    (exact_grad,) = torch.autograd.grad(exact.sum(), wide)
    exact, (gate, up) = exact.detach(), split(wide.detach(), options)

    def check(name: str, computed: Tensor, exact: Tensor, error: Tensor) -> None:
        error = error + ROUNDOFF[dtype] * (exact.abs() + error) + TINY[dtype]
        worst = ((computed.double() - exact).abs() / error).max(0)
        assert worst.values.max() <= 1, f"{name} off by {worst.values} bounds at {h[worst.indices]}"

    bound = Activation(options)
    check(
        "a",
        ops.glu(h, *options),
        exact,
        activation_error(wide.detach(), torch.zeros_like(h, dtype=torch.float64), options),
    )
    error_gate = (bound.slope + 5) * U * bound.steepness(gate) * up.abs()
    error_up = (bound.value + 4) * U * bound.size(gate)
    errors = torch.cat((error_gate, error_up), 1) + TINY[torch.float32] * (1 + gate.abs() * up.abs())
    check("grad_h", ops.glu_backward(torch.ones_like(h[:, :1]), h, *options), exact_grad, errors)


def test_bounds_catch_one_rounding_too_many(backend: str) -> None:
    """The bounds can fail: they do if float32 results lose two bits."""
    layer, options, y, bound = forward_problems(0)
    computed, _ = ops.moe_forward(*layer.arguments(), *options, False)
    lossy = computed.double() * (1 + 2.0**-15)
    assert layer.x.dtype == torch.float32
    assert ((lossy - y).abs() / bound).max() > 1
