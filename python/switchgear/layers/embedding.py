# SPDX-License-Identifier: BSD-3-Clause
"""Embeddings whose table stays in the blocks of a GGUF file."""

from __future__ import annotations

from torch import Tensor, nn

from switchgear.reference import gguf
from switchgear.weights.form import Layout
from switchgear.weights.module import matrix_of, stored_of
from switchgear.weights.state import extend
from switchgear.weights.weight import Weight


class StoredEmbedding(nn.Embedding):
    """What a torch.nn.Embedding is while its weight is stored in a GGUF type, as `load_gguf` makes it: a call decodes
    the rows that it looks up. `restore` makes it an Embedding again.

    Buffers replace the parameter `weight`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[...] integers -> [..., embedding_dim] in the weight's dtype."""
        weight = matrix_of(self)
        assert isinstance(weight, Weight)
        return gguf.decode(weight.format, weight.data[0].flatten(0, 1)[input]).to(weight.dtype)

    def extra_repr(self) -> str:
        stored = stored_of(self)
        return f"{super().extra_repr()}, {'' if stored is None else stored.form}"


_LAYOUT = Layout(("weight",), transposed=False, split_gates=False, stored_class=StoredEmbedding)

extend("embedding", lambda module: _LAYOUT if type(module) in (nn.Embedding, StoredEmbedding) else None)
