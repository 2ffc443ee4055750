# SPDX-License-Identifier: BSD-3-Clause
"""FeedForward: the weights of one dense feed-forward network, read from a module of any naming."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.complaints import check_module
from switchgear.integrations.gates import ACTIVATION_NAMES, ACTIVATIONS, name_activation
from switchgear.layers.shared import SharedExperts
from switchgear.reference import activations
from switchgear.utils.modules import set_eval

# (gate, up, down) of the modules in use; None: not gated.
NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    (None, "up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "fc_in", "fc_out"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
)
FUSED = ("gate_up_proj", "down_proj")  # gates first, then ups
TANH = functools.partial(F.gelu, approximate="tanh")
STRINGS: dict[str, Any] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu, "gelu_new": TANH, "gelu_pytorch_tanh": TANH,
}  # fmt: skip


@dataclass(frozen=True)
class FeedForward:
    """down · (act(gate · x) ⊙ (up · x)), or down · act(up · x) without a gate.

    gate and up [I,H], down [H,I]; up_bias and gate_bias [I], down_bias [H].
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    activation: str = "silu"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.up.shape[1])

    @property
    def intermediate_size(self) -> int:
        """I."""
        return int(self.up.shape[0])

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection."""
        return self.gate is not None

    @property
    def has_bias(self) -> bool:
        """Whether the projections have biases."""
        return self.down_bias is not None

    def __call__(self, x: Tensor) -> Tensor:
        """x [...,H] -> [...,H], in torch."""
        h = F.linear(x, self.up, self.up_bias)
        if self.gate is not None:
            h = torch.cat((F.linear(x, self.gate, self.gate_bias), h), -1)
        a = activations.glu_of(h.flatten(0, -2), self.activation, self.gated, False, 1.702, 0.0)
        return F.linear(a.view(*h.shape[:-1], -1), self.down, self.down_bias)

    def neurons(self, index: Tensor, scale: float = 1.0) -> FeedForward:
        """The network of the neurons `index` [n] alone, its output multiplied by `scale`, down_bias included."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        bias = self.down_bias if self.down_bias is None else self.down_bias * scale
        return replace(
            self, gate=rows(self.gate), up=self.up[index], down=self.down[:, index] * scale,
            gate_bias=rows(self.gate_bias), up_bias=rows(self.up_bias), down_bias=bias,
        )  # fmt: skip

    def padded(self, width: int) -> FeedForward:
        """The same function with zero neurons up to `width`; act(0) · 0 = 0 for every activation."""
        more = width - self.intermediate_size

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, more))

        padded = rows(self.up)
        assert padded is not None
        return replace(
            self, gate=rows(self.gate), up=padded, down=F.pad(self.down, (0, more)), gate_bias=rows(self.gate_bias),
            up_bias=rows(self.up_bias),
        )  # fmt: skip

    def biased(self) -> FeedForward:
        """The same function with biases, zeros where there are none."""

        def bias(given: Tensor | None, weight: Tensor) -> Tensor:
            return weight.new_zeros(weight.shape[0]) if given is None else given

        gate = None if self.gate is None else bias(self.gate_bias, self.gate)
        return replace(
            self, gate_bias=gate, up_bias=bias(self.up_bias, self.up), down_bias=bias(self.down_bias, self.down)
        )

    def expert(self, interleaved: bool = False) -> dict[str, Tensor]:
        """Its weights by name of the parameters of Experts: gate_up_proj [2I,H] (up_proj [I,H]), down_proj [H,I], …."""

        def joined(gate: Tensor | None, up: Tensor) -> Tensor:
            if gate is None:
                return up
            return torch.stack((gate, up), 1).flatten(0, 1) if interleaved else torch.cat((gate, up))

        first = "up_proj" if self.gate is None else "gate_up_proj"
        found = {first: joined(self.gate, self.up), "down_proj": self.down}
        if self.down_bias is not None:
            assert self.up_bias is not None
            found[f"{first}_bias"] = joined(self.gate_bias, self.up_bias)
            found["down_proj_bias"] = self.down_bias
        return found

    def options(self) -> dict[str, Any]:
        """The keyword arguments of Experts, SharedExperts and MoE that describe it."""
        return {
            "activation": self.activation, "gated": self.gated, "bias": self.has_bias,
            "device": self.up.device, "dtype": self.up.dtype,
        }  # fmt: skip

    def module(self) -> SharedExperts:
        """A SharedExperts with copies of these weights."""
        made = SharedExperts(self.hidden_size, self.intermediate_size, **self.options())
        fill_shared(made, self)
        return made


