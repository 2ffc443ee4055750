# SPDX-License-Identifier: BSD-3-Clause
"""The torch ops of switchgear: schema, fake implementation, and the call of the native module or of the reference.

The only file that calls the ops of `_C` and `_cuda`, and private to the package: an op knows no gradient, so the public
functions of functional.py are the ones to use. Shapes and formats are those of include/switchgear/ops.h.

Each op below is one function that allocates its outputs, in `allocate` (which also serves as the fake implementation),
and one that passes them to a native module: `_C` for tensors on the CPU, `_cuda` for those on a CUDA device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import MethodType, ModuleType
from typing import Any, TypeVar

import torch  # first: it brings the OpenMP runtime that the native module then shares
from torch import Tensor, nn

from switchgear import backends, cuda, reference, reference_policies, reference_quantized

try:
    from switchgear import _C
except ImportError as error:
    raise ImportError(
        "switchgear's native module `switchgear._C` is missing or does not load; build it with "
        f"`pip install .` in a checkout of the repository ({error})"
    ) from error

advise_huge_pages = _C.advise_huge_pages
available_cpu_isas = _C.available_cpu_isas
collapse_into_huge_pages = _C.collapse_into_huge_pages
cpu_isa = _C.cpu_isa

set_cpu_isa = _C.set_cpu_isa
version: str = _C.version


class Kernels:
    """What an op runs on: a native module, the last argument of its functions, and memory for gradients of weights."""

    __slots__ = ("empty_weight", "execution", "module")

    def __init__(
        self, module: Any, execution: Callable[[], Any], empty_weight: Callable[[Tensor], Tensor] = torch.empty_like
    ) -> None:
        self.module = module
        self.execution = execution
        self.empty_weight = empty_weight


_KEPT_BYTES = 1 << 20  # smaller tensors come from memory that malloc keeps anyway


def _kept_like(tensor: Tensor) -> Tensor:
    """torch.empty_like in memory that `_C` keeps for the next tensor of this size. A weight gradient that is allocated
    anew at each step has its pages faulted in and zeroed at each step."""
    transposed = not tensor.is_contiguous()
    dense = tensor.mT if transposed else tensor
    if tensor.nbytes < _KEPT_BYTES or not dense.is_contiguous():
        return torch.empty_like(tensor)
    memory = torch.frombuffer(_C.Buffer(tensor.nbytes), dtype=tensor.dtype).view(dense.shape)
    return memory.mT if transposed else memory


host = Kernels(_C, torch.get_num_threads, _kept_like)


@functools.cache
def _on_cuda(index: int) -> Kernels:
    module = cuda.module()
    return Kernels(module, cuda.Execution(module, index))


_lib: Any = torch.library.Library("switchgear", "DEF")  # type: ignore[no-untyped-call]


def _loop_over_batch(op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of torch.vmap: one call per element, results stacked."""

    def element(arg: Any, dim: Any, index: int) -> Any:
        if isinstance(dim, (list, tuple)):
            return [element(item, item_dim, index) for item, item_dim in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, index)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        pairs = list(zip(args, in_dims, strict=True))
        results = [op(*(element(arg, dim, index) for arg, dim in pairs)) for index in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def _check_devices(op: Any, args: Sequence[Any]) -> None:
    device = args[0].device
    for argument, value in zip(op._schema.arguments, args, strict=False):
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, Tensor) and tensor.device != device:
                raise ValueError(f"{argument.name}: expected a tensor on {device}, got one on {tensor.device}")


