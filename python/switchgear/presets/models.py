# SPDX-License-Identifier: BSD-3-Clause
"""Routing of known models. Parameters have the names of MoE; Hugging Face's blocks of gpt-oss, Phi-3.5-MoE and Llama 4
name their router differently (`router.…` instead of `gate.…`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from switchgear.papers.parts.masks import Lookup
from switchgear.papers.parts.stochastic import SparseMixer
from switchgear.presets.entry import OURS, PAPER, Example, preset
from switchgear.routing import LossFreeBias, SwitchLoss, TopK


@preset("model", None, "Mixtral of Experts, arXiv:2401.04088", f"{PAPER} and of the code in Hugging Face transformers")
def mixtral(*, top_k: int = 2) -> dict[str, Any]:
    """The best two experts, weighted by a softmax over them."""
    return {"top_k": top_k, "normalize": True}


@preset(
    "model",
    None,
    "Qwen3 Technical Report, arXiv:2505.09388",
    "formula of the code in Hugging Face transformers",
    example=Example((64, 32, 16)),
)
def qwen3(*, top_k: int = 8) -> dict[str, Any]:
    """The best eight experts, normalised."""
    return {"top_k": top_k, "normalize": True}


@preset(
    "model",
    None,
    "DeepSeek-V3 Technical Report, arXiv:2412.19437",
    f"{PAPER} and of the code in Hugging Face transformers; the loss counts the experts that tokens use; the "
    f"paper counts those of the largest scores, whatever bias and groups choose: {OURS}",
    example=Example((64, 32, 32)),
)
def deepseek_v3(
    *,
    top_k: int = 8,
    num_groups: int = 8,
    topk_groups: int = 4,
    scale: float = 2.5,
    rate: float = 1e-3,
    balance: float = 1e-4,
) -> dict[str, Any]:
    """Sigmoid scores, only experts of the best groups, a shared expert; balanced by a bias and a small loss per
    sequence.

    The loss counts the experts that tokens use. Equation 18 of the paper counts those of the largest scores, whatever
    bias and groups choose.
    """
    return {
        "top_k": top_k,
        "score_function": "sigmoid",
        "normalize": True,
        "scale": scale,
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "group_score": "top2_sum",
        "float32_router": True,
        "num_shared_experts": 1,
        "balance": [
            LossFreeBias(rate),
            partial(SwitchLoss, balance, "sequence", per_choice=True, score_function="sigmoid"),
        ],
    }


@preset(
    "model",
    None,
    "gpt-oss-120b & gpt-oss-20b Model Card, arXiv:2508.10925",
    "formula of the code in Hugging Face transformers",
)
def gpt_oss(*, top_k: int = 4) -> dict[str, Any]:
    """The best four experts, weighted by a softmax over them; biases everywhere and a clamped activation."""
    return {
        "top_k": top_k,
        "normalize": True,
        "router_bias": True,
        "activation": "swiglu_oai",
        "limit": 7.0,
        "bias": True,
        "interleaved": True,
        "transposed": True,
    }


@preset(
    "model",
    None,
    "Phi-3 Technical Report: A Highly Capable Language Model Locally on Your Phone, arXiv:2404.14219",
    "formula of the code in Hugging Face transformers; input_jitter reaches the router alone, there also the "
    "experts, drawn twice",
    example=Example((64, 32, 16)),
)
def phimoe(*, jitter: float = 0.01, input_jitter: float = 0.0) -> dict[str, Any]:
    """The router of Phi-3.5-MoE: SparseMixer over two experts.

    input_jitter reaches the router alone. That of Hugging Face's block, 0 by default, is drawn twice, first for router
    and experts in place, then for the router.
    """
    return {"jitter": input_jitter, "select": SparseMixer(2, jitter)}


@preset(
    "model",
    None,
    "The Llama 4 herd, https://ai.meta.com/blog/llama-4-multimodal-intelligence",
    "formula of the code in Hugging Face transformers",
    example=Example((64, 32, 16)),
)
def llama4(*, top_k: int = 1) -> dict[str, Any]:
    """The best expert of the input multiplied by the sigmoid of its logit, and a shared expert."""
    return {"select": TopK(top_k, "sigmoid"), "scale_input": True, "num_shared_experts": 1}


@preset(
    "model",
    None,
    "DeepSeek-V4: Towards Highly Efficient Million-Token Context Intelligence, arXiv:2606.19348",
    f"formula of the code in Hugging Face transformers; a random table: {OURS}",
    unverified="rate",
    example=Example((64, 32, 16), arguments={"vocabulary_size": 100}, inputs={"token_ids": "token_ids"}),
)
def deepseek_v4(
    *, vocabulary_size: int | None = None, top_k: int = 6, scale: float = 1.5, limit: float = 10.0, rate: float = 1e-3
) -> dict[str, Any]:
    """The experts that a table lists for the token's id, as in the first layers, or the best by √softplus scores and a
    bias that balances them; weighted by the scores, normalised. A shared expert and a clamped activation.

    vocabulary_size: of a random table; None for the layers without one. Pass the table `tid2eid` of a checkpoint as
    select=partial(Lookup, tid2eid, score_function="sqrt_softplus", normalize=True, scale=1.5).
    """
    scored: dict[str, Any] = {"score_function": "sqrt_softplus", "normalize": True, "scale": scale}
    common = {"limit": limit, "num_shared_experts": 1}
    if vocabulary_size is not None:
        return {"select": partial(Lookup.hashed, vocabulary_size, top_k=top_k, **scored), **common}
    return {"select": TopK(top_k, **scored), "balance": [LossFreeBias(rate)], **common}