@torch.no_grad()
def fill_shared(module: SharedExperts, weights: FeedForward) -> None:
    """Copies the weights into a module of their size."""
    parts = (("gate", module.gate_proj), ("up", module.up_proj), ("down", module.down_proj))
    for name, linear in parts:
        if linear is not None:
            linear.weight.copy_(getattr(weights, name))
            if linear.bias is not None:
                linear.bias.copy_(getattr(weights, f"{name}_bias"))


def feed_forward(module: nn.Module | FeedForward, name: str = "mlp") -> FeedForward:
    """The weights of a dense feed-forward module: two or three torch.nn.Linear, or two with gate and up fused.

    Knows LLaMA's, Mixtral's, Phi-3's and GPT's names, and SharedExperts. What was read is compared with the module on
    random rows, so a module that computes something else is refused. The tensors are those of the module.

    Raises:
        TypeError: no module.
        ValueError: no feed-forward module, or one of another function.
    """
    if isinstance(module, FeedForward):
        return module
    check_module(name, module)
    found = next(_readings(module), None)
    if found is None:
        raise ValueError(
            f"{name}: expected a dense feed-forward module with Linear layers gate_proj, up_proj, down_proj (or w1, "
            f"w3, w2; gate_up_proj, down_proj; fc1, fc2), got {type(module).__name__}"
        )
    _check_same(module, found, name)
    return found


def is_feed_forward(module: nn.Module) -> bool:
    """Whether a module has the Linear layers of a dense feed-forward network."""
    return next(_readings(module), None) is not None


def _readings(module: nn.Module) -> Iterator[FeedForward]:
    activation = activation_of(module)
    if activation is None:
        return
    for gate, up, down in NAMES:
        if all(name is None or _is_linear(getattr(module, name, None)) for name in (gate, up, down)):
            of_gate = (None, None) if gate is None else _tensors(getattr(module, gate))
            of_up, of_down = _tensors(getattr(module, up)), _tensors(getattr(module, down))
            yield _made(of_gate, of_up, of_down, activation)
    if all(_is_linear(getattr(module, name, None)) for name in FUSED):
        weight, bias = _tensors(module.gate_up_proj)
        gates, ups = weight.chunk(2)
        biases = (None, None) if bias is None else bias.chunk(2)
        yield _made((gates, biases[0]), (ups, biases[1]), _tensors(module.down_proj), activation)


def _made(gate: Any, up: Any, down: Any, activation: str) -> FeedForward:
    """Missing biases become zeros if there are others."""
    biases = [gate[1], up[1], down[1]]
    made = FeedForward(gate[0], up[0], down[0], activation, *biases)
    return made if all(bias is None for bias in biases) else made.biased()


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear)


def _tensors(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


def activation_of(module: Any) -> str | None:
    """The name of the module's activation, found by its values."""
    if isinstance(module, SharedExperts):
        plain = module.activation in ACTIVATIONS and module.limit is None
        return module.activation if plain else None
    for name in (*ACTIVATION_NAMES, "hidden_act"):
        function = getattr(module, name, None)
        if isinstance(function, str):
            function = STRINGS.get(function)
        if callable(function):
            return name_activation(function)
    return None


@torch.no_grad()
def _check_same(module: nn.Module, found: FeedForward, name: str) -> None:
    if found.up.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, found.hidden_size, generator=generator).to(found.up)
    try:
        with set_eval(module):
            y = module(x)
    except Exception as error:
        raise ValueError(f"{name}: expected a module of rows [T,H], got {type(module).__name__} ({error})") from error
    expected = found(x)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(x.dtype, 5e-2)
    scale = float(expected.abs().max()) + 1e-30
    if not isinstance(y, Tensor) or y.shape != expected.shape or float((y - expected).abs().max()) > tolerance * scale:
        raise ValueError(
            f"{name}: expected down(act(gate(x)) · up(x)), got a {type(module).__name__} that computes something else"
        )
