# SPDX-License-Identifier: BSD-3-Clause
"""A text embedding from the router's weights (MoEE, arXiv:2410.10814): no training, next to the hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import checked
from switchgear.trace import observe


@dataclass(frozen=True)
class RoutingEmbedding:
    """The embeddings of N texts. routing has the softmax; MoEE's code has raw logits for OLMoE and Qwen1.5-MoE."""

    routing: Tensor  # [N, Σ E]: the softmax over all experts, layer after layer
    hidden: Tensor | None  # [N,H]: the last hidden state of the same token, if the model returns it

    def similarity(self, other: RoutingEmbedding, alpha: float = 1.0) -> Tensor:
        """cos(hidden, hidden') + alpha · cos(routing, routing') of all pairs, [N,N'], MoEE's weighted sum; only the
        second term if a side has no hidden state."""
        result = _compute_cosines(self.routing, other.routing)
        if self.hidden is None or other.hidden is None:
            return result
        return _compute_cosines(self.hidden, other.hidden) + alpha * result

    def standardize(self) -> RoutingEmbedding:
        """The z-scores of each feature over the N texts, as MoEE's code takes before any similarity: minus the mean,
        divided by the unbiased standard deviation plus 1e-8.

        Raises:
            ValueError: fewer than two texts, which have no deviation.
        """
        if len(self.routing) < 2:
            raise ValueError(f"routing: expected at least 2 texts, got {len(self.routing)}")
        hidden = None if self.hidden is None else _compute_scores(self.hidden)
        return RoutingEmbedding(_compute_scores(self.routing), hidden)

    @property
    def concatenated(self) -> Tensor:
        """Both parts as unit vectors side by side, [N, H + Σ E], for an index of vectors: the dot product of two is the
        weighted sum with alpha 1. MoEE's other form concatenates the parts as they are."""
        parts = [self.routing] if self.hidden is None else [self.hidden, self.routing]
        return torch.cat([nn.functional.normalize(part.float(), dim=-1) for part in parts], -1)


def prompt_eol(text: str) -> str:
    """PromptEOL (arXiv:2307.16645), the prompt whose last token is embedded: MoEE finds it better than the bare text.
    As in its code, the text ends with a full stop if it has no mark at its end, and has no double quotes or
    underscores."""
    stop = "" if not text or text[-1] in ".?!\"'" else "."
    sentence = (text + stop).replace('"', "'").replace("_", " ")
    return f'This sentence : "{sentence}" means in one word:"'


@checked
@torch.no_grad()
def routing_embedding(
    model: nn.Module, inputs: Tensor | Mapping[str, Any], token: Literal["last", "mean"] = "last"
) -> RoutingEmbedding:
    """Embeds a batch of N texts.

        batch = tokenizer([prompt_eol(text) for text in texts], padding=True, return_tensors="pt")
        similarity = routing_embedding(model, batch).similarity(routing_embedding(model, queries))

    Args:
        model: with routers whose logits can be seen; see `trace.observe`.
        inputs: its keyword arguments, or its one tensor [N,S,…]. attention_mask [N,S] marks padding, on either side.
        token: "last", of the text, or "mean" of its tokens.

    Raises:
        ValueError: a layer hides its logits, or does not see one row per token.
    """
    arguments = {} if isinstance(inputs, Tensor) else dict(inputs)
    first = inputs if isinstance(inputs, Tensor) else _find_tokens(inputs)
    weights = _weigh_tokens(first, arguments.get("attention_mask"), token)
    layers: list[Tensor] = []

    def see(name: str, seen: Any) -> None:
        logits = seen.router_logits
        if logits is None:
            raise ValueError(f"model: expected routers whose logits can be seen, got {name}")
        if logits.shape[0] != weights.numel():
            raise ValueError(f"inputs: expected {weights.numel()} tokens in {name}, got {logits.shape[0]}")
        layers.append(_weigh(logits.float().softmax(-1).view(*weights.shape, -1), weights))

    wants_hidden = "config" in vars(model) and isinstance(getattr(model.config, "model_type", None), str)
    extra = {"output_hidden_states": True} if wants_hidden else {}
    with observe(model, see):
        output = model(inputs, **extra) if isinstance(inputs, Tensor) else model(**{**arguments, **extra})
    hidden = _find_hidden(output)
    if hidden is not None:
        hidden = None if hidden.shape[:2] != weights.shape else _weigh(hidden.float(), weights)
    return RoutingEmbedding(torch.cat(layers, -1), hidden)


def _find_tokens(arguments: Mapping[str, Any]) -> Tensor:
    for value in (arguments.get("input_ids"), arguments.get("inputs_embeds"), *arguments.values()):
        if isinstance(value, Tensor) and value.dim() > 1:
            return value
    raise ValueError("inputs: expected a tensor [N,S] or [N,S,H] among them, got none")


def _weigh_tokens(first: Tensor, mask: Any, token: str) -> Tensor:
    """[N,S] float32: how much of each token is in the embedding."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        kept = mask.bool()
    else:
        kept = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    if token == "mean":
        return kept.float() / kept.sum(1, keepdim=True).clamp(min=1)
    places = torch.arange(1, kept.shape[1] + 1, device=kept.device) * kept
    return nn.functional.one_hot(places.argmax(1), kept.shape[1]).float()


def _weigh(rows: Tensor, weights: Tensor) -> Tensor:
    """[N,D] of rows [N,S,D]. Rows of weight 0 do not count, even if they are NaN (attention of padding may be)."""
    weights = weights.to(rows.device)[..., None]
    return (torch.where(weights > 0, rows, 0) * weights).sum(1)


def _find_hidden(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.dim() == 3 else None
    states = getattr(output, "hidden_states", None)
    last = states[-1] if states else getattr(output, "last_hidden_state", None)
    return last if isinstance(last, Tensor) and last.dim() == 3 else None


def _compute_scores(rows: Tensor) -> Tensor:
    return (rows - rows.mean(0)) / (rows.std(0) + 1e-8)


def _compute_cosines(first: Tensor, second: Tensor) -> Tensor:
    units = (nn.functional.normalize(side.float(), dim=-1) for side in (first, second))
    a, b = units
    return a @ b.T
