# SPDX-License-Identifier: BSD-3-Clause
"""Conversions of whole Hugging Face models in memory. The result is a model of an unmodified family of transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import transformers
from torch import Tensor

from switchgear.convert.plans import Plan, StateDict
from switchgear.convert.recipes import split_plan, upcycle_plan
from switchgear.convert.result import Conversion, Converted


def upcycle_model(
    model: Any, *, num_experts: int, top_k: int, layers: str | Sequence[int], router_init: float, noise: float,
    seed: int, family: str | None,
) -> Conversion:  # fmt: skip
    """See upcycle."""
    plan = upcycle_plan(
        config_of(model), tensors_of(model), num_experts=num_experts, top_k=top_k, layers=layers,
        router_init=router_init, noise=noise, seed=seed, family=family,
    )  # fmt: skip
    return built(model, plan)


def split_model(
    model: Any, *, num_experts: int, top_k: int, layers: str | Sequence[int] = "all", family: str | None = None,
    **options: Any,
) -> Conversion:  # fmt: skip
    """See split_dense."""
    plan = split_plan(
        config_of(model), tensors_of(model), num_experts=num_experts, top_k=top_k, layers=layers, family=family,
        **options,
    )  # fmt: skip
    return built(model, plan)


def config_of(model: Any) -> dict[str, Any]:
    """All fields of the config, with the architecture of the model."""
    config: dict[str, Any] = model.config.to_dict()
    return {**config, "architectures": [type(model).__name__]}


def tensors_of(model: Any) -> StateDict:
    """The tensors of the state dict, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return StateDict({key: tensor for key, tensor in model.state_dict().items() if key not in tied})


def built(model: Any, plan: Plan) -> Conversion:
    """A new model of the plan's config with its tensors, in the mode, dtype and on the device of the old one."""
    config = transformers.AutoConfig.for_model(**plan.config)
    made_class = getattr(transformers, plan.config["architectures"][0])
    like: Tensor = next(model.parameters())
    state = {item.key: _fitting(item.make(), item.shape) for item in plan.items}
    made = made_class.from_pretrained(None, config=config, state_dict=state, dtype=like.dtype)
    made = made.to(like.device).train(model.training)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    layers = tuple(Converted(*layer) for layer in plan.layers)
    return Conversion(made, layers, plan.notes)


def _fitting(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise AssertionError(f"a tensor of shape {list(shape)} was planned, {list(tensor.shape)} was made")
    return tensor.contiguous()
