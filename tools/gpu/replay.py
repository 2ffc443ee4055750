# SPDX-License-Identifier: BSD-3-Clause
"""CUDA graphs: a layer is captured once and replayed with 1000 routings; and ops on a stream that is not the default.

    replay.py [--device cuda] [--routings 1000] [--from N]

On a CPU, a stand-in for a graph calls the layer again, which tests this program. Prints lines.py's lines.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import switchgear

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.lines import parser_of, serve
from gpu.shape import Shape

SHAPES = (
    Shape(1, 256, 128, 32, 4),  # decoding
    Shape(64, 256, 128, 64, 8),  # few rows per expert
    Shape(1024, 256, 192, 8, 2),  # tiles of 128 rows
    Shape(96, 264, 136, 33, 3),  # tails
)


class Layer:
    """A layer with static inputs, as a captured graph needs them."""

    def __init__(self, shape: Shape, device: str, train: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def leaf(*size: int, scale: float) -> Tensor:
            values = torch.randn(size, generator=generator) * scale
            return values.bfloat16().to(device).requires_grad_(train)

        self.shape, self.train = shape, train
        self.x = leaf(shape.tokens, shape.hidden_size, scale=1.0)
        self.gate_up = leaf(shape.num_experts, 2 * shape.intermediate_size, shape.hidden_size, scale=0.1)
        self.down = leaf(shape.num_experts, shape.hidden_size, shape.intermediate_size, scale=0.1)
        self.logits = torch.zeros(shape.tokens, shape.num_experts, device=device)
        self.outputs: list[Tensor] = []

    def __call__(self) -> None:
        """y, and in training the gradients of all inputs, in `outputs`: the same memory at every replay."""
        leaves = [self.x, self.gate_up, self.down]
        routing = switchgear.route(self.logits, self.shape.top_k, normalize=True)
        y = switchgear.moe(self.x, self.gate_up, self.down, routing.topk_ids, routing.topk_weights)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y)) if self.train else ()
        self.outputs = [y.detach(), *grads]

    def choose(self, number: int) -> None:
        """Routing `number`: most are random, some send all tokens to a few experts, some are all ties."""
        generator = torch.Generator().manual_seed(number)
        logits = torch.randn(self.logits.shape, generator=generator)
        if number % 5 == 1:
            logits[:, self.shape.top_k :] -= 100.0
        elif number % 5 == 2:
            logits.zero_()
        elif number % 5 == 3:
            logits *= 30.0
        self.logits.copy_(logits)


def captured(layer: Layer) -> Callable[[], None]:
    """A function that replays the layer. It runs before the capture: kernels are loaded at their first use."""
    if layer.x.device.type != "cuda":
        return layer
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
    return graph.replay


def replays(shape: Shape, train: bool, device: str, routings: int) -> dict[str, Any]:
    """Replayed results have the bits of direct calls, for every kind of routing."""
    static, direct = Layer(shape, device, train), Layer(shape, device, train)
    replay = captured(static)
    for number in range(routings):
        static.choose(number)
        direct.choose(number)
        replay()
        if number < 20 or number % 7 == 0:  # direct calls take longer; in steps of 7 come all five kinds of `choose`
            direct()
            for got, want in zip(static.outputs, direct.outputs, strict=True):
                if not torch.equal(got, want):
                    raise AssertionError(f"routing {number}: a replay differs from a call")
    return {"routings": routings}


@contextlib.contextmanager
def other_stream(device: str) -> Iterator[None]:
    """A stream that is not the default one."""
    if device != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def streams(shape: Shape, device: str) -> dict[str, Any]:
    """Inputs come late on the stream itself: an op on another stream would read them before they are there."""
    layer, want = Layer(shape, device, True), Layer(shape, device, True)
    for number in range(8):
        want.choose(number)
        want()
        expected = [tensor.clone() for tensor in want.outputs]
        layer.logits.fill_(0.0)
        late = want.logits.clone()
        if device == "cuda":
            torch.cuda.synchronize()
        with other_stream(device):
            if device == "cuda":
                torch.cuda._sleep(20_000_000)  # some 10 ms
            layer.logits.copy_(late)
            layer()
        for got, wanted in zip(layer.outputs, expected, strict=True):
            if not torch.equal(got, wanted):
                raise AssertionError(f"routing {number}: differs on another stream")
    return {}


def cases(device: str, routings: int) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    found: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for shape in SHAPES:
        name = " ".join(map(str, shape))
        found += [
            (f"forward {name}", partial(replays, shape, False, device, routings)),
            (f"train {name}", partial(replays, shape, True, device, routings // 5)),
            (f"stream {name}", partial(streams, shape, device)),
        ]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--routings", type=int, default=1000)
    args = parser.parse_args(arguments)
    return serve(cases(args.device, args.routings), args.first)


if __name__ == "__main__":
    sys.exit(main())
