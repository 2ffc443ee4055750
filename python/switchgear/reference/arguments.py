# SPDX-License-Identifier: BSD-3-Clause
"""The arguments that a layer of experts has at every level: ops, native modules, derivatives and the specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from switchgear.checks import Finite, NotNegative
from switchgear.reference.activations import Activation
from switchgear.reference.checks import TopkIds, TopkWeights


class GluOptions(NamedTuple):
    """The options of the activation between the projections; `switchgear.glu` documents them."""

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.702  # only for swiglu_oai
    limit: float = 0.0  # 0: none

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments for `switchgear.glu` and `switchgear.moe`."""
        activation, gated, interleaved, alpha, limit = self  # torch.compile does not trace _asdict
        return {
            "activation": activation,
            "gated": gated,
            "interleaved": interleaved,
            "alpha": alpha,
            "limit": limit or None,
        }


class Layer(NamedTuple):
    """A layer of experts and the choices of tokens, without x. csrc/bindings.cpp reads the fields by their order, and
    the schemas of the ops list them by their names."""

    gate_up_proj: Sequence[Tensor]  # the tensors of a weight (formats.py)
    gate_up_form: Sequence[int]  # empty: plain, one tensor [E,N,C]
    down_proj: Sequence[Tensor]
    down_form: Sequence[int]
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    topk_ids: TopkIds
    topk_weights: TopkWeights
    activation: Activation
    gated: bool
    interleaved: bool
    alpha: Finite
    limit: NotNegative
    gate_up_adapter: Sequence[Tensor] | None = None  # a, b, scales and possibly ranks (adapters.py)
    down_adapter: Sequence[Tensor] | None = None
    dropout_seed: Tensor | None = None
    dropout: Sequence[float] = ()  # of both adapters; empty: none

    @property
    def options(self) -> GluOptions:
        return GluOptions(*self[8:13])


NUM_REQUIRED = len(Layer._fields) - len(Layer._field_defaults)
