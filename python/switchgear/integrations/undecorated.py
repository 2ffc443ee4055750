# SPDX-License-Identifier: BSD-3-Clause
"""Experts of transformers models without the decorator: a table of forwards, swapped in one instance at a time.

Each entry computes what the class computes, from the class's own parameters. The class's routers stay, and so do their
hooks and losses. A swap is kept only if it agrees with the class on a few random rows: only the class's source defines
the result, and sources change.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import switchgear
from switchgear.integrations import samples
from switchgear.integrations.experts import ExpertWeights, chosen, project, run_experts
from switchgear.integrations.gates import gate_of, own_gate
from switchgear.integrations.parts import LINEAR, PartClass, of_model, part_of


class Patch(NamedTuple):
    """How to run one class."""

    weights: Callable[[Any], Sequence[Any]]  # read once per forward; raises Bypassed for a wrapped submodule
    forward: Callable[..., Any]  # (module, weights, *arguments of the class's forward)
    sample: Callable[[Any, torch.Generator], tuple[Any, ...]]  # arguments for a trial
    has_choice: bool = True  # whether forward passes its routing through `chosen`
    gate: str | None = None  # the submodule ("" is the module itself) whose gate may be fused

    def path(self, module: nn.Module) -> str:
        """ "moe" or "grouped_gemm", as `switchgear.integrations.transformers.path_of`."""
        fused = self.gate is not None and gate_of(module.get_submodule(self.gate)) is not None
        return "moe" if fused else "grouped_gemm"


# ---- experts stacked as [E, ...] -------------------------------------------------------------------------------------


def _step3p7(module: Any, weights: ExpertWeights, hidden_states: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
    ids = torch.where(ids < module.num_experts, ids, -1)
    return run_experts(hidden_states, ids, topk_weights, weights, gate_of(module), own_gate(module))


def _longcat(module: Any, weights: ExpertWeights, hidden_states: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
    routed = ids < module.num_routed_experts
    routed_ids = torch.where(routed, ids, -1)
    y = run_experts(hidden_states, routed_ids, topk_weights, weights, gate_of(module), own_gate(module))
    identity = topk_weights.masked_fill(routed, 0).sum(dim=-1, keepdim=True)  # the zero experts return their input
    return y + (hidden_states * identity).to(y.dtype)


def _llama4(module: Any, weights: ExpertWeights, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden_states.reshape(-1, module.hidden_dim)
    router_scores, router_logits = module.router(x)  # scores [T, E], 0 for unselected experts
    topk_weights, topk_ids = router_scores.topk(module.top_k, dim=-1)
    # The score scales the expert's input, so each choice becomes its own row.
    rows = (x[:, None] * topk_weights[..., None]).flatten(0, 1)
    ones = torch.ones_like(rows[:, :1])
    y = run_experts(rows, topk_ids.reshape(-1, 1), ones, weights, gate_of(module.experts), own_gate(module.experts))
    return module.shared_expert(x) + y.view(-1, module.top_k, module.hidden_dim).sum(dim=1), router_logits


def _jetmoe(module: Any, weights: ExpertWeights, layer_input: Tensor) -> Tensor:
    x = layer_input.flatten(0, 1)
    index_sorted_experts, _, batch_gates, expert_size, _ = module.router(x)
    # The router returns its choices sorted by expert; scatter restores the order of tokens.
    tokens_per_expert = torch.tensor(expert_size, device=x.device)
    sorted_ids = torch.repeat_interleave(torch.arange(len(expert_size), device=x.device), tokens_per_expert)
    shape = (x.shape[0], module.router.top_k)
    topk_ids = torch.zeros_like(sorted_ids).scatter(0, index_sorted_experts, sorted_ids).view(shape)
    topk_weights = torch.zeros_like(batch_gates).scatter(0, index_sorted_experts, batch_gates).view(shape)
    y = run_experts(x, topk_ids, topk_weights, weights, gate_of(module), own_gate(module))
    bias: Tensor = module.bias
    return y.view(layer_input.shape) + bias


def _jetmoe_linear(module: Any, weights: Sequence[Tensor], inputs: Tensor, expert_size: list[int]) -> Tensor:
    offsets = torch.tensor([0, *itertools.accumulate(expert_size)], dtype=torch.int32, device=inputs.device)
    return project(inputs, weights[0], offsets)


def _dbrx(module: Any, weights: Sequence[Tensor], hidden_states: Tensor, ids: Tensor, topk_weights: Tensor) -> Tensor:
    x = hidden_states.reshape(-1, module.hidden_size)
    w1, v1, w2 = (weight.view(module.num_experts, module.ffn_hidden_size, module.hidden_size) for weight in weights)
    ids, topk_weights = chosen(ids, topk_weights, module.num_experts)
    plan = switchgear.plan(ids, module.num_experts)
    gate = project(x, w1, plan.expert_offsets, token_indices=plan.token_indices)
    up = project(x, v1, plan.expert_offsets, token_indices=plan.token_indices)
    permuted_y = project(module.mlp.activation_fn(gate) * up, w2.mT, plan.expert_offsets)
    y = switchgear.combine(permuted_y, plan, topk_weights).to(x.dtype)
    return y.view(hidden_states.shape[0], -1, x.shape[1])


# ---- one module per expert -------------------------------------------------------------------------------------------


class _Linears(NamedTuple):
    """The linear layers of all experts, by base pointer. Only their biases, [E, N] in all, are copied."""

    weight: list[Any]
    bias: list[Any]

    def project(self, x: Tensor, plan: switchgear.Plan, token_indices: Tensor | None = None) -> Tensor:
        bias = torch.stack(self.bias) if self.bias else None
        return project(x, self.weight, plan.expert_offsets, bias, token_indices)


def _linears(owner: nn.Module, names: Sequence[str]) -> _Linears:
    layers: list[Any] = [part_of(owner, name, LINEAR) for name in names]
    return _joined(layers)


def _joined(layers: Sequence[Any]) -> _Linears:
    return _Linears([layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None])


def _dense_experts(expert_class: PartClass, first: str, second: str) -> Callable[[Any], Sequence[_Linears]]:
    def weights(module: Any) -> Sequence[_Linears]:
        experts = [part_of(module, f"expert_{e}", expert_class) for e in range(module.num_experts)]
        return [_joined([part_of(expert, layer, LINEAR) for expert in experts]) for layer in (first, second)]

    return weights


def _run_dense(module: Any, weights: Sequence[_Linears], x: Tensor, plan: switchgear.Plan) -> Tensor:
    expert = module["expert_0"]  # all experts have the same activation and dropout
    h = weights[0].project(x, plan, plan.token_indices)
    return weights[1].project(expert.dropout(expert.act(h)), plan)


def _switch(
    module: Any, weights: Sequence[_Linears], hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    taken, ids = selected_experts.max(dim=-1)  # one-hot [T, 1, E]; all zeros for a token past its expert's capacity
    ids, routing_weights = chosen(torch.where(taken > 0, ids, -1), routing_weights, module.num_experts)
    plan = switchgear.plan(ids, module.num_experts)
    permuted_y = _run_dense(module, weights, hidden_states, plan)
    return switchgear.combine(permuted_y, plan, routing_weights).to(hidden_states.dtype)


def _nllb(
    module: Any, weights: Sequence[_Linears], hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor
) -> Tensor:
    # The class uses router_mask [T, C] as expert ids and router_probs [T, C] as their weights. transformers 5.24 passes
    # the one-hot mask of the first choice, so C = E and experts 0 and 1 serve every token. Checkpoints run that way, so
    # we return the same. Ids repeat within a token; summing their weights leaves two distinct ones.
    by_expert = router_probs.new_zeros(len(router_probs), module.num_experts).scatter_add(1, router_mask, router_probs)
    topk_weights, topk_ids = by_expert.topk(min(2, module.num_experts), dim=-1)
    topk_ids, topk_weights = chosen(topk_ids, topk_weights, module.num_experts)
    plan = switchgear.plan(topk_ids, module.num_experts)
    permuted_y = _run_dense(module, weights, hidden_states, plan)
    kept = 1 - module.moe_token_dropout
    permuted_y = module.token_dropout(permuted_y) if module.training else permuted_y * kept
    return switchgear.combine(permuted_y, plan, topk_weights).to(hidden_states.dtype)


def _vitpose(module: Any, weights: Sequence[_Linears], hidden_state: Tensor, indices: Tensor) -> Tensor:
    batch, length, _ = hidden_state.shape  # one expert per image: indices [B, 1, 1]
    plan = switchgear.plan(indices.reshape(batch, 1).expand(batch, length).reshape(-1, 1), module.num_experts)
    permuted_y = weights[0].project(hidden_state.flatten(0, 1), plan, plan.token_indices)
    return switchgear.combine(permuted_y, plan).view(batch, length, -1)


# ---- the table -------------------------------------------------------------------------------------------------------


def _stacked(module: Any) -> ExpertWeights:
    return ExpertWeights(module.gate_up_proj, module.down_proj)


_DBRX_MLP = of_model("dbrx", "DbrxExpertGLU")
_JETMOE_LINEAR = of_model("jetmoe", "JetMoeParallelExperts")
_LLAMA4_EXPERTS = of_model("llama4", "Llama4TextExperts")
_NLLB_EXPERT = of_model("nllb_moe", "NllbMoeDenseActDense")
_SWITCH_EXPERT = of_model("switch_transformers", "SwitchTransformersDenseActDense")


def _jetmoe_weights(module: Any) -> ExpertWeights:
    first: Any = part_of(module, "input_linear", _JETMOE_LINEAR)
    second: Any = part_of(module, "output_linear", _JETMOE_LINEAR)
    return ExpertWeights(first.weight, second.weight)


def _llama4_weights(module: Any) -> ExpertWeights:
    experts: Any = part_of(module, "experts", _LLAMA4_EXPERTS)
    return ExpertWeights(experts.gate_up_proj.mT, experts.down_proj.mT)


def _dbrx_weights(module: Any) -> Sequence[Tensor]:
    mlp: Any = part_of(module, "mlp", _DBRX_MLP)
    return mlp.w1, mlp.v1, mlp.w2


# model folder and class in transformers -> how to run it
PATCHES: dict[str, Patch] = {
    "dbrx.DbrxExperts": Patch(_dbrx_weights, _dbrx, samples.dbrx),
    "jetmoe.JetMoeMoE": Patch(_jetmoe_weights, _jetmoe, samples.jetmoe, gate=""),
    "jetmoe.JetMoeParallelExperts": Patch(
        lambda m: (m.weight,), _jetmoe_linear, samples.jetmoe_linear, has_choice=False
    ),
    "llama4.Llama4TextMoe": Patch(_llama4_weights, _llama4, samples.llama4, gate="experts"),
    "longcat_flash.LongcatFlashExperts": Patch(
        # gate_up_proj also has rows for the zero experts; nothing reads them.
        lambda m: ExpertWeights(m.gate_up_proj[: m.num_routed_experts], m.down_proj), _longcat, samples.longcat, gate=""
    ),
    "nllb_moe.NllbMoeExperts": Patch(_dense_experts(_NLLB_EXPERT, "fc1", "fc2"), _nllb, samples.nllb),
    "step3p7.Step3p7Experts": Patch(_stacked, _step3p7, samples.topk, gate=""),
    "switch_transformers.SwitchTransformersExperts": Patch(
        _dense_experts(_SWITCH_EXPERT, "wi", "wo"), _switch, samples.switch
    ),
    "vitpose_backbone.VitPoseNaiveMoe": Patch(
        lambda m: (_linears(m, list(m._modules)),), _vitpose, samples.vitpose, has_choice=False
    ),
}  # fmt: skip

# Listed to show that their absence above is deliberate.
NOT_EXPERTS = {
    "doge.DogeCDMoE": "its experts are single rows of two embeddings, looked up per token: there is no matrix product",
}


def patch_of(module: nn.Module) -> Patch | None:
    """The entry for the module's class. A subclass made by a parametrisation counts as its class."""
    for cls in type(module).__mro__:
        folder, _, file = cls.__module__.removeprefix("transformers.models.").partition(".")
        if file == f"modeling_{folder}" and f"{folder}.{cls.__name__}" in PATCHES:
            return PATCHES[f"{folder}.{cls.__name__}"]
    return None
