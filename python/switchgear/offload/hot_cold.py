# SPDX-License-Identifier: BSD-3-Clause
"""HotColdSplit: experts with many tokens move to the fast device, those with few are computed where they lie."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import Count, Positive, as_device, checked
from switchgear.experts import Experts
from switchgear.functional.gradients import needs_autograd
from switchgear.offload.device import CudaDevice, Event, find_device
from switchgear.reference import check_range
from switchgear.weights.module import check_plain

# ---- Copies for one call ---------------------------------------------------------------------------------------------


_BUFFERS = 2  # one is filled while the other is copied


class Mover:
    """Copies experts on the stream `copies`: from pinned memory as it is, from other memory through two pinned buffers.

    params [E, …]: of all experts, by name, contiguous.
    """

    @torch.inference_mode(False)
    def __init__(self, device: CudaDevice, params: Mapping[str, Tensor]) -> None:
        self.device = device
        self._buffers: Tensor | None = None
        if not all(map(device.is_pinned, params.values())):
            self._buffers = device.buffers(_BUFFERS, max(param[0].nbytes for param in params.values()))
        self._copying: list[Event | None] = [None] * _BUFFERS
        self._next, self._lock = 0, threading.Lock()

    def move(self, params: Mapping[str, Tensor], experts: Sequence[int]) -> dict[str, Tensor]:
        """params[experts] on the device, for later work of the caller's stream."""
        device = self.device
        moved = {name: device.empty((len(experts), *p.shape[1:]), p.dtype) for name, p in params.items()}
        device.copies.wait_event(device.compute().record_event())  # who had this memory may still use it
        with self._lock:
            for name, param in params.items():
                for place, expert in enumerate(experts):
                    self._copy(moved[name][place], param[expert])
        device.compute().wait_event(device.copies.record_event())
        return moved

    def _copy(self, to: Tensor, source: Tensor) -> None:
        if self._buffers is None:
            self.device.copy(to, source)
            return
        number = self._next
        self._next = (number + 1) % _BUFFERS
        if (event := self._copying[number]) is not None:
            event.synchronize()
        buffer = self._buffers[number, : source.nbytes].view(source.dtype).view(source.shape)
        buffer.copy_(source)
        self.device.copy(to, buffer)
        self._copying[number] = self.device.copies.record_event()


# ---- The split -------------------------------------------------------------------------------------------------------


@checked
@dataclass(frozen=True)
class SplitCost:
    """Seconds of both devices, for the threshold "auto".

    Attributes:
        bandwidth: bytes per second between the devices.
        hot_flops, cold_flops: floating-point operations per second of an expert's products.
    The defaults are a GPU on PCIe 4.0 and a CPU with AVX-512; measure your own.
    """

    bandwidth: Positive = 25e9
    hot_flops: Positive = 100e12
    cold_flops: Positive = 1e12

    def seconds(self, hot: Sequence[int], cold: Sequence[int], params: int, hidden_size: int, item: int) -> float:
        """The slower device's time. hot, cold: tokens of each expert there; params: of an expert; item: bytes of an
        element. Hot experts are copied and then multiplied; rows of cold ones go there and back."""
        fast = len(hot) * params * item / self.bandwidth + 2 * sum(hot) * params / self.hot_flops
        slow = sum(cold) * (2 * hidden_size * item / self.bandwidth + 2 * params / self.cold_flops)
        return max(fast, slow)


