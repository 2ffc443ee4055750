# SPDX-License-Identifier: BSD-3-Clause
"""switchgear as an experts implementation of Hugging Face transformers.

Importing this module registers the name "switchgear":

    import switchgear.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="switchgear")
    model.set_experts_implementation("switchgear")  # or later

transformers ignores the name on models whose experts lack its decorator (llama4, jetmoe, dbrx, ...) and refuses it on
some wrappers. `accelerate(model)` handles those too, and returns what it replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ExpertsInterface

from switchgear.adapters import wrappers
from switchgear.adapters.sites import TARGETS, Site, refuse_wrapped
from switchgear.backends import warn_once
from switchgear.complaints import check_module
from switchgear.integrations import OLDEST_TRANSFORMERS, is_too_old, saving
from switchgear.integrations.bypass import refuse_bypass
from switchgear.integrations.experts import ExpertWeights, is_of, not_plain, run_experts, skips_the_last_id
from switchgear.integrations.forwards import runs_own_forward
from switchgear.integrations.gates import gate_of, own_gate
from switchgear.integrations.swap import is_swapped, obstacle, swap_forward
from switchgear.integrations.undecorated import PATCHES, patch_of
from switchgear.integrations.whole_blocks import join
from switchgear.weights import Layout, stored_of, weights_of
from switchgear.weights.state import extend

if is_too_old(transformers.__version__):
    needed = ".".join(map(str, OLDEST_TRANSFORMERS))
    raise ImportError(f"expected transformers {needed} or newer, got {transformers.__version__}")

NAME = "switchgear"
_logger = logging.getLogger(__name__)
# What use_experts_implementation sets on a module and on its class.
MARKS = ("config", "is_transposed", "has_bias")
CLASS_MARK = "_apply_gate"


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function that transformers calls in place of an experts module's forward.

    Args:
        module: an experts module whose class has the decorator `use_experts_implementation`.
        hidden_states: [T, H].
        top_k_index: [T, K] int64. Ids >= `module.num_experts` mark empty slots (expert parallelism's sentinels).
        top_k_weights: [T, K] of any float dtype; they need not sum to 1.

    Returns:
        [T, H] in the dtype of `hidden_states`: the K results, weighted and summed.
    """
    # int32 first saves a conversion in moe. Ids always fit: they index a router's logits.
    ids = torch.where(top_k_index < module.num_experts, top_k_index, -1).int()
    weights = weights_in(module)
    if (reason := not_plain(weights)) is not None:
        refuse_bypass(module, reason)
        warn_once(f"{type(module).__name__} keeps its own implementation: {reason}")
        if not skips_the_last_id(module):
            top_k_index, top_k_weights = top_k_index.masked_fill(ids < 0, 0), top_k_weights.masked_fill(ids < 0, 0)
        return _decorated_forward(module)(module, hidden_states, top_k_index, top_k_weights)
    return run_experts(
        hidden_states,
        ids,
        top_k_weights,
        weights,
        gate_of(module),
        own_gate(module),
        module.post_expert_norm if has_post_norm(module) else None,
    )


def _first(module: Any) -> str:
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def weights_in(module: Any) -> ExpertWeights:
    """The weights of a decorated experts module, as the kernels take them."""
    name = _first(module)
    gate_up_proj, down_proj = weights_of(module, Layout((name, "down_proj"), module.is_transposed, False))
    if not module.has_bias:
        return ExpertWeights(gate_up_proj, down_proj)
    return ExpertWeights(gate_up_proj, down_proj, getattr(module, f"{name}_bias"), module.down_proj_bias)


def _decorated_forward(module: Any) -> Callable[..., Tensor]:
    """The class's forward before `use_experts_implementation` wrapped it."""
    forward: Callable[..., Tensor] = type(module).forward.__wrapped__
    return forward


