# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench generate`: greedy decoding of whole models by `generate`, beside transformers and llama.cpp.

Each implementation has a process of its own, with the same random weights; those of a model at true size share one, and
its weights. They work in turns: a long prompt; then one token as the prompt of a text, or of several, and a token at a
time. Before that, logits of a prompt are compared with transformers' own in the same dtype, and afterwards the tokens.
A GGUF file is run as it is, and its logits are compared with transformers' for the decoded weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

import switchgear
from switchgear._C import read_bandwidth
from switchgear.cli.common import CommandError, console, markdown_table, require
from switchgear.integrations.gguf import load_gguf, save_gguf
from switchgear.integrations.transformers import undo_accelerate
from switchgear_bench.processes import Child

from .competitors import Skip
from .llama import Llama, package
from .machine import busy_seconds_elsewhere
from .options import add_competitors_folder, add_files, add_quick, add_shapes, add_threads, begin, choose
from .report import threads, write_outputs
from .results import read_json, rounded
from .timing import STIRRED, TICK, counted, wait_for_quiet

SCHEMA = "switchgear-bench-generate/2"
GGUF_TOLERANCE = 0.25  # logits of random weights of 2 to 8 bits, by activations of 8 bits
TOKENS, TURNS = 64, 7
QUICK_TOKENS, QUICK_TURNS = 8, 3
SHARED_TURNS = 3  # of a minute and a half
LONG_PROMPT, SEQUENCES = 256, 8
PROMPT, LENGTH = 16, 512  # tokens: whose logits are compared; of the longest text
BASE = "transformers"
IN_TURNS = BASE, "switchgear, experts", "switchgear"
BEGIN = "begin"
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
    is_shared: bool = False  # by IN_TURNS: memory has no room for another

    @property
    def bytes_read(self) -> int:
        """By a token, of weights in bfloat16."""
        of_layer = 4 * self.hidden_size + self.num_experts + 3 * self.top_k * self.intermediate_size
        return 2 * self.hidden_size * (self.layers * of_layer + self.vocabulary)


MODELS = {
    "tiny": Model("fits in the cache", 4, 256, 128, 8, 2, 4, 1024),
    "olmoe": Model("four of the sixteen layers of OLMoE-1B-7B", 4, 2048, 1024, 64, 8, 16, 50304),
    "olmoe-whole": Model("all sixteen: 14 GB", 16, 2048, 1024, 64, 8, 16, 50304, is_shared=True),
}


class Decoder(Protocol):
    """A model in one implementation."""

    def begin(self) -> None:
        """Before a turn of it; not timed."""
        return None

    def logits(self, prompt: list[int]) -> Tensor:
        """Of the token that follows, [vocabulary], float32."""

    def decode(self, first: int, count: int, sequences: int = 1) -> list[int]:
        """The next tokens, greedily, of as many equal texts; those of one."""


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

    def __init__(self, path: Path) -> None:
        self._llama = Llama(path, LENGTH, torch.get_num_threads(), SEQUENCES)

    def logits(self, prompt: list[int]) -> Tensor:
        self._llama.forget()
        return self._llama.step(prompt)

    def decode(self, first: int, count: int, sequences: int = 1) -> list[int]:
        self._llama.forget()
        tokens = [first]
        for place in range(count):
            tokens.append(int(self._llama.step(tokens[-1:] * sequences, place if sequences > 1 else None).argmax()))
        return tokens[1:]


def _write_for_llama(model: Model, folder: str, kind: str) -> InLlama:
    package()
    built, path = build(model), Path(folder, f"{kind}.gguf")
    switchgear.accelerate(built)
    save_gguf(built, path, kind)
    return InLlama(path)


class InTransformers(Decoder):
    """`generate`, after `prepare`."""

    def __init__(self, model: Any, prepare: Callable[[Any], object] = lambda _: None) -> None:
        self._model = model
        prepare(model)

    @torch.inference_mode()
    def logits(self, prompt: list[int]) -> Tensor:
        found: Tensor = self._model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1]
        return found.float()

    @torch.inference_mode()
    def decode(self, first: int, count: int, sequences: int = 1) -> list[int]:
        prompt = torch.full((sequences, 1), first)
        ids = self._model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        tokens: list[int] = ids[0, 1:].tolist()
        return tokens


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


