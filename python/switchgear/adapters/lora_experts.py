# SPDX-License-Identifier: BSD-3-Clause
"""LoRAExperts: a frozen module plus a routed mixture of low-rank experts (LoRA, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.adapters.peft_format import LowRank, as_low_rank
from switchgear.backends import in_autocast
from switchgear.checks import Finite, FiniteTensor, Share, Size, checked
from switchgear.functional import Routing, combine, grouped_gemm, plan
from switchgear.layers.common import WithLosses, check_rows, refuse_unknown_experts
from switchgear.papers.layers.composed import SoftMoE
from switchgear.papers.parts.scores import PosthocGate
from switchgear.reference import weight_dtype
from switchgear.routing.context import context_of
from switchgear.routing.router import Router, RouterOptions
from switchgear.routing.scores import init_uniform
from switchgear.routing.selection import Dense, TopK
from switchgear.utils.modules import FillsBuffers

if TYPE_CHECKING:
    from typing_extensions import Unpack


# The columns of A per choice, E·r / K, up to which the product with all experts takes less time than that with chosen
# ones. Measured with 512 tokens, H = 2048, ranks of 4 to 32, bfloat16 and float32, two cores: 50 to 120.
FEW_COLUMNS = 64


class LowRankExperts(FillsBuffers):
    """y = Σ_k w_k · alpha_e / r_e · B_e A_e x, where e is the expert topk_ids[k]. Same interface as Experts.

    Args:
        in_features, out_features: sizes of x and y.
        num_experts: E.
        rank: r, or the rank of each expert.
        alpha: an expert's output is multiplied by alpha / rank; one for all, or one for each; rank if None.
        dropout: probability of zeroing an element of x, in training; one draw for all experts.

    Parameters: lora_A [E,r,in] (uniform like torch.nn.Linear) and lora_B [E,r,out], which is B transposed (zeros, so
    the output is zero at first). r is the largest rank; an expert of a lower one has zeros in its last rows, and their
    gradients are zero.

    Two products take all experts, their columns scaled by the weights, if a token uses many of them or if they have few
    columns in all; they read every expert, so one that is NaN or infinite reaches all tokens. Otherwise each token is
    multiplied by its own experts only.
    """

    scale: Tensor

    @checked
    def __init__(
        self,
        in_features: Size,
        out_features: Size,
        num_experts: Size,
        rank: Size | Sequence[Size],
        *,
        alpha: Finite | Sequence[Finite] | None = None,
        dropout: Share = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.out_features, self.num_experts = in_features, out_features, num_experts
        self.ranks: tuple[int, ...] = _repeat("rank", rank, num_experts)
        alphas = self.ranks if alpha is None else _repeat("alpha", alpha, num_experts)
        self.alphas = tuple(float(one) for one in alphas)
        self.dropout = dropout
        largest = max(self.ranks)
        self.lora_A = nn.Parameter(torch.empty(num_experts, largest, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(num_experts, largest, out_features, device=device, dtype=dtype))
        self.register_buffer("scale", torch.empty(num_experts, device=device), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A is uniform within ±1/√in, B is zero."""
        init_uniform(self.lora_A, self.hidden_size)
        nn.init.zeros_(self.lora_B)
        if min(self.ranks) < max(self.ranks):
            rows = torch.arange(self.lora_A.shape[1], device=self.lora_A.device)
            ranks = torch.tensor(self.ranks, device=self.lora_A.device)
            self.lora_A.masked_fill_((rows >= ranks[:, None])[..., None], 0)
        self.fill_buffers(self.scale.device)

    def fill_buffers(self, device: torch.device) -> None:
        """The scale of each expert."""
        values = [alpha / rank for alpha, rank in zip(self.alphas, self.ranks, strict=True)]
        self.scale = torch.tensor(values, dtype=weight_dtype(self.lora_A.dtype), device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankExperts:
        super()._apply(fn, recurse)
        self.fill_buffers(self.scale.device)  # not in the dtype of the module, which would round it
        return self

    @torch.no_grad()
    def load(self, pairs: Sequence[LowRank]) -> None:
        """Copies adapters of these experts' ranks."""
        self.lora_A.zero_()
        self.lora_B.zero_()
        for expert, pair in enumerate(pairs):
            self.lora_A[expert, : pair.rank].copy_(pair.a)
            self.lora_B[expert, : pair.rank].copy_(pair.b.T)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden_states [..., in], topk_ids [..., K] (-1 for none) and topk_weights [..., K] -> [..., out]."""
        check_rows(hidden_states, self.hidden_size)
        x = hidden_states.reshape(-1, self.hidden_size)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        has_autocast = in_autocast(x.device.type)
        if not has_autocast:
            x = x.to(self.lora_A.dtype)
        top_k = topk_ids.shape[-1]
        topk_ids, topk_weights = topk_ids.reshape(len(x), top_k), topk_weights.reshape(len(x), top_k)
        self.fill_on(x.device)
        product = self._all if self._is_dense(top_k) else self._chosen
        y = product(x, topk_ids, topk_weights)
        y = y.view(*hidden_states.shape[:-1], self.out_features)
        return y if has_autocast else y.to(hidden_states.dtype)

    def _is_dense(self, top_k: int) -> bool:
        """Whether the product with all experts is at most twice the work, or takes less time."""
        rank = self.lora_A.shape[1]
        return 2 * top_k >= self.num_experts or self.num_experts * rank <= FEW_COLUMNS * top_k

    def _all(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        refuse_unknown_experts(topk_ids, self.num_experts)
        gates = topk_weights.new_zeros(len(x), self.num_experts + 1)
        gates = gates.scatter_add(1, topk_ids.long() + 1, topk_weights)[:, 1:] * self.scale
        h = _multiply(x, self.lora_A.flatten(0, 1))
        h = (h.view(len(x), self.num_experts, h.shape[1] // self.num_experts) * gates[..., None]).to(h.dtype).flatten(1)
        return _multiply(h, self.lora_B.flatten(0, 1).mT)

    def _chosen(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        slots = plan(topk_ids, self.num_experts)
        weights = topk_weights * self.scale[topk_ids.clamp(min=0).long()]
        h = grouped_gemm(x, self.lora_A, slots.expert_offsets, token_indices=slots.token_indices)
        return combine(grouped_gemm(h, self.lora_B.mT, slots.expert_offsets), slots, weights)

    def extra_repr(self) -> str:
        ranks = sorted(set(self.ranks))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        text = f"{self.hidden_size}, {self.out_features}, num_experts={self.num_experts}, rank={rank}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ, whose bits do not depend on the other rows."""
    offsets = torch.arange(2, dtype=torch.int32, device=x.device) * len(x)
    return grouped_gemm(x, weight[None], offsets)


def _repeat(name: str, values: Any, num_experts: int) -> tuple[Any, ...]:
    if not isinstance(values, Sequence):
        return (values,) * num_experts
    if len(values) != num_experts:
        raise ValueError(f"{name}: expected {num_experts} (num_experts), got {len(values)}")
    return tuple(values)


# ---- around a module -------------------------------------------------------------------------------------------------


class LoRAExperts(WithLosses):
    """y = base(x) + Σ_k w_k · alpha_e / r_e · B_e A_e x, where e is the k-th expert that a router chooses for x.

        layer = LoRAExperts(linear, num_experts=8, rank=4, alpha=32)                      # all experts: LoRAMoE
        layer = LoRAExperts(linear, 64, 16, top_k=2, normalize=True)                      # two for each token
        layer = LoRAExperts.from_adapters(linear, [(A, B, 16), (A2, B2, 32)], top_k=1)    # trained adapters

    Args:
        base: a module x [..., in] -> y [..., out], for example nn.Linear. Its parameters are frozen.
        num_experts: E.
        rank: r, or the rank of each expert.
        alpha, dropout: see LowRankExperts.
        slots: no router: each expert gets that many mixtures of the tokens of a sequence, and each token a mixture of
            their outputs (SoftMoE; Omni-SMoLA, arXiv:2312.00968).
        router: a module (x, Context) -> Routing, instead of the options of a Router.
        features: (in, out), for a base without attributes in_features and out_features.
        device, dtype: of adapters and router; by default those of the base's weight.
        router_options: options of Router. Without top_k and select, all experts are used (Dense).

    Routing can depend on a sequence or task; forward takes the attributes of Context as keyword arguments, as MoE does.
    In a model that calls layer(x), `Mixture.context` sets them.

    Submodules: base; gate (Router); experts (LowRankExperts; with slots, SoftMoE around it). The weights of a mixture
    differ for each token, so it can't be merged into the base.
    """

    gate: nn.Module | None

    @checked
    def __init__(
        self,
        base: nn.Module,
        num_experts: Size,
        rank: Size | Sequence[Size],
        *,
        alpha: float | Sequence[float] | None = None,
        dropout: float = 0.0,
        slots: int | None = None,
        router: Callable[..., Routing] | None = None,
        top_k: int | None = None,
        features: tuple[Size, Size] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options: Unpack[RouterOptions],
    ) -> None:
        super().__init__()
        if unknown := sorted(set(router_options) - set(RouterOptions.__annotations__)):
            raise TypeError(f"{unknown[0]}: expected an option of LoRAExperts or of its Router, got one of neither")
        if isinstance(base, LoRAExperts):
            raise ValueError("base: expected a module without LoRAExperts, got LoRAExperts")
        given = [*router_options, *(["top_k"] if top_k is not None else [])]
        for name, value in {"slots": slots, "router": router}.items():
            others = [*given, *(["router"] if name == "slots" and router is not None else [])]
            if value is not None and others:
                raise ValueError(f"{name}: expected None with options of a router, got {', '.join(others)}")
        self.in_features, self.out_features = features or find_features(base)
        made = find_device_and_dtype(base, device, dtype)
        low_rank = LowRankExperts(
            self.in_features, self.out_features, num_experts, rank, alpha=alpha, dropout=dropout, **made
        )
        if slots is None and router is None:
            router = build_router(self.in_features, num_experts, top_k, **router_options, **made)
        seen = getattr(router, "num_experts", num_experts)
        if seen != num_experts:
            raise ValueError(f"router: expected one of {num_experts} experts, got {seen}")
        self.experts: nn.Module = low_rank if slots is None else SoftMoE(low_rank, slots=slots, **made)
        self._gate: tuple[nn.Module, ...] = ()
        self.gate = None
        gate: Any = router
        if gate is not None and getattr(gate, "is_shared", False):
            self._gate = (gate,)  # a submodule of one layer only
        elif gate is not None:
            self.gate = gate
        self.known: dict[str, Any] = {}  # set by Mixture.context
        self.base = base
        self._was_trained = [name for name, p in base.named_parameters() if p.requires_grad]
        base.requires_grad_(False)  # last, so that an error leaves it as it was

    @classmethod
    @checked
    def from_adapters(
        cls,
        base: nn.Module,
        adapters: Sequence[LowRank | tuple[Tensor, Tensor, float]],
        *,
        gates: Sequence[FiniteTensor] | None = None,
        features: tuple[Size, Size] | None = None,
        **options: Any,
    ) -> LoRAExperts:
        """Trained adapters as experts, with their own ranks.

        Args:
            adapters: one or more (A [r,in], B [out,r], alpha), as in PEFT; `read_lora` reads a checkpoint.
            gates: a vector [in] for each adapter, from train_gate (PHATGOOSE, arXiv:2402.05859). Without other options
                of the router, it is then PosthocGate with the two best experts.
            features, options: those of LoRAExperts but rank and alpha.

        Raises:
            ValueError: no adapters, shapes that do not fit the base, or numbers that are not finite.
        """
        features = features or find_features(base)
        pairs = [as_low_rank(f"adapters[{i}]", adapter, features) for i, adapter in enumerate(adapters)]
        if not pairs:
            raise ValueError("adapters: expected at least one, got none")
        if gates is not None:
            _check_gates(gates, len(pairs), features[0])
            if not set(options) & (set(RouterOptions.__annotations__) | {"router", "slots", "top_k"}):
                options |= {"score": PosthocGate, "select": TopK(min(2, len(pairs)), normalize=True)}
        ranks, alphas = [pair.rank for pair in pairs], [pair.alpha for pair in pairs]
        layer = cls(base, len(pairs), ranks, alpha=alphas, features=features, **options)
        try:
            if gates is not None:
                _set_gates(layer, gates)
            layer.low_rank.load(pairs)
        except BaseException:
            layer.release()
            raise
        return layer

    @property
    def low_rank(self) -> LowRankExperts:
        """The experts, also inside SoftMoE."""
        inside = self.experts.experts if isinstance(self.experts, SoftMoE) else self.experts
        assert isinstance(inside, LowRankExperts)
        return inside

    @property
    def router(self) -> nn.Module | None:
        """gate, or the router that is shared with other layers."""
        return self._gate[0] if self._gate else self.gate

    def own_router(self) -> None:
        """Makes a shared router a submodule of this layer; one layer of a model does."""
        self.gate, self._gate = self.router, ()

    @property
    def weight(self) -> Any:
        """That of the base, for code that reads the weight of a Linear."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The bias of the base layer, or None."""
        return self.base.bias

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        """hidden_states [..., in] -> [..., out]. Keyword arguments are attributes of Context."""
        check_rows(hidden_states, self.in_features)
        y: Tensor = self.base(hidden_states)
        router, known = self.router, {**self.known, **context}
        if router is None:
            low = self.experts(hidden_states, known.get("mask"))
        else:
            routing: Routing = router(hidden_states, context_of(**known)) if known else router(hidden_states)
            if not isinstance(routing, Routing):
                raise TypeError(f"router: expected one that returns Routing, got {type(routing).__name__}")
            if routing.losses or self.losses:
                self.losses = routing.losses
            rows = hidden_states.reshape(-1, self.in_features)
            low = self.experts(rows, routing.topk_ids, routing.topk_weights)
        y = y + low.view(y.shape).to(y.dtype)
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "known": {}}

    def release(self) -> nn.Module:
        """The base, with gradients as before."""
        for name, parameter in self.base.named_parameters():
            if name in self._was_trained:
                parameter.requires_grad_(True)
        return self.base

    def merge(self, name: str = "the layer") -> NoReturn:
        """Raises ValueError: there is no one weight to merge into the base."""
        raise ValueError(
            f"model: expected adapters that act on all tokens alike, got {name}, a routed mixture, which weighs its "
            "adapters for each token and is saved with Mixture(model).state_dict()"
        )


