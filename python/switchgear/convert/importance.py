# SPDX-License-Identifier: BSD-3-Clause
"""How much each neuron of a dense feed-forward network matters, for splits and domain masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import checked
from switchgear.convert.ffn import NAMES, is_feed_forward
from switchgear.convert.modules import call_model, choose_layers, find_dense_layers, watch_rows
from switchgear.trace.observe import inputs_of
from switchgear.utils.modules import set_eval

DOWN = tuple(dict.fromkeys(down for _, _, down in NAMES))


@checked
def neuron_importance(
    module: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor], *, mlp: nn.Module | None = None
) -> Tensor:
    """[I] float32: the first-order change of the loss if a neuron is removed for a token, |h · ∂loss/∂h| of its
    activation h, the mean over the tokens of all batches, in eval() and without padding (LLaMA-MoE v2,
    arXiv:2411.15708). A loss that sums over tokens gives the same for any division into batches.

    Args:
        module: computes the loss: loss(module(batch)); a mapping is passed as keywords.
        mlp: the feed-forward module inside it; by default `module` itself.

    Gradients of parameters are left as they are.
    """
    down = _find_down(module if mlp is None else mlp)
    name = next((name for name, part in module.named_modules() if part is down), None)
    if name is None:
        raise ValueError(f"mlp: expected a part of module, got another {type(mlp).__name__}")
    with set_eval(module):
        (total,) = _sum_gradients(module, batches, loss, {name: down})
    return total


@checked
def layer_importance(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor] | None = None,
    *,
    by: Literal["gradient", "activation"] = "gradient",
    layers: str | Sequence[int] = "all",
) -> dict[int, Tensor]:
    """The importance [I] float32 of the neurons of each dense feed-forward layer of a model, in one pass over batches
    in eval(): split_dense(model, 8, 2, method="gradient", importance=…). For a row per expert, and for domain masks,
    stack the results for each domain's texts; each row is a mean over tokens, so long domains count no more.

        scores = [layer_importance(llama, texts, by="activation") for texts in domains]
        masks = {layer: torch.stack([score[layer] for score in scores]) for layer in scores[0]}

    Args:
        batches: passed to the model; a mapping as keywords.
        loss: of the model's output; by default its attribute `loss`. Not used for activations.
        by: "gradient", see neuron_importance; "activation": the mean |activation| of the neuron. Both without padding
            (attention_mask 0).
        layers: indices of feed-forward layers; the keys of the result.

    Raises:
        ValueError: the model has no dense feed-forward layers, or no batch has tokens for one of them.
    """
    found = find_dense_layers(model)
    chosen = choose_layers(layers, len(found))
    downs = {name: _find_down(mlp) for name, mlp in (found[layer] for layer in chosen)}
    with set_eval(model):
        if by == "activation":
            totals = _sum_activations(model, batches, downs)
        else:
            totals = _sum_gradients(model, batches, _read_loss if loss is None else loss, downs)
    return dict(zip(chosen, totals, strict=True))


def _sum_gradients(
    module: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor], downs: Mapping[str, nn.Linear]
) -> list[Tensor]:
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(downs, 0)
    seen: list[tuple[str, Tensor, Tensor | None]] = []  # layer, activations, mask of this forward
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        inputs = stack.enter_context(inputs_of(module))
        for name, down in downs.items():

            def see(_: Any, args: tuple[Tensor, ...], name: str = name) -> Tensor:
                h = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()  # all before may be frozen
                seen.append((name, h, inputs.mask(name, h.shape[:-1].numel())))
                return h

            stack.callback(down.register_forward_pre_hook(see).remove)
        for batch in _require_batches(batches):
            for name, change, tokens in _sum_changes(loss(call_model(module, batch)), seen):
                totals[name] = totals.get(name, 0) + change
                counts[name] += tokens
    return _divide(totals, counts)


def _sum_changes(loss: Tensor, seen: list[tuple[str, Tensor, Tensor | None]]) -> list[tuple[str, Tensor, int]]:
    """|h · ∂loss/∂h| summed over the tokens of what `seen` has of a forward, and how many they are; empties it, so that
    nothing is kept."""
    found = list(seen)  # checkpointing adds more in the backward pass
    grads = torch.autograd.grad(loss, [h for _, h, _ in found]) if found else ()
    seen.clear()
    changes = []
    for (name, h, mask), grad in zip(found, grads, strict=True):
        rows = (h.detach().float() * grad.float()).abs().reshape(-1, h.shape[-1])
        rows = rows if mask is None else rows[mask.to(rows.device)]
        changes.append((name, rows.sum(0), len(rows)))
    return changes


@torch.no_grad()
def _sum_activations(model: nn.Module, batches: Iterable[Any], downs: Mapping[str, nn.Linear]) -> list[Tensor]:
    sums = {name: torch.zeros(down.in_features, device=down.weight.device) for name, down in downs.items()}
    counts = dict.fromkeys(downs, 0)

    def add(name: str, rows: Tensor) -> None:
        sums[name] += rows.float().abs().sum(0)
        counts[name] += len(rows)

    with watch_rows(model, downs, add):
        for batch in _require_batches(batches):
            call_model(model, batch)
    return _divide(sums, counts)


def _require_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches. Raises ValueError if there are none."""
    is_empty = True
    for batch in batches:
        is_empty = False
        yield batch
    if is_empty:
        raise ValueError("batches: expected at least one, got none")


def _divide(sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> list[Tensor]:
    """The means over the tokens of each layer."""
    if idle := [name for name, count in counts.items() if not count]:
        raise ValueError(f"batches: expected tokens for {idle[0] or 'mlp'}, got none")
    return [sums[name] / count for name, count in counts.items()]


def _read_loss(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            "loss: expected a function, or batches with labels, for which the model returns a loss; got none"
        )
    return found


def _find_down(mlp: nn.Module) -> nn.Linear:
    linear = next((part for name in DOWN if isinstance(part := getattr(mlp, name, None), nn.Linear)), None)
    if linear is None or not is_feed_forward(mlp):
        raise ValueError(f"mlp: expected a dense feed-forward module, got {type(mlp).__name__}")
    return linear
