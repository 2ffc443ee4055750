# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench generate`: greedy decoding of whole models by `generate`, beside transformers and llama.cpp.

The implementations have the same random weights: those in transformers one process and one model, the others a process
each. They work in turns: a long prompt; then one token as the prompt of a text, or of several, and a token at a time.
Before that, logits of a prompt are compared with transformers' own in the same dtype.
A GGUF file is run as it is, and its logits are compared with transformers' for the decoded weights if memory has room
for them. If it has no room for two implementations of a file, each turn has a process of its own, which loads the file.
`--model` writes the file of a published model with drawn weights (generate_files.py).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple, Protocol, cast
from unittest.mock import patch

import torch
from torch import Tensor

import switchgear
from switchgear import ops
from switchgear._C import read_bandwidth
from switchgear.analysis.models import MODELS as PUBLISHED
from switchgear.cli import plan as plan_cli
from switchgear.cli.common import CommandError, console, markdown_table, positive, require
from switchgear.integrations.gguf import load_gguf, save_gguf
from switchgear.integrations.transformers import undo_accelerate
from switchgear_bench.processes import Child

from .competitors import Skip
from .generate_files import KINDS, Sizes, measure_sizes, read_through, write_drawn
from .llama import Llama, package
from .machine import busy_seconds_elsewhere, free_memory_bytes
from .offload_model_files import with_layers
from .options import add_competitors_folder, add_files, add_quick, add_shapes, add_threads, begin, choose, positives
from .report import threads, write_outputs
from .results import read_json, rounded
from .timing import STIRRED, TICK, counted, wait_for_quiet

SCHEMA = "switchgear-bench-generate/2"
GGUF_TOLERANCE = 0.25  # logits of random weights of 2 to 8 bits, by activations of 8 bits
TOKENS, TURNS = 64, 7
QUICK_TOKENS, QUICK_TURNS = 8, 3
LARGE_TURNS = 3  # of a large model: of up to a minute and a half
LARGE = 2 << 30  # bytes of a file
ALONE_TOKENS, ALONE_TURNS = 32, 2  # of minutes
WARM_TOKENS = 2  # of a new process
LONG_PROMPT, SEQUENCES = 256, 8
PROMPT, LENGTH = 16, 512  # tokens: whose logits are compared; of the longest text
BASE = "transformers"
IN_TURNS = BASE, "switchgear, experts", "switchgear"
BEGIN, PARTS = "begin", "parts"
# Root mean square. A layer rounds about 10 tensors to bfloat16, by 2^-9 of their size, and the roundings add up like a
# random walk: 0.0125 for four layers. Experts chosen differently add to that.
TOLERANCE = 0.05


class Model(NamedTuple):
    """An OLMoE with random weights."""

    about: str
    layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    heads: int
    vocabulary: int
    is_large: bool = False  # memory has no room for another, nor for gradients

    @property
    def sizes(self) -> Sizes:
        """Of weights in bfloat16, without whole and decoded."""
        of_layer = 4 * self.hidden_size + self.num_experts + 3 * self.top_k * self.intermediate_size
        head = 2 * self.hidden_size * self.vocabulary
        return Sizes(0, 2 * self.hidden_size * self.layers * of_layer + head, 0, head)


MODELS = {
    "tiny": Model("fits in the cache", 4, 256, 128, 8, 2, 4, 1024),
    "olmoe": Model("four of the sixteen layers of OLMoE-1B-7B", 4, 2048, 1024, 64, 8, 16, 50304),
    "olmoe-whole": Model("all sixteen: 14 GB", 16, 2048, 1024, 64, 8, 16, 50304, is_large=True),
}


class Decoder(Protocol):
    """A model in one implementation."""

    def begin(self) -> None:
        """Before a turn of it; not timed."""
        return None

    def logits(self, prompt: list[int]) -> Tensor:
        """Of the token that follows, [vocabulary], float32."""

    def decode(self, first: int, count: int, sequences: int = 1) -> list[int]:
        """The next tokens, greedily, of texts that begin with tokens first, first + 1, …; those of the first text."""