def _accelerate(model: Any, form: str = "plain", whole_layers: bool = False) -> None:
    """ "plain" moves all weights to huge pages."""
    switchgear.accelerate(model, whole_layers=whole_layers)
    if form == "plain":
        switchgear.store(model, form)
    else:
        switchgear.store(model, form, linears=form, skip=["gate"])


MAKERS: dict[str, Callable[[Model, str], Decoder]] = {
    BASE: lambda model, folder: InTransformers(build(model)),
    "switchgear, experts": lambda model, folder: InTransformers(build(model), _accelerate),
    "switchgear": lambda model, folder: InTransformers(build(model), partial(_accelerate, whole_layers=True)),
    "llama.cpp": partial(_write_for_llama, kind="bf16"),
    "switchgear, int4": lambda model, folder: InTransformers(
        build(model), partial(_accelerate, form="int4", whole_layers=True)
    ),
    "switchgear, Q4_0": lambda model, folder: InTransformers(
        build(model), partial(_accelerate, form="q4_0", whole_layers=True)
    ),
    "llama.cpp, Q4_0": partial(_write_for_llama, kind="q4_0"),
}
LOSSY = {"switchgear, int4", "switchgear, Q4_0", "llama.cpp, Q4_0"}
OF_FILES: dict[str, Callable[[Path, str], Decoder]] = {
    BASE: lambda path, folder: InTransformers(load_gguf(path, dtype=torch.bfloat16), switchgear.restore),
    "switchgear": lambda path, folder: InTransformers(
        load_gguf(path, dtype=torch.bfloat16), partial(switchgear.accelerate, whole_layers=True)
    ),
    "llama.cpp": lambda path, folder: InLlama(path),
}
WORK: dict[str, Callable[[Decoder, int], tuple[int, Any]]] = {  # what is timed: its tokens, and an answer
    "prefill": lambda decoder, count: (LONG_PROMPT, decoder.logits(list(range(1, LONG_PROMPT + 1)))),
    "decode": lambda decoder, count: (count, decoder.decode(1, count)),
    f"decode of {SEQUENCES}": lambda decoder, count: (SEQUENCES * count, decoder.decode(1, count, SEQUENCES)),
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def makers_of(model: Model | Path) -> Mapping[str, Callable[[Any, str], Decoder]]:
    return OF_FILES if isinstance(model, Path) else MAKERS


def _serve(connection: Connection, names: tuple[str, ...], model: Model | Path, folder: str, thread_count: int) -> None:
    """Sends logits by implementation, or why there are none; then takes (implementation, work, tokens)."""
    torch.set_num_threads(thread_count)
    try:
        if len(names) > 1:
            decoders = build_in_turns(cast(Model, model))
        else:
            decoders = {name: makers_of(model)[name](model, folder) for name in names}
    except Skip as reason:
        connection.send(("ok", reason.args[0]))
        return
    found = {}
    for name, decoder in decoders.items():
        decoder.begin()
        found[name] = decoder.logits(list(range(1, PROMPT + 1)))
    connection.send(("ok", found))
    while True:
        name, work, count = connection.recv()
        if work == BEGIN:
            decoders[name].begin()
            connection.send(("ok", None))
            continue
        before, start = busy_seconds_elsewhere(), perf_counter()
        num_tokens, answer = WORK[work](decoders[name], count)
        seconds = perf_counter() - start
        connection.send(("ok", (seconds / num_tokens, seconds, busy_seconds_elsewhere() - before, answer)))


def measure(model: Model | Path, name: str, count: int, turns: int, thread_count: int) -> dict[str, Any]:
    """One model by all implementations. That of a file by transformers is not timed: it may fill the memory."""
    is_file = isinstance(model, Path)
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    is_shared = isinstance(model, Model) and model.is_shared
    turns = min(turns, SHARED_TURNS) if is_shared else turns
    groups = [IN_TURNS] if is_shared else [(maker,) for maker in makers_of(model)]
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        children: dict[str, Child] = {}
        expected = torch.empty(0)
        for group in groups:
            child = Child(", ".join(group), _serve, group, model, folder, thread_count)
            stack.callback(child.close)
            answer = child.receive()
            if isinstance(answer, str):
                skipped.append({"implementation": group[0], "reason": answer})
                continue
            for maker, found in answer.items():
                expected = found if maker == BASE else expected
                error = float((found - expected).norm() / expected.norm())
                if maker not in LOSSY and not error <= (GGUF_TOLERANCE if is_file else TOLERANCE):
                    raise CommandError(f"{name}: logits of {maker} differ from transformers' by {error:.2g}")
                if is_file and maker == BASE:
                    child.close()
                    continue
                children[maker] = child
                results.append({"implementation": maker, "error": error})
        taken: dict[tuple[str, str], list[tuple[list[float], bool]]] = {}
        answers: dict[tuple[str, str], Any] = {}
        reads = []
        for turn in range(turns + 1):  # the first one is not timed
            reads.append(read_bandwidth(thread_count))
            for maker, child in children.items():
                child.connection.send((maker, BEGIN, 0))
                child.receive()
                for work in WORK:
                    wait_for_quiet(1.0)
                    child.connection.send((maker, work, count))
                    each, seconds, busy, answers[maker, work] = child.receive()
                    if turn:
                        taken.setdefault((maker, work), []).append(([each], busy <= STIRRED * seconds + TICK))
        first = results[0]["implementation"]
        for row in results:
            maker = row["implementation"]
            tokens, expected_tokens = answers[maker, "decode"], answers[first, "decode"]
            row["same_tokens"] = next((i for i in range(count) if tokens[i] != expected_tokens[i]), count)
            row["tokens_per_second"] = {work: 1 / median(counted(taken[maker, work])) for work in WORK}
            row["quiet_turns"] = sum(is_quiet for work in WORK for _, is_quiet in taken[maker, work])
            if isinstance(model, Model) and maker not in LOSSY:
                row["of_read"] = row["tokens_per_second"]["decode"] * model.bytes_read / median(reads)
    return {"model": name, "tokens": count, "turns": turns, "results": rounded(results), "skipped": skipped}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, MODELS, "tiny,olmoe")
    parser.add_argument("--gguf", type=Path, nargs="+", metavar="FILE", help="GGUF files instead, beside llama.cpp")
    add_competitors_folder(parser)
    add_quick(parser, "a small model and few tokens")
    add_threads(parser)
    add_files(parser, "source json markdown")


