# SPDX-License-Identifier: BSD-3-Clause
"""switchgear.accelerate: what it replaces in a Hugging Face model, and what it does not change."""

import copy
import functools
import importlib.util
import runpy
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear import backends
from switchgear.integrations.forwards import is_swapped
from switchgear.integrations.modules import PatchedExperts
from switchgear.integrations.transformers import accelerate, path_of, undo_accelerate
from switchgear.integrations.undecorated import find_patch
from switchgear.utils.packages import is_installed
from tiny_models import build, example_inputs


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("model_type", ["mixtral", "llama4_text", "switch_transformers", "kimi_k25", "jetmoe"])
def test_accelerate_and_restore(model_type: str) -> None:
    model = build(model_type)
    inputs = example_inputs(model)
    keys, want = list(model.state_dict()), model(**inputs).logits
    replacements = accelerate(model)
    for replacement in replacements:
        module = model.get_submodule(replacement.name)
        assert type(module).__name__ == replacement.class_name
        assert path_of(module) == replacement.path
    assert list(model.state_dict()) == keys
    assert relative(model(**inputs).logits, want) < 1e-5
    undo_accelerate(replacements)
    assert all(path_of(model.get_submodule(r.name)).startswith("not replaced") for r in replacements)
    assert torch.equal(model(**inputs).logits, want)


def test_accelerate_twice_changes_nothing() -> None:
    model = build("llama4_text")
    first = accelerate(model)
    forward = model.model.layers[0].feed_forward.forward
    undo_accelerate(accelerate(model))
    assert model.model.layers[0].feed_forward.forward == forward
    undo_accelerate(first)
    assert "forward" not in vars(model.model.layers[0].feed_forward)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_calls_are_undone_in_any_order(order: tuple[int, int]) -> None:
    model = build("olmoe")
    config = model.model.layers[0].mlp.experts.config
    before = config._experts_implementation
    given = [accelerate(model), accelerate(model, whole_blocks=True)]
    for index in order:
        undo_accelerate(given[index])
    assert config._experts_implementation == before != "switchgear"
    assert all("forward" not in vars(module) for module in model.modules())


def test_wrong_arguments_are_named() -> None:
    with raises(TypeError, "model"):
        accelerate(42)  # type: ignore[arg-type]
    replacements = accelerate(build("olmoe"))
    for wrong in (None, replacements[0], [*replacements, 3]):
        with raises(TypeError, "replacements"):
            undo_accelerate(wrong)  # type: ignore[arg-type]


def test_accelerate_says_when_there_is_nothing() -> None:
    with raises(ValueError):
        accelerate(nn.Linear(2, 2))


def sample(module: nn.Module) -> tuple[Any, ...]:
    """Arguments for the forward of a class in the table."""
    patch = find_patch(module)
    assert patch is not None
    return patch.sample(module, torch.Generator().manual_seed(0))


def test_copies_run_their_own_weights() -> None:
    model = build("llama4_text")
    accelerate(model)
    clone = copy.deepcopy(model)
    nn.init.zeros_(clone.model.layers[0].feed_forward.experts.down_proj)
    inputs = example_inputs(model)
    assert relative(clone(**inputs).logits, model(**inputs).logits) > 1e-3


def test_swap_is_refused_where_a_class_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama4_text")
    moe = model.model.layers[0].feed_forward
    forward = type(moe).forward
    monkeypatch.setattr(type(moe), "forward", lambda self, x: (2 * forward(self, x)[0], forward(self, x)[1]))
    with (
        pytest.warns(UserWarning, match="Llama4TextMoe is left alone, it does not compute what switchgear expects"),
        raises(ValueError),
    ):
        accelerate(model)


def test_swap_is_refused_where_the_patch_gives_nan() -> None:
    _, module = swappable("llama4_text")
    patch = find_patch(module)
    assert patch is not None
    nan = patch._replace(forward=lambda module, weights, x: (x.reshape(-1, x.shape[-1]) * torch.nan, None))
    experts = PatchedExperts(module, nan)
    with pytest.warns(UserWarning, match="Llama4TextMoe is left alone, .*: difference nan"):
        assert experts.swap() is None
    nn.init.constant_(module.shared_expert.down_proj.weight, torch.inf)  # such weights compare with nothing
    undo = experts.swap()
    assert undo is not None
    undo()


