# SPDX-License-Identifier: BSD-3-Clause
"""Mixtures of attention: experts are whole attention layers (BAM, arXiv:2408.08274), or the head groups of one layer
(LLaMA-MoE v2, arXiv:2411.15708)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.checks import NotEmpty, Seed, Share, Size, checked
from switchgear.convert.modules import compare_outputs, initialize_router
from switchgear.papers.parts.selections import EqualTopK
from switchgear.routing.context import Context
from switchgear.routing.router import Router
from switchgear.routing.selection import Dense

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
UNUSUAL = ("attn_logit_softcapping", "clip_qkv")  # a few random rows do not show them


class MixtureOfAttention(nn.Module):
    """y = Σ_e w_e(x) · attention_e(x), with grouped queries, rotary embeddings and a cache.

    It has the interface of attention layers of transformers, so it can take the place of one.

    Args:
        num_experts, num_heads, num_kv_heads, head_dim: E; the others are per expert.
        shared_kv: all experts attend to the keys and values of one projection, so the cache is as large as for one
            attention layer (BAM's KV variant).
        select: which experts a token uses and their weights; by default all, by softmax (BAM). All are computed.
        keys: "all": each expert attends to all tokens; "chosen": to those that chose it (LLaMA-MoE v2). Cached keys
            then have a channel more, which tells whether the token chose the expert.
        bias, o_bias: of the projections q, k, v, and of o.
        qk_norm: RMSNorm of queries and keys per head (Qwen3), with this epsilon.
        scaling: of the scores; default 1/√head_dim.
        dropout, residual_dropout: in train() only, of the weights of attention, and of the output.

    Parameters: q_proj [E,heads·dim,H], k_proj and v_proj [E,kv_heads·dim,H] (E = 1 with shared_kv), o_proj
    [E,H,heads·dim]; q_bias, k_bias, v_bias, o_bias; q_norm, k_norm [E,dim]; the gate's own.
    """

    @checked
    def __init__(
        self,
        hidden_size: Size,
        num_experts: Size,
        num_heads: Size,
        num_kv_heads: Size | None = None,
        *,
        head_dim: Size | None = None,
        shared_kv: bool = False,
        select: Any = None,
        keys: Literal["all", "chosen"] = "all",
        bias: bool = False,
        o_bias: bool = False,
        qk_norm: float | None = None,
        scaling: float | None = None,
        dropout: Share = 0.0,
        residual_dropout: Share = 0.0,
        causal: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if head_dim < 1:
            raise ValueError(f"head_dim: expected at least 1, got {hidden_size} // {num_heads} heads")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of {num_heads} heads, got {num_kv_heads}")
        if shared_kv and keys == "chosen":
            raise ValueError("keys: expected 'all' with shared_kv, whose experts have the same keys, got 'chosen'")
        self.hidden_size, self.num_experts, self.head_dim = hidden_size, num_experts, head_dim
        self.num_heads, self.num_kv_heads, self.shared_kv, self.keys = num_heads, num_kv_heads, shared_kv, keys
        self.scaling = head_dim**-0.5 if scaling is None else scaling
        self.dropout, self.residual_dropout = dropout, residual_dropout
        self.qk_norm, self.causal, self.layer_idx = qk_norm, causal, layer_idx
        self.is_causal = causal  # transformers reads it
        of_kv = 1 if shared_kv else num_experts

        def parameter(*shape: int, fan_in: int | None = None) -> nn.Parameter:
            data = torch.empty(shape, device=device, dtype=dtype)
            return nn.Parameter(
                nn.init.ones_(data) if fan_in is None else nn.init.uniform_(data, -(fan_in**-0.5), fan_in**-0.5)
            )

        q, kv = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = parameter(num_experts, q, hidden_size, fan_in=hidden_size)
        self.k_proj, self.v_proj = (parameter(of_kv, kv, hidden_size, fan_in=hidden_size) for _ in range(2))
        self.o_proj = parameter(num_experts, hidden_size, q, fan_in=q)
        self.q_bias = parameter(num_experts, q, fan_in=hidden_size) if bias else None
        self.k_bias, self.v_bias = (parameter(of_kv, kv, fan_in=hidden_size) if bias else None for _ in range(2))
        self.o_bias = parameter(num_experts, hidden_size, fan_in=q) if o_bias else None
        self.q_norm = parameter(num_experts, head_dim) if qk_norm is not None else None
        self.k_norm = parameter(of_kv, head_dim) if qk_norm is not None else None
        self.gate = Router(
            hidden_size, num_experts, select=Dense() if select is None else select, device=device, dtype=dtype
        )

    @property
    def cached_heads(self) -> int:
        """The heads of keys, and of values, that a cache keeps for each token."""
        return self.num_kv_heads * (1 if self.shared_kv else self.num_experts)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B,S,H] -> ([B,S,H], None).

        position_embeddings: (cos, sin) [B,S,dim]. attention_mask: [B,1,S,N], boolean (True: attend) or added to the
        scores; without it, causal. cache: a Cache of transformers, called past_key_values before its version 5.20.
        """
        batch, length, _h = hidden_states.shape
        q = self._heads(hidden_states, self.q_proj, self.q_bias, self.q_norm)
        k = self._heads(hidden_states, self.k_proj, self.k_bias, self.k_norm)
        v = self._heads(hidden_states, self.v_proj, self.v_bias, None)
        if position_embeddings is not None:
            cos, sin = (part.unsqueeze(1) for part in position_embeddings)
            q, k = (part * cos + _rotate(part) * sin for part in (q, k))
        routing = self.gate(hidden_states, Context())
        if self.keys == "chosen":
            ones = torch.ones_like(routing.topk_weights)
            is_chosen = self._by_expert(routing.topk_ids, ones, batch) > 0
            q, k = F.pad(q, (0, 1), value=1.0), torch.cat((k, self._hidden(is_chosen, k)), -1)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        k, v = (self._per_query(part) for part in (k, v))
        mask = attention_mask
        if mask is not None and mask.dtype is not torch.bool:
            mask = mask.to(q.dtype)
        is_causal = self.causal and mask is None and k.shape[2] == length
        if self.causal and mask is None and not is_causal:  # a static cache has room for later keys, a sliding one cuts
            before = min(int(cache.get_seq_length(self.layer_idx)), k.shape[2]) - length
            if before + 1 < k.shape[2]:  # else a single token sees all
                mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril(before)
        dropout = self.dropout if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.scaling)
        a = a.transpose(1, 2).reshape(batch, length, self.num_experts, -1)
        weights = self._by_expert(routing.topk_ids, routing.topk_weights, batch).to(a.dtype)
        y = torch.einsum("bsed,ehd->bsh", a * weights[..., None], self.o_proj)
        if self.o_bias is not None:
            y = y + weights @ self.o_bias
        return F.dropout(y, self.residual_dropout, self.training), None

    def _by_expert(self, ids: Tensor, values: Tensor, batch: int) -> Tensor:
        """[B,S,E]: the values [T,K] of the chosen experts [T,K], 0 for others."""
        spread = values.new_zeros(len(ids), self.num_experts + 1).scatter_add(1, ids.long() + 1, values)
        return spread[:, 1:].view(batch, -1, self.num_experts)

    def _hidden(self, is_chosen: Tensor, keys: Tensor) -> Tensor:
        """[B,E·kv,S,1]: the part of a score that makes the share of a token 0 in experts that it did not choose.
        Finite, also where autocast makes it float16: rows without any chosen token must not be NaN. Caches move,
        reorder and cut it with the keys."""
        least = -min(1e4 / self.scaling, torch.finfo(torch.float16).max / 2)
        hidden = keys.new_zeros(is_chosen.shape).masked_fill(~is_chosen, least)
        return hidden.transpose(1, 2).repeat_interleave(self.num_kv_heads, 1)[..., None]

    def _heads(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None) -> Tensor:
        """[B,E·heads,S,dim]"""
        rows = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        heads = rows.view(*x.shape[:2], weight.shape[0], -1, self.head_dim)
        if norm is not None:
            assert self.qk_norm is not None
            wide = heads.float() if heads.dtype is not torch.float64 else heads
            scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.qk_norm)
            heads = scaled.to(heads.dtype) * norm[:, None]
        return heads.flatten(2, 3).transpose(1, 2)

    def _per_query(self, heads: Tensor) -> Tensor:
        """Keys or values [B,kv,N,dim], repeated for each head of queries."""
        heads = heads.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
        return heads.repeat(1, self.num_experts, 1, 1) if self.shared_kv else heads

    def extra_repr(self) -> str:
        kind = ", shared_kv" if self.shared_kv else f", keys={self.keys!r}"
        return f"{self.hidden_size}, num_experts={self.num_experts}, heads={self.num_heads}/{self.num_kv_heads}{kind}"


