# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear plan-parallel`: predicts the cost of experts on many ranks, from a routing and a few speeds.

PREDICTIONS of parallel/cost.py, not measurements. `switchgear bench --parallel` compares the same model with
measurements on one machine.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

from switchgear.parallel.cost import CHUNKS, Layer, Machine, Prediction, count, draw_routing, predict
from switchgear.parallel.placement import Placement, place_experts

from ..common import CommandError, console, positive, require, table
from .results import write_json

NOTICE = "PREDICTIONS of a model, not measurements."


class Model(NamedTuple):
    layer: Layer
    num_layers: int  # with experts
    what: str


MODELS = {
    "mixtral": Model(Layer(4096, 14336, 8, 2), 32, "Mixtral-8x7B"),
    "olmoe": Model(Layer(2048, 1024, 64, 8), 16, "OLMoE-1B-7B"),
    "qwen3_moe": Model(Layer(4096, 1536, 128, 8), 94, "Qwen3-235B-A22B"),
    "qwen3_moe_30b": Model(Layer(2048, 768, 128, 8), 48, "Qwen3-30B-A3B"),
    "deepseek_v3": Model(Layer(7168, 2048, 256, 8), 58, "DeepSeek-V3"),
    "gpt_oss": Model(Layer(2880, 2880, 128, 4), 36, "gpt-oss-120b"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    known = ", ".join(f"{name} ({model.what})" for name, model in MODELS.items())
    add("--model", choices=MODELS, default="qwen3_moe", metavar="NAME", help=f"one of {known}")
    add("--ep", type=positive, default=64, metavar="N", help="ranks that share the experts of a layer")
    add("--nodes", type=positive, default=8, metavar="N", help="nodes that they are on, equally many on each")
    add("--tokens", type=positive, default=4096, metavar="T", help="tokens of a rank in a step")
    add("--bandwidth", type=float, default=50.0, metavar="GB/s", help="between nodes, of a rank, in each direction")
    add("--local-bandwidth", type=float, default=400.0, metavar="GB/s", help="within a node, of a rank")
    add("--flops", type=float, default=400.0, metavar="TFLOP/s", help="that a rank reaches in its experts")
    add("--overhead", type=float, default=20.0, metavar="µs", help="that one more chunk costs")
    add("--chunks", type=int, choices=CHUNKS, help="of an exchange (default: whatever is fastest)")
    add("--bytes", type=positive, default=2, metavar="B", help="of an element of rows and weights")
    add("--optimizer-bytes", type=int, default=12, metavar="B", help="of a parameter, beside weight and gradient")
    skew_help = "expert e is (e+1)^-S as likely as expert 0: 0 is even, 1 is Zipf's law"
    add("--skew", type=float, default=0.0, metavar="S", help=skew_help)
    add("--trace", metavar="FILE", help="a routing instead: topk_ids [tokens, top_k], saved by torch.save")
    add("--replicas", type=int, default=0, metavar="N", help="further copies of busy experts, placed by load")
    add("--json", metavar="FILE", help="write the predictions")


def run(args: argparse.Namespace) -> int:
    require("rich")
    model = MODELS[args.model]
    if args.ep % args.nodes:
        raise CommandError(f"--nodes: expected a divisor of {args.ep} (--ep), got {args.nodes}")
    routing = _routing(args, model.layer)
    placement = _placement(args, model.layer, routing)
    machine = Machine(
        args.flops * 1e12, args.bandwidth * 1e9, args.local_bandwidth * 1e9, args.ep // args.nodes, args.overhead * 1e-6
    )
    traffic = count(list(torch.split(routing, args.tokens)), placement)
    chunks = [args.chunks] if args.chunks else list(CHUNKS)
    predictions = {c: predict(model.layer, traffic, placement, machine, args.bytes, c) for c in chunks}
    best = min(predictions, key=lambda c: predictions[c].forward.seconds + predictions[c].backward.seconds)
    _print(args, model, predictions, best)
    if args.json:
        write_json(_results(args, model, predictions, best), args.json)
    return 0


def _routing(args: argparse.Namespace, layer: Layer) -> torch.Tensor:
    """topk_ids of all ranks' tokens, in rank order."""
    total = args.tokens * args.ep
    if not args.trace:
        return draw_routing(total, layer.num_experts, layer.top_k, args.skew)
    try:
        ids = torch.load(args.trace, weights_only=True)
    except Exception as error:
        raise CommandError(f"--trace: cannot read {args.trace}: {error}") from None
    integers = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    if not isinstance(ids, torch.Tensor) or ids.dtype not in integers or ids.dim() != 2 or not ids.numel():
        raise CommandError("--trace: expected integers [tokens, top_k], as saved by torch.save")
    if int(ids.min()) < -1 or int(ids.max()) >= layer.num_experts:
        raise CommandError(f"--trace: expected topk_ids from -1 to {layer.num_experts - 1}")
    return ids.repeat(-(-total // len(ids)), 1)[:total].int()


def _placement(args: argparse.Namespace, layer: Layer, routing: torch.Tensor) -> Placement:
    if not args.replicas:
        return Placement.contiguous(layer.num_experts, args.ep)
    load = torch.bincount(routing[routing >= 0].flatten().long(), minlength=layer.num_experts)
    try:
        return place_experts(load, args.ep, num_replicas=args.replicas)
    except ValueError as error:
        raise CommandError(f"--replicas: {error}") from None


def memory(prediction: Prediction, num_layers: int, item: int, optimizer_bytes: int) -> dict[str, int]:
    """Bytes of the busiest rank, over all layers: expert weights, their gradients and optimizer state, activations."""
    weights = prediction.weight_bytes * num_layers
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": weights // item * optimizer_bytes,
        "activations": prediction.activation_bytes * num_layers,
    }


def _print(args: argparse.Namespace, model: Model, predictions: dict[int, Prediction], best: int) -> None:
    out = console()
    layer, chosen = model.layer, predictions[best]
    out.print(f"[bold]{NOTICE}[/]")
    out.print(f"{model.what}: {model.num_layers} layers of {layer.num_experts} experts, top {layer.top_k}, "
              f"H {layer.hidden_size}, I {layer.intermediate_size}; {args.ep} ranks on {args.nodes} nodes, "
              f"{args.tokens} tokens each")  # fmt: skip
    shown = table("chunks", "forward ms", "exposed", "hidden", "backward ms", "exposed", "hidden")
    for c, prediction in predictions.items():
        cells = [str(c) + (" *" if c == best else "")]
        for timeline in (prediction.forward, prediction.backward):
            cells += [f"{1e3 * timeline.seconds:.2f}", f"{1e3 * timeline.exposed:.2f}", f"{timeline.hidden:.0%}"]
        shown.add_row(*cells)
    out.print(shown)
    step = model.num_layers * (chosen.forward.seconds + chosen.backward.seconds)
    exposed = model.num_layers * (chosen.forward.exposed + chosen.backward.exposed)
    out.print(f"a step's experts: {1e3 * step:.1f} ms, {1e3 * exposed:.1f} ms of it waiting ({exposed / step:.0%})")
    out.print(
        f"sent by a rank, a layer: {chosen.bytes_forward / 1e6:.1f} MB forward "
        f"({chosen.bytes_between_nodes / 1e6:.1f} MB between nodes), {chosen.bytes_backward / 1e6:.1f} MB backward"
    )
    out.print(f"a row for each choice would be {chosen.rows_without_sharing:.2f} times the rows")
    out.print(f"choices on the busiest rank: {chosen.load:.2f} times the mean")
    parts = memory(chosen, model.num_layers, args.bytes, args.optimizer_bytes)
    listed = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())
    out.print(f"memory of a rank for experts: {sum(parts.values()) / 1e9:.1f} GB ({listed})")


def _results(args: argparse.Namespace, model: Model, predictions: dict[int, Prediction], best: int) -> dict[str, Any]:
    def line(c: int, prediction: Prediction) -> dict[str, Any]:
        return {
            "chunks": c, "best": c == best,
            **{f"{name}_{what}": getattr(getattr(prediction, name), what) for name in ("forward", "backward")
               for what in ("seconds", "exposed", "link", "experts", "hidden")},
            "bytes_forward": prediction.bytes_forward, "bytes_backward": prediction.bytes_backward,
            "bytes_between_nodes": prediction.bytes_between_nodes, "load": prediction.load,
            "memory": memory(prediction, model.num_layers, args.bytes, args.optimizer_bytes),
        }  # fmt: skip

    given = {key: value for key, value in vars(args).items() if key not in ("command", "json")}
    return {"schema": "switchgear-plan-parallel/1", "notice": NOTICE, "arguments": given,
            "predictions": [line(c, prediction) for c, prediction in predictions.items()]}  # fmt: skip