def _register(
    schema: str, native: Callable[..., Any], allocate: Callable[..., Any], specified_in: ModuleType = reference
) -> Any:
    """Defines the op and returns its overload, which is quicker to call than the packet. An op of another
    module than reference that a native module lacks runs as its specification says."""
    name = schema.partition("(")[0]
    specification = getattr(specified_in, name)
    is_everywhere = specified_in is reference

    on_host = MethodType(native, host)  # quicker than to hand `host` on with the arguments

    def on_cpu(*args: Any) -> Any:
        if backends.runs_natively(args[0].dtype) and (is_everywhere or hasattr(host.module, name)):
            return on_host(*args)
        return in_torch(*args)

    def on_cuda(*args: Any) -> Any:
        device = args[0].device
        if device.type != "cuda":  # another argument brought the call here
            _check_devices(op, args)
        if not backends.runs_natively(args[0].dtype):
            return in_torch(*args)
        reason = cuda.reason_against(device.index)
        if reason is not None:
            backends.announce_reference(device, reason)
            return in_torch(*args)
        kernels = _on_cuda(device.index)
        if not (is_everywhere or hasattr(kernels.module, name)):
            return in_torch(*args)
        with cuda.current(device.index):
            return native(kernels, *args)

    def elsewhere(*args: Any) -> Any:
        backends.announce_reference(args[0].device)
        return in_torch(*args)

    def without_data(*args: Any) -> Any:  # meta tensors come here too, whatever the device of the others
        _check_devices(op, args)
        return allocate(*args)

    def in_torch(*args: Any) -> Any:
        with backends.without_autocast(args[0].device.type):  # which would round every product in here
            return specification(*args)

    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _lib.impl(name, on_cpu, "CPU")
    _lib.impl(name, on_cuda, "CUDA")
    _lib.impl(name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"switchgear::{name}", without_data, lib=_lib)
    op = getattr(torch.ops.switchgear, name).default
    torch.library.register_vmap(f"switchgear::{name}", _loop_over_batch(op), lib=_lib)
    return op


T = TypeVar("T", Tensor, Tensor | None)


def _dense(tensor: T) -> T:
    return None if tensor is None else tensor.contiguous()


def _rows(tensor: T) -> T:
    """The kernels take any distance between rows, but rows must be contiguous."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _matrix(name: str, tensor: Tensor, dims: int = 2) -> Tensor:
    """`tensor`, once it is known to have the dimensions that the outputs' shapes are read from."""
    if tensor.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {list(tensor.shape)}")
    return tensor


# ---- route -----------------------------------------------------------------------------------------------------------