class HotColdSplit(nn.Module):
    """Experts split by their tokens n_e at each call (MoNDE, arXiv:2405.18832): y is the sum of two parts.

        moe.experts = offload.HotColdSplit(moe.experts, hot="cuda")     # experts in host memory, x on the GPU

    The hot part's weights are copied to `hot` and multiplied there. The cold part's rows go to the experts' device,
    whose product overlaps with the hot part. The two parts are rounded before they are added, so the result does
    not have the bits of one call.

    On a GPU, copies and kernels of the hot part are queued first, and the CPU computes meanwhile. Experts in pinned
    memory (`p.data = p.data.pin_memory()`) are copied from where they are, and must not change before the GPU is done;
    others go through a buffer. With gradients, or with hot="cpu", the cold part runs in a thread.

    Args:
        experts: with plain weights, at each call too: no other form, no adapters, no experts that train alone, none of
            other ranks. They stay on their device.
        hot: the fast device, that of x.
        threshold: experts with at least this many tokens are hot. "bytes": where the rows of an expert, there and back,
            n_e·2·H·b, are not fewer bytes than its parameters. "auto": the number of hot experts, by descending n_e,
            at which the slower device takes least by `cost`.
        cost: for "auto".
    """

    @checked
    def __init__(
        self,
        experts: Experts,
        hot: torch.device | str = "cuda",
        threshold: Count | str = "auto",
        cost: SplitCost | None = None,
    ) -> None:
        super().__init__()
        _check_experts(experts)
        if isinstance(threshold, str) and threshold not in ("auto", "bytes"):
            raise ValueError(f"threshold: expected auto, bytes or a number of tokens, got {threshold!r}")
        device = as_device("hot", hot)
        if device.type == "meta":
            raise ValueError(f"hot: expected a device with memory, got {device}")
        self.experts, self.hot, self.threshold = experts, device, threshold
        self.cost = SplitCost() if cost is None else cost
        self.num_experts = experts.num_experts
        self._mover: Mover | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mover": None}  # copies have streams of their own

    @property
    def params(self) -> int:
        """Parameters of an expert, biases included."""
        return sum(p[0].numel() for p in self.experts.parameters())

    def hot_experts(self, topk_ids: Tensor) -> list[int]:
        """The experts of this choice [T,K] that move, ascending. Experts without tokens are in neither part."""
        ids = topk_ids[(topk_ids >= 0) & (topk_ids < self.num_experts)].flatten().long()
        counts = torch.bincount(ids, minlength=self.num_experts).tolist()
        used = sorted((e for e, count in enumerate(counts) if count), key=lambda e: (-counts[e], e))
        hidden_size, item = self.experts.hidden_size, self.experts.down_proj.element_size()
        if self.threshold == "auto":
            tokens = [counts[e] for e in used]
            number = min(
                range(len(used) + 1),
                key=lambda n: self.cost.seconds(tokens[:n], tokens[n:], self.params, hidden_size, item),
            )
            return sorted(used[:number])
        if self.threshold == "bytes":
            return sorted(e for e in used if counts[e] * 2 * hidden_size >= self.params)
        return sorted(e for e in used if counts[e] >= int(self.threshold))

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """As Experts."""
        _check_experts(self.experts)
        x, ids, weights = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (hidden_states, topk_ids, topk_weights))
        return self._split(x, ids, weights).reshape(hidden_states.shape)

    def _split(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        topk_ids = topk_ids.cpu()
        check_range("topk_ids", topk_ids, -1, self.num_experts)
        hot = self.hot_experts(topk_ids)
        number = torch.full((self.num_experts + 1,), -1, dtype=torch.int32)  # the last one is that of -1
        number[hot] = torch.arange(len(hot), dtype=torch.int32)
        local = number[torch.where(topk_ids < 0, self.num_experts, topk_ids).long()]
        if not hot:
            rows, *inputs = self._to_cold(hidden_states, topk_ids, topk_weights)
            part = self.experts(*inputs).to(hidden_states.device)
            return torch.zeros_like(hidden_states, dtype=part.dtype).index_copy(0, rows, part)
        mover = self._find_mover(hidden_states, topk_weights)
        if not bool(((local < 0) & (topk_ids >= 0)).any()):
            return self._hot(mover, hot, hidden_states, local, topk_weights)
        cold_ids = topk_ids.masked_fill(local >= 0, -1)
        if mover is not None:
            rows = _used(cold_ids)
            there = rows.to(hidden_states.device)
            launch = partial(self._hot, mover, hot, hidden_states, local, topk_weights)
            sent = hidden_states[there], topk_weights[there]
            y, part = overlap(mover.device, sent, launch, lambda x, weights: self.experts(x, cold_ids[rows], weights))
            return y.index_add(0, there, part.to(y))
        cold_rows, *cold = self._to_cold(hidden_states, cold_ids, topk_weights)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # a thread has its own
        kind = self.experts.down_proj.device.type
        casts, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def compute() -> Tensor:
            with (
                torch.inference_mode(modes[1]),
                torch.set_grad_enabled(modes[0]),
                torch.autocast(kind, dtype, enabled=casts),
            ):
                part: Tensor = self.experts(*cold)
                return part

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(compute)
            y = self._hot(None, hot, hidden_states, local, topk_weights)
            return y.index_add(0, cold_rows, running.result().to(y))

    def _find_mover(self, x: Tensor, weights: Tensor) -> Mover | None:
        """None: copies are torch's, which have gradients."""
        params = dict(self.experts.named_parameters())
        if not self.experts.down_proj.is_cpu or needs_autograd(x, weights, *params.values()):
            return None
        if self._mover is None and (device := find_device(self.hot)) is not None:
            self._mover = Mover(device, params)
        return self._mover

    def _to_cold(self, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which rows have a cold expert, and on its device what they, their ids and weights are: before the hot part is
        launched, behind which they would wait."""
        at = self.experts.down_proj.device
        rows = _used(ids)
        there = rows.to(x.device)
        return there, x[there].to(at), ids[rows].to(at), weights[there].to(at)

    def _hot(self, mover: Mover | None, hot: list[int], x: Tensor, local: Tensor, weights: Tensor) -> Tensor:
        own = self.experts
        moved = Experts(
            own.hidden_size, own.intermediate_size, len(hot), activation=own.activation, gated=own.gated,
            bias=own.down_proj_bias is not None, interleaved=own.interleaved, transposed=own.transposed,
            alpha=own.alpha, limit=own.limit, device="meta", dtype=own.down_proj.dtype,
        )  # fmt: skip
        params = dict(own.named_parameters())
        values = mover.move(params, hot) if mover else {name: p[hot].to(self.hot) for name, p in params.items()}
        y: Tensor = torch.func.functional_call(
            moved, values, (x.to(self.hot), local.to(self.hot), weights.to(self.hot))
        )
        return y.to(x.device)


def _check_experts(experts: Experts) -> None:
    """Raises ValueError unless the parameters, a row per expert, are all that the experts compute with."""
    check_plain("experts", experts)
    if callable(experts.activation):
        raise ValueError("experts: expected a named activation, got a function")
    for name in experts._layout.names:
        parameter = experts._parameters.get(name)  # a parametrization replaces it by a computed attribute
        if parameter is None:
            raise ValueError(f"experts: expected plain weights, got a {name} that is computed")
        if len(parameter) != experts.num_experts:
            raise ValueError(f"experts: expected all {experts.num_experts} of a layer, got {len(parameter)} of a rank")


def _used(ids: Tensor) -> Tensor:
    """The rows of ids [T,K] with an expert."""
    return (ids >= 0).any(-1).nonzero()[:, 0]


def overlap(
    device: CudaDevice, sent: Sequence[Tensor], launch: Callable[[], Tensor], multiply: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """launch(), which queues work on the device, and meanwhile multiply(*sent) on the host, for later work there."""
    fetched, event = device.fetch(sent)  # before the launch, behind which it would wait
    y = launch()
    event.synchronize()
    return y, device.send(multiply(*fetched))