# ---- in transformers -------------------------------------------------------------------------------------------------


def build(model: Model) -> Any:
    """The model of transformers, in bfloat16."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=model.vocabulary, hidden_size=model.hidden_size, intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers, num_attention_heads=model.heads, num_key_value_heads=model.heads,
        num_experts=model.num_experts, num_experts_per_tok=model.top_k, max_position_embeddings=LENGTH,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made: Any = OlmoeForCausalLM(config)
        return made.eval()
    finally:
        torch.set_default_dtype(default)


class InLlama(Decoder):
    """llama.cpp, with a GGUF file."""

    def __init__(self, path: Path, length: int) -> None:
        self._llama = Llama(path, length, torch.get_num_threads(), SEQUENCES)

    def logits(self, prompt: list[int]) -> Tensor:
        self._llama.forget()
        return self._llama.step(prompt)

    def decode(self, first: int, count: int, sequences: int = 1) -> list[int]:
        self._llama.forget()
        tokens = [list(range(first, first + sequences))]
        for place in range(count):
            logits = self._llama.step(tokens[-1], place if sequences > 1 else None)
            tokens.append(logits.view(sequences, -1).argmax(1).tolist())
        return [step[0] for step in tokens[1:]]


def _write_for_llama(model: Model, folder: str, length: int, kind: str) -> InLlama:
    package()
    built, path = build(model), Path(folder, f"{kind}.gguf")
    switchgear.accelerate(built)
    save_gguf(built, path, kind)
    return InLlama(path, length)


class InTransformers(Decoder):
    """`generate`, after `prepare`."""

    def __init__(self, model: Any, prepare: Callable[[Any], object] = lambda _: None) -> None:
        self._model = model
        prepare(model)
        model.generation_config.eos_token_id = None  # no text ends early

    @torch.inference_mode()
    def logits(self, prompt: list[int]) -> Tensor:
        found: Tensor = self._model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1]
        return found.float()

    def decode(self, first: int, count: int, sequences: int = 1) -> list[int]:
        prompt = torch.arange(first, first + sequences)[:, None]
        ids = self._model.generate(  # without a mask, transformers ignores tokens that are its token of padding
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
        )
        tokens: list[int] = ids[0, 1:].tolist()
        return tokens

    def train(self, count: int) -> None:
        """Computes and drops the gradients of a text's loss."""
        ids = 1 + torch.arange(count)[None] % 1000
        self._model.train()
        with torch.enable_grad():
            self._model(ids, labels=ids, use_cache=False).loss.backward()
        self._model.zero_grad()
        self._model.eval()

    def time_parts(self, count: int) -> dict[str, float]:
        """Median seconds of a token: in the call of all layers, in the head, and in all."""
        clock, run = _Clock(), ops.decoder_layers_on_host
        head = self._model.get_output_embeddings()
        hooks = [
            head.register_forward_pre_hook(lambda *_: clock.begin()),
            head.register_forward_hook(lambda *_: clock.end("head")),
        ]

        def run_layers(*args: Any) -> Any:
            clock.begin()
            results = run(*args)
            clock.end("layers")
            return results

        prompt = torch.ones(1, 1, dtype=torch.long)
        with patch.object(ops, "decoder_layers_on_host", run_layers):
            self._model.generate(
                prompt, attention_mask=prompt, max_new_tokens=count + 2, do_sample=False, streamer=clock
            )
        for hook in hooks:
            hook.remove()
        return {part: median(token.get(part, 0.0) for token in clock.tokens[2:]) for part in ("layers", "head", "all")}


