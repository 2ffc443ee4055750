# SPDX-License-Identifier: BSD-3-Clause
"""A dense feed-forward network becomes the experts of an MoE layer: upcycle copies it into each, split_dense divides
its neurons. prior_approximate trains the router of a network that was split (FactorLLM)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import Finite, FloatTensor, NotNegative, Seed, Shape, Size, checked
from switchgear.convert.modules import (
    OURS,
    feed_forward,
    initialize_router,
    is_feed_forward,
    is_transformers,
    replace_layers,
)
from switchgear.convert.partitions import Method, Partition, partition
from switchgear.convert.plans import derive_seed, draw_noise
from switchgear.convert.recipes import plan_split, plan_upcycle
from switchgear.experts import Experts
from switchgear.integrations.blocks import FeedForward, write_network, write_shared
from switchgear.layers.heterogeneous import HeterogeneousExperts
from switchgear.modules import MoE
from switchgear.papers.parts.auxiliary import kl_divergence
from switchgear.papers.parts.selections import EqualTopK
from switchgear.routing.ranking import choose
from switchgear.routing.selection import TopK

UNIT = 16  # neurons; experts of different widths are padded with zeros to multiples, as the kernels' slices need

# Options of MoE that follow from the networks: their sizes, and which experts there are.
DECIDED = {
    "hidden_size", "intermediate_size", "num_experts", "activation", "gated", "bias", "device", "dtype", "widths",
    "null_experts", "copy_experts", "constant_experts", "shared_intermediate_size", "num_shared_experts", "shared_gate",
}  # fmt: skip


@checked
def upcycle(
    mlp: nn.Module | FeedForward,
    num_experts: Size = 8,
    top_k: Size = 2,
    *,
    layers: str | Sequence[int] = "all",
    router_init: NotNegative = 0.02,
    noise: NotNegative = 0.0,
    normalize: bool = True,
    seed: Seed = 0,
    family: str | None = None,
    **options: Any,
) -> Any:
    """Copies a dense feed-forward network into every expert of an MoE layer (Llama 3 Meets MoE, arXiv:2412.09952).

        moe = upcycle(layer.mlp, 8, 2)                     # an MoE with the same output
        done = upcycle(llama, 8, 2)                        # done.model is a MixtralForCausalLM with the same logits

    The output is the dense one for any router, since the weights of the chosen experts sum to 1: softmax over the
    chosen logits (Mixtral's; the same as a softmax over all that is normalised). normalize=False leaves the softmax
    over all experts, whose chosen weights sum to less than 1: the layer starts as a scaled copy.

    Args:
        mlp: a feed-forward module (returns an MoE), a Hugging Face model of a dense family (returns a Conversion with a
            new model of an MoE family; the old one is unchanged), or another model (its feed-forward modules are
            replaced in place; returns a Conversion, whose notes name dropout, which experts do not have).
        layers: "all", or the indices of the feed-forward layers that become experts; negative ones count from the end.
        router_init: standard deviation of the router's normal initial weights.
        noise: standard deviation of normal noise on each expert's weights; 0 for exact copies.
        seed: of the router and of the noise.
        family: model type of a Hugging Face result: "mixtral", "qwen2_moe" or "qwen3_moe". By default Mixtral for Llama
            and Mistral, Qwen2-MoE for Qwen2 (and for chosen layers of Llama), Qwen3-MoE for Qwen3. "switchgear"
            replaces the feed-forward modules of any model in place, by layers that only switchgear loads.
        options: of MoE, such as balance=[SwitchLoss(1e-2)] or capacity; none that the network decides, such as dtype or
            null_experts, and none for Hugging Face models.

    Raises:
        TypeError, ValueError: no feed-forward network is found, an option is out of range, or the family cannot express
            the result. Nothing is changed.
    """
    how: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k, "router_init": router_init, "noise": noise}

    def make_layer(dense: FeedForward, index: int) -> MoE:
        return _copy_into_layer(dense, normalize=normalize, seed=derive_seed(seed, index), **how, **options)

    def make_model(model: nn.Module) -> Any:
        from switchgear.convert.models import convert_model  # imports transformers

        _refuse_options([*options, *([] if normalize else ["normalize"])])
        return convert_model(model, plan_upcycle, layers=layers, family=family, seed=seed, **how)

    return _convert(mlp, layers, family, make_layer, make_model)


def _convert(
    mlp: nn.Module | FeedForward, layers: str | Sequence[int], family: str | None,
    make_layer: Callable[[FeedForward, int], MoE], make_model: Callable[[nn.Module], Any],
) -> Any:  # fmt: skip
    """A network becomes a layer, a model of transformers another one, and in other models layers are replaced."""
    if isinstance(mlp, FeedForward) or is_feed_forward(mlp):
        return make_layer(feed_forward(mlp), 0)
    if is_transformers(mlp) and family != OURS:
        return make_model(mlp)
    if family not in (None, OURS):
        raise ValueError(f"family: expected None for a {type(mlp).__name__}, which is no model of transformers")
    return replace_layers(mlp, layers, make_layer)


def _refuse_options(names: Sequence[str]) -> None:
    if names:
        raise ValueError(f"{names[0]}: expected none for a Hugging Face model, whose family decides it")


def _copy_into_layer(
    dense: FeedForward, num_experts: int, top_k: int, router_init: float, noise: float, seed: int, normalize: bool,
    **options: Any,
) -> MoE:  # fmt: skip
    if "select" not in options:
        options |= {"top_k": top_k, "normalize": normalize}
    moe = create_layer(dense, dense.intermediate_size, num_experts, options)
    write_networks(moe.experts, [dense] * num_experts)
    initialize_router(moe, router_init, seed)
    if noise:
        with torch.no_grad():
            for name, parameter in moe.experts.named_parameters():
                if not name.endswith("bias"):
                    parameter.add_((draw_noise(seed, name, parameter.shape) * noise).to(parameter))
    return moe


@checked
def split_dense(
    mlp: nn.Module | FeedForward,
    num_experts: Size,
    top_k: Size | None = None,
    *,
    layers: str | Sequence[int] = "all",
    family: str | None = None,
    method: Method | Partition = "random",
    shared: int | float = 0,
    importance: Tensor | Mapping[int, Tensor] | None = None,
    keep: Finite = 0.5,
    weights: Literal["equal", "softmax"] = "equal",
    rescale: bool = True,
    router_init: NotNegative = 0.02,
    seed: Seed = 0,
    **options: Any,
) -> Any:
    """An MoE layer whose experts are the neurons of a dense feed-forward network. With all experts (top_k = E) and
    equal weights it is that network; with fewer, the routed part is multiplied by E / K.

        moe = split_dense(layer.mlp, 8, 2, method="gradient", importance=scores, shared=1)

    Args:
        mlp: a LLaMA-like module, switchgear's SharedExperts, a plain network of two Linear layers, or a FeedForward;
            the result is an MoE. For a Hugging Face model of a dense family it is a Conversion with a new model whose
            experts are scaled to the family's weights, which sum to 1 (importance is then a dict by layer, and weights
            and options stay unset). In another model, feed-forward modules are replaced in place.
        num_experts, top_k: E and K; all experts by default.
        method: how neurons are divided, or a Partition.
            "random": LLaMA-MoE (arXiv:2406.16554). "contiguous": FactorLLM (arXiv:2408.11855).
            "cluster": balanced k-means of the rows of the gate, each of length 1 (LLaMA-MoE).
            "interleave": every E-th neuron, and the shared ones in each expert (MiniMoE, arXiv:2305.12129). A fraction
            `shared` is one of each expert, which has I / E neurons, as in the paper's code with 2/3; neurons that no
            expert has room for are left out. One expert is meant to run (top_k = 1, the default then), weighted by its
            softmax. With `importance` neurons are taken in its order.
            "gradient": the most important neurons are shared; with importance [I] each expert gets an equal share of
            the others. With [E,I] those are shared that are among the best of most experts, and the others go to the
            expert to which they matter: near the highest sum, where the paper's code is greedy (LLaMA-MoE v2,
            arXiv:2411.15708).
            "domain_masks": importance [E,I] of E domains. Each keeps its best `keep · I` neurons; those in all masks
            are the shared expert (Read-ME, arXiv:2410.19123). Neurons in no mask are dropped, widths differ, and
            nothing is rescaled: the shared expert and expert e are the dense network under mask e. top_k is 1 by
            default.
        shared: the shared expert, which all tokens use with weight 1: a whole number of experts
            (I = (E + shared) · width), or a fraction of the neurons. The most important ones if there is `importance`,
            else the first ones.
        importance: see neuron_importance.
        weights: "equal": each chosen expert has the same weight, with the gradient of its softmax (EqualTopK);
            "softmax": E · softmax over the chosen ones, the same on average. `select` of `options` replaces both.
        rescale: multiply by E / K. False leaves the sum of the chosen experts as it is.
        router_init: standard deviation of the router.
        seed: of the random partition, of k-means, and of the router.
        layers, family: of a model; see upcycle.
        options: of MoE, such as balance=[ImportanceLoad(1e-2)]; none that the network decides, such as dtype or widths.

    Raises:
        TypeError, ValueError: the module is no dense feed-forward network, or an option is out of range.
    """
    if isinstance(importance, Mapping) and (isinstance(mlp, FeedForward) or is_feed_forward(mlp)):
        raise TypeError("importance: expected a tensor for one feed-forward module, got a mapping by layer")

    def make_layer(dense: FeedForward, index: int) -> MoE:
        own = derive_seed(seed, index)
        if isinstance(method, Partition):
            parts = method
            _check_partition(parts, num_experts, dense.intermediate_size)
        else:
            given = importance.get(index) if isinstance(importance, Mapping) else importance
            parts = partition(dense, num_experts, method, shared=shared, importance=given, keep=keep, seed=own)
        chosen = top_k or (num_experts if parts.is_split else 1)
        if chosen > num_experts:  # EqualTopK does not know E
            raise ValueError(f"top_k: expected 1 to {num_experts} (num_experts), got {chosen}")
        select = _choose_selection(parts, num_experts, chosen, weights, rescale)
        return _build_layer(dense, parts, router_init, own, {"select": select, **options})

    def make_model(model: nn.Module) -> Any:
        from switchgear.convert.models import convert_model  # imports transformers

        _refuse_options([*options, *([] if weights == "equal" else ["weights"])])
        if isinstance(method, Partition):
            raise ValueError("method: expected a name for a Hugging Face model, got a Partition")
        if importance is not None and not isinstance(importance, Mapping):
            got = f"a Hugging Face model, got {type(importance).__name__}"
            raise TypeError(f"importance: expected a mapping from layers to tensors for {got}")
        default = 1 if method in ("domain_masks", "interleave") else num_experts
        return convert_model(
            model, plan_split, num_experts=num_experts, top_k=top_k or default, layers=layers, family=family,
            method=method, importance=importance, shared=shared, keep=keep, rescale=rescale, router_init=router_init,
            seed=seed,
        )  # fmt: skip

    return _convert(mlp, layers, family, make_layer, make_model)


def _choose_selection(parts: Partition, num_experts: int, top_k: int, weights: str, rescale: bool) -> Any:
    if not parts.is_split and not len(parts.shared):  # MiniMoE: whole networks, not parts of a sum
        return TopK(top_k, "softmax", normalize=top_k > 1)
    scale = num_experts / top_k if rescale and parts.is_split else 1.0
    if weights == "equal":
        return EqualTopK(top_k, scale)
    return TopK(top_k, "softmax", normalize=True, scale=scale * top_k)


def _check_partition(parts: Partition, num_experts: int, width: int) -> None:
    if parts.num_experts != num_experts:
        raise ValueError(f"method: expected a Partition into {num_experts} experts, got {parts.num_experts}")
    for index in (*parts.experts, parts.shared):
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= width):
            raise ValueError(f"method: expected a Partition of {width} neurons, got index {int(index.max())}")
    together = torch.cat((*parts.experts, parts.shared)).sort().values
    if parts.is_split and not torch.equal(together.cpu(), torch.arange(width)):
        raise ValueError(f"method: expected a Partition with each of {width} neurons once (is_split)")


def _build_layer(dense: FeedForward, parts: Partition, router_init: float, seed: int, options: dict[str, Any]) -> MoE:
    networks, shared = cut_network(dense, parts)
    widths = [network.intermediate_size for network in networks]
    is_ragged = len(set(widths)) > 1
    if is_ragged and dense.has_bias:
        raise ValueError("mlp: expected no biases for experts of different widths, got some")
    size, width = UNIT if is_ragged else widths[0], 0 if shared is None else shared.intermediate_size
    moe = create_layer(dense, size, len(networks), options, width)
    if is_ragged:
        layout = dense.options()
        layout.pop("bias")
        layout |= {name: options[name] for name in ("interleaved", "transposed", "limit") if name in options}
        moe.experts = HeterogeneousExperts(dense.hidden_size, widths, **layout)
        write_ragged(moe.experts, networks)
    else:
        write_networks(moe.experts, networks)
    if shared is not None:
        assert moe.shared_experts is not None
        write_shared(moe.shared_experts, shared)  # type: ignore[arg-type]
    initialize_router(moe, router_init, seed)
    return moe


def cut_network(dense: FeedForward, parts: Partition) -> tuple[list[FeedForward], FeedForward | None]:
    """The networks of the experts and of the shared expert. Their biases of the down projection add up to the dense
    network's: it is the shared expert's, or each of E experts has a share of 1 / E."""
    index = [part.to(dense.up.device) for part in parts.experts]
    networks = [dense.neurons(part) for part in index]
    if len(set(parts.widths)) > 1:
        networks = [network.padded(max(-(-network.intermediate_size // UNIT), 1) * UNIT) for network in networks]
    shared = dense.neurons(parts.shared.to(dense.up.device)) if len(parts.shared) else None
    if dense.down_bias is not None:
        share = 0.0 if shared is not None else 1 / len(networks) if parts.is_split else 1.0
        networks = [replace(network, down_bias=dense.down_bias * share) for network in networks]
    return networks, shared


def create_layer(
    dense: FeedForward, width: int, num_experts: int, options: Mapping[str, Any], shared_width: int = 0
) -> MoE:
    """An MoE with experts of `width` neurons like the dense network's, before its weights are copied. Raises ValueError
    for an option that the network decides."""
    if taken := next((name for name in options if name in DECIDED), None):
        raise ValueError(f"{taken}: expected none, since the dense networks decide it, got {options[taken]!r}")
    return MoE(
        dense.hidden_size, width, num_experts, shared_intermediate_size=shared_width, **dense.options(), **options
    )


@torch.no_grad()
def write_networks(experts: Any, networks: list[FeedForward]) -> None:
    """Copies networks of one width into Experts."""
    assert isinstance(experts, Experts)
    for expert, network in enumerate(networks):
        write_network(experts, expert, network)


@torch.no_grad()
def write_ragged(experts: HeterogeneousExperts, networks: list[FeedForward]) -> None:
    """Copies networks of the widths of the experts into their slices."""
    unit, slices = experts.unit, experts.slices
    for expert, network in enumerate(networks):
        first = int(experts.first_slice[expert])
        for place in range(network.intermediate_size // unit):
            index = torch.arange(place * unit, (place + 1) * unit, device=network.up.device)
            write_network(slices, first + place, network.neurons(index))


# ---- what trains and selects in a split network ----------------------------------------------------------------------


@checked
def prior_approximate(
    router_logits: Annotated[FloatTensor, Shape("T", "E")],
    expert_outputs: Annotated[FloatTensor, Shape("T", "E", "H")],
    dense_output: Annotated[FloatTensor, Shape("T", "H")],
    top_k: Size,
) -> Tensor:
    """KL(softmax(router_logits) || softmax(target)), a float32 scalar averaged over tokens: teaches the router of a
    split network which experts come closest to it (FactorLLM's prior-approximate loss, arXiv:2408.11855, in the
    direction of its code).

    The target [T,E] is 1 for the top_k experts with the least mean squared error to dense_output · K / E, else 0, and
    has no gradient.

    Args:
        router_logits: [T,E].
        expert_outputs: [T,E,H], of every expert.
        dense_output: [T,H], of the network that was split.
    """
    num_tokens, num_experts = router_logits.shape
    with torch.no_grad():
        share = dense_output.float() * (top_k / num_experts)
        errors = (expert_outputs.float() - share[:, None]).square().mean(-1)
        target = torch.zeros_like(errors).scatter_(1, choose(-errors, top_k).long(), 1.0)
        log_target = target.log_softmax(-1)
    log_router = router_logits.float().log_softmax(-1)
    return kl_divergence(log_router, log_target).sum() / max(num_tokens, 1)
