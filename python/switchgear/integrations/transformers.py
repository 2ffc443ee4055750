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

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from switchgear.adapters import wrappers
from switchgear.backends import warn_once
from switchgear.checks import checked
from switchgear.integrations import OLDEST_TRANSFORMERS, is_too_old, packed, saving
from switchgear.integrations.decoding import run_whole_layers
from switchgear.integrations.experts import (
    find_unreadable,
    has_post_norm,
    run_experts,
    skips_the_last_id,
)
from switchgear.integrations.forwards import (
    runs_own_forward,
)
from switchgear.integrations.linears import run_linears
from switchgear.integrations.modules import (
    CLASS_MARK,
    FP8_ADVICE,
    MARKS,
    NAME,
    DecoratedExperts,
    PatchedExperts,
    is_decorated,
    recognize,
    refuse_bypass,
    weights_in,
)
from switchgear.integrations.undecorated import PATCHES
from switchgear.integrations.whole_blocks import run_as_whole
from switchgear.utils.modules import extend_once
from switchgear.weights.state import extend

__all__ = [
    "Replacement",
    "accelerate",
    "experts",
    "has_post_norm",
    "is_decorated",
    "path_of",
    "register",
    "undo_accelerate",
    "weights_in",
]

if is_too_old(transformers.__version__):
    needed = ".".join(map(str, OLDEST_TRANSFORMERS))
    raise ImportError(f"expected transformers {needed} or newer, got {transformers.__version__}")

_logger = logging.getLogger(__name__)


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
    if (reason := find_unreadable(weights)) is not None:
        refuse_bypass(module, reason)
        warn_once(f"{type(module).__name__} keeps its own implementation: {reason}")
        if not skips_the_last_id(module):
            top_k_index, top_k_weights = top_k_index.masked_fill(ids < 0, 0), top_k_weights.masked_fill(ids < 0, 0)
        own: Callable[..., Tensor] = type(module).forward.__wrapped__  # as the decorator found it
        return own(module, hidden_states, top_k_index, top_k_weights)
    return run_experts(hidden_states, ids, top_k_weights, weights, module)


