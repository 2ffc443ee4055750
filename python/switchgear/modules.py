# SPDX-License-Identifier: BSD-3-Clause
"""MoE: a router, experts and shared experts as one torch.nn.Module; balance_loss and after_step for a whole model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import Count, Finite, FloatDtype, Size, Sizes, checked
from switchgear.functional import Routing
from switchgear.functional.arguments import Limit
from switchgear.layers.common import WithLosses, experts_class, scaled_input
from switchgear.layers.expand import add_expert, expand
from switchgear.layers.heterogeneous import HeterogeneousExperts
from switchgear.layers.shared import GatedSharedExperts, SharedExperts
from switchgear.layers.virtual import VirtualExperts
from switchgear.reference.activations import AnyActivation
from switchgear.routing.context import context_of
from switchgear.routing.router import Router, RouterOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from switchgear.parallel import ExpertParallel


class MoE(WithLosses):
    """A Mixture-of-Experts layer: y = Σ_k w_k · expert_k(x) + shared_experts(x).

        moe = MoE(hidden_size=2048, intermediate_size=1024, num_experts=64, top_k=8)
        y = moe(x)                                       # x [..., H]
        moe = MoE(2048, 1024, 64, **switchgear.presets.expert_choice())

    Args:
        hidden_size, intermediate_size, num_experts, top_k: H, I, E, K.
        float32_router, router_bias: options `float32` and `bias` of Router.
        router_options: other options of Router. score_function, normalize, scale, selection_bias, num_groups,
            topk_groups, group_score, jitter; score, select, capacity, balance, isolation for policies other than top-k.
        activation, gated, bias, interleaved, transposed, alpha, limit: options of Experts.
            An activation that is a function: not with widths or parallel.
        shared_intermediate_size: width of the shared experts; 0 for none. They use the activation of the experts.
        num_shared_experts: the same width in units of intermediate_size; use only one of the two.
        shared_gate: multiply the output of the shared experts by sigmoid(w · x) (Qwen2-MoE, arXiv:2407.10671).
        widths: [E], the ratios of the experts' widths. intermediate_size is then their mean; every width must be an
            integer (HMoE, arXiv:2408.10681). Not with bias, which every slice of an expert would add.
        null_experts, copy_experts, constant_experts: numbers of additional experts, which need no matrix products. They
            add nothing, x, or a learned vector; see VirtualExperts.
        renormalize, mix_constants: options of VirtualExperts. With null experts, renormalize divides the weights of the
            other experts by their sum (AdaMoE); False keeps the router's weights (MoE++).
        scale_input: multiply the input of the experts by the weights, instead of their output (Llama 4).
        initialize: a function of the layer, called last, that gives its parameters other initial values. Call it again
            after `reset_parameters` of the parts, as for a layer that was built on the meta device.
        return_routing: forward returns (y, Routing), for losses such as load_balancing_loss(routing.router_logits,
            routing.topk_ids).
        parallel: distribute the experts over these ranks (switchgear.parallel.ExpertParallel). All other parameters are
            replicated; use DistributedDataParallel or FSDP for them.

    Attribute `losses`: the balance losses of the router by name, from the last forward; none if that was in evaluation.
    See balance_loss.

    Submodules and keys of the state dict: gate (Router: gate.weight, gate.e_score_correction_bias), experts (Experts:
    experts.gate_up_proj, experts.down_proj), shared_experts (shared_experts.gate_proj.weight, …). With shared_gate,
    widths or virtual experts they are one level deeper: shared_experts.experts, experts.slices, experts.experts.
    """

    @checked
    def __init__(
        self,
        hidden_size: Size,
        intermediate_size: Size,
        num_experts: Size,
        top_k: int | None = None,
        *,
        float32_router: bool = False,
        router_bias: bool = False,
        activation: AnyActivation = "silu",
        gated: bool = True,
        bias: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
        alpha: Finite = 1.702,
        limit: Limit | None = None,
        shared_intermediate_size: Count = 0,
        num_shared_experts: Count = 0,
        shared_gate: bool = False,
        widths: Sizes | None = None,
        null_experts: Count = 0,
        copy_experts: Count = 0,
        constant_experts: Count = 0,
        renormalize: bool = True,
        mix_constants: bool = False,
        scale_input: bool = False,
        initialize: Callable[[MoE], object] | None = None,
        return_routing: bool = False,
        parallel: ExpertParallel | None = None,
        device: torch.device | str | None = None,
        dtype: FloatDtype | None = None,
        **router_options: Unpack[RouterOptions],
    ) -> None:
        super().__init__()
        if "layer" in router_options:
            raise TypeError(
                "layer: expected options of one MoE, got those of a preset that composes several layers; call "
                "switchgear.presets.build(hidden_size, intermediate_size, num_experts, **options)"
            )
        if unknown := sorted(set(router_options) - set(RouterOptions.__annotations__)):
            raise TypeError(f"{unknown[0]}: expected an option of MoE, or of its Router, got one of neither")
        if mix_constants and not constant_experts:
            raise ValueError("mix_constants: expected constant_experts with it, got none")
        self.return_routing, self.scale_input = return_routing, scale_input
        virtual: dict[str, Any] = {"null": null_experts, "copy": copy_experts, "constant": constant_experts}
        self.gate = Router(
            hidden_size,
            num_experts + sum(virtual.values()),
            top_k,
            float32=float32_router,
            bias=router_bias,
            device=device,
            dtype=dtype,
            **router_options,
        )
        layout: dict[str, Any] = {"interleaved": interleaved, "transposed": transposed}
        options: dict[str, Any] = {
            "activation": activation, "gated": gated, "alpha": alpha, "limit": limit, "device": device, "dtype": dtype,
        }  # fmt: skip
        experts: nn.Module
        if widths is None:
            make_experts = experts_class(parallel)
            experts = make_experts(hidden_size, intermediate_size, num_experts, bias=bias, **layout, **options)
        elif bias:
            raise ValueError("bias: expected False with widths=, got True")
        else:
            sizes = _find_sizes(intermediate_size, num_experts, widths)
            experts = HeterogeneousExperts(hidden_size, sizes, parallel=parallel, **layout, **options)
        if hasattr(self.gate.score, "bind"):  # a score of the experts' own weights
            self.gate.score.bind(experts)
        self.experts: nn.Module = experts
        if any(virtual.values()):
            self.experts = VirtualExperts(experts, **virtual, renormalize=renormalize, mix_constants=mix_constants)
        if shared_intermediate_size and num_shared_experts:
            raise ValueError(f"num_shared_experts: expected 0 with shared_intermediate_size, got {num_shared_experts}")
        width = shared_intermediate_size or num_shared_experts * intermediate_size
        if shared_gate and not width:
            raise ValueError("shared_gate: expected shared experts with it, got none")
        shared = GatedSharedExperts if shared_gate else SharedExperts
        self.shared_experts = shared(hidden_size, width, bias=bias, **options) if width else None
        if initialize is not None:
            initialize(self)

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor | tuple[Tensor, Routing]:
        """hidden_states [..., H] -> y [..., H], or (y, Routing) with return_routing.

        Keyword arguments are attributes of Context: token_ids and sequence_ids [...], embedding [..., D], generator, ….
        """
        if context:
            routing: Routing = self.gate(hidden_states, context_of(**context))
        else:
            routing = self.gate(hidden_states)
        rows = hidden_states if hidden_states.dim() == 2 else hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.scale_input:
            y = scaled_input(self.experts, rows, routing.topk_ids, routing.topk_weights)
        else:
            y = self.experts(rows, routing.topk_ids, routing.topk_weights)
        y = y.reshape(hidden_states.shape)
        if self.shared_experts is not None:
            y = y + self.shared_experts(hidden_states)
        if routing.losses or self.losses:
            self.losses = routing.losses
        return (y, routing) if self.return_routing else y

    @checked
    def expand(
        self,
        num_new: Size,
        *,
        init: Literal["copy", "random"] = "copy",
        sources: Sequence[int] | None = None,
        freeze_old: bool = True,
    ) -> list[nn.Parameter]:
        """Appends experts and their rows of the router, and returns the parameters that train (Lifelong-MoE,
        arXiv:2305.12281).

        Args:
            num_new: number of new experts. Their ids follow the old ones.
            init: "copy" copies experts with their rows of the router; ties go to the old ones. "random" initialises new
                ones.
            sources: the experts to copy; by default 0, 1, ….
            freeze_old: old experts and their rows of the router keep every bit in training: the new ones become
                parameters of their own, gate.weight_selected, experts.gate_up_proj_selected, …. State dicts keep their
                keys. finetune.unfreeze ends it.

        Parameters change size, so make the optimizer afterwards. Outputs do not change while the logits of new experts
        are -inf (gate.bias with router_bias); with normalize=True, also while they are disabled (override).

        Raises:
            ValueError: an option out of range, or a layer that cannot grow: distributed, stored or virtual experts,
                experts of different widths, adapters, a router that is not linear or has a part for E experts only, or
                a SwitchLoss with accumulate in the middle of a step. Nothing is changed.
        """
        return expand(self, num_new, init, sources, freeze_old)

    @checked
    def add_expert(
        self,
        expert: Mapping[str, Tensor],
        gate_weight: Tensor,
        *,
        gate_bias: float = 0.0,
        freeze_old: bool = False,
    ) -> int:
        """Appends one expert that exists already, such as the FFN of another model, and returns its id.

        expert: its weights by name of the parameters of `experts`, without the first dimension: gate_up_proj [2I,H],
        down_proj [H,I], …. gate_weight [H], gate_bias: its row of the router. Otherwise as `expand`.
        """
        return add_expert(self, expert, gate_weight, gate_bias, freeze_old)


def _find_sizes(intermediate_size: int, num_experts: int, widths: Sequence[int]) -> list[int]:
    """The widths of the experts: their ratios are `widths`, and their mean is intermediate_size."""
    if len(widths) != num_experts:
        raise ValueError(f"widths: expected {num_experts} numbers, one for each expert, got {list(widths)}")
    total = intermediate_size * num_experts
    unit = sum(widths) // math.gcd(num_experts * math.gcd(*widths), sum(widths))
    if intermediate_size % unit:
        raise ValueError(
            f"intermediate_size: expected a multiple of {unit} for the widths {list(widths)}, got {intermediate_size}"
        )
    return [width * total // sum(widths) for width in widths]


def balance_loss(model: nn.Module) -> Tensor | float:
    """The sum of all layers' balance losses from the last forward, 0.0 if there are none. Add it to the model's
    loss. Warns of losses without a graph in training: reentrant activation checkpointing runs forward without one."""
    total: Tensor | float = 0.0
    for module in model.modules():
        losses = vars(module).get("losses")  # layers of layers have a property `losses`: skip it
        for loss in losses.values() if isinstance(losses, dict) else ():
            total = total + loss
            trains = module.training and torch.is_grad_enabled()
            if trains and not getattr(loss, "requires_grad", True) and _learns(module):
                warnings.warn(
                    "balance_loss: a loss has no graph, so it trains nothing; in activation checkpointing, pass "
                    "use_reentrant=False",
                    stacklevel=2,
                )
    return total


def _learns(layer: nn.Module) -> bool:
    """Whether its router has parameters that train."""
    return any(parameter.requires_grad for parameter in getattr(layer, "gate", layer).parameters())


def after_step(model: nn.Module) -> None:
    """Calls Router.after_step of all routers in the model. Call it once per optimizer step if any has controllers."""
    for module in model.modules():
        if isinstance(module, Router):
            module.after_step()