class ParallelBlock(nn.Module):
    """x + moe(norm(x)) + attention(norm(x)): attention and feed-forward experts in parallel (BAM)."""

    def __init__(self, norm: nn.Module, moe: nn.Module, attention: MixtureOfAttention) -> None:
        super().__init__()
        self.norm, self.moe, self.attention = norm, moe, attention

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        """x [B,S,H] -> [B,S,H]; keywords of MixtureOfAttention.forward."""
        rows = self.norm(x)
        y: Tensor = x + self.moe(rows) + self.attention(rows, **attention)[0]
        return y


@checked
def attention_from_experts(
    layers: Annotated[Sequence[nn.Module], NotEmpty],
    *,
    shared_kv: bool = False,
    select: Any = None,
    router_init: float = 0.02,
    seed: Seed = 0,
) -> MixtureOfAttention:
    """A soft mixture of attention layers that were trained apart (BAM). With shared_kv, keys and values are those of
    the average of the layers.

    Args:
        layers: attention of transformers: Linear layers q_proj, k_proj, v_proj, o_proj, and head_dim. Each is compared
            with its mixture of one on random rows.
        select: as for MixtureOfAttention.
        router_init, seed: standard deviation of the router's weight, and the seed of its random numbers.

    Raises ValueError for attention that computes something else, and for layers that differ in size.
    """
    found = [_read(layer, f"layers[{index}]") for index, layer in enumerate(layers)]
    first = found[0]
    for index, other in enumerate(found):
        shapes, wanted = ({name: t.shape for name, t in part["tensors"].items()} for part in (other, first))
        differs = {key for key, value in other["options"].items() if value != first["options"][key]} - {"layer_idx"}
        if shapes != wanted or differs:
            raise ValueError(f"layers[{index}]: expected attention of the size of the first, got another")
    options = {**first["options"], "shared_kv": shared_kv, "select": select}
    made = MixtureOfAttention(first["hidden_size"], len(layers), first["heads"], first["kv_heads"], **options)
    with torch.no_grad():
        for name in first["tensors"]:
            stacked = torch.stack([part["tensors"][name] for part in found])
            if shared_kv and name[0] in "kv":
                stacked = stacked.float().mean(0, keepdim=True).to(stacked.dtype)
            made.get_parameter(name).copy_(stacked)
    initialize_router(made, router_init, seed)
    return made.train(layers[0].training)


