# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear offload-plan MODEL --memory 8G --text FILE…`: what a cache of experts would do in so much memory."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .checkpoint import cut_texts, find_folder, load_model, read_texts
from .common import (
    UNITS,
    Advance,
    CommandError,
    above_zero,
    check_file,
    console,
    positive,
    progress,
    require,
    size,
    table,
)


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    checkpoint.add_arguments(parser, tokens=2048, texts="texts like those that the model will read")
    add = parser.add_argument
    add("--memory", type=size, required=True, metavar="SIZE", help="for weights, keys and values: 8G, 512M")
    add("--context", type=positive, default=4096, metavar="N", help="tokens whose keys and values are kept")
    add("--bits", type=above_zero, metavar="N", help="bits per weight (default: those of the checkpoint)")
    add("--expert-bits", type=above_zero, metavar="N", help="bits per weight of experts (default: as --bits)")
    add("--bandwidth", type=size, metavar="SIZE", help="bytes per second at which experts are loaded: 2.5G")
    add("--compute-ms", type=above_zero, default=0.0, metavar="MS", help="of a token whose experts are resident")
    add("--plot", metavar="FILE", help="a PNG of hit rate by slots")
# fmt: on


@dataclass(frozen=True)
class Budget:
    """Bytes of a model's parts, and the experts that fit in addition to the resident ones."""

    memory: int
    dense: int  # weights that are no routed experts
    cached: int  # keys and values
    record: int  # an expert, the largest
    num_layers: int
    num_experts: int  # of the layer with most
    all_experts: int  # bytes

    @property
    def room(self) -> int:
        return self.memory - self.dense - self.cached

    @property
    def slots(self) -> int:
        """Per layer."""
        return min(self.room // (self.record * self.num_layers), self.num_experts)

    def __str__(self) -> str:
        return (
            f"resident: {_bytes(self.dense)} of weights, {_bytes(self.cached)} of keys and values; "
            f"experts: {_bytes(self.all_experts)} in {self.num_layers} layers, {_bytes(self.record)} each\n"
            f"{_bytes(self.memory)} leave {_bytes(self.room)} for experts: "
            f"{self.slots} of {self.num_experts} per layer"
        )


def read_config(model: str) -> Any:
    """The config in the folder of a checkpoint. CommandError if there is none."""
    folder = find_folder(model)
    try:
        return require("transformers").AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(f"cannot load the config of {folder}: {reason}") from None


def budget_of(config: Any, args: argparse.Namespace, *, is_stored: bool = False) -> tuple[Budget, Any]:
    """The budget, and the `analysis.Cost` that it is from. is_stored: embeddings and the head have the bits of
    the checkpoint, as `switchgear.store` leaves them."""
    from ..analysis import cost

    try:
        found = cost(config)
        context = min(args.context, getattr(config.get_text_config(), "max_position_embeddings", args.context))
        plain = dtype_bits(config)
        cached = found.kv_bytes(context, plain) if found.attention is not None else 0
    except ValueError as error:
        raise CommandError(str(error)) from None
    if not found.moe_layers or not found.experts:
        raise CommandError("expected a model with MoE layers, got one without")
    bits = args.bits or plain
    expert_bits = args.expert_bits or bits
    record = max(-(-parameters // experts) for experts, _, parameters in found.moe_layers)
    whole = found.weight_bytes(bits, expert_bits)
    if is_stored:
        whole += round((found.embedding + count_head(config)) * (plain - bits) / 8)
    experts = round(found.experts * expert_bits / 8)
    most = max(number for number, _, _ in found.moe_layers)
    result = Budget(
        args.memory, whole - experts, cached, round(record * expert_bits / 8), len(found.moe_layers), most, experts
    )
    if result.slots < 1:
        least = result.dense + result.cached + result.record * result.num_layers
        raise CommandError(
            f"--memory: expected at least {_bytes(least)}, an expert per layer, got {_bytes(args.memory)}"
        )
    return result, found


def count_head(config: Any) -> int:
    """Parameters of the product that gives logits, also if embeddings are tied to it."""
    text = config.get_text_config()
    return int(getattr(text, "vocab_size", 0) * text.hidden_size)


def dtype_bits(config: Any) -> int:
    """Of an element of the checkpoint; 16 if it does not say."""
    names = (getattr(of, "dtype", None) for of in (config, config.get_text_config()))
    dtype = next((name for name in names if name is not None), torch.bfloat16)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return 8 * int(dtype.itemsize)


def run(args: argparse.Namespace) -> int:
    require("transformers")
    require("rich")
    if args.plot:
        require("matplotlib")
        if Path(args.plot).suffix.lower() != ".png":
            raise CommandError(f"--plot: expected a name that ends in .png, got {args.plot}")
        check_file("plot", args.plot)
    torch.set_num_threads(args.threads)
    folder = find_folder(args.model)
    texts = read_texts(args.text, folder)
    budget, _ = budget_of(read_config(args.model), args)
    model = load_model(folder, args.dtype)
    batches = list(cut_texts(texts, model, folder, tokens=args.tokens, length=args.length).values())
    with progress("reading") as advance:
        try:
            calibration, replayed = read(model, batches, advance)
        except ValueError as error:  # no MoE layers, or none that can be observed
            raise CommandError(str(error)) from None
    steps = sizes(budget, max(len(experts) for experts in replayed.steps[0]))
    with progress("simulating") as advance:
        found = simulations(replayed, calibration, steps, budget, args, advance)
    print(budget)
    print(
        f"{replayed.num_tokens} tokens decoded one by one, "
        f"{replayed.num_uses / max(replayed.num_tokens, 1):.1f} experts each"
    )
    console().print(hit_table(found, steps, budget.slots))
    print(advice(found, budget, replayed.num_tokens))
    if args.plot:
        plot(found, steps, budget, Path(args.plot))
        print(f"plot: {args.plot}")
    return 0


@torch.no_grad()
def read(model: Any, batches: Sequence[Sequence[Tensor]], advance: Advance) -> tuple[Any, Any]:
    """The first half of each text, to calibrate, and the second, to replay; a text of one window is split inside."""
    from ..diagnostics import collect
    from ..offload import Accesses

    halves: tuple[list[Any], list[Any]] = ([], [])
    for number, text in enumerate(batches):
        with collect(model, logits=False) as choices:
            for ids in text:
                model(input_ids=ids, use_cache=False)
        advance(number + 1, len(batches), "texts")
        accesses = Accesses.of(choices)
        for half, part in zip(halves, accesses.split(len(accesses.steps) // 2), strict=True):
            half.append(part)
    return Accesses.join(halves[0]), Accesses.join(halves[1])


def sizes(budget: Budget, top_k: int) -> list[int]:
    """Slots per layer: what fits, and 1, 2, 4, … times the experts of a token."""
    several = {min(top_k << power, budget.num_experts) for power in range(12)}
    return sorted(several | {budget.slots})


def simulations(
    replayed: Any, calibration: Any, steps: Sequence[int], budget: Budget, args: argparse.Namespace, advance: Advance
) -> dict[tuple[str, int], Any]:
    """By (name, slots per layer), in each layer's own cache and in a shared one."""
    from ..offload import POLICIES, StaticFrequency, simulate

    policies = (*POLICIES, StaticFrequency.of(calibration))
    found = {}
    total = len(policies) * len(steps) * 2
    for shared in (False, True):
        for policy in policies:
            for slots in steps:
                name = f"{policy.name}, shared" if shared else policy.name
                found[name, slots] = simulate(
                    replayed, policy, slots=slots, shared=shared, record_bytes=budget.record,
                    bandwidth=args.bandwidth, compute_seconds=args.compute_ms / 1e3,
                )  # fmt: skip
                advance(len(found), total, name)
    return found


def hit_table(found: Mapping[tuple[str, int], Any], steps: Sequence[int], fits: int) -> Any:
    made = table("hits", *(f"{slots} slots{' *' if slots == fits else ''}" for slots in steps))
    for name in dict.fromkeys(name for name, _ in found):
        made.add_row(name, *(f"{found[name, slots].hit_rate:.1%}" for slots in steps))
    made.caption = "per layer; * fits. shared: one cache for all layers, as large. belady looks ahead: a bound"
    return made


def advice(found: Mapping[tuple[str, int], Any], budget: Budget, num_tokens: int) -> str:
    """The policy with the fewest misses of those that a running model can follow; of equals, the first in the table."""
    at = {name: one for (name, slots), one in found.items() if slots == budget.slots}
    best = min((name for name in at if not name.startswith("belady")), key=lambda name: at[name].misses)
    one = at[best]
    rate = one.tokens_per_second
    if budget.slots == budget.num_experts:
        words = "recommended: no cache, since all experts fit"
        return words if rate is None else f"{words}; {rate:.1f} tokens/s if each is loaded once, at first use"
    bound = max(at["belady"].hit_rate, at["belady, shared"].hit_rate)
    words = (
        f"recommended: {best}, {budget.slots} slots per layer: {one.hit_rate:.1%} hits (bound {bound:.1%}), "
        f"{_bytes(one.bytes / max(num_tokens, 1))} loaded per token"
    )
    if rate is not None:
        words += f", {rate:.1f} tokens/s if loads do not overlap with computation"
    even = budget.slots / budget.num_experts
    if one.hit_rate < even * 1.1:
        words += f"\nthe routing is hardly local: a cache of random experts would hit {even:.1%}"
    return words


def plot(found: Mapping[tuple[str, int], Any], steps: Sequence[int], budget: Budget, path: Path) -> None:
    from .common import FAINT, colors, pyplot, save

    figure, axis = pyplot().subplots(figsize=(8, 4.5))
    names = list(dict.fromkeys(name for name, _ in found))
    palette = colors([name for name in names if not name.endswith("shared")])
    for name in names:
        shared = name.endswith(", shared")
        axis.plot(
            steps, [found[name, slots].hit_rate for slots in steps], color=palette[name.removesuffix(", shared")],
            linestyle="--" if shared else "-", marker="." if not shared else None, label=None if shared else name,
        )  # fmt: skip
    axis.axvline(budget.slots, color=FAINT, linewidth=0.8)
    axis.set_xlabel("slots per layer; line: what fits")
    axis.set_ylabel("hit rate")
    axis.set_ylim(0, 1.02)
    axis.set_title("Hits of a cache of experts; dashed: one cache for all layers")
    axis.legend()
    save(figure, path)


def _bytes(number: float) -> str:
    for unit in ("G", "M", "K"):
        if number >= UNITS[unit]:
            return f"{number / UNITS[unit]:.1f} {unit}iB"
    return f"{number:.0f} B"