class _Clock:
    """A streamer of transformers. tokens: seconds by part, of the prompt, of the first token, …"""

    def __init__(self) -> None:
        self.tokens: list[dict[str, float]] = []
        self._parts: dict[str, float] = {}
        self._last = self._began = perf_counter()

    def begin(self) -> None:
        self._began = perf_counter()

    def end(self, part: str = "") -> None:
        """Without a part: of the text."""
        self._parts[part] = self._parts.get(part, 0.0) + perf_counter() - self._began

    def put(self, value: object) -> None:
        now = perf_counter()
        self.tokens.append(self._parts | {"all": now - self._last})
        self._parts, self._last = {}, now


class InTurns(InTransformers):
    """One of several implementations of the same model."""

    def __init__(self, model: Any, whole_layers: bool | None, undo: list[Any]) -> None:
        super().__init__(model)
        self._whole_layers, self._undo = whole_layers, undo

    def begin(self) -> None:
        undo_accelerate(self._undo)
        self._undo[:] = []
        if self._whole_layers is not None:
            self._undo[:] = switchgear.accelerate(self._model, whole_layers=self._whole_layers)


def build_in_turns(model: Model) -> dict[str, Decoder]:
    """IN_TURNS, with the weights of one model, on huge pages."""
    built = build(model)
    undo = switchgear.accelerate(built)
    switchgear.store(built, "plain")
    return {name: InTurns(built, whole, undo) for name, whole in zip(IN_TURNS, (None, False, True), strict=True)}


def _store(model: Any, form: str) -> None:
    switchgear.accelerate(model, whole_layers=True)
    switchgear.store(model, form, linears=form, skip=["gate"])


MAKERS: dict[str, Callable[[Model, str, int], Decoder]] = {
    "llama.cpp": partial(_write_for_llama, kind="bf16"),
    "switchgear, int4": lambda model, folder, length: InTransformers(build(model), partial(_store, form="int4")),
    "switchgear, Q4_0": lambda model, folder, length: InTransformers(build(model), partial(_store, form="q4_0")),
    "llama.cpp, Q4_0": partial(_write_for_llama, kind="q4_0"),
}
LOSSY = {"switchgear, int4", "switchgear, Q4_0", "llama.cpp, Q4_0"}
OF_FILES: dict[str, Callable[[Path, str, int], Decoder]] = {
    BASE: lambda path, folder, length: InTransformers(load_gguf(path, dtype=torch.bfloat16), switchgear.restore),
    "switchgear": lambda path, folder, length: InTransformers(
        load_gguf(path, dtype=torch.bfloat16), partial(switchgear.accelerate, whole_layers=True)
    ),
    "llama.cpp": lambda path, folder, length: InLlama(path, length),
}


class Work(NamedTuple):
    """What is timed."""

    kind: str  # "prefill", "decode" or "train"
    size: int  # tokens, or texts of "decode"

    def do(self, decoder: Decoder, count: int) -> int:
        """Its tokens."""
        if self.kind == "decode":
            decoder.decode(1, count, self.size)
            return self.size * count
        if self.kind == "train":
            cast(InTransformers, decoder).train(self.size)
        else:
            decoder.logits([1 + place % 1000 for place in range(self.size)])
        return self.size


def list_works(prompts: Sequence[int], trained: Sequence[int] = ()) -> dict[str, Work]:
    found = {f"prefill of {size}": Work("prefill", size) for size in prompts}
    found |= {"decode": Work("decode", 1), f"decode of {SEQUENCES} texts": Work("decode", SEQUENCES)}
    return found | {f"training of {size}": Work("train", size) for size in trained}


# ---- measuring -------------------------------------------------------------------------------------------------------


def open_decoders(names: tuple[str, ...], model: Model | Path, folder: str, length: int) -> dict[str, Decoder]:
    """Skip if a package is missing."""
    if isinstance(model, Path):
        return {name: OF_FILES[name](model, folder, length) for name in names}
    if names == IN_TURNS:
        return build_in_turns(model)
    return {name: MAKERS[name](model, folder, length) for name in names}


