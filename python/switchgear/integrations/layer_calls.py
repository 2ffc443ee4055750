# SPDX-License-Identifier: BSD-3-Clause
"""What the tokens of a generation repeat for decoder layers: the arguments of their one native call.

The layers' Python code would otherwise find them anew for each token, with code and data that the weights have evicted
from the caches. They are kept on the layers of the cache, so for a generation, and not on the model: weights that are
replaced are freed.

While a model's own forward runs, the first layer computes those after it too. They return what is there if they are
called with the tensors that were foreseen, and only then count the token as one of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FIXED = frozenset(vars(nn.Module())) - {"training"}  # what every module has and no code assigns


class Snapshot:
    """The modules in a layer as they are: hooks, forwards, parameters, buffers, submodules and plain attributes."""

    def __init__(self, layer: nn.Module) -> None:
        self.modules = list(layer.modules())
        self.classes = [type(module) for module in self.modules]
        self.distinct = list(dict.fromkeys(self.classes))
        self.forwards = [cls.forward for cls in self.distinct]
        self.hooks = [vars(module)[name] for module in self.modules[1:] for name in _HOOKS]
        self.spaces: list[dict[str, Any]] = []
        for module in self.modules:
            self.spaces += vars(module), module._parameters, module._buffers, module._modules
        self.size = sum(map(len, self.spaces))
        items = [(space, *item) for space in self.spaces for item in space.items() if item[0] not in _FIXED]
        self.owners, self.names, self.values = map(list, zip(*items, strict=True))

    def is_current(self) -> bool:
        """Whether nothing has changed. All loops are those of built-in functions."""
        return (
            not any(self.hooks)
            and sum(map(len, self.spaces)) == self.size
            and _are(map(dict.get, self.owners, self.names), self.values)
            and _are(map(type, self.modules), self.classes)
            and _are(map(getattr, self.distinct, repeat("forward")), self.forwards)
        )


def _are(now: Iterable[Any], before: Iterable[Any]) -> bool:
    return all(map(is_, now, before))


class LayerCall:
    """The arguments of `ops.decoder_layers_on_host` that stay the same, for an x of `dtype`.

    Args:
        config: names the implementation of the layer's experts.
        eps: of the norms before, in and after the attention.
        tensors: the arguments weights and block, and the attention's sinks.
        choice: the last of the options.
    """

    def __init__(
        self,
        layer: nn.Module,
        config: Any,
        dtype: torch.dtype,
        eps: tuple[float, float, float],
        tensors: tuple[tuple[Any, ...], tuple[Any, ...], Tensor | None],
        choice: tuple[Any, ...],
    ) -> None:
        self.layer, self.config, self.dtype, self.eps, self.choice = layer, config, dtype, eps, choice
        self.weights, self.block, self.sinks = tensors
        self.attention: Any = layer._modules["self_attn"]
        self.implementation = config._experts_implementation
        self.snapshot = Snapshot(layer)
        self.follows = True  # the model has taken what was computed ahead

    def list_arguments(self) -> tuple[tuple[Any, ...], Tensor | None, tuple[Any, ...]]:
        return self.weights, None if self.sinks is None else self.sinks.float(), self.block

    def list_options(self, angles: int, length: int, window: int) -> tuple[Any, ...]:
        return angles, length, self.attention.scaling, window, *self.eps, self.choice

    def is_current(self, layer: nn.Module) -> bool:
        """Whether the layer is the one it was."""
        is_same = self.layer is layer and self.config._experts_implementation == self.implementation
        return is_same and self.snapshot.is_current()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of a cache find their calls themselves."""
        return type(None), ()


class Ahead:
    """What layers return that the first one of a cache has computed, while the forward of their model runs.

    `arguments` are those of the last layer with a window that computed its own results. Layers that were computed ahead
    must be called with the same as that of their window, and with the x that the layer before returned, unmodified.
    """

    def __init__(self) -> None:
        self.arguments: dict[int | None, dict[str, Any]] = {}
        self._results: dict[nn.Module, tuple[Tensor, int, Tensor, LayerCall, Any]] = {}

    def put(self, x: Tensor, y: Tensor, call: LayerCall, keeping: Any) -> None:
        """keeping: the layer of the cache, whose memory has the tokens, but not its length."""
        self._results[call.layer] = x, x._version, y, call, keeping
        call.follows = False

    def foresee(self, window: int | None, of: int | None) -> dict[str, Any] | None:
        """The arguments of the next layer with a window: those of `of`, but for the mask. None if its mask is not
        known."""
        own = self.arguments[of]
        if own.get("attention_mask") is None:
            return self.arguments.setdefault(window, own)
        if (arguments := self.arguments.get(window)) is None:
            return None
        mask = {"attention_mask": own["attention_mask"]}
        return arguments if _are_same(arguments | mask, own) else None

    def take(self, layer: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """What the layer returns for x, now with its tokens counted; else None."""
        window = read_window(layer._modules["self_attn"])
        if (found := self._results.pop(layer, None)) is not None:
            of, version, y, call, keeping = found
            if x is of and x._version == version and _are_same(arguments, self.arguments.get(window, {})):
                keeping.length += x.shape[1]
                call.follows = True
                return y
        self.arguments[window] = arguments
        return None


def read_window(attention: Any) -> int | None:
    """How many tokens an attention sees, if not all."""
    return getattr(attention, "sliding_window", None)


def _are_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return len(a) == len(b) and _are(map(a.get, b), b.values())
