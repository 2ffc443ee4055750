# SPDX-License-Identifier: BSD-3-Clause
"""Experts from dense models that were trained apart: Branch-Train-MiX (arXiv:2403.07816), Nexus (arXiv:2408.15901),
MergeME (arXiv:2502.00997). MergeME's routing without training: each sequence goes to the models under which it is most
probable."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import pad

from switchgear.checks import FiniteTensor, NotEmpty, NotNegative, Seed, Shape, Size, checked
from switchgear.convert.average import Merge, Merging
from switchgear.convert.modules import feed_forward, initialize_router, is_feed_forward, is_transformers
from switchgear.convert.split import create_layer, write_networks
from switchgear.experts import Experts
from switchgear.integrations.blocks import FeedForward, write_shared
from switchgear.layers.expand import appended
from switchgear.modules import MoE
from switchgear.papers.parts.scores import Domain
from switchgear.routing.context import Context, sequences
from switchgear.utils.modules import set_eval
from switchgear.weights.module import check_plain


@checked
def from_dense_experts(
    models: Annotated[Sequence[nn.Module | FeedForward], NotEmpty],
    top_k: Size = 2,
    *,
    shared: nn.Module | None = None,
    router: FiniteTensor | Literal["random", "hidden", "embedding", "zeros"] = "random",
    router_init: NotNegative = 0.02,
    prompts: Sequence[Tensor] | None = None,
    embeddings: Tensor | None = None,
    merge: Merge = "average",
    attention: Literal["merged", "experts", "shared_kv"] = "merged",
    base: nn.Module | None = None,
    weights: Sequence[float] | None = None,
    density: float = 0.2,
    seed: Seed = 0,
    layers: str | Sequence[int] = "all",
    family: str | None = None,
    **options: Any,
) -> Any:
    """An MoE whose expert e is the feed-forward network of model e. Everything else is merged.

        done = from_dense_experts([math, code, law], top_k=2, router="hidden", prompts=[m, c, l])     # a Mixtral

    Args:
        models: Hugging Face models of one dense family and size (returns a Conversion with a new model), or
            feed-forward modules (returns an MoE).
        shared: feed-forward modules only: the network of the shared expert, such as the seed model's (Nexus).
        router: "random" with standard deviation router_init; "zeros"; "hidden": row e is the direction of the mean
            input of the feed-forward layer over prompts[e], in the base model (or the first one); "embedding": the same
            of the embedded prompts, equal in all layers; a tensor [E,H] ([L,E,H] for models).
        prompts: input_ids [B,S] of each expert.
        embeddings: [E,D]: a Domain router over these embeddings instead (Nexus; feed-forward modules only).
        merge, base, weights, density, seed: how all other tensors are merged; see merge_models.
        attention: "merged" like all others; "experts" or "shared_kv": a soft MixtureOfAttention of the models'
            attention layers (BAM), which only switchgear loads.
        layers, family, options: see upcycle.

    Raises:
        TypeError, ValueError: models that differ in type, size or activation, or an option out of range.
    """
    if all(isinstance(model, FeedForward) or is_feed_forward(model) for model in models):
        if isinstance(router, str) and router in ("hidden", "embedding"):
            raise ValueError(f"router: expected random, zeros or a tensor for feed-forward modules, got {router!r}")
        return _layer(models, top_k, shared, router, router_init, embeddings, seed, options)
    if not all(is_transformers(model) for model in models):
        kinds = ", ".join(sorted({type(model).__name__ for model in models}))
        raise TypeError(f"models: expected Hugging Face models, or feed-forward modules, got {kinds}")
    if shared is not None or embeddings is not None or options:
        name = next(iter(options), "shared" if shared is not None else "embeddings")
        raise ValueError(f"{name}: expected none for Hugging Face models, no family of which expresses it")
    from switchgear.convert.models import collect_models  # imports transformers

    return collect_models(
        models, attention=attention, top_k=top_k, router=router, router_init=router_init, prompts=prompts, base=base,
        layers=layers, family=family, merging=Merging(merge, weights, density, 1.0, seed),
    )  # fmt: skip


def _layer(
    models: Sequence[nn.Module | FeedForward], top_k: int, shared: nn.Module | None, router: str | Tensor,
    router_init: float, embeddings: Tensor | None, seed: int, options: dict[str, Any],
) -> MoE:  # fmt: skip
    networks = [feed_forward(model, f"models[{index}]") for index, model in enumerate(models)]
    first = networks[0]
    for index, network in enumerate(networks):
        for name in ("hidden_size", "intermediate_size", "activation", "gated", "has_bias"):
            if getattr(network, name) != getattr(first, name):
                wanted, got = getattr(first, name), getattr(network, name)
                raise ValueError(f"models[{index}]: expected {name} {wanted} like the first, got {got}")
    of_shared = None if shared is None else feed_forward(shared, "shared")
    width = 0 if of_shared is None else of_shared.intermediate_size
    if embeddings is not None:
        options["score"] = partial(Domain, domain_embeddings=embeddings)
    elif "score" not in options and "select" not in options:
        options.setdefault("normalize", True)
    if "select" not in options:
        options["top_k"] = top_k
    moe = create_layer(first, first.intermediate_size, len(networks), options, width)
    write_networks(moe.experts, networks)
    if of_shared is not None:
        write_shared(moe.shared_experts, of_shared)  # type: ignore[arg-type]
    if isinstance(router, Tensor):
        if moe.gate.weight is None or moe.gate.weight.shape != router.shape:
            raise ValueError(f"router: expected [{len(networks)}, {first.hidden_size}], got {list(router.shape)}")
        with torch.no_grad():
            moe.gate.weight.copy_(router)
    else:
        initialize_router(moe, 0.0 if router == "zeros" else router_init, seed)
    return moe


def add_domain_expert(moe: MoE, mlp: nn.Module | Mapping[str, Tensor], embedding: Tensor) -> int:
    """Appends an expert to a layer with a Domain router, and returns its id (Nexus): its feed-forward network, and the
    embedding of its domain, from which the router computes its row. The logits of old experts do not change.

    Merge the other tensors with merge_models([old, new], weights=[n, 1]).

    Raises:
        TypeError, ValueError: another router, an expert of another shape or activation, an embedding of another size,
            experts that are not plain, a router with a part for E experts only, or a SwitchLoss with accumulate in the
            middle of a step. Nothing is changed.
    """
    experts: Any = moe.experts
    gate, score = moe.gate, moe.gate.score
    if not isinstance(score, Domain):
        raise ValueError(
            f"moe: expected a Domain router, got {type(score).__name__}; see MoE.add_expert for linear ones"
        )
    if type(experts) is not Experts:
        raise ValueError(f"moe: expected plain Experts in this process, got {type(experts).__name__}")
    check_plain("moe", experts)
    gate.check_resizable("moe")
    count = experts.num_experts + 1
    if count % gate.num_groups:
        raise ValueError(f"moe: expected a multiple of {gate.num_groups} groups of experts in all, got {count}")
    if isinstance(mlp, Mapping):
        given = mlp
    else:
        network = feed_forward(mlp)
        if network.activation != experts.activation:
            raise ValueError(f"mlp: expected activation {experts.activation!r}, got {network.activation!r}")
        given = network.expert(experts.interleaved)
    wanted = dict(experts.named_parameters(recurse=False))
    rows = {name: tensor.mT if experts.transposed and tensor.dim() == 2 else tensor for name, tensor in given.items()}
    if {name: row.shape for name, row in rows.items()} != {name: p.shape[1:] for name, p in wanted.items()}:
        shapes = {name: list(parameter.shape[1:]) for name, parameter in wanted.items()}
        raise ValueError(f"mlp: expected {shapes}, got { {name: list(row.shape) for name, row in rows.items()} }")
    if embedding.numel() != score.domain_embeddings.shape[1]:
        raise ValueError(f"embedding: expected [{score.domain_embeddings.shape[1]}], got {list(embedding.shape)}")
    grown = {name: appended(parameter.detach(), rows[name].detach()[None]) for name, parameter in wanted.items()}
    for name, tensor in grown.items():
        experts._parameters[name] = nn.Parameter(tensor, requires_grad=wanted[name].requires_grad)
    score.add_expert(embedding)
    if (bias := gate.e_score_correction_bias) is not None:
        gate.e_score_correction_bias = pad(bias, (0, 1))
    gate.resize_counts(count)
    experts.num_experts = gate.num_experts = count
    return int(count) - 1


class Projected(nn.Module):
    """An expert of another hidden size: out_proj(expert(in_proj(x))), with random projections that are to be trained
    (MergeME). Both are two Linear layers with a GELU between them.

    expert: a module of rows [T,inner_size].
    """

    @checked
    def __init__(
        self, expert: nn.Module, hidden_size: Size, inner_size: Size, *, width: int | None = None, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        width = max(hidden_size, inner_size) if width is None else width

        def projection(size_in: int, size_out: int) -> nn.Sequential:
            first = nn.Linear(size_in, width, device=device, dtype=dtype)
            return nn.Sequential(first, nn.GELU(), nn.Linear(width, size_out, device=device, dtype=dtype))

        self.in_proj, self.expert, self.out_proj = (
            projection(hidden_size, inner_size), expert, projection(inner_size, hidden_size),
        )  # fmt: skip
        self.hidden_size = hidden_size

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out_proj(self.expert(self.in_proj(x)))
        return y


class ModuleExperts(nn.Module):
    """Experts that are any modules of rows [T,H], such as Projected ones of other architectures, with the interface of
    Experts. They run one after another.

        moe.experts = ModuleExperts([mlp, Projected(other, 64, 96)], hidden_size=64)
    """

    @checked
    def __init__(self, modules: Annotated[Sequence[nn.Module], NotEmpty], hidden_size: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(modules)
        self.hidden_size, self.num_experts = hidden_size, len(modules)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden_states [..., H], topk_ids and topk_weights [..., K] -> [..., H]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids, weights = topk_ids.reshape(len(x), -1), topk_weights.reshape(len(x), -1)
        y = torch.zeros_like(x)
        for expert, module in enumerate(self.members):
            tokens, slots = (ids == expert).nonzero(as_tuple=True)
            if len(tokens):
                y = y.index_add(0, tokens, module(x[tokens]) * weights[tokens, slots, None].to(x.dtype))
        return y.view_as(hidden_states)


# ---- routing without training ----------------------------------------------------------------------------------------


@checked
@torch.no_grad()
def sequence_perplexities(
    models: Sequence[nn.Module],
    input_ids: Annotated[Tensor, Shape("B", "S")],
    mask: Annotated[Tensor, Shape("B", "S")] | None = None,
) -> Tensor:
    """[B,E] float32: the perplexity of each sequence under each causal language model, over its known tokens.

    models: called in eval() with input_ids, and with the mask as attention_mask if they take one; they return logits
    [B,S,V] or an object with them. mask [B,S]: False for padding. Padding before a token needs models that take one.
    """
    if input_ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected [B,S] with at least two tokens, got {list(input_ids.shape)}")
    counted = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    masks = [{} if mask is None else _make_masks(model, counted) for model in models]
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


def _make_masks(model: nn.Module, known: Tensor) -> dict[str, Tensor]:
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
