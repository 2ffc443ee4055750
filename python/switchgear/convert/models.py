# SPDX-License-Identifier: BSD-3-Clause
"""Conversions of whole Hugging Face models in memory. The result is a model of an unmodified family of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor

from switchgear.convert.attention import attention_from_experts
from switchgear.convert.average import Merging, read_state
from switchgear.convert.families import layers_of
from switchgear.convert.modules import Conversion, Converted, watch_rows
from switchgear.convert.plans import ConversionPlan, StateDict, derive_seed
from switchgear.convert.recipes import plan_experts
from switchgear.utils.modules import set_eval


def convert_model(model: Any, plan: Callable[..., ConversionPlan], **options: Any) -> Conversion:
    """A new model by a plan of recipes.py, whose options the public function has checked."""
    return build_model(model, plan(read_config(model), read_tensors(model), **options))


def read_config(model: Any) -> dict[str, Any]:
    """All fields of the config, with the architecture of the model."""
    config: dict[str, Any] = model.config.to_dict()
    return {**config, "architectures": [type(model).__name__]}


def read_tensors(model: Any) -> StateDict:
    """The tensors of the state dict, tied ones once. Raises ValueError for a model that computes with others."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return StateDict({key: tensor for key, tensor in read_state("model", model).items() if key not in tied})


def build_model(model: Any, plan: ConversionPlan) -> Conversion:
    """A new model of the plan's config with its tensors, in the mode and on the device of the old one. Raises
    ValueError for tensors of several dtypes, since transformers gives a model one."""
    dtype = _find_dtype(plan)
    config = transformers.AutoConfig.for_model(**plan.config)
    made_class = getattr(transformers, plan.config["architectures"][0])
    like: Tensor = next(model.parameters())
    state = {item.key: item.make().contiguous() for item in plan.items}
    if wrong := [item.key for item in plan.items if tuple(state[item.key].shape) != item.shape]:
        raise AssertionError(f"another shape of {wrong[0]} was planned than was made")
    made, info = made_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    tied = set(getattr(made, "all_tied_weights_keys", None) or ())
    if different := sorted({*info["missing_keys"], *info["unexpected_keys"]} - tied):
        raise ValueError(f"model: expected the tensors of {type(made).__name__}, got a difference in {different[0]}")
    made = made.to(like.device).train(model.training)
    made.config._name_or_path = model.config._name_or_path
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    layers = tuple(Converted(*layer) for layer in plan.layers)
    return Conversion(made, layers, plan.notes)


def _find_dtype(plan: ConversionPlan) -> torch.dtype:
    """The floating dtype that all tensors have."""
    first, *others = (item for item in plan.items if item.dtype.is_floating_point)
    for item in others:
        if item.dtype is not first.dtype:
            expected = f"tensors of one dtype, such as {first.dtype} of {first.key}"
            raise ValueError(f"model: expected {expected}, got {item.dtype} of {item.key}; convert.run keeps them")
    return first.dtype


def collect_models(
    models: Sequence[Any], *, top_k: int, router: str | Tensor, router_init: float, prompts: Sequence[Tensor] | None,
    base: Any, layers: str | Sequence[int], family: str | None, merging: Merging, attention: str = "merged",
) -> Conversion:  # fmt: skip
    """See from_dense_experts."""
    first = models[0] if base is None else base
    chosen = layers_of(read_config(first), layers)
    rows = compute_router_rows(first, len(models), chosen, router, prompts)
    plan = plan_experts(
        [(read_config(model), read_tensors(model)) for model in models],
        None if base is None else (read_config(base), read_tensors(base)),
        top_k=top_k, layers=layers, family=family, router=rows, router_init=0.0 if router == "zeros" else router_init,
        merging=merging, seed=merging.seed,
    )  # fmt: skip
    done = build_model(first, plan)
    if attention == "merged":
        return done
    mixtures = [
        attention_from_experts(
            [model.model.layers[layer].self_attn for model in models],
            shared_kv=attention == "shared_kv", router_init=router_init, seed=derive_seed(merging.seed, layer),
        )
        for layer in range(len(first.model.layers))
    ]  # fmt: skip
    for layer, mixture in zip(done.model.model.layers, mixtures, strict=True):  # type: ignore[union-attr, arg-type]
        layer.self_attn = mixture.train(done.model.training)
    note = f"attention: a mixture of {len(models)} layers ({attention}), which only switchgear loads"
    return replace(done, notes=(*done.notes, note))


@torch.no_grad()
def compute_router_rows(
    model: Any, num_experts: int, layers: Sequence[int], router: str | Tensor, prompts: Sequence[Tensor] | None
) -> dict[int, Tensor] | None:
    """The rows [E,H] of each layer's router, or None for random ones."""
    hidden = int(model.config.hidden_size)
    if isinstance(router, Tensor):
        shape = (len(layers), num_experts, hidden)
        if router.dim() == 2:
            router = router[None].expand(len(layers), -1, -1)
        if router.shape != shape:
            raise ValueError(f"router: expected {list(shape)} or {list(shape[1:])}, got {list(router.shape)}")
        return dict(zip(layers, router, strict=True))
    if router not in ("hidden", "embedding"):
        return None
    if prompts is None or len(prompts) != num_experts:
        got = "None" if prompts is None else f"{len(prompts)}"
        raise ValueError(
            f"prompts: expected input_ids of each of {num_experts} experts for router={router!r}, got {got}"
        )
    rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for ids in prompts:
        if router == "hidden":
            means = _mean_inputs(model, ids, layers)
        else:
            means = dict.fromkeys(layers, model.get_input_embeddings()(ids).float().flatten(0, -2).mean(0))
        for layer, mean in means.items():
            rows[layer].append(mean / mean.norm().clamp(min=1e-8))
    return {layer: torch.stack(found) for layer, found in rows.items()}


def _mean_inputs(model: Any, input_ids: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """The mean input [H] float32 of each feed-forward layer in eval(), which is what the layer's router will see."""
    found: dict[str, Tensor] = {}
    modules = {f"model.layers.{layer}.mlp": model.model.layers[layer].mlp for layer in layers}
    with set_eval(model), watch_rows(model, modules, lambda name, x: found.update({name: x.float().mean(0)})):
        model(input_ids)
    return dict(zip(layers, (found[name] for name in modules), strict=True))