def test_a_module_that_keeps_its_own_code_counts_as_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is hooked and runs as before; only the second shows that the class has changed."""
    model = build("llama4_text")
    first, second = (layer.feed_forward for layer in model.model.layers[:2])
    first.experts.register_forward_hook(lambda *_: None)
    forward = type(first).forward
    monkeypatch.setattr(type(first), "forward", lambda self, x: (3 * forward(self, x)[0], forward(self, x)[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerate(model)
    assert path_of(first) == "eager: experts has hooks"
    assert path_of(second).startswith("not replaced")


def test_trial_leaves_the_mode_alone() -> None:
    model = build("switch_transformers").train()
    model.encoder.block[0].layer[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    accelerate(model)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("model_type", "name"), [("llama4_text", "router"), ("switch_transformers", "expert_0.act")])
def test_trial_calls_no_hooks_of_parts(model_type: str, name: str) -> None:
    model, module = swappable(model_type)
    part, arguments, calls = module.get_submodule(name), sample(module), []
    part.register_forward_hook(lambda *_: calls.append("after"))
    part.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    accelerate(model)
    assert not calls
    module(*arguments)
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    ("model_type", "dropouts"),
    [
        ("switch_transformers", lambda experts: [expert.dropout for expert in experts.values()]),
        ("nllb-moe", lambda experts: [experts.token_dropout]),
    ],
)
def test_dropout_in_training(model_type: str, dropouts: Callable[[Any], list[nn.Dropout]]) -> None:
    """If everything is dropped, the output is zero; if nothing is dropped, it equals that of eager."""
    model = build(model_type)
    module: Any = model.get_submodule(accelerate(model)[0].name)
    arguments = sample(module)
    module.train()
    for dropout in dropouts(module):
        dropout.p = 1.0
    assert not module(*arguments).any()
    for dropout in dropouts(module):
        dropout.p = 0.0
    assert relative(module(*arguments), type(module).forward(module, *arguments)) < 1e-5


def test_adapters_on_single_experts_are_not_bypassed() -> None:
    """switch_transformers has one nn.Linear per expert; what wraps one must still be called."""
    model = build("switch_transformers")
    module: Any = model.get_submodule(accelerate(model)[0].name)
    arguments = sample(module)
    calls = []
    handle = module["expert_0"].wi.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="keeps its own implementation: wi has hooks"):
        module(*arguments)
    assert calls
    handle.remove()
    calls.clear()
    module(*arguments)
    assert not calls


class Doubled(nn.Module):
    """Stands in for an adapter that wraps a module."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any) -> Any:
        return 2 * self.base(*args)


def wrap(owner: nn.Module, name: str) -> None:
    setattr(owner, name, Doubled(owner.get_submodule(name)))


def hook(owner: nn.Module, name: str) -> None:
    owner.get_submodule(name).register_forward_hook(lambda module, args, output: 2 * output)


def replace_forward(owner: nn.Module, name: str) -> None:
    part = owner.get_submodule(name)
    forward = part.forward
    part.forward = lambda *args: 2 * forward(*args)


# The submodules whose parameters a swapped forward reads.
PARTS = [
    ("llama4_text", "experts"), ("jetmoe", "input_linear"), ("jetmoe", "output_linear"), ("dbrx", "mlp"),
    ("switch_transformers", "expert_0"), ("nllb-moe", "expert_1"), ("vitpose_backbone", "1"),
]  # fmt: skip


changes_of_parts = pytest.mark.parametrize(
    ("model_type", "name", "change"),
    [
        (model_type, name, change)
        for model_type, name in PARTS
        for change in (hook, replace_forward, wrap)
        if (model_type, change) != ("dbrx", wrap)  # the class itself reads weights of its part: it cannot be wrapped
    ],
)