def _refuse_fp8(module: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(f"switchgear has no kernels for {type(module).__name__}: {_FP8_ADVICE}")


_FP8_ADVICE = (
    "load FP8 checkpoints with switchgear.integrations.published.load_published(path), which keeps them in FP8, "
    'or with FineGrainedFP8Config(dequantize=True) and experts_implementation="switchgear"'
)


def register() -> None:
    """Makes "switchgear" a valid `experts_implementation`, and `save_pretrained` save stored experts. Importing this
    module calls it."""
    saving.register()
    wrappers.register()
    ExpertsInterface.register(NAME, experts)
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    except ImportError:  # an older transformers without this interface
        return
    FP8ExpertsInterface.register(NAME, _refuse_fp8)  # otherwise the name passes at load and is a KeyError in forward


register()


# ---- accelerate ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replacement:
    """One experts module that now runs on switchgear."""

    name: str  # as in model.named_modules()
    class_name: str
    path: str  # see path_of
    replaced: str  # what was changed, in words
    undo: Callable[[], None] = field(repr=False, compare=False)


def accelerate(model: nn.Module, *, whole_blocks: bool = False) -> list[Replacement]:
    """Runs every experts module of a loaded model on switchgear, including those that transformers would not dispatch.

    Decorated modules get `experts_implementation="switchgear"` in their own config. Modules of the classes in
    `undecorated.PATCHES` get a new `forward` on the instance. Parameters and state dict do not change. Decorated
    modules that share a config object change together: those of a model for a part of it, such as one layer, and those
    of all models made from one config object, as with transformers' own `set_experts_implementation`.

    Args:
        whole_blocks: also run the blocks of OLMoE, Qwen3 MoE and Mixtral as a whole when no gradient is needed: router
            and experts without calls of their modules, unless these have hooks. It is faster for one token. The logits
            of the router may differ in the last bit.

    Returns a Replacement for each module; `undo_accelerate(replacements)` of this module undoes the call.

    Raises:
        ValueError: the model has no experts module that switchgear supports.
    """
    check_module("model", model)
    replacements: list[Replacement] = []
    wrappers.register()
    try:
        _replace(model, replacements)
        if whole_blocks:
            _join_blocks(model, replacements)
    except BaseException:
        undo_accelerate(replacements)
        raise
    if not replacements:
        raise ValueError(_nothing_found(model))
    for replacement in replacements:
        _logger.info("%s (%s): %s", replacement.name, replacement.class_name, replacement.path)
    return replacements


def _replace(model: nn.Module, replacements: list[Replacement]) -> None:
    earlier: dict[int, str | None] = {}  # modules of one model share a config
    module: Any
    for name, module in model.named_modules():
        # Parts of a module that runs as a whole are not run by themselves. If adapters wrap them, they are.
        if any(name.startswith(f"{o.name}.") and not o.path.startswith("eager") for o in replacements):
            continue
        if is_decorated(module) and not _is_fp8(module):
            before = earlier.setdefault(id(module.config), module.config._experts_implementation)
            replacements.append(_dispatch(name, module, before))
        elif patch_of(module) is not None and (undo := _swap(module, replacements)) is not None:
            replacements.append(Replacement(name, type(module).__name__, path_of(module), "forward", undo))


def _join_blocks(model: nn.Module, replacements: list[Replacement]) -> None:
    for name, module in model.named_modules():
        if (undo := join(module, weights_in)) is not None:
            replacements.append(Replacement(name, type(module).__name__, "whole block", "forward", undo))


def undo_accelerate(replacements: Iterable[Replacement]) -> None:
    """Undoes `accelerate`. What an earlier call of it replaced belongs to that call. Hooks and forwards of other code
    stay; a wrapper that has taken switchgear's forward for the module's own still calls it."""
    given: list[Any] = list(replacements) if isinstance(replacements, Iterable) else [None]
    if not all(isinstance(replacement, Replacement) for replacement in given):
        raise TypeError(f"replacements: expected the list of accelerate(model), got {replacements!r}")
    for replacement in reversed(given):
        replacement.undo()


def path_of(module: Any) -> str:
    """How an experts module runs now: "moe" (fused), "grouped_gemm" (around the model's own gate), "eager: …" (the
    model's own code, and why), or why it is not replaced."""
    if (patch := patch_of(module)) is not None:
        if not is_swapped(module):
            if runs_own_forward(module):
                return "not replaced: call switchgear.accelerate(model)"
            return "not replaced: other code has replaced its forward"
        reason = obstacle(module, patch)
        return patch.path(module) if reason is None else f"eager: {reason}"
    if not is_decorated(module):
        return "not an experts module that switchgear knows"
    if _is_fp8(module):
        return f"FP8 experts: {_FP8_ADVICE}"
    if module.config._experts_implementation != NAME:
        name = module.config._experts_implementation
        return f"not replaced: experts_implementation is {name!r}, call switchgear.accelerate(model)"
    if stored_of(module) is None:
        # FSDP, tensor and expert parallelism hold DTensors between forwards, and plain local tensors during one.
        local = (weight for weight in weights_in(module) if not isinstance(weight, DTensor))
        if (reason := not_plain(local)) is not None:
            return f"eager: {reason}"
    return "grouped_gemm" if gate_of(module) is None or has_post_norm(module) else "moe"


def _layout_of(module: Any) -> Layout | None:
    """For `store`: the layout of a decorated module on the fused kernel, or None."""
    if not is_decorated(module) or path_of(module) != "moe":
        return None
    gate = gate_of(module)
    assert gate is not None
    return Layout((_first(module), "down_proj"), module.is_transposed, gate.gated and not gate.interleaved)


def _hint_of(module: nn.Module) -> str | None:
    """For `store`: why an experts module has no layout, or None."""
    if patch_of(module) is None and not is_decorated(module):
        return None
    path = path_of(module)
    if patch_of(module) is not None and is_swapped(module):
        return f"{type(module).__name__} runs as {path}, but its class has no stored layout"
    return f"{type(module).__name__} runs as {path}" if path == "grouped_gemm" else path


extend("layout", _layout_of)
extend("hint", _hint_of)


# ---- adapters --------------------------------------------------------------------------------------------------------


def _sites_of(path: str, module: Any) -> list[Site] | None:
    """For `add_lora`: the projections of a module that runs on switchgear, or None."""
    patch = patch_of(module)
    if (patch is None and not is_decorated(module)) or (patch is not None and not is_swapped(module)):
        return None
    refuse_wrapped(path, module)
    if (how := path_of(module)) not in ("moe", "grouped_gemm"):
        raise ValueError(f"{f'model.{path}' if path else 'model'}: expected experts that run on switchgear, got {how}")
    if patch is None:
        layout = Layout((_first(module), "down_proj"), module.is_transposed, False)
        stored = stored_of(module)
        weights: Any = stored.weights(module) if stored is not None else _plain_views(module, layout)
        return [
            Site(path, module, name, target, weight, module.is_transposed, (), module, _guard)
            for name, target, weight in zip(layout.names, TARGETS, weights, strict=True)
        ]
    names = {id(part): name for name, part in module.named_modules(prefix=path)}
    sites = []
    for part in patch.sites(module):
        refuse_wrapped(names[id(part.module)], part.module)
        sites.append(Site(names[id(part.module)], *part, guarded=module, guard=_guard))
    return sites


def _plain_views(module: Any, layout: Layout) -> list[Tensor]:
    weights = [getattr(module, name) for name in layout.names]
    if (reason := not_plain(weights)) is not None:  # a DTensor, between forwards
        raise ValueError(f"model: expected experts with plain weights, got others: {reason}")
    return [weight.mT if layout.transposed else weight for weight in weights]


def _guard(module: Any, *_: Any) -> None:
    """A forward pre-hook of modules with adapters or experts that train alone."""
    if patch_of(module) is not None:
        if not is_swapped(module):
            refuse_bypass(module, path_of(module))
    elif module.config._experts_implementation != NAME:
        refuse_bypass(module, path_of(module))


def _reads_borrowed(module: Any, name: str) -> bool | None:
    """Whether a call of the module on switchgear reads what it borrows for its parameter `name`."""
    if patch_of(module) is not None:
        own = _READ_BY_THEMSELVES.get(type(module).__name__, ())
        reads = name in own and is_swapped(module) and not path_of(module).startswith("eager")
    else:
        own = _first(module), "down_proj"
        reads = is_decorated(module) and name in own and path_of(module) in ("moe", "grouped_gemm")
    return True if reads else None


# Classes with a patch that PEFT can wrap as a whole.
_READ_BY_THEMSELVES = {
    "JetMoeParallelExperts": ("weight",),
    "LongcatFlashExperts": TARGETS,
    "Step3p7Experts": TARGETS,
}

extend("site", _sites_of)
extend("reader", _reads_borrowed)


def is_decorated(module: nn.Module) -> bool:
    """Whether the module's class has transformers' decorator `use_experts_implementation`."""
    own = vars(module)  # getattr of a wrapper, as of torch.compile, answers for the module inside
    return all(mark in own for mark in MARKS) and hasattr(type(module), CLASS_MARK)


def has_post_norm(module: nn.Module) -> bool:
    """Whether an experts module normalises each expert's output before it is weighted."""
    return getattr(module, "has_post_expert_norm", False)


def _is_fp8(module: nn.Module) -> bool:
    return is_of(module, "FP8Experts")


def _dispatch(name: str, module: Any, before: str | None) -> Replacement:
    config = module.config
    config._experts_implementation_internal = NAME  # the public setter would also change sub-configs

    def undo() -> None:
        if before != NAME:
            config._experts_implementation_internal = before

    return Replacement(name, type(module).__name__, path_of(module), f"experts_implementation, was {before!r}", undo)


def _swap(module: nn.Module, replacements: list[Replacement]) -> Callable[[], None] | None:
    name = type(module).__name__
    tried = any(done.class_name == name and not done.path.startswith("eager") for done in replacements)
    return swap_forward(module, trial=not tried)  # one trial per class: it may read the weights of all experts


def _nothing_found(model: nn.Module) -> str:
    fp8 = sorted({type(module).__name__ for module in model.modules() if is_decorated(module) and _is_fp8(module)})
    if fp8:
        return f"model: {', '.join(fp8)} cannot run on switchgear; {_FP8_ADVICE}"
    known = [module for module in model.modules() if patch_of(module) is not None]
    taken = sorted({type(module).__name__ for module in known if not runs_own_forward(module)})
    if taken:
        return f"model: expected experts that run their own forward, other code has replaced that of {', '.join(taken)}"
    return (
        f"model: expected routed experts, {type(model).__name__} has none that switchgear knows. Looked for modules "
        f"with the attributes {', '.join((*MARKS, CLASS_MARK))} (transformers' use_experts_implementation) and for the "
        f"classes {', '.join(name.split('.')[-1] for name in PATCHES)}"
    )
