# SPDX-License-Identifier: BSD-3-Clause
"""The experts implementations of transformers."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..case import Case, Inputs, Layer
from .registry import DECODED, Skip, competitor

# batched_mm copies the weights of each slot. Beyond this many slots, only that copy is timed.
BATCHED_MM_SLOTS = 128


def _hugging_face(case: Case, implementation: str) -> Layer:
    """MixtralExperts with the case's own parameters, dispatched by name as inside a model."""
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


@competitor("hf_grouped_mm", dtypes=DECODED)
def hf_grouped_mm(case: Case) -> Layer:
    """transformers' default: sorted tokens, torch's grouped_mm."""
    return _hugging_face(case, "grouped_mm")


@competitor("hf_eager", dtypes=DECODED)
def hf_eager(case: Case) -> Layer:
    """transformers' loop over the experts."""
    return _hugging_face(case, "eager")


@competitor("hf_batched_mm")
def hf_batched_mm(case: Case) -> Layer:
    """transformers' batched product: copies the weights of every (token, expert) pair."""
    if case.tokens * case.shape.top_k > BATCHED_MM_SLOTS:
        raise Skip(f"copies the weights of all {case.tokens * case.shape.top_k} slots; up to {BATCHED_MM_SLOTS} only")
    return _hugging_face(case, "batched_mm")


@competitor("hf_sonicmoe", dtypes=("bf16",), default=False)
def hf_sonicmoe(case: Case) -> Layer:
    """SonicMoE through transformers, on CUDA devices only."""
    if importlib.util.find_spec("sonicmoe") is None and importlib.util.find_spec("kernels") is None:
        raise Skip("neither sonicmoe nor kernels is installed")
    if case.gate_up_proj.device.type != "cuda":
        raise Skip("runs on CUDA devices only")
    return _hugging_face(case, "sonicmoe")


@competitor("hf_switchgear", default=False)
def hf_switchgear(case: Case) -> Layer:
    """switchgear as transformers calls it, through its experts interface."""
    try:
        import switchgear.integrations.transformers  # noqa: F401  registers the name
    except ImportError as error:
        raise Skip(f"needs transformers: {error}") from None
    return _hugging_face(case, "switchgear")