def _serve(
    connection: Connection, names: tuple[str, ...], model: Model | Path, folder: str, length: int, thread_count: int
) -> None:
    """Sends logits by implementation, or why there are none; then takes (implementation, work, tokens)."""
    torch.set_num_threads(thread_count)
    try:
        decoders = open_decoders(names, model, folder, length)
    except Skip as reason:
        connection.send(("ok", reason.args[0]))
        return
    found = {}
    for name, decoder in decoders.items():
        decoder.begin()
        found[name] = decoder.logits(list(range(1, PROMPT + 1)))
    gc.freeze()  # a collection walks all that was imported, in one decode of several
    connection.send(("ok", found))
    while True:
        name, work, count = connection.recv()
        if work == BEGIN:
            decoders[name].begin()
            connection.send(("ok", None))
            continue
        if work == PARTS:
            connection.send(("ok", cast(InTransformers, decoders[name]).time_parts(count)))
            continue
        before, start = busy_seconds_elsewhere(), perf_counter()
        num_tokens = work.do(decoders[name], count)
        seconds = perf_counter() - start
        connection.send(("ok", (seconds / num_tokens, seconds, busy_seconds_elsewhere() - before)))


class Plan(NamedTuple):
    """How a model is measured. groups: implementations that share a process. is_alone: a process lives for a turn."""

    groups: list[tuple[str, ...]]
    turns: int
    tokens: int
    is_alone: bool = False


def plan(model: Model | Path, count: int, turns: int) -> Plan:
    """A file's decoded weights are left out if memory has no room for them."""
    if isinstance(model, Model):
        if model.is_large:
            return Plan([IN_TURNS], min(turns, LARGE_TURNS), count)
        return Plan([IN_TURNS, *((maker,) for maker in MAKERS)], turns, count)
    groups: list[tuple[str, ...]] = [(maker,) for maker in OF_FILES]
    free, sizes = free_memory_bytes() or 0, measure_sizes(model)
    if sizes.whole + sizes.decoded > 0.9 * free:
        groups.remove((BASE,))
    if 2 * sizes.whole > free:  # llama.cpp may keep weights in another order
        return Plan(groups, ALONE_TURNS, min(count, ALONE_TOKENS), is_alone=True)
    return Plan(groups, min(turns, LARGE_TURNS) if sizes.whole > LARGE else turns, count)


class _Case:
    """The processes of a model, and what they have answered."""

    def __init__(self, stack: ExitStack, model: Model | Path, name: str, length: int, thread_count: int) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self.skipped: list[dict[str, str]] = []
        self.taken: dict[tuple[str, str], list[tuple[list[float], bool]]] = {}
        self._stack, self._model, self._name = stack, model, name
        self._arguments = model, stack.enter_context(TemporaryDirectory()), length, thread_count
        self._expected: Tensor | None = None

    def open(self, group: tuple[str, ...]) -> Child | None:
        """A process, whose logits are compared with the first one's. None if there is nothing to time."""
        child = Child(", ".join(group), _serve, group, *self._arguments)
        self._stack.callback(child.close)
        answer = child.receive()
        if isinstance(answer, str):
            self.skipped.append({"implementation": group[0], "reason": answer})
            return None
        is_file = isinstance(self._model, Path)
        for maker, found in answer.items():
            self._expected = found if self._expected is None else self._expected
            error = float((found - self._expected).norm() / self._expected.norm())
            if maker not in LOSSY and not error <= (GGUF_TOLERANCE if is_file else TOLERANCE):
                raise CommandError(f"{self._name}: logits of {maker} differ by {error:.2g}")
            if is_file and maker == BASE:
                child.close()
                return None
            self.results.setdefault(maker, {"implementation": maker, "error": error})
        return child

    def time_parts(self, child: Child, maker: str, count: int) -> None:
        child.connection.send((maker, PARTS, count))
        self.results[maker]["parts"] = child.receive()

    def time(self, child: Child, maker: str, works: Mapping[str, Work], count: int, *, is_timed: bool = True) -> None:
        child.connection.send((maker, BEGIN, 0))
        child.receive()
        for name, work in works.items():
            if work.kind == "train" and maker not in IN_TURNS:
                continue
            wait_for_quiet(1.0)
            child.connection.send((maker, work, count))
            each, seconds, busy = child.receive()
            if is_timed:
                self.taken.setdefault((maker, name), []).append(([each], busy <= STIRRED * seconds + TICK))