@changes_of_parts
def test_what_wraps_a_part_before_the_swap_is_called(
    model_type: str, name: str, change: Callable[[nn.Module, str], None]
) -> None:
    model = build(model_type)
    modules = (module for module in model.modules() if find_patch(module) is not None)
    module: Any = next(module for module in modules if name in module._modules)
    arguments = sample(module)
    before = _tensor(module(*arguments))
    change(module, name)
    want = _tensor(module(*arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerate(model)
        assert path_of(module).startswith("eager: ")
        got = _tensor(module(*arguments))
    assert relative(got, want) < 1e-5  # parts of JetMoE's experts run on switchgear by themselves
    assert relative(got, before) > 0.01


@changes_of_parts
def test_what_wraps_a_part_after_the_swap_is_called(
    model_type: str, name: str, change: Callable[[nn.Module, str], None]
) -> None:
    model = build(model_type)
    replacement = next(r for r in accelerate(model) if name in dict(model.get_submodule(r.name).named_children()))
    module: Any = model.get_submodule(replacement.name)
    arguments = sample(module)
    kind = type(module.get_submodule(name)).__name__
    before = _tensor(module(*arguments))
    change(module, name)
    reasons = {hook: f"{name} has hooks", replace_forward: f"the forward of {name} was replaced"}
    assert path_of(module) == f"eager: {reasons.get(change, f'{name} is a test_accelerate Doubled, not a {kind}')}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = _tensor(module(*arguments))
    assert torch.equal(got, _tensor(type(module).forward(module, *arguments)))
    assert relative(got, before) > 0.01


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def swappable(model_type: str) -> tuple[nn.Module, Any]:
    """A model, and its first module of a class in the table."""
    model = build(model_type)
    return model, next(module for module in model.modules() if find_patch(module) is not None)


@pytest.mark.parametrize(
    "order",
    [
        "hook swap undo remove", "hook swap remove undo", "swap hook undo remove", "swap hook remove undo",
        "swap hook undo swap remove",
    ],
)  # fmt: skip
@pytest.mark.parametrize("model_type", ["step3p7", "llama4_text", "jetmoe", "dbrx", "switch_transformers"])
def test_hooks_of_accelerate_come_and_go(model_type: str, order: str) -> None:
    hooks = pytest.importorskip("accelerate", reason="accelerate is not installed").hooks

    class Half(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Tensor:
            return _tensor(output) / 2

    model, module = swappable(model_type)
    arguments = sample(module)
    want = _tensor(module(*arguments))
    hooked, swapped, given = False, False, []
    for event in order.split():
        if event == "hook":
            hooks.add_hook_to_module(module, Half())
        elif event == "swap":
            given = accelerate(model)
        elif event == "undo":
            undo_accelerate(given)
        else:
            hooks.remove_hook_from_module(module)
        hooked = event == "hook" or (hooked and event != "remove")
        swapped = event == "swap" or (swapped and event != "undo")
        assert is_swapped(module) == swapped
        got = _tensor(module(*arguments)) * (2 if hooked else 1)
        assert relative(got, want) < 1e-5 if swapped else torch.equal(got, want)


@pytest.mark.parametrize("order", [("offload", "swap"), ("swap", "offload")])
def test_experts_that_accelerate_offloads(order: tuple[str, str]) -> None:
    library = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = build("step3p7")
    inputs = example_inputs(model)
    want = model(**inputs).logits
    given = []
    for event in order:
        if event == "swap":
            given = accelerate(model)
        else:
            library.cpu_offload(model, torch.device("cpu"))
    assert relative(model(**inputs).logits, want) < 1e-5
    undo_accelerate(given)
    assert torch.equal(model(**inputs).logits, want)


def test_a_forward_that_other_code_has_replaced_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned_about", set())
    model, module = swappable("step3p7")
    for other in model.modules():
        if type(other) is type(module):
            other.forward = functools.partial(lambda forward, *args: 2 * forward(*args), other.forward)
    arguments, replaced = sample(module), module.forward
    want = module(*arguments)
    with (
        pytest.warns(UserWarning, match="Step3p7Experts is left alone, other code has replaced its forward"),
        raises(ValueError),
    ):
        accelerate(model)
    assert path_of(module) == "not replaced: other code has replaced its forward"
    assert module.forward is replaced
    assert torch.equal(module(*arguments), want)


def test_restore_leaves_what_has_wrapped_a_swap() -> None:
    model, module = swappable("step3p7")
    arguments = sample(module)
    want = 2 * module(*arguments)
    given = accelerate(model)
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)
    undo_accelerate(given)
    assert relative(module(*arguments), want) < 1e-5


def test_a_second_restore_changes_nothing() -> None:
    model, module = swappable("step3p7")
    given = accelerate(model)
    undo_accelerate(given)
    accelerate(model)
    undo_accelerate(given)
    assert is_swapped(module)


@pytest.mark.parametrize("model_type", ["llama4_text", "jetmoe", "dbrx", "longcat_flash", "step3p7"])
def test_parametrised_after_the_swap(model_type: str) -> None:
    model = build(model_type)
    module: Any = model.get_submodule(accelerate(model)[0].name)
    path, patch = path_of(module), find_patch(module)
    assert patch is not None
    arguments = patch.sample(module, torch.Generator().manual_seed(0))
    before = _tensor(module(*arguments))
    for part in list(module.modules()):
        for name in [n for n, p in part._parameters.items() if p is not None and "router" not in n and p.dim() >= 2]:
            nn.utils.parametrize.register_parametrization(part, name, Times())
    assert path_of(module) == path
    got = _tensor(module(*arguments))
    assert relative(got, _tensor(type(module).forward(module, *arguments))) < 1e-5
    assert relative(got, before) > 0.01
    factors = [p for n, p in module.named_parameters() if n.endswith(".factor")]
    gradients = torch.autograd.grad(got.sum(), factors, allow_unused=True)
    assert sum(gradient is not None for gradient in gradients) >= 2


class Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def test_nothing_is_replaced_where_a_trial_fails_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("jetmoe")
    calls = []

    swap = PatchedExperts.swap

    def run_out(experts: PatchedExperts, trial: bool) -> Any:
        calls.append(experts)
        if len(calls) == 3:
            raise MemoryError
        return swap(experts, trial)

    monkeypatch.setattr(PatchedExperts, "swap", run_out)
    with pytest.raises(MemoryError):
        accelerate(model)
    assert len(calls) == 3
    assert not any("forward" in vars(module) for module in model.modules())


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "switchgear.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)  # import raises ImportError
    wanted = r"^switchgear\.accelerate: needs transformers .*; pip install 'switchgear\[transformers\]'$"
    with pytest.raises(ImportError, match=wanted):
        _ = switchgear.accelerate


@pytest.mark.parametrize("stub", [None, types.ModuleType("transformers")])
def test_a_stub_of_transformers_is_none(stub: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests and builds of documentation have: switchgear can be imported beside it."""
    monkeypatch.setitem(sys.modules, "transformers", stub)
    assert not is_installed("transformers")


def test_a_star_import_needs_no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    names = runpy.run_path(switchgear.__file__)["__all__"]
    assert set(switchgear.__all__) - set(names) == {"accelerate", "load_gguf", "save_gguf", "save_gguf_adapter"}