def find_features(base: nn.Module) -> tuple[int, int]:
    """The sizes (in, out) of a Linear, or of a Conv1D of transformers."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = [getattr(base, name, None) for name in names]
        if all(isinstance(size, int) for size in sizes):
            return sizes[0], sizes[1]  # type: ignore[return-value]
    raise ValueError(f"features: expected (in, out) for {type(base).__name__}, which has no in_features, got None")


def find_device_and_dtype(base: nn.Module, device: Any, dtype: torch.dtype | None) -> dict[str, Any]:
    """device and dtype, by default those of the base's first parameter if it is not quantised."""
    weight = next(base.parameters(), None)
    if weight is None:
        return {"device": device, "dtype": dtype}
    own = weight.dtype if weight.is_floating_point() else None
    return {"device": weight.device if device is None else device, "dtype": dtype or own}


def build_router(in_features: int, num_experts: int, top_k: int | None, **options: Any) -> Router:
    """A Router; of all experts if neither top_k nor select is given, and Dense takes over the options that it knows."""
    if top_k is None and options.get("select") is None:
        names = ("score_function", "normalize", "scale")
        options["select"] = Dense(**{name: options.pop(name) for name in names if name in options})
    return Router(in_features, num_experts, top_k, **options)


def _check_gates(gates: Sequence[Tensor], num_experts: int, in_features: int) -> None:
    if len(gates) != num_experts:
        raise ValueError(f"gates: expected {num_experts}, one for each adapter, got {len(gates)}")
    for number, vector in enumerate(gates):
        if vector.numel() != in_features:
            raise ValueError(f"gates[{number}]: expected shape [{in_features}], got {list(vector.shape)}")


def _set_gates(layer: LoRAExperts, gates: Sequence[Tensor]) -> None:
    score = getattr(layer.gate, "score", None)
    if not isinstance(score, PosthocGate):
        raise ValueError(f"gates: expected a router with score=PosthocGate for them, got {type(score).__name__}")
    with torch.no_grad():
        score.gates.copy_(torch.stack([vector.detach().flatten() for vector in gates]))
