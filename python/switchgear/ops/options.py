# SPDX-License-Identifier: BSD-3-Clause
"""The options of the activation between an expert's projections, as one value."""

from __future__ import annotations

from typing import Any, NamedTuple


class GluOptions(NamedTuple):
    """The options in the order of the ops' arguments, `*options`; `switchgear.glu` documents them."""

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
