# SPDX-License-Identifier: BSD-3-Clause
"""Handover: how a pre-gate gets the hidden states of the block before."""

from __future__ import annotations

from torch import Tensor


class Handover:
    """The hidden states that a router passes on to the next one, within a forward."""

    def __init__(self, name: str) -> None:
        self.name = name  # of the block that takes them
        self.hidden_states: Tensor | None = None

    def take(self, like: Tensor) -> Tensor:
        """What the block before left, once; `like` is the input of the block that takes it."""
        hidden_states, self.hidden_states = self.hidden_states, None
        if hidden_states is None:
            raise ValueError(
                f"{self.name}: expected the block before to run first in each forward, got none (pre-gates exclude "
                "activation checkpointing of single blocks)"
            )
        if hidden_states.shape != like.shape:
            raise ValueError(
                f"hidden_states: expected {list(hidden_states.shape)} in {self.name}, as in the block before, got "
                f"{list(like.shape)}"
            )
        return hidden_states