def run(args: argparse.Namespace) -> int:
    about = begin(args, add_arguments)
    require("rich")
    require("transformers")
    if args.source:
        results = read_json(args.source, "--from", SCHEMA)
    else:
        count, turns = (QUICK_TOKENS, QUICK_TURNS) if args.quick else (TOKENS, TURNS)
        names = choose("shapes", args.shapes or ("tiny" if args.quick else "tiny,olmoe"), MODELS)
        files = {path.name: path for path in args.gguf or ()}
        models = files or {name: MODELS[name] for name in names}
        cases = [measure(model, name, count, turns, args.threads) for name, model in models.items()]
        results = {"schema": SCHEMA, "machine": about, "cases": cases}
    console().print(markdown(results))
    for case in results["cases"]:
        console().print(*(f"{entry['implementation']}: {entry['reason']}" for entry in case["skipped"]), sep="\n")
    write_outputs(args, results, {"generate": lambda: markdown(results)})
    return 0


def markdown(results: dict[str, Any]) -> str:
    lines = []
    for case in results["cases"]:
        base = case["results"][0]["tokens_per_second"]
        for row in case["results"]:
            rates = row["tokens_per_second"]
            error = "" if row["implementation"] == BASE else f"{row['error']:.1%}"
            speeds = {work: f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" for work, rate in rates.items()}
            if "of_read" in row:
                speeds["decode"] += f" ({row['of_read']:.0%})"
            lines.append([case["model"], row["implementation"], *speeds.values(),
                          f"{rates['decode'] / base['decode']:.2f}", error,
                          f"{row['same_tokens']} of {case['tokens']}"])  # fmt: skip
    works = [f"{work}, tokens/s" for work in results["cases"][0]["results"][0]["tokens_per_second"]]
    header = ["model", "implementation", *works, "decode / first row", "logits differ by", "same tokens"]
    about = results["machine"]
    note = f"{about['model']}, {threads(about['threads'])}, {about['isa']}; torch {about['torch']}."
    if any("of_read" in row for case in results["cases"] for row in case["results"]):
        note += " In brackets: the bytes of weights that a token reads, as a share of a plain read."
    return f"{markdown_table(header, lines, left=(0, 1))}\n{note}\n"
