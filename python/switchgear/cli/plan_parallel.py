# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear plan-parallel`: predicts the cost of experts on many ranks, from a routing and a few speeds.

PREDICTIONS of parallel/cost.py, not measurements. `switchgear bench parallel` compares the same model with
measurements on one machine.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

from switchgear.parallel.cost import (
    CHUNKS,
    Layer,
    Losses,
    Machine,
    Prediction,
    Rates,
    count,
    draw_routing,
    expected_losses,
    predict,
)
from switchgear.parallel.nodes import Nodes
from switchgear.parallel.placement import Placement, place_experts
from switchgear.parallel.rows import WIRES

from ..files import load_saved
from ..utils.packages import first_line
from .common import (
    CommandError,
    above_zero,
    at_least,
    check_file,
    console,
    not_negative,
    positive,
    require,
    table,
    write_json,
)

NOTICE = "PREDICTIONS of a model, not measurements."


class Model(NamedTuple):
    layer: Layer
    num_layers: int  # with experts
    what: str
    groups: tuple[int, int] = (1, 1)  # of experts, and those that a token may choose from


MODELS = {
    "mixtral": Model(Layer(4096, 14336, 8, 2), 32, "Mixtral-8x7B"),
    "olmoe": Model(Layer(2048, 1024, 64, 8), 16, "OLMoE-1B-7B"),
    "qwen3_moe": Model(Layer(4096, 1536, 128, 8), 94, "Qwen3-235B-A22B"),
    "qwen3_moe_30b": Model(Layer(2048, 768, 128, 8), 48, "Qwen3-30B-A3B"),
    "deepseek_v3": Model(Layer(7168, 2048, 256, 8), 58, "DeepSeek-V3", (8, 4)),
    "gpt_oss": Model(Layer(2880, 2880, 128, 4), 36, "gpt-oss-120b"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    known = ", ".join(f"{name} ({model.what})" for name, model in MODELS.items())
    add("--model", choices=MODELS, default="qwen3_moe", metavar="NAME", help=f"one of {known}")
    add("--ep", type=positive, default=64, metavar="N", help="ranks that share the experts of a layer")
    nodes_help = "nodes that they are on, equally many on each (default: the fewest of up to 8 ranks)"
    add("--nodes", type=positive, metavar="N", help=nodes_help)
    add("--tokens", type=positive, default=4096, metavar="T", help="tokens of a rank in a step")
    add("--bandwidth", type=above_zero, default=50.0, metavar="GB/s", help="between nodes, of a rank, each way")
    add("--local-bandwidth", type=above_zero, default=400.0, metavar="GB/s", help="within a node, of a rank")
    add("--flops", type=above_zero, default=400.0, metavar="TFLOP/s", help="that a rank reaches in its experts")
    add("--overhead", type=not_negative, default=20.0, metavar="us", help="that one more chunk costs")
    add("--chunks", type=int, choices=CHUNKS, help="of an exchange (default: whatever is fastest)")
    add("--bytes", type=positive, default=2, metavar="B", help="of an element of rows and weights")
    optimizer_help = "of a parameter, beside weight and gradient"
    add("--optimizer-bytes", type=at_least(0), default=12, metavar="B", help=optimizer_help)
    skew_help = "expert e is (e+1)^-S as likely as expert 0: 0 is even, 1 is Zipf's law"
    add("--skew", type=not_negative, default=0.0, metavar="S", help=skew_help)
    add("--trace", metavar="FILE", help="a routing instead: topk_ids [tokens, top_k], saved by torch.save")
    add("--replicas", type=at_least(0), default=0, metavar="N", help="further copies of busy experts, placed by load")
    add(
        "--levels", type=int, choices=(1, 2), help="1: rows go to each rank, 2: once to each node (default: the faster)"
    )
    add("--wire", choices=WIRES, default="exact", help="format of rows on their way")
    add("--stages", type=positive, default=1, metavar="N", help="of a pipeline: a rank has 1/N of the layers")
    add("--gpus", type=positive, metavar="N", help="ranks of the whole job, for failures (default: --ep)")
    add("--mtbf", type=above_zero, default=50_000.0, metavar="HOURS", help="between failures of one rank")
    add("--step", type=above_zero, metavar="S", help="seconds of a whole step (default: those of all layers' experts)")
    add("--restart", type=not_negative, default=600.0, metavar="S", help="that a restart from a checkpoint takes")
    add("--checkpoint-every", type=not_negative, default=30.0, metavar="MIN", help="minutes between checkpoints")
    add("--shrink", type=not_negative, default=10.0, metavar="S", help="until the other ranks continue after a failure")
    add("--join", type=not_negative, default=30.0, metavar="S", help="for which all ranks wait when one joins")
    add("--repair", type=not_negative, default=12.0, metavar="HOURS", help="until a lost rank joins again")
    add("--json", metavar="FILE", help="write the predictions")


def run(args: argparse.Namespace) -> int:
    require("rich")
    model = MODELS[args.model]
    if args.stages > model.num_layers:
        raise CommandError(
            f"--stages: expected at most {model.num_layers}, the layers of {args.model}, got {args.stages}"
        )
    model = model._replace(num_layers=-(-model.num_layers // args.stages))
    if args.nodes is None:
        args.nodes = next(n for n in range(-(-args.ep // 8), args.ep + 1) if args.ep % n == 0)
    if args.ep % args.nodes:
        raise CommandError(f"--nodes: expected a divisor of {args.ep} (--ep), got {args.nodes}")
    if args.gpus is not None and args.gpus < args.ep:
        raise CommandError(f"--gpus: expected at least {args.ep} (--ep), got {args.gpus}")
    if args.gpus is not None and args.gpus % args.ep:
        raise CommandError(f"--gpus: expected a multiple of {args.ep} (--ep), got {args.gpus}")
    if args.json:
        check_file("json", args.json)
    routing = _routing(args, model.layer)
    placement = _placement(args, model.layer, routing)
    machine = Machine(
        args.flops * 1e12, args.bandwidth * 1e9, args.local_bandwidth * 1e9, args.ep // args.nodes, args.overhead * 1e-6
    )
    nodes = Nodes(tuple(rank // machine.ranks_per_node for rank in range(args.ep)))
    ways = [args.levels] if args.levels else [1, 2] if nodes.has_levels else [1]
    if 2 in ways and not nodes.has_levels:
        raise CommandError("--levels: expected 1 unless there are several nodes with several ranks")
    ids = list(torch.split(routing, args.tokens))
    traffic = {n: count(ids, placement, nodes if n == 2 else None) for n in ways}

    def plan(wire: str) -> dict[tuple[int, int], Prediction]:
        return {
            (n, c): predict(model.layer, traffic[n], placement, machine, args.bytes, c, wire=wire)
            for n in ways
            for c in ([args.chunks] if args.chunks else CHUNKS)
        }

    predictions = plan(args.wire)
    if not all(0 < seconds(prediction) < float("inf") for prediction in predictions.values()):
        raise CommandError("--bandwidth, --local-bandwidth, --flops: expected speeds at which a step takes some time")
    best = min(predictions, key=lambda key: seconds(predictions[key]))
    others = {wire: min(map(seconds, plan(wire).values())) for wire in WIRES if wire != args.wire}
    step = args.step or model.num_layers * seconds(predictions[best])
    rates = Rates(
        args.gpus or args.ep, 3600 * args.mtbf, step, args.restart, 60 * args.checkpoint_every, args.shrink, args.join,
        3600 * args.repair,
    )  # fmt: skip
    losses = expected_losses(rates, placement)
    _print(args, model, predictions, best)
    _print_failures(args, rates, losses)
    for line in recommendations(predictions, best, others, losses):
        console().print(line)
    if args.json:
        write_json(_results(args, model, predictions, best, losses), args.json)
    return 0


def seconds(prediction: Prediction) -> float:
    return prediction.forward.seconds + prediction.backward.seconds


def _routing(args: argparse.Namespace, layer: Layer) -> torch.Tensor:
    """topk_ids of all ranks' tokens, in rank order."""
    total = args.tokens * args.ep
    if not args.trace:
        return draw_routing(total, layer.num_experts, layer.top_k, args.skew, groups=MODELS[args.model].groups)
    try:
        ids = load_saved(args.trace)
    except (OSError, ValueError) as error:
        raise CommandError(f"--trace: cannot read {args.trace}: {first_line(error)}") from None
    integers = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    if not isinstance(ids, torch.Tensor) or ids.dtype not in integers or ids.dim() != 2 or not ids.numel():
        raise CommandError("--trace: expected integers [tokens, top_k], as saved by torch.save")
    if int(ids.min()) < -1 or int(ids.max()) >= layer.num_experts:
        raise CommandError(f"--trace: expected topk_ids from -1 to {layer.num_experts - 1}")
    if ids.shape[1] != layer.top_k:
        raise CommandError(f"--trace: expected {layer.top_k} choices of each token, got {ids.shape[1]}")
    if not (ids[:total] >= 0).any():
        raise CommandError("--trace: expected at least one choice, got -1 everywhere")
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


Predictions = dict[tuple[int, int], Prediction]  # by levels and chunks


def _print(args: argparse.Namespace, model: Model, predictions: Predictions, best: tuple[int, int]) -> None:
    out = console()
    layer, chosen = model.layer, predictions[best]
    out.print(f"[bold]{NOTICE}[/]")
    stages = f" of one of {args.stages} stages" if args.stages > 1 else ""
    out.print(f"{model.what}: {model.num_layers} layers{stages} of {layer.num_experts} experts, top {layer.top_k}, "
              f"H {layer.hidden_size}, I {layer.intermediate_size}; {args.ep} ranks on {args.nodes} nodes, "
              f"{args.tokens} tokens each")  # fmt: skip
    shown = table("levels", "chunks", "forward ms", "exposed", "hidden", "backward ms", "exposed", "hidden")
    for (n, c), prediction in predictions.items():
        cells = [str(n), str(c) + (" *" if (n, c) == best else "")]
        for timeline in (prediction.forward, prediction.backward):
            cells += [f"{1e3 * timeline.seconds:.2f}", f"{1e3 * timeline.exposed:.2f}", f"{timeline.hidden:.0%}"]
        shown.add_row(*cells)
    out.print(shown)
    step = model.num_layers * seconds(chosen)
    exposed = model.num_layers * (chosen.forward.exposed + chosen.backward.exposed)
    out.print(f"a step's experts: {1e3 * step:.1f} ms, {1e3 * exposed:.1f} ms of it waiting ({exposed / step:.0%})")
    out.print(
        f"sent by a rank, a layer: {chosen.bytes_forward / 1e6:.1f} MB forward "
        f"({chosen.bytes_between_nodes / 1e6:.1f} MB between nodes), {chosen.bytes_backward / 1e6:.1f} MB backward"
    )
    to = "nodes" if best[0] == 2 else "ranks"
    out.print(f"a row for each choice would be {chosen.rows_without_sharing:.2f} times the rows to other {to}")
    out.print(f"choices on the busiest rank: {chosen.load:.2f} times the mean")
    parts = memory(chosen, model.num_layers, args.bytes, args.optimizer_bytes)
    listed = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in parts.items())
    out.print(f"memory of a rank for experts: {sum(parts.values()) / 1e9:.1f} GB ({listed})")


def _print_failures(args: argparse.Namespace, rates: Rates, losses: Losses) -> None:
    out = console()
    out.print(
        f"failures: {losses.failures:.2f} a day of {rates.ranks} ranks, one in {args.mtbf:.0f} hours each; steps of "
        f"{rates.step:.2f} s"
    )
    out.print(
        f"lost a day: {losses.steps_restarting:.0f} steps ({losses.fraction_restarting:.2%}) restarting from "
        f"checkpoints, {losses.steps_continuing:.0f} ({losses.fraction_continuing:.2%}) continuing without the rank"
    )
    out.print(f"experts without a copy on a lost rank: {losses.experts_without_copy:.1f}")


def recommendations(
    predictions: Predictions, best: tuple[int, int], others: dict[str, float], losses: Losses
) -> list[str]:
    """What to choose, and what other choices would gain. others: the best seconds of a layer with other formats."""
    levels, chunks = best
    own = seconds(predictions[best])
    lines = [f"[bold]recommended:[/] {'one level' if levels == 1 else 'two levels'}, num_chunks={chunks}"]
    slower = min((seconds(p) for key, p in predictions.items() if key[0] != levels), default=None)
    if slower is not None:
        lines.append(f"  {'two levels' if levels == 1 else 'one level'} would take {slower / own - 1:+.1%}")
    for wire, other in others.items():
        lines.append(f"  wire={wire!r} would take {other / own - 1:+.1%}")
    if (load := predictions[best].load) > 1.25:
        lines.append(f"  the busiest rank has {load:.2f} times the mean: put busy experts on several (--replicas)")
    if losses.fraction_restarting - losses.fraction_continuing > 0.001:
        lines.append(f"  continuing after failures saves {losses.fraction_restarting - losses.fraction_continuing:.1%}")
    return lines


def _results(
    args: argparse.Namespace, model: Model, predictions: Predictions, best: tuple[int, int], losses: Losses
) -> dict[str, Any]:  # fmt: skip
    def line(key: tuple[int, int], prediction: Prediction) -> dict[str, Any]:
        return {
            "levels": key[0], "chunks": key[1], "best": key == best,
            **{f"{name}_{what}": getattr(getattr(prediction, name), what) for name in ("forward", "backward")
               for what in ("seconds", "exposed", "link", "experts", "hidden")},
            "bytes_forward": prediction.bytes_forward, "bytes_backward": prediction.bytes_backward,
            "bytes_between_nodes": prediction.bytes_between_nodes, "load": prediction.load,
            "memory": memory(prediction, model.num_layers, args.bytes, args.optimizer_bytes),
        }  # fmt: skip

    given = {key: value for key, value in vars(args).items() if key not in ("command", "json")}
    return {"schema": "switchgear-plan-parallel/2", "notice": NOTICE, "arguments": given,
            "predictions": [line(*entry) for entry in predictions.items()], "failures": losses._asdict()}  # fmt: skip
