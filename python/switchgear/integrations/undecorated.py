# SPDX-License-Identifier: BSD-3-Clause
"""Experts of transformers models without the decorator: a table of forwards, swapped in one instance at a time.

Each entry computes what the class computes, from the class's own parameters. The class's routers stay, and so do their
hooks and losses. A swap is kept only if it agrees with the class on a few random rows: only the class's source defines
the result, and sources change.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear import functional
from switchgear.adapters.sites import TARGETS, Site
from switchgear.integrations.experts import ExpertWeights, list_tensors, project, run_experts
from switchgear.integrations.forwards import LINEAR, PartClass, borrow, get_part, name_model_class, unwrap_part
from switchgear.integrations.gates import find_gate
from switchgear.utils.modules import set_eval
from switchgear.weights import AdaptedWeight, stored_of
from switchgear.weights.adapted import adapted

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_TOKENS = 8  # of a trial


class Patch(NamedTuple):
    """How to run one class."""

    weights: Callable[[Any], Sequence[Any]]  # read once per forward; raises Bypassed for a wrapped submodule
    forward: Callable[..., Any]  # (module, weights, *arguments of the class's forward)
    sample: Callable[[Any, torch.Generator], tuple[Any, ...]]  # arguments for a trial
    has_choice: bool = True  # whether it belongs to an MoE block with a choice per token
    gate: str | None = None  # the submodule ("" is the module itself) whose gate may be fused
    sites: Callable[[Any], list[Site]] = lambda _: []  # those that can have adapters, without their paths
    borrows: tuple[str, ...] = ()  # parameters that PEFT may wrap on the module itself, which reads their factors

    def path(self, module: nn.Module) -> str:
        """ "moe" or "grouped_gemm", as `path_of` of transformers.py."""
        fused = self.gate is not None and find_gate(unwrap_part(module.get_submodule(self.gate))) is not None
        return "moe" if fused else "grouped_gemm"


# ---- experts stacked as [E, ...] -------------------------------------------------------------------------------------


def _step3p7(module: Any, weights: ExpertWeights, hidden_states: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
    ids = torch.where(ids < module.num_experts, ids, -1)
    return run_experts(hidden_states, ids, topk_weights, weights, module)


def _longcat(module: Any, weights: ExpertWeights, hidden_states: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
    routed = ids < module.num_routed_experts
    routed_ids = torch.where(routed, ids, -1)
    y = run_experts(hidden_states, routed_ids, topk_weights, weights, module)
    identity = topk_weights.masked_fill(routed, 0).sum(dim=-1, keepdim=True)  # the zero experts return their input
    return y + (hidden_states * identity).to(y.dtype)


def _llama4(module: Any, weights: ExpertWeights, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden_states.reshape(-1, module.hidden_dim)
    router_scores, router_logits = module.router(x)  # scores [T, E], 0 for unselected experts
    topk_weights, topk_ids = router_scores.topk(module.top_k, dim=-1)
    # The score scales the expert's input, so each choice becomes its own row.
    rows = (x[:, None] * topk_weights[..., None]).flatten(0, 1)
    ones = torch.ones_like(rows[:, :1])
    y = run_experts(rows, topk_ids.reshape(-1, 1), ones, weights, unwrap_part(module.experts))
    return module.shared_expert(x) + y.view(-1, module.top_k, module.hidden_dim).sum(dim=1), router_logits


def _jetmoe(module: Any, weights: ExpertWeights, layer_input: Tensor) -> Tensor:
    x = layer_input.flatten(0, 1)
    topk_ids, topk_weights = read_jetmoe(module.router(x), module.router.top_k)
    y = run_experts(x, topk_ids, topk_weights, weights, module)
    bias: Tensor = module.bias
    return y.view(layer_input.shape) + bias


def read_jetmoe(output: Any, top_k: int) -> tuple[Tensor, Tensor]:
    """ids and weights [T,K] in the output of the router, which has its choices by expert."""
    order, _, gates, sizes, _ = output
    counts = torch.tensor(sizes, device=order.device)
    by_expert = torch.repeat_interleave(torch.arange(len(sizes), device=order.device), counts)
    ids, weights = (torch.zeros_like(values).scatter(0, order, values) for values in (by_expert, gates))
    return ids.view(-1, top_k), weights.view(-1, top_k)


def _jetmoe_linear(module: Any, weights: Sequence[Tensor], inputs: Tensor, expert_size: list[int]) -> Tensor:
    offsets = torch.tensor([0, *itertools.accumulate(expert_size)], dtype=torch.int32, device=inputs.device)
    return project(inputs, weights[0], offsets)


def _dbrx(module: Any, weights: Sequence[Any], hidden_states: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
    x = hidden_states.reshape(-1, module.hidden_size)
    w1, v1, w2 = weights
    activation_fn = unwrap_part(module.mlp).activation_fn
    plan = functional.plan(ids, module.num_experts)
    gate = project(x, w1, plan.expert_offsets, token_indices=plan.token_indices)
    up = project(x, v1, plan.expert_offsets, token_indices=plan.token_indices)
    permuted_y = project(activation_fn(gate) * up, w2, plan.expert_offsets)
    y = functional.combine(permuted_y, plan, topk_weights).to(x.dtype)
    return y.view(hidden_states.shape[0], -1, x.shape[1])


# ---- one module per expert -------------------------------------------------------------------------------------------


class _Linears(NamedTuple):
    """The linear layers of all experts, by base pointer. Only their biases, [E, N] in all, are copied."""

    weight: list[Any]
    bias: list[Any]
    adapter: AdaptedWeight | None  # `weight` with its adapter

    def project(self, x: Tensor, plan: functional.Plan, token_indices: Tensor | None = None) -> Tensor:
        bias = torch.stack(self.bias) if self.bias else None
        y = project(x, self.weight, plan.expert_offsets, bias, token_indices)
        if self.adapter is None:
            return y
        a, b, scale = self.adapter.a, self.adapter.b, self.adapter.scale
        if self.adapter.dropout:
            x = x if token_indices is None else x[token_indices.clamp(min=0).long()]
            x, token_indices = F.dropout(x, self.adapter.dropout), None
        return y + scale * project(project(x, a, plan.expert_offsets, None, token_indices), b, plan.expert_offsets)


def _join(owner: nn.Module, layers: Sequence[Any], adapter: str) -> _Linears:
    weight = [layer.weight for layer in layers]
    both = adapted(owner, adapter, weight)
    bias = [layer.bias for layer in layers if layer.bias is not None]
    return _Linears(weight, bias, both if isinstance(both, AdaptedWeight) else None)


def _build_dense(
    expert_class: PartClass, names: tuple[str, str], forward: Callable[..., Any], sample: Callable[..., Any]
) -> Patch:
    """The entry of a class with a module per expert, whose linear layers have these names."""

    def weights(module: Any) -> Sequence[_Linears]:
        experts = [get_part(module, f"expert_{e}", expert_class) for e in range(module.num_experts)]
        return [_join(module, [get_part(expert, name, LINEAR) for expert in experts], name) for name in names]

    def sites(module: Any) -> list[Site]:
        found = []
        for name, target in zip(names, TARGETS, strict=True):
            linears = tuple(f"expert_{e}.{name}" for e in range(module.num_experts))
            weight = [module.get_submodule(linear).weight for linear in linears]
            found.append(Site("", module, name, target, weight, linears=linears))
        return found

    return Patch(weights, forward, sample, sites=sites)


def _run_dense(module: Any, weights: Sequence[_Linears], x: Tensor, plan: functional.Plan) -> Tensor:
    expert = module["expert_0"]  # all experts have the same activation and dropout
    h = weights[0].project(x, plan, plan.token_indices)
    return weights[1].project(expert.dropout(expert.act(h)), plan)


def _switch(
    module: Any, weights: Sequence[_Linears], hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    taken, ids = selected_experts.max(dim=-1)  # one-hot [T, 1, E]; all zeros for a token past its expert's capacity
    plan = functional.plan(torch.where(taken > 0, ids, -1), module.num_experts)
    permuted_y = _run_dense(module, weights, hidden_states, plan)
    return functional.combine(permuted_y, plan, routing_weights).to(hidden_states.dtype)


def _nllb(
    module: Any, weights: Sequence[_Linears], hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor
) -> Tensor:
    topk_weights, topk_ids = read_nllb(router_mask, router_probs, module.num_experts)
    plan = functional.plan(topk_ids, module.num_experts)
    permuted_y = _run_dense(module, weights, hidden_states, plan)
    kept = 1 - module.moe_token_dropout
    permuted_y = module.token_dropout(permuted_y) if module.training else permuted_y * kept
    return functional.combine(permuted_y, plan, topk_weights).to(hidden_states.dtype)


def read_nllb(router_mask: Tensor, router_probs: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Weights and ids [T,2]. The class uses router_mask [T,C] as expert ids and router_probs [T,C] as their weights.
    transformers 5.24 passes the one-hot mask of the first choice, so C = E and experts 0 and 1 serve every token.
    Checkpoints run that way, so we return the same. Ids repeat within a token; summing their weights leaves two."""
    by_expert = router_probs.new_zeros(len(router_probs), num_experts).scatter_add(1, router_mask, router_probs)
    weights, ids = by_expert.topk(min(2, num_experts), dim=-1)
    return weights, ids


