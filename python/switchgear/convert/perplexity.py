# SPDX-License-Identifier: BSD-3-Clause
"""Routing without training: each sequence goes to the models under which it is most probable (MergeME,
arXiv:2502.00997)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.complaints import check_tensor
from switchgear.routing.context import Context, sequences
from switchgear.utils.modules import set_eval


@torch.no_grad()
def sequence_perplexities(models: Sequence[nn.Module], input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B,E] float32: the perplexity of each sequence under each causal language model, over its known tokens.

    models: called in eval() with input_ids, and with the mask as attention_mask if they take one; they return logits
    [B,S,V] or an object with them. mask [B,S]: False for padding. Padding before a token needs models that take one.
    """
    check_tensor("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected [B,S] with at least two tokens, got {list(input_ids.shape)}")
    if mask is not None:
        check_tensor("mask", mask)
        if mask.shape != input_ids.shape:
            raise ValueError(f"mask: expected {list(input_ids.shape)} like input_ids, got {list(mask.shape)}")
    counted = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    masks = [{} if mask is None else _masks(model, counted) for model in models]
    counted = counted[:, 1:] & counted[:, :-1]
    columns = []
    for model, named in zip(models, masks, strict=True):
        with set_eval(model):
            output: Any = model(input_ids, **named)
        logits = output if isinstance(output, Tensor) else output.logits
        losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
        losses = losses.view_as(counted).masked_fill(~counted, 0)
        columns.append((losses.sum(1) / counted.sum(1).clamp(min=1)).exp())
    return torch.stack(columns, 1)


def _masks(model: nn.Module, known: Tensor) -> dict[str, Tensor]:
    """The keyword arguments that keep padding from the known tokens [B,S]: those that the model's forward names."""
    taken = inspect.signature(model.forward).parameters
    if "attention_mask" in taken:
        positions = (known.cumsum(1) - 1).clamp(min=0)
        named = {"attention_mask": known.long(), "position_ids": positions}
        return {name: tensor for name, tensor in named.items() if name in taken}
    if (known[:, 1:] & ~known[:, :-1]).any():
        raise ValueError(
            f"mask: expected padding behind the tokens for {type(model).__name__}, which takes no attention_mask, "
            "got some before a token"
        )
    return {}


class SequenceLogits(nn.Module):
    """A score that each sequence has once, for all of its tokens: MoE(H, I, E, 2, score=SequenceLogits), then
    moe(x, fields={"sequence_logits": -sequence_perplexities(models, input_ids)}).

    sequence_logits [B,E]. Sequences come from the Context, or are the rows of hidden_states [B,S,H].
    """

    def __init__(self, hidden_size: int, num_experts: int, **_: Any) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [T,H] -> router_logits [T,E]."""
        logits: Tensor = context.require("sequence_logits", "SequenceLogits")
        if logits.dim() != 2 or logits.shape[1] != self.num_experts:
            raise ValueError(f"sequence_logits: expected [B, {self.num_experts}], got {list(logits.shape)}")
        sequence, count = sequences(context, len(x), x.device)
        if count != len(logits):
            raise ValueError(f"sequence_logits: expected {count} rows, one per sequence, got {len(logits)}")
        return logits.to(x.device)[sequence.long()]
