# SPDX-License-Identifier: BSD-3-Clause
"""Linear layers whose weights `switchgear.store` can store."""

from __future__ import annotations

from torch import Tensor, nn

from switchgear.functional.products import linear
from switchgear.weights.form import Layout
from switchgear.weights.module import matrix_of, stored_of
from switchgear.weights.state import extend


class StoredLinear(nn.Linear):
    """What a torch.nn.Linear is while its weight is stored: `store` makes it one, `restore` makes it a Linear again.

    Buffers replace the parameter `weight`; `bias` is a parameter as before.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; see `switchgear.linear`."""
        return linear(input, matrix_of(self), self.bias)

    def extra_repr(self) -> str:
        stored = stored_of(self)
        return f"{super().extra_repr()}, {'' if stored is None else stored.form}"


_LAYOUT = Layout(("weight",), transposed=False, split_gates=False, stored_class=StoredLinear)

# Subclasses may compute anything else, and others read the weight of theirs.
extend("linear", lambda module: _LAYOUT if type(module) in (nn.Linear, StoredLinear) else None)