def _vitpose(module: Any, weights: Sequence[_Linears], hidden_state: Tensor, indices: Tensor) -> Tensor:
    batch, length, _ = hidden_state.shape  # one expert per image: indices [B, 1, 1]
    plan = functional.plan(indices.reshape(batch, 1).expand(batch, length).reshape(-1, 1), module.num_experts)
    permuted_y = weights[0].project(hidden_state.flatten(0, 1), plan, plan.token_indices)
    return functional.combine(permuted_y, plan).view(batch, length, -1)


# ---- arguments for a trial -------------------------------------------------------------------------------------------


def _draw_x(module: Any, generator: torch.Generator, width: int) -> Tensor:
    return torch.randn(_TOKENS, width, generator=generator).to(next(module.parameters()))


def _draw_choices(module: Any, generator: torch.Generator, num_experts: int) -> tuple[Tensor, Tensor]:
    """Two distinct experts per token (one if there is one), with weights in (0, 1)."""
    scores = torch.rand(_TOKENS, num_experts, generator=generator)
    topk_weights, topk_ids = scores.topk(min(2, num_experts), dim=-1)
    like = next(module.parameters())
    return topk_ids.to(like.device), topk_weights.to(like)


def sample_topk(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module.gate_up_proj.shape[-1])
    return x, *_draw_choices(module, generator, module.num_experts)


