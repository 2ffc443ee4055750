# SPDX-License-Identifier: BSD-3-Clause
"""Muon for stacked experts: each matrix of a parameter [E,N,C] is orthogonalised by itself, all in one batch.

    matrices, rest = optim.muon_groups(model)
    optimizers = optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=3e-4)

torch.optim.Muon takes matrices only; a stack of experts would have to be split into E parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import Finite, Range, checked, convert, list_of_names
from switchgear.functional import as_number
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.papers.layers.monet import MonetRouter
from switchgear.routing.router import Router
from switchgear.weights.form import layout_of
from switchgear.weights.selected import SUFFIX

__all__ = ["Muon", "muon_groups", "orthogonalized"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration (Jordan et al., 2024)
_CACHED = 1 << 19  # elements of a batch on a CPU
_TRANSPOSED = "is_transposed"  # an attribute of parameters [E,in,out]
_HINTS = {
    "ns_steps": Annotated[int, Range(0, 99)],
    "ns_coefficients": tuple[Finite, Finite, Finite],
    "adjust_lr_fn": Literal["original", "match_rms_adamw"] | None,
}


def orthogonalized(
    matrices: Tensor, steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """About U·Vᵀ of each matrix U·S·Vᵀ in matrices [..., N, C], in bfloat16, by Newton–Schulz iteration. Singular
    values come out between 0.7 and 1.2. Zero matrices stay zero.

    The iteration multiplies on the shorter side, in batched products: of all matrices on a GPU, of a megabyte of them
    on a CPU, where larger ones are as fast one by one.
    """
    if not matrices.numel():
        return matrices.bfloat16()
    matrix = matrices.shape[-2:]
    stack = matrices.reshape(-1, *matrix)
    count = len(stack) if stack.is_cuda else max(1, _CACHED // matrix.numel())
    parts = [_orthogonalize(part, steps, coefficients, eps) for part in torch.split(stack, count)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(matrices.shape)


def _orthogonalize(matrices: Tensor, steps: int, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    a, b, c = coefficients
    x, is_tall = matrices.bfloat16(), matrices.shape[1] > matrices.shape[2]
    if is_tall:
        x = x.mT.contiguous()
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon (arXiv:2502.16982) for matrices and stacks of matrices: the update of torch.optim.Muon, whose options and
    defaults it has, for each matrix of a parameter [..., N, C].

    Args:
        params: parameters of 2 or more dimensions, or groups of them (muon_groups).
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps: as in torch.optim.Muon. lr may be a tensor
            of one number, of any shape.
        adjust_lr_fn: None or "original" multiplies lr by √max(1, N/C), "match_rms_adamw" by 0.2·√max(N, C). N is the
            size of the output; of experts that are stored transposed, [E,C,N], muon_groups marks it.

    Raises ValueError for an option out of range, or a parameter of fewer dimensions.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        options = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
        }  # fmt: skip
        super().__init__(params, options)  # add_param_group checks them

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim. Raises ValueError for an option out of range, or a parameter of fewer dimensions."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dim() < 2:
                del self.param_groups[-1]
                shape = list(parameter.shape)
                raise ValueError(f"params: expected parameters of at least 2 dimensions, got shape {shape}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Parameters without a gradient stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr = float(group["lr"])
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, lr)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], lr: float) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        options = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"], "eps": group["eps"]}
        update = _map_matrices(partial(orthogonalized, **options), update)
        parameter.mul_(1 - lr * group["weight_decay"])
        rows, columns = parameter.shape[-2:]
        if getattr(parameter, _TRANSPOSED, False):
            rows, columns = columns, rows
        matches_adamw = group["adjust_lr_fn"] == "match_rms_adamw"
        ratio = 0.2 * math.sqrt(max(rows, columns)) if matches_adamw else math.sqrt(max(1, rows / columns))
        parameter.add_(update, alpha=-lr * ratio)


def _check(options: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "momentum", "eps"):
        if not as_number(name, options[name]) >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {options[name]}")
    for name, hint in _HINTS.items():
        value = options[name]
        convert(name, tuple(value) if isinstance(value, list) else value, hint)


@checked
def muon_groups(model: nn.Module, *, others: str | Iterable[str] = ()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits the parameters that require gradients: matrices of hidden layers for Muon, the rest for AdamW.

    The rest: vectors and scalars, also as matrices with a single row or column; biases of stacked experts, embeddings,
    convolutions, A_log of state-space models; routers of MoE layers (switchgear's or Hugging Face's) and what a class
    names in `not_matrices`; and the parameters of the modules or the names in `others`, to which the output layer
    belongs ("lm_head"). Each parameter is in one list, once.

    Parameters of experts get an attribute is_transposed, for Muon. Raises ValueError for a name in `others` that the
    model does not have.
    """
    others = list_of_names("others", others)
    names = dict(model.named_parameters(remove_duplicate=False))
    for prefix in others:
        if not any(_is_in(name, prefix) for name in names):
            raise ValueError(f"others: expected names of modules or parameters, got {prefix!r}")
    kinds = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, Router, MonetRouter)
    modules = [block.gate for block in moe_blocks(model).values() if block.gate is not None]  # Hugging Face's, too
    modules += [module for module in model.modules() if isinstance(module, kinds)]
    excluded = {id(parameter) for module in modules for parameter in module.parameters()} | {
        id(parameter)
        for name, parameter in names.items()
        if not _is_matrix(name, parameter) or any(_is_in(name, prefix) for prefix in others)
    }
    for module in model.modules():
        for name, parameter in module.named_parameters():
            if name.partition(".")[0] in getattr(module, "not_matrices", ()):
                excluded.add(id(parameter))
        if (layout := layout_of(module)) is not None:
            for name, parameter in module.named_parameters(recurse=False):
                is_projection = name.removesuffix(SUFFIX) in layout.names  # factors of adapters are never transposed
                setattr(parameter, _TRANSPOSED, layout.transposed and is_projection)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trained if id(p) not in excluded], [p for p in trained if id(p) in excluded]


def _is_in(name: str, prefix: str) -> bool:
    """Whether a parameter has the name `prefix`, or is in the module of that name."""
    return name == prefix or name.startswith(f"{prefix}.")


def _is_matrix(name: str, parameter: Tensor) -> bool:
    own = name.rpartition(".")[2]
    return parameter.dim() >= 2 and 1 not in parameter.shape[-2:] and "bias" not in own and own != "A_log"


def _map_matrices(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """function(tensor [..., N, C]), which acts on each matrix by itself. A rank takes its own matrices, and those
    that are split among ranks."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return function(tensor)
    from torch.distributed.tensor import DTensor, Replicate

    kept = [p if p.is_shard() and p.dim < tensor.dim() - 2 else Replicate() for p in tensor.placements]  # type: ignore[attr-defined]
    part = function(tensor.redistribute(placements=kept).to_local()).contiguous()  # type: ignore[attr-defined]
    shape, stride = tensor.shape, tensor.stride()
    result = DTensor.from_local(part, mesh, kept, run_check=False, shape=shape, stride=stride)
    placed: Tensor = result.redistribute(placements=tensor.placements)  # type: ignore[attr-defined]
    return placed