def measure(
    model: Model | Path, name: str, count: int, turns: int, thread_count: int, works: Mapping[str, Work]
) -> dict[str, Any]:
    """One model by all implementations. That of a file by transformers is not timed: it may fill the memory."""
    groups, turns, count, is_alone = plan(model, count, turns)
    sizes = measure_sizes(model) if isinstance(model, Path) else model.sizes
    if isinstance(model, Model) and model.is_large:
        works = {name: work for name, work in works.items() if work.kind != "train"}
    reads, longest = [], max(work.size for work in works.values())
    children: dict[tuple[str, ...], Child | None] = {}
    with ExitStack() as stack:
        case = _Case(stack, model, name, max(LENGTH, longest), thread_count)
        for turn in range(turns):
            reads.append(read_bandwidth(thread_count))
            for group in groups:
                if is_new := group not in children:
                    if is_alone:
                        read_through(cast(Path, model))
                    children[group] = case.open(group)
                if (child := children[group]) is None:
                    continue
                for maker in group:
                    if is_new:
                        case.time(child, maker, works, WARM_TOKENS, is_timed=False)
                    case.time(child, maker, works, count)
                    if maker == "switchgear" and turn == turns - 1:
                        case.time_parts(child, maker, count)
                if is_alone:
                    child.close()
                    del children[group]
    rate = median(reads)
    for maker, row in case.results.items():
        taken = {work: case.taken[maker, work] for work in works if (maker, work) in case.taken}
        row["tokens_per_second"] = {work: 1 / median(counted(turns)) for work, turns in taken.items()}
        row["quiet_turns"] = sum(is_quiet for turns in taken.values() for _, is_quiet in turns)
        if isinstance(model, Path) or maker not in LOSSY:
            row["of_read"] = row["tokens_per_second"]["decode"] * sizes.read / rate
    about = {"model": name, "tokens": count, "turns": turns, "token_bytes": sizes.read, "head_bytes": sizes.head,
             "read_rate": rate}  # fmt: skip
    made: dict[str, Any] = rounded(about | {"results": list(case.results.values()), "skipped": case.skipped})
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, MODELS, "tiny,olmoe")
    add = parser.add_argument
    add("--gguf", type=Path, nargs="+", metavar="FILE", help="GGUF files instead, beside llama.cpp")
    add(
        "--model",
        metavar="MODEL",
        help=f"a GGUF file with drawn weights of {', '.join(PUBLISHED)}, or of a folder with a config.json",
    )
    add("--type", metavar="LIST", default="q4_k_m", help="of that file: q4_0, q4_k_m, …; a file for each")
    add("--layers", type=positive, metavar="N", help="of that model (default: all)")
    add("--keep", metavar="DIR", help="folder for these files, which are used again (default: they are deleted)")
    add("--prompts", metavar="LIST", type=positives, default=(LONG_PROMPT,), help=f"lengths (default: {LONG_PROMPT})")
    add("--train", metavar="LIST", type=positives, default=(), help="lengths of texts, whose gradients are computed")
    add_competitors_folder(parser)
    add_quick(parser, "a small model and few tokens")
    add_threads(parser)
    add_files(parser, "source json markdown")