def _refuse_fp8(module: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(f"switchgear has no kernels for {type(module).__name__}: {FP8_ADVICE}")


def _extend_choice(original: Any) -> Any:
    @functools.wraps(original)
    def get_correct_experts_implementation(self: Any, requested_experts: str | None) -> Any:
        folder = type(self).__module__.removeprefix("transformers.models.").partition(".")[0]
        is_known = any(name.startswith(f"{folder}.") for name in PATCHES)
        if requested_experts == NAME and is_known and not self._can_set_experts_implementation():
            advice = "call switchgear.accelerate(model), which replaces their forward"
            warn_once(f"the experts of {folder} ignore experts_implementation={NAME!r}; {advice}")
        return original(self, requested_experts)

    return get_correct_experts_implementation


def register() -> None:
    """Makes "switchgear" a valid `experts_implementation`, with a warning from models that ignore it, and
    `save_pretrained` and `from_pretrained` save and load stored weights. Importing this module calls it."""
    saving.register()
    packed.register(lambda model: accelerate(model))  # which is defined below
    wrappers.register()
    extend_once(PreTrainedModel, "get_correct_experts_implementation", _extend_choice)
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

    name: str  # the module's name in model.named_modules()
    class_name: str
    path: str  # see path_of
    replaced: str  # what was changed, in words
    undo: Callable[[], None] = field(repr=False, compare=False)


@checked
def accelerate(
    model: nn.Module, *, whole_blocks: bool = False, linears: bool = False, whole_layers: bool = False
) -> list[Replacement]:
    """Runs every experts module of a loaded model on switchgear, including those that transformers would not dispatch.

    Decorated modules get `experts_implementation="switchgear"` in their own config. Modules of the classes in
    `undecorated.PATCHES` get a new `forward` on the instance. Parameters and state dict do not change. Decorated
    modules that share a config object change together: those of a model for a part of it, such as one layer, and those
    of all models made from one config object, as with transformers' own `set_experts_implementation`.

    Args:
        whole_blocks: also run blocks of known families (`whole_blocks.BLOCKS`) as a whole when no gradient is needed:
            router and experts without calls of their modules, unless these have hooks. It is faster for one token, and
            no bit of a token depends on its batch. The router's logits may differ from torch's in the last bit.
        linears: also multiply every nn.Linear of the model, and the weights of its routers, by `switchgear.linear`,
            forward and backward: a row then has the same bits in any batch. Results may differ from torch's in the
            last bits. Modules, names, parameters and hooks stay. Under torch.compile, autocast and torch.func, and on
            other devices, torch's products run.
        whole_layers: also run decoder layers of known forms (`layer_classes.py`) in a handful of kernel calls,
            attention over a cache that is written in place included, and all `linears`. `generate` needs no argument
            for it. No bit of a token depends on its batch, its padding, how the prompt is cut or the number of threads,
            nor on whether gradients are needed. A layer with hooks, adapters, another mask or cache runs the model's
            own code.

    Returns a Replacement for each module; `undo_accelerate(replacements)` of this module undoes the call.

    Raises:
        ValueError: the model has no experts module that switchgear supports.
    """
    replacements: list[Replacement] = []
    wrappers.register()
    try:
        _replace(model, replacements)
        if whole_blocks:
            for name, module in model.named_modules():
                if (undo := run_as_whole(module)) is not None:
                    kind = type(module).__name__
                    replacements.append(Replacement(name, kind, "whole block", "forward", undo))
        if linears or whole_layers:
            for name, module, undo in run_linears(model):
                replacements.append(Replacement(name, type(module).__name__, "linear", "forward", undo))
        if whole_layers:
            for name, module, undo in run_whole_layers(model):
                replacements.append(Replacement(name, type(module).__name__, "whole layer", "forward", undo))
    except BaseException:
        undo_accelerate(replacements)
        raise
    if not replacements:
        raise ValueError(_explain_nothing_found(model))
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
        found, kind = recognize(module), type(module).__name__
        undo: Callable[[], None] | None = None
        if isinstance(found, DecoratedExperts) and not found.is_fp8:
            before = earlier.setdefault(id(module.config), module.config._experts_implementation)
            undo, replaced = found.dispatch(before), f"experts_implementation, was {before!r}"
        elif isinstance(found, PatchedExperts):
            tried = any(done.class_name == kind and not done.path.startswith("eager") for done in replacements)
            undo, replaced = found.swap(trial=not tried), "forward"  # a trial may read the weights of all experts
        if found is not None and undo is not None:
            replacements.append(Replacement(name, kind, found.path(), replaced, undo))


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
    return _ask(module, "path") or "not an experts module that switchgear knows"


def _ask(module: nn.Module, question: str, *args: Any) -> Any:
    """The answer of a module of experts; None from other modules."""
    return None if (experts := recognize(module)) is None else getattr(experts, question)(*args)


extend("layout", lambda module: _ask(module, "layout"))
extend("hint", lambda module: _ask(module, "hint"))
extend("site", lambda path, module: _ask(module, "sites", path))
extend("reader", lambda module, name: _ask(module, "reads_borrowed", name) or None)


def _explain_nothing_found(model: nn.Module) -> str:
    known = [experts for module in model.modules() if (experts := recognize(module)) is not None]
    fp8 = sorted({type(e.module).__name__ for e in known if isinstance(e, DecoratedExperts)})
    if fp8:
        return f"model: {', '.join(fp8)} cannot run on switchgear; {FP8_ADVICE}"
    taken = sorted({type(e.module).__name__ for e in known if not runs_own_forward(e.module)})
    if taken:
        return f"model: expected experts that run their own forward, other code has replaced that of {', '.join(taken)}"
    return (
        f"model: expected routed experts, {type(model).__name__} has none that switchgear knows. Looked for modules "
        f"with the attributes {', '.join((*MARKS, CLASS_MARK))} (transformers' use_experts_implementation) and for the "
        f"classes {', '.join(name.split('.')[-1] for name in PATCHES)}"
    )