def sample_longcat(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module.hidden_size)
    return x, *_draw_choices(module, generator, module.total_experts)


def sample_dbrx(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module.hidden_size)
    return x[None], *_draw_choices(module, generator, module.num_experts)


def sample_jetmoe_linear(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    ids = torch.randint(module.num_experts, (_TOKENS,), generator=generator)
    expert_size = torch.bincount(ids, minlength=module.num_experts).tolist()
    return _draw_x(module, generator, module.input_size), expert_size


def sample_switch(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module["expert_0"].wi.in_features)
    ids, topk_weights = _draw_choices(module, generator, module.num_experts)
    selected = F.one_hot(ids[:, :1], module.num_experts)
    selected[0] = 0  # a token past capacity
    return x, selected, topk_weights[:, :1]


def sample_nllb(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module["expert_0"].fc1.in_features)
    ids, topk_weights = _draw_choices(module, generator, module.num_experts)
    router_probs = topk_weights.new_zeros(_TOKENS, module.num_experts).scatter(1, ids, topk_weights)
    return x, F.one_hot(ids[:, 0], module.num_experts), router_probs


def sample_vitpose(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    x = _draw_x(module, generator, module[0].in_features)
    indices = torch.randint(module.num_experts, (2, 1, 1), generator=generator)
    return x.view(2, _TOKENS // 2, -1), indices.to(x.device)


# ---- the table -------------------------------------------------------------------------------------------------------


def _stacked_sites(module: Any) -> list[Site]:
    return [Site("", module, name, name, getattr(module, name)) for name in TARGETS]


def _build_weights(sites: Callable[[Any], list[Site]], **wrapped: PartClass) -> Callable[[Any], Sequence[Any]]:
    """Reads the weights at `sites` with their adapters. wrapped: the submodules that PEFT may wrap and their classes,
    one around all sites, or one around each."""

    def weights(module: Any) -> Sequence[Any]:
        # First, since it tells whether there are sites.
        borrowed: list[Any] = [borrow(module, name, cls) for name, cls in wrapped.items()]
        parts = sites(module)
        factors = borrowed if len(borrowed) == len(parts) else (borrowed or [None]) * len(parts)
        found = [
            adapted(p.module, p.name, p.weight, transposed=p.transposed, borrowed=own)
            for p, own in zip(parts, factors, strict=True)
        ]
        return ExpertWeights(*found) if len(found) == 2 else found

    return weights


def _longcat_sites(module: Any) -> list[Site]:
    # gate_up_proj also has rows for the zero experts; nothing reads them.
    weights = module.gate_up_proj[: module.num_routed_experts], module.down_proj
    return [Site("", module, name, name, weight) for name, weight in zip(TARGETS, weights, strict=True)]


_DBRX_MLP = name_model_class("dbrx", "DbrxExpertGLU")
_JETMOE_LINEAR = name_model_class("jetmoe", "JetMoeParallelExperts")
_LLAMA4_EXPERTS = name_model_class("llama4", "Llama4TextExperts")
_NLLB_EXPERT = name_model_class("nllb_moe", "NllbMoeDenseActDense")
_SWITCH_EXPERT = name_model_class("switch_transformers", "SwitchTransformersDenseActDense")


def _jetmoe_sites(module: Any) -> list[Site]:
    linears = (unwrap_part(module.input_linear), unwrap_part(module.output_linear))
    return [Site("", linear, "weight", target, linear.weight) for linear, target in zip(linears, TARGETS, strict=True)]


def _llama4_sites(module: Any) -> list[Site]:
    experts = unwrap_part(module.experts)
    stored = stored_of(experts)  # out of a GGUF file
    weights = [getattr(experts, name).mT for name in TARGETS] if stored is None else stored.weights(experts)
    return [Site("", experts, name, name, weight, True) for name, weight in zip(TARGETS, weights, strict=True)]


def _dbrx_sites(module: Any) -> list[Site]:
    mlp, sizes = unwrap_part(module.mlp), (module.num_experts, module.ffn_hidden_size, module.hidden_size)
    first = [Site("", mlp, name, TARGETS[0], getattr(mlp, name).view(sizes)) for name in ("w1", "v1")]
    return [*first, Site("", mlp, "w2", TARGETS[1], mlp.w2.view(sizes).mT, True)]


def _vitpose_sites(module: Any) -> list[Site]:
    linears = tuple(module._modules)
    return [Site("", module, "weight", TARGETS[0], [module[int(e)].weight for e in linears], linears=linears)]


# model folder and class in transformers -> how to run it
PATCHES: dict[str, Patch] = {
    "dbrx.DbrxExperts": Patch(_build_weights(_dbrx_sites, mlp=_DBRX_MLP), _dbrx, sample_dbrx, sites=_dbrx_sites),
    "jetmoe.JetMoeMoE": Patch(
        _build_weights(_jetmoe_sites, input_linear=_JETMOE_LINEAR, output_linear=_JETMOE_LINEAR),
        _jetmoe, lambda m, random: (_draw_x(m, random, m.input_size)[None],), gate="", sites=_jetmoe_sites,
    ),
    "jetmoe.JetMoeParallelExperts": Patch(
        lambda m: (adapted(m, "weight", m.weight),), _jetmoe_linear, sample_jetmoe_linear, has_choice=False,
        borrows=("weight",),
    ),
    "llama4.Llama4TextMoe": Patch(
        _build_weights(_llama4_sites, experts=_LLAMA4_EXPERTS), _llama4,
        lambda m, random: (_draw_x(m, random, m.hidden_dim),), gate="experts", sites=_llama4_sites,
    ),
    "longcat_flash.LongcatFlashExperts": Patch(
        _build_weights(_longcat_sites), _longcat, sample_longcat, gate="", sites=_longcat_sites, borrows=TARGETS
    ),
    "nllb_moe.NllbMoeExperts": _build_dense(_NLLB_EXPERT, ("fc1", "fc2"), _nllb, sample_nllb),
    "step3p7.Step3p7Experts": Patch(
        _build_weights(_stacked_sites), _step3p7, sample_topk, gate="", sites=_stacked_sites, borrows=TARGETS
    ),
    "switch_transformers.SwitchTransformersExperts": _build_dense(_SWITCH_EXPERT, ("wi", "wo"), _switch, sample_switch),
    "vitpose_backbone.VitPoseNaiveMoe": Patch(
        lambda m: (_join(m, [get_part(m, name, LINEAR) for name in m._modules], "weight"),), _vitpose, sample_vitpose,
        has_choice=False, sites=_vitpose_sites,
    ),
}  # fmt: skip

# Listed to show that their absence above is deliberate.
NOT_EXPERTS = {
    "doge.DogeCDMoE": "its experts are single rows of two embeddings, looked up per token: there is no matrix product",
}


def find_patch(module: nn.Module) -> Patch | None:
    """The entry for the module's class. A subclass made by a parametrisation counts as its class."""
    for cls in type(module).__mro__:
        folder, _, file = cls.__module__.removeprefix("transformers.models.").partition(".")
        if file == f"modeling_{folder}" and f"{folder}.{cls.__name__}" in PATCHES:
            return PATCHES[f"{folder}.{cls.__name__}"]
    return None


# ---- the trial -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def find_difference(module: nn.Module, patch: Patch, weights: Any) -> str | None:
    """Runs the class's forward and the Patch on the same random rows. Returns how they differ, or None."""
    leaves = list_tensors(weights)
    if any(leaf.is_meta for leaf in leaves):
        return None  # nothing to compare yet
    arguments = patch.sample(module, torch.Generator().manual_seed(0))
    try:
        with _set_hooks_aside(module):
            want = _get_tensor(type(module).forward(module, *arguments))
            got = _get_tensor(patch.forward(module, weights, *arguments))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if not bool(want.isfinite().all()):
        return None  # weights that are not finite compare with nothing
    # Tolerance: a few roundings to the storage dtype, and sums of `length` float32 products in another order (a random
    # walk of half ulps). A patch with another meaning differs by the size of the value itself.
    length = max(leaf.shape[-1] for leaf in leaves)
    relative = 16 * torch.finfo(want.dtype).eps + 4 * length**0.5 * torch.finfo(torch.float32).eps
    bound = relative * want.abs().max()
    difference = (got - want).abs().max()
    return None if difference <= bound else f"difference {difference:.1e} of {want.abs().max():.1e}"  # NaN differs


@contextmanager
def _set_hooks_aside(module: nn.Module) -> Iterator[None]:
    """Without dropout, and without hooks of parts, which belong to the model's own calls."""
    before = [(part, name, getattr(part, name)) for part in module.modules() for name in _HOOKS]
    try:
        for part, name, _ in before:
            setattr(part, name, OrderedDict())
        with set_eval(module):
            yield
    finally:
        for part, name, hooks in before:
            setattr(part, name, hooks)


def _get_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