def write_models(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Files of --model, each deleted when the next one is wanted."""
    config = plan_cli.config_of(args.model)
    config = with_layers(config, args.layers) if args.layers else config
    for kind in choose("type", args.type, KINDS):
        with nullcontext(args.keep) if args.keep else TemporaryDirectory() as folder:
            path = Path(folder, f"{Path(args.model).name}-{config.num_hidden_layers}-{kind}.gguf")
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_drawn(config, kind, path)
            yield f"{Path(args.model).name}, {kind}" + (f", {args.layers} layers" if args.layers else ""), path


def run(args: argparse.Namespace) -> int:
    about = begin(args, add_arguments)
    require("rich")
    require("transformers")
    if args.train and (args.gguf or args.model):
        raise CommandError("--train: expected without --gguf and --model, whose weights are stored")
    if args.source:
        results = read_json(args.source, "--from", SCHEMA)
    else:
        count, turns = (QUICK_TOKENS, QUICK_TURNS) if args.quick else (TOKENS, TURNS)
        names = choose("shapes", args.shapes or ("tiny" if args.quick else "tiny,olmoe"), MODELS)
        files = {path.name: path for path in args.gguf or ()}
        models = write_models(args) if args.model else iter((files or {name: MODELS[name] for name in names}).items())
        works = list_works(args.prompts, args.train)
        cases = [measure(model, name, count, turns, args.threads, works) for name, model in models]
        results = {"schema": SCHEMA, "machine": about, "cases": cases}
    console().print(markdown(results))
    for case in results["cases"]:
        console().print(*(f"{entry['implementation']}: {entry['reason']}" for entry in case["skipped"]), sep="\n")
    write_outputs(args, results, {"generate": lambda: markdown(results)})
    return 0


def markdown(results: dict[str, Any]) -> str:
    lines, works = [], list(dict.fromkeys(
        work for case in results["cases"] for row in case["results"] for work in row["tokens_per_second"]
    ))  # fmt: skip
    for case in results["cases"]:
        for row in case["results"]:
            rates = row["tokens_per_second"]
            error = f"{row['error']:.1%}" if row["error"] else ""
            speeds = {work: f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" for work, rate in rates.items()}
            if "of_read" in row:
                speeds["decode"] += f" ({row['of_read']:.0%})"
            lines.append([case["model"], row["implementation"], *(speeds.get(work, "") for work in works), error])
    rates = [f"{work}, tokens/s" for work in works]
    header = ["model", "implementation", *rates, "logits differ by"]
    about = results["machine"]
    note = f"{about['model']}, {threads(about['threads'])}, {about['isa']}; torch {about['torch']}."
    if any("of_read" in row for case in results["cases"] for row in case["results"]):
        note += " In brackets: the bytes of weights that a token reads, as a share of a plain read."
    reads = [
        f"{case['model']} {case['token_bytes'] / 1e9:.3g} GB of {case['read_rate'] / 1e9:.3g} GB/s"
        for case in results["cases"]
        if "token_bytes" in case
    ]
    if reads:
        note += f" A token reads, and a plain read has: {'; '.join(reads)}."
    return f"{markdown_table(header, lines, left=(0, 1))}\n{note}\n{_parts_table(results['cases'])}"


def _parts_table(cases: list[dict[str, Any]]) -> str:
    """Of a token of one text; "" if nothing was timed."""
    lines = []
    for case in cases:
        for row in case["results"]:
            if parts := row.get("parts"):
                read = case["token_bytes"] - case["head_bytes"], case["head_bytes"]
                both = zip(read, (parts["layers"], parts["head"]), strict=True)
                cells = [f"{1e3 * t:.1f}: {size / t / case['read_rate']:.0%}" for size, t in both]
                rest = parts["all"] - parts["layers"] - parts["head"]
                lines.append([case["model"], *cells, f"{1e3 * rest:.1f}: {rest / parts['all']:.0%}"])
    header = ["a token, ms", "layers: of a plain read", "head: of a plain read", "all else: of the token"]
    return f"\n{markdown_table(header, lines, left=(0,))}" if lines else ""