@checked
def attention_to_moe(
    attention: nn.Module, num_experts: Size, top_k: Size | None = None, *, select: Any = None,
    keys: Literal["all", "chosen"] = "chosen", router_init: float = 0.02, seed: Seed = 0,
) -> MixtureOfAttention:  # fmt: skip
    """Head groups of an attention layer as experts (LLaMA-MoE v2): each has its keys and values with their queries, and
    its columns of the output projection. With all groups (top_k = E, the default) it is the layer; with fewer, the sum
    of the chosen ones times E / K, which all have equal weights (EqualTopK) unless `select` says otherwise. The paper's
    code has select=TopK(top_k, "softmax", normalize=True, scale=…).

    Groups are computed for all tokens, which saves no time.

    Args:
        num_experts: a divisor of the heads of keys; or a multiple that divides the heads of queries: several experts
            then start with the same keys and values, and train copies of them.
        keys: "chosen": a token attends in a group to tokens that chose it (LLaMA-MoE v2); "all": to all tokens, so that
            with fewer groups each head still computes what it did in the layer.
        router_init, seed: standard deviation of the router's weight, and the seed of its random numbers.

    Raises ValueError for other numbers of experts, and for attention that computes something else, such as interleaved
    rotary embeddings: the layer is compared with its mixture on random rows.
    """
    found = _read(attention, "attention")
    top_k = num_experts if top_k is None else top_k
    if top_k > num_experts:  # EqualTopK does not know E
        raise ValueError(f"top_k: expected 1 to {num_experts} (num_experts), got {top_k}")
    heads, kv_heads = found["heads"], found["kv_heads"]
    copies = max(num_experts // kv_heads, 1)
    if kv_heads * copies % num_experts or heads % num_experts:
        raise ValueError(
            f"num_experts: expected a divisor of {kv_heads} heads of keys, or a multiple that divides {heads} heads of "
            f"queries, got {num_experts}"
        )
    chosen = EqualTopK(top_k, num_experts / top_k) if select is None else select
    made = MixtureOfAttention(
        found["hidden_size"], num_experts, heads // num_experts, kv_heads * copies // num_experts, select=chosen,
        keys=keys, **found["options"],
    )  # fmt: skip
    with torch.no_grad():
        for name, tensor in found["tensors"].items():
            if name == "o_proj":
                parts = torch.stack(tensor.chunk(num_experts, 1))
            elif name == "o_bias":
                parts = (tensor / num_experts).expand(num_experts, -1)
            elif name.endswith("norm"):
                parts = tensor.expand(num_experts, -1)
            elif name[0] in "kv":
                parts = torch.stack(tensor.chunk(num_experts // copies, 0)).repeat_interleave(copies, 0)
            else:
                parts = torch.stack(tensor.chunk(num_experts, 0))
            made.get_parameter(name).copy_(parts)
    initialize_router(made, router_init, seed)
    return made.train(attention.training)


def _read(attention: Any, name: str) -> dict[str, Any]:
    linears: dict[str, Any] = {part: getattr(attention, part, None) for part in PROJECTIONS}
    head_dim = getattr(attention, "head_dim", None)
    if not all(isinstance(linear, nn.Linear) for linear in linears.values()) or not isinstance(head_dim, int):
        raise ValueError(
            f"{name}: expected attention with Linear layers {', '.join(PROJECTIONS)} and head_dim, "
            f"got {type(attention).__name__}"
        )
    _check_usual(attention, name)
    q, k, o = linears["q_proj"], linears["k_proj"], linears["o_proj"]
    tensors: dict[str, Tensor] = {part: linear.weight.detach() for part, linear in linears.items()}
    tensors |= {f"{part[0]}_bias": linear.bias.detach() for part, linear in linears.items() if linear.bias is not None}
    if any(f"{part}_bias" in tensors for part in "qkv"):  # some layers have none for keys
        for part in PROJECTIONS[:3]:
            tensors.setdefault(f"{part[0]}_bias", torch.zeros_like(tensors[part][:, 0]))
    norms: dict[str, Any] = {part: getattr(attention, part, None) for part in ("q_norm", "k_norm")}
    norms = {part: norm for part, norm in norms.items() if norm is not None}
    for part, norm in norms.items():
        if tuple(norm.weight.shape) != (head_dim,) or not hasattr(norm, "variance_epsilon"):
            raise ValueError(f"{name}: expected {part} to be an RMSNorm per head, got {type(norm).__name__}")
        tensors[part] = norm.weight.detach()
    options = {
        "head_dim": head_dim, "bias": "q_bias" in tensors, "o_bias": o.bias is not None,
        "qk_norm": norms["q_norm"].variance_epsilon if norms else None, "scaling": getattr(attention, "scaling", None),
        "dropout": _read_dropout(attention, "attention_dropout"),
        "residual_dropout": _read_dropout(attention, "residual_dropout"),
        "causal": getattr(attention, "is_causal", True), "layer_idx": getattr(attention, "layer_idx", None),
        "device": q.weight.device, "dtype": q.weight.dtype,
    }  # fmt: skip
    found = {
        "hidden_size": q.in_features, "heads": q.out_features // head_dim, "kv_heads": k.out_features // head_dim,
        "tensors": tensors, "options": options,
    }  # fmt: skip
    _check_same(attention, found, name)
    return found


def _read_dropout(attention: Any, name: str) -> float:
    dropout = getattr(attention, name, None) or 0.0
    return float(getattr(dropout, "p", dropout))


def _check_usual(attention: Any, name: str) -> None:
    if getattr(attention, "sliding_window", None):
        raise ValueError(f"{name}: expected full attention, got a sliding window")
    config = getattr(attention, "config", None)
    for option in UNUSUAL:
        if value := getattr(attention, option, None) or getattr(config, option, None):
            raise ValueError(f"{name}: expected attention without {option}, got {value}")
    rotary = getattr(config, "rope_parameters", None) or {}
    share = rotary.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1
    if share != 1:
        raise ValueError(f"{name}: expected rotary embeddings of whole heads, got partial_rotary_factor={share}")


@torch.no_grad()
def _check_same(attention: nn.Module, found: dict[str, Any], name: str) -> None:
    """Compares a mixture of one with the layer on random rows and rotations, both in float32 or more."""
    device, head_dim = found["options"]["device"], found["options"]["head_dim"]
    if device.type == "meta":
        return
    dtype = torch.promote_types(found["options"]["dtype"], torch.float32)
    options = found["options"] | {"device": "meta", "dtype": dtype}  # no random numbers are drawn
    made = MixtureOfAttention(found["hidden_size"], 1, found["heads"], found["kv_heads"], **options).eval()
    state = {key: tensor[None].to(dtype) for key, tensor in found["tensors"].items()}
    state["gate.weight"] = torch.zeros(1, found["hidden_size"], dtype=dtype, device=device)
    made.load_state_dict(state, assign=True)
    layer: Any = copy.deepcopy(attention).eval().to(dtype)
    if hasattr(layer, "config"):
        layer.config._attn_implementation = "eager"  # others may want masks of another kind
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, found["hidden_size"], generator=generator).to(device, dtype)
    angles = (torch.rand(1, 4, head_dim // 2, generator=generator) * torch.pi).repeat(1, 1, 2).to(device, dtype)
    mask = torch.full((4, 4), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)[None, None]
    inputs = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": mask}
    formula = "attention with rotary embeddings and nothing else between its projections"
    tolerance = 1e-4  # eager attention takes its softmax in float32
    compare_outputs(
        name, attention, formula, lambda: (layer(hidden_states=x, **inputs)[0], made(x, **inputs)[0]), tolerance
    )


def _rotate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