def _allocate_route(router_logits: Tensor, selection_bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    num_tokens = _matrix("router_logits", router_logits).shape[0]
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    topk_ids = router_logits.new_empty(num_tokens, top_k, dtype=torch.int32)
    return topk_ids, router_logits.new_empty(num_tokens, top_k, dtype=reference.weight_dtype(router_logits.dtype))


def _route(
    kernels: Kernels,
    router_logits: Tensor,
    selection_bias: Tensor | None,
    top_k: int,
    score_function: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    outputs = _allocate_route(router_logits, selection_bias, top_k)
    kernels.module.route(
        _rows(router_logits), _dense(selection_bias), *outputs, score_function, normalize, scale,
        num_groups, topk_groups, group_score, kernels.execution(),
    )  # fmt: skip
    return outputs


route: Callable[..., tuple[Tensor, Tensor]] = _register(
    "route(Tensor router_logits, Tensor? selection_bias, int top_k, str score_function, bool normalize, float scale, "
    "int num_groups, int topk_groups, str group_score) -> (Tensor topk_ids, Tensor topk_weights)",
    _route,
    _allocate_route,
)


def _allocate_route_backward(grad_topk_weights: Tensor, router_logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(router_logits, memory_format=torch.contiguous_format)


def _route_backward(
    kernels: Kernels,
    grad_topk_weights: Tensor,
    router_logits: Tensor,
    topk_ids: Tensor,
    score_function: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    grad_router_logits = _allocate_route_backward(grad_topk_weights, router_logits)
    kernels.module.route_backward(
        grad_topk_weights.contiguous(), _rows(router_logits), topk_ids.contiguous(), grad_router_logits,
        score_function, normalize, scale, kernels.execution(),
    )  # fmt: skip
    return grad_router_logits


route_backward: Callable[..., Tensor] = _register(
    "route_backward(Tensor grad_topk_weights, Tensor router_logits, Tensor topk_ids, str score_function, "
    "bool normalize, float scale) -> Tensor",
    _route_backward,
    _allocate_route_backward,
)


# ---- routing policies ------------------------------------------------------------------------------------------------


def _allocate_route_dynamic(
    router_logits: Tensor, selection_bias: Tensor | None, max_experts: int, *_: Any
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = _matrix("router_logits", router_logits).shape
    if not 1 <= max_experts <= num_experts:
        raise ValueError(f"max_experts: expected 1 to {num_experts}, got {max_experts}")
    topk_ids = router_logits.new_empty(num_tokens, max_experts, dtype=torch.int32)
    return topk_ids, router_logits.new_empty(num_tokens, max_experts, dtype=reference.weight_dtype(router_logits.dtype))


def _route_dynamic(
    kernels: Kernels, router_logits: Tensor, selection_bias: Tensor | None, max_experts: int, *options: Any
) -> tuple[Tensor, Tensor]:
    outputs = _allocate_route_dynamic(router_logits, selection_bias, max_experts)
    kernels.module.route_dynamic(_rows(router_logits), _dense(selection_bias), *outputs, *options, kernels.execution())
    return outputs


route_dynamic: Callable[..., tuple[Tensor, Tensor]] = _register(
    "route_dynamic(Tensor router_logits, Tensor? selection_bias, int max_experts, int min_experts, str score_function, "
    "float top_p, float threshold, bool normalize, float scale) -> (Tensor topk_ids, Tensor topk_weights)",
    _route_dynamic,
    _allocate_route_dynamic,
    reference_policies,
)


def _allocate_column_topk(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(_matrix("values", values).shape, dtype=torch.int32)


def _column_topk(kernels: Kernels, values: Tensor, sequence_ids: Tensor | None, limits: Tensor) -> Tensor:
    topk_ids = _allocate_column_topk(values)
    kernels.module.column_topk(_rows(values), _dense(sequence_ids), limits.contiguous(), topk_ids, kernels.execution())
    return topk_ids


column_topk: Callable[..., Tensor] = _register(
    "column_topk(Tensor values, Tensor? sequence_ids, Tensor limits) -> Tensor",
    _column_topk,
    _allocate_column_topk,
    reference_policies,
)


def _allocate_fit_capacity(topk_ids: Tensor, *_: Any) -> Tensor:
    return topk_ids.new_empty(_matrix("topk_ids", topk_ids).shape)


def _fit_capacity(
    kernels: Kernels,
    topk_ids: Tensor,
    priorities: Tensor | None,
    scores: Tensor | None,
    sequence_ids: Tensor | None,
    limits: Tensor,
    num_experts: int,
    drop: str,
    candidates: int,
) -> Tensor:
    kept_ids = _allocate_fit_capacity(topk_ids)
    kernels.module.fit_capacity(
        topk_ids.contiguous(), _dense(priorities), _dense(scores), _dense(sequence_ids), limits.contiguous(), kept_ids,
        num_experts, drop, candidates, kernels.execution(),
    )  # fmt: skip
    return kept_ids


fit_capacity: Callable[..., Tensor] = _register(
    "fit_capacity(Tensor topk_ids, Tensor? priorities, Tensor? scores, Tensor? sequence_ids, Tensor limits, "
    "int num_experts, str drop, int candidates) -> Tensor",
    _fit_capacity,
    _allocate_fit_capacity,
    reference_policies,
)


def _allocate_assign_balanced(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(_matrix("values", values).shape[:1], dtype=torch.int32)


def _assign_balanced(
    kernels: Kernels, values: Tensor, sequence_ids: Tensor | None, num_sequences: int, eps: float, max_iterations: int
) -> Tensor:
    expert_ids = _allocate_assign_balanced(values)
    kernels.module.assign_balanced(
        values.contiguous(), _dense(sequence_ids), expert_ids, num_sequences, eps, max_iterations, kernels.execution()
    )
    return expert_ids


assign_balanced: Callable[..., Tensor] = _register(
    "assign_balanced(Tensor values, Tensor? sequence_ids, int num_sequences, float eps, int max_iterations) -> Tensor",
    _assign_balanced,
    _allocate_assign_balanced,
    reference_policies,
)


def _allocate_assign_capped(values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(_matrix("values", values).shape, dtype=reference.weight_dtype(values.dtype))


def _assign_capped(
    kernels: Kernels,
    values: Tensor,
    sequence_ids: Tensor | None,
    limits: Tensor,
    cap: int,
    entropy: float,
    iterations: int,
    longest: int | None = None,
    largest: int | None = None,
) -> Tensor:
    assignment = _allocate_assign_capped(values)
    kernels.module.assign_capped(
        _rows(values), _dense(sequence_ids), limits.contiguous(), assignment, cap, entropy, iterations,
        kernels.execution(),
    )  # fmt: skip
    return assignment


assign_capped: Callable[..., Tensor] = _register(
    "assign_capped(Tensor values, Tensor? sequence_ids, Tensor limits, int cap, float entropy, int iterations, "
    "int? longest=None, int? largest=None) -> Tensor",
    _assign_capped,
    _allocate_assign_capped,
    reference_policies,
)


# ---- plan ------------------------------------------------------------------------------------------------------------


def _allocate_plan(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = _matrix("topk_ids", topk_ids).shape
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    return (
        topk_ids.new_empty(num_experts + 1),
        topk_ids.new_empty(num_tokens * top_k),
        topk_ids.new_empty(num_tokens, top_k),
    )


def _plan(kernels: Kernels, topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate_plan(topk_ids, num_experts)
    kernels.module.plan(topk_ids.contiguous(), *outputs, kernels.execution())
    return outputs


plan: Callable[..., tuple[Tensor, Tensor, Tensor]] = _register(
    "plan(Tensor topk_ids, int num_experts) -> (Tensor expert_offsets, Tensor token_indices, Tensor slot_indices)",
    _plan,
    _allocate_plan,
)


# ---- permute, combine ------------------------------------------------------------------------------------------------


def _allocate_permute(x: Tensor, expert_offsets: Tensor, token_indices: Tensor, *_: Any) -> Tensor:
    return x.new_empty(token_indices.shape[0], _matrix("x", x).shape[1])


def _permute(
    kernels: Kernels,
    x: Tensor,
    expert_offsets: Tensor,
    token_indices: Tensor,
    slot_indices: Tensor,
    topk_weights: Tensor | None,
) -> Tensor:
    permuted_x = _allocate_permute(x, expert_offsets, token_indices)
    kernels.module.permute(
        _rows(x), expert_offsets.contiguous(), token_indices.contiguous(), slot_indices.contiguous(),
        _dense(topk_weights), permuted_x, kernels.execution(),
    )  # fmt: skip
    return permuted_x


permute: Callable[..., Tensor] = _register(
    "permute(Tensor x, Tensor expert_offsets, Tensor token_indices, Tensor slot_indices, Tensor? topk_weights) "
    "-> Tensor",
    _permute,
    _allocate_permute,
)


def _allocate_combine(
    permuted_y: Tensor, expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor, *_: Any
) -> Tensor:
    return permuted_y.new_empty(slot_indices.shape[0], _matrix("permuted_y", permuted_y).shape[1])


def _combine(
    kernels: Kernels,
    permuted_y: Tensor,
    expert_offsets: Tensor,
    token_indices: Tensor,
    slot_indices: Tensor,
    topk_weights: Tensor | None,
) -> Tensor:
    y = _allocate_combine(permuted_y, expert_offsets, token_indices, slot_indices)
    kernels.module.combine(
        _rows(permuted_y), expert_offsets.contiguous(), token_indices.contiguous(), slot_indices.contiguous(),
        _dense(topk_weights), y, kernels.execution(),
    )  # fmt: skip
    return y


combine: Callable[..., Tensor] = _register(
    "combine(Tensor permuted_y, Tensor expert_offsets, Tensor token_indices, Tensor slot_indices, "
    "Tensor? topk_weights) -> Tensor",
    _combine,
    _allocate_combine,
)


def _allocate_combine_weight_backward(
    grad_y: Tensor, permuted_y: Tensor, expert_offsets: Tensor, token_indices: Tensor, slot_indices: Tensor
) -> Tensor:
    return grad_y.new_empty(slot_indices.shape, dtype=reference.weight_dtype(grad_y.dtype))


def _combine_weight_backward(
    kernels: Kernels,
    grad_y: Tensor,
    permuted_y: Tensor,
    expert_offsets: Tensor,
    token_indices: Tensor,
    slot_indices: Tensor,
) -> Tensor:
    grad_topk_weights = _allocate_combine_weight_backward(
        grad_y, permuted_y, expert_offsets, token_indices, slot_indices
    )
    kernels.module.combine_weight_backward(
        _rows(grad_y), _rows(permuted_y), expert_offsets.contiguous(), token_indices.contiguous(),
        slot_indices.contiguous(), grad_topk_weights, kernels.execution(),
    )  # fmt: skip
    return grad_topk_weights


combine_weight_backward: Callable[..., Tensor] = _register(
    "combine_weight_backward(Tensor grad_y, Tensor permuted_y, Tensor expert_offsets, Tensor token_indices, "
    "Tensor slot_indices) -> Tensor",
    _combine_weight_backward,
    _allocate_combine_weight_backward,
)


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def _is_packed(weight: Sequence[Tensor]) -> bool:
    return len(weight) == 1 and weight[0].dim() == 3


def _alike(weight: Sequence[Tensor]) -> list[Tensor]:
    """The kernels take one pair of strides for all matrices; where they differ, as contiguous copies."""
    if all(matrix.stride() == weight[0].stride() for matrix in weight):
        return list(weight)
    return [matrix.clone(memory_format=torch.contiguous_format) for matrix in weight]


def _allocate_grouped_gemm(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    input_gradient: bool = False,
) -> Tensor:
    if not _is_packed(weight):
        for matrix in weight:
            _matrix("weight", matrix)
    rows = x.shape[0] if token_indices is None else token_indices.shape[0]
    return x.new_empty(rows, max(matrix.shape[-2] for matrix in weight))


def _grouped_gemm(
    kernels: Kernels,
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    input_gradient: bool = False,
) -> Tensor:
    out = _allocate_grouped_gemm(x, weight, bias, expert_offsets, token_indices)
    kernels.module.grouped_gemm(
        _rows(x), weight[0] if _is_packed(weight) else _alike(weight), _rows(bias), expert_offsets.contiguous(),
        _dense(token_indices), out, kernels.execution(), input_gradient,
    )  # fmt: skip
    return out


grouped_gemm: Callable[..., Tensor] = _register(
    "grouped_gemm(Tensor x, Tensor[] weight, Tensor? bias, Tensor expert_offsets, Tensor? token_indices, "
    "bool input_gradient=False) -> Tensor",
    _grouped_gemm,
    _allocate_grouped_gemm,
)


def _allocate_grouped_gemm_wgrad(
    grad_out: Tensor, x: Tensor, expert_offsets: Tensor, token_indices: Tensor | None, transposed: bool
) -> Tensor:
    rows, columns = _matrix("grad_out", grad_out).shape[1], _matrix("x", x).shape[1]
    return reference.empty_weight(grad_out, expert_offsets.shape[0] - 1, rows, columns, transposed)


def _grouped_gemm_wgrad(
    kernels: Kernels,
    grad_out: Tensor,
    x: Tensor,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    transposed: bool,
) -> Tensor:
    grad_weight = _allocate_grouped_gemm_wgrad(grad_out, x, expert_offsets, token_indices, transposed)
    kernels.module.grouped_gemm_wgrad(
        _rows(grad_out), _rows(x), expert_offsets.contiguous(), _dense(token_indices), grad_weight,
        kernels.execution(),
    )  # fmt: skip
    return grad_weight


grouped_gemm_wgrad: Callable[..., Tensor] = _register(
    "grouped_gemm_wgrad(Tensor grad_out, Tensor x, Tensor expert_offsets, Tensor? token_indices, bool transposed) "
    "-> Tensor",
    _grouped_gemm_wgrad,
    _allocate_grouped_gemm_wgrad,
)


# ---- glu -------------------------------------------------------------------------------------------------------------


def _allocate_glu(h: Tensor, activation: str, gated: bool, *_: Any) -> Tensor:
    rows, width = _matrix("h", h).shape
    return h.new_empty(rows, width // 2 if gated else width)


def _glu(
    kernels: Kernels, h: Tensor, activation: str, gated: bool, interleaved: bool, alpha: float, limit: float
) -> Tensor:
    a = _allocate_glu(h, activation, gated)
    kernels.module.glu(_rows(h), a, activation, gated, interleaved, alpha, limit, kernels.execution())
    return a


glu: Callable[..., Tensor] = _register(
    "glu(Tensor h, str activation, bool gated, bool interleaved, float alpha, float limit) -> Tensor",
    _glu,
    _allocate_glu,
)


def _allocate_glu_backward(grad_a: Tensor, h: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _glu_backward(
    kernels: Kernels,
    grad_a: Tensor,
    h: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
) -> Tensor:
    grad_h = _allocate_glu_backward(grad_a, h)
    kernels.module.glu_backward(
        _rows(grad_a), _rows(h), grad_h, activation, gated, interleaved, alpha, limit,
        kernels.execution(),
    )  # fmt: skip
    return grad_h


glu_backward: Callable[..., Tensor] = _register(
    "glu_backward(Tensor grad_a, Tensor h, str activation, bool gated, bool interleaved, float alpha, float limit) "
    "-> Tensor",
    _glu_backward,
    _allocate_glu_backward,
)


# ---- the whole layer -------------------------------------------------------------------------------------------------

_LAYER = (
    "Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, Tensor topk_ids, "
    "Tensor topk_weights, str activation, bool gated, bool interleaved, float alpha, float limit"
)


def _allocate_moe_forward(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(_matrix("x", x), memory_format=torch.contiguous_format)
    width = _matrix("gate_up_proj", gate_up_proj, 3).shape[1]
    return y, x.new_empty(_matrix("topk_ids", topk_ids).numel() if save_h else 0, width)


def _moe_forward(
    kernels: Kernels,
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    options = (activation, gated, interleaved, alpha, limit)
    layer = (gate_up_proj, down_proj, gate_up_bias, down_bias, topk_ids, topk_weights)
    y, h = _allocate_moe_forward(x, *layer, *options, save_h)
    kernels.module.moe_forward(
        _rows(x), gate_up_proj, down_proj, _rows(gate_up_bias), _rows(down_bias),
        topk_ids.contiguous(), topk_weights.contiguous(), y, h if save_h else None, *options, kernels.execution(),
    )  # fmt: skip
    return y, h


moe_forward: Callable[..., tuple[Tensor, Tensor]] = _register(
    f"moe_forward(Tensor x, {_LAYER}, bool save_h) -> (Tensor y, Tensor h)",
    _moe_forward,
    _allocate_moe_forward,
)


# Torch's dispatcher costs a call more than its kernel's binding does: 5 µs, and many times that where a model has
# emptied the caches since the last call, as in decoding. So the layer goes past it, where it would only hand the call
# on.
_PLAIN = (Tensor, nn.Parameter)
_dispatch_modes, _is_tracing = torch._C._len_torch_dispatch_stack, torch._C._is_tracing
_is_profiling: Callable[[], bool] = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


def needs_no_dispatch(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all are plain tensors for the CPU's kernels, and nobody traces, profiles or redirects their ops."""
    if torch.compiler.is_compiling() or _dispatch_modes() or _is_tracing() or _is_profiling():
        return False
    for tensor in (x, *others):
        if tensor is not None and not (type(tensor) in _PLAIN and tensor.is_cpu):
            return False
    return backends.runs_natively(x.dtype)


def moe_forward_on_host(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *options: Any,
) -> Tensor:
    """y of moe_forward, for tensors that need no dispatch."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    host.module.moe_forward(
        _rows(x), gate_up_proj, down_proj, _rows(gate_up_bias), _rows(down_bias),
        topk_ids.contiguous(), topk_weights.contiguous(), y, None, *options, host.execution(),
    )  # fmt: skip
    return y


def _allocate_moe_backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of weights have the strides of the weights, so that an optimizer sees one layout."""
    tensors = (x, gate_up_proj, down_proj, gate_up_bias, down_bias, topk_weights)
    weights = (False, True, True, False, False, False)
    return tuple(
        x.new_empty(0, dtype=x.dtype if tensor is None else tensor.dtype)
        if tensor is None or not need
        else torch.empty_like(tensor, memory_format=torch.preserve_format if is_weight else torch.contiguous_format)
        for tensor, need, is_weight in zip(tensors, needs, weights, strict=True)
    )


def _moe_backward(
    kernels: Kernels,
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    options = (activation, gated, interleaved, alpha, limit)
    layer = (gate_up_proj, down_proj, gate_up_bias, down_bias, topk_ids, topk_weights)
    small = (needs[0], False, False, *needs[3:])
    grad_x, _, _, *rest = _allocate_moe_backward(grad_y, x, h, *layer, *options, small)
    projections = (
        kernels.empty_weight(weight) if need else x.new_empty(0)
        for weight, need in zip((gate_up_proj, down_proj), needs[1:3], strict=True)
    )
    grads = (grad_x, *projections, *rest)
    present = (True, True, True, gate_up_bias is not None, down_bias is not None, True)
    outputs: Any = (grad if need and there else None for grad, need, there in zip(grads, needs, present, strict=True))
    kernels.module.moe_backward(
        _rows(grad_y), _rows(x), _rows(h), gate_up_proj, down_proj,
        _rows(gate_up_bias), _rows(down_bias), topk_ids.contiguous(), topk_weights.contiguous(),
        *outputs, *options, kernels.execution(),
    )  # fmt: skip
    return grads


moe_backward: Callable[..., tuple[Tensor, ...]] = _register(
    f"moe_backward(Tensor grad_y, Tensor x, Tensor h, {_LAYER}, bool[] needs) -> (Tensor grad_x, "
    "Tensor grad_gate_up_proj, Tensor grad_down_proj, Tensor grad_gate_up_bias, Tensor grad_down_bias, "
    "Tensor grad_topk_weights)",
    _moe_backward,
    _allocate_moe_backward,
)


# ---- quantised weights -----------------------------------------------------------------------------------------------
# A weight [E,N,C] is four tensors: values, scales, row_scales, and zeros or None; see reference_quantized.py.


def _allocate_quantized_grouped_gemm(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    row_scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    rows: int,
    columns: int,
    parts: int,
    bits: int,
    group_size: int,
    transposed: bool,
) -> Tensor:
    slots = _matrix("x", x).shape[0] if token_indices is None else token_indices.shape[0]
    return x.new_empty(slots, columns if transposed else rows)


def _quantized_grouped_gemm(
    kernels: Kernels,
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    row_scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    rows: int,
    columns: int,
    parts: int,
    bits: int,
    group_size: int,
    transposed: bool,
) -> Tensor:
    slots = _matrix("x", x).shape[0] if token_indices is None else token_indices.shape[0]
    out = x.new_empty(slots, columns if transposed else rows)
    kernels.module.quantized_grouped_gemm(
        _rows(x), values, scales, row_scales, zeros, _rows(bias), expert_offsets.contiguous(), _dense(token_indices),
        out, rows, columns, parts, bits, group_size, transposed, kernels.execution(),
    )  # fmt: skip
    return out


quantized_grouped_gemm: Callable[..., Tensor] = _register(
    "quantized_grouped_gemm(Tensor x, Tensor values, Tensor scales, Tensor row_scales, Tensor? zeros, Tensor? bias, "
    "Tensor expert_offsets, Tensor? token_indices, int rows, int columns, int parts, int bits, int group_size, "
    "bool transposed) -> Tensor",
    _quantized_grouped_gemm,
    _allocate_quantized_grouped_gemm,
    reference_quantized,
)


def _allocate_quantized_moe_forward(
    x: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    gate_up_row_scales: Tensor,
    gate_up_zeros: Tensor | None,
    down_values: Tensor,
    down_scales: Tensor,
    down_row_scales: Tensor,
    down_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    intermediate_size: int,
    bits: int,
    group_size: int,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(_matrix("x", x), memory_format=torch.contiguous_format)
    width = 2 * intermediate_size if gated else intermediate_size
    return y, x.new_empty(_matrix("topk_ids", topk_ids).numel() if save_h else 0, width)


def _quantized_moe_forward(
    kernels: Kernels,
    x: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    gate_up_row_scales: Tensor,
    gate_up_zeros: Tensor | None,
    down_values: Tensor,
    down_scales: Tensor,
    down_row_scales: Tensor,
    down_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    intermediate_size: int,
    bits: int,
    group_size: int,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(_matrix("x", x), memory_format=torch.contiguous_format)
    width = 2 * intermediate_size if gated else intermediate_size
    h = x.new_empty(_matrix("topk_ids", topk_ids).numel(), width) if save_h else None
    kernels.module.quantized_moe_forward(
        _rows(x), gate_up_values, gate_up_scales, gate_up_row_scales, gate_up_zeros,
        down_values, down_scales, down_row_scales, down_zeros,
        _rows(gate_up_bias), _rows(down_bias), topk_ids.contiguous(), topk_weights.contiguous(), y, h,
        intermediate_size, bits, group_size, activation, gated, interleaved, alpha, limit, kernels.execution(),
    )  # fmt: skip
    return y, x.new_empty(0, width) if h is None else h


quantized_moe_forward: Callable[..., tuple[Tensor, Tensor]] = _register(
    "quantized_moe_forward(Tensor x, Tensor gate_up_values, Tensor gate_up_scales, Tensor gate_up_row_scales, "
    "Tensor? gate_up_zeros, Tensor down_values, Tensor down_scales, Tensor down_row_scales, Tensor? down_zeros, "
    "Tensor? gate_up_bias, Tensor? down_bias, Tensor topk_ids, Tensor topk_weights, int intermediate_size, int bits, "
    "int group_size, str activation, bool gated, bool interleaved, float alpha, float limit, bool save_h) "
    "-> (Tensor y, Tensor h)",
    _quantized_moe_forward,
    _allocate_quantized_moe_forward,
    reference_quantized,
)


def quantized_moe_forward_on_host(x: Tensor, *args: Any) -> Tensor:
    """y of quantized_moe_forward without save_h, for tensors that need no dispatch."""
    *weights, gate_up_bias, down_bias, topk_ids, topk_weights = args[:12]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    host.module.quantized_moe_forward(
        _rows(x), *weights, _rows(gate_up_bias), _rows(down_bias), topk_ids.contiguous(), topk_weights.contiguous(),
        y, None, *args[12:], host.execution(),
    )  # fmt: skip
    return y
