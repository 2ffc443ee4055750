# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench serve`: answers of `switchgear serve` to several clients at once, beside `transformers serve`.

Each server has a process of its own, with the same model, and they take turns. First one client asks each question.
Then several ask at once, and each answer is compared with the one that its server gave before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any, NamedTuple

import torch

from switchgear.cli import serve
from switchgear.cli.common import console, markdown_table, positive, require
from switchgear_bench.processes import Child

from .generate import MODELS, build
from .options import add_files, add_quick, add_shapes, add_threads, begin, choose, positives
from .report import threads, write_outputs
from .results import read_json, rounded
from .timing import wait_for_quiet

SCHEMA = "switchgear-bench-serve/1"
CLIENTS, QUESTIONS, TOKENS, TURNS = (1, 4, 16), 16, 32, 3
QUICK_QUESTIONS, QUICK_TOKENS, QUICK_TURNS = 4, 8, 1
SHORTEST, LONGER = 16, 8  # words of the first question, and of each further one
BATCHING: dict[str, Any] = {"continuous_batching": True, "cb_num_blocks": 256, "cb_max_batch_tokens": 256}


class Server(NamedTuple):
    is_ours: bool
    options: dict[str, Any]


SERVERS = {
    "transformers": Server(False, {}),
    "switchgear": Server(True, {}),
    "transformers, batching": Server(False, BATCHING),
    "switchgear, batching": Server(True, BATCHING),
}


class Answer(NamedTuple):
    text: str
    first: float  # seconds to its first token
    seconds: float


def write_checkpoint(name: str, folder: str) -> None:
    """A model of MODELS in bfloat16, and a tokenizer with a word for each token."""
    tokenizers, transformers = require("tokenizers"), require("transformers")
    model = MODELS[name]
    build(model).save_pretrained(folder)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(model.vocabulary)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template).save_pretrained(folder)


def make_questions(count: int) -> list[str]:
    """Different ones, of different lengths."""
    return [" ".join(f"w{1 + (37 * i + 11 * j) % 997}" for j in range(SHORTEST + LONGER * i)) for i in range(count)]


def _serve(connection: Connection, name: str, folder: str, thread_count: int) -> None:
    """Sends the port of a server, which ends with the connection."""
    server = SERVERS[name]
    options = server.options | {"port": 0, "non_blocking": True, "log_level": "error"}
    if server.is_ours:
        parser = argparse.ArgumentParser()
        serve.add_arguments(parser)
        serving = serve.start(parser.parse_args([folder, "--threads", str(thread_count)]), **options)
    else:
        from transformers.cli.serve import Serve

        torch.set_num_threads(thread_count)
        serving = Serve(force_model=folder, device="cpu", dtype="bfloat16", **options)
    while not serving.server.started:
        sleep(0.01)
    connection.send(("ok", serving.server.servers[0].sockets[0].getsockname()[1]))
    try:
        connection.recv()
    finally:
        serving.kill_server()


def ask(port: int, model: str, questions: Sequence[str], clients: int, tokens: int) -> tuple[list[Answer], float]:
    """Their answers, and the seconds of all."""
    openai = require("openai")
    with openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", timeout=3600.0, max_retries=0) as client:

        def answer(question: str) -> Answer:
            messages = [{"role": "user", "content": question}]
            start, first, text = perf_counter(), 0.0, ""
            for chunk in client.chat.completions.create(
                model=model, messages=messages, max_tokens=tokens, temperature=0.0, stream=True
            ):
                if content := chunk.choices and chunk.choices[0].delta.content:
                    first = first or perf_counter() - start
                    text += content
            return Answer(text, first, perf_counter() - start)

        with ThreadPoolExecutor(clients) as pool:
            start = perf_counter()
            answers = list(pool.map(answer, questions))
            return answers, perf_counter() - start


def measure(
    name: str, clients: Sequence[int], count: int, tokens: int, turns: int, thread_count: int
) -> dict[str, Any]:
    questions = make_questions(count)
    taken: dict[tuple[str, int], list[tuple[list[Answer], float]]] = {}
    alone: dict[str, list[str]] = {}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        path = str(Path(folder, name))
        write_checkpoint(name, path)
        ports = {}
        for server in SERVERS:
            child = Child(server, _serve, server, path, thread_count)
            stack.callback(child.close)
            ports[server] = child.receive()
            alone[server] = [answer.text for answer in ask(ports[server], path, questions, 1, tokens)[0]]
        for _ in range(turns):
            for number in clients:
                for server, port in ports.items():
                    wait_for_quiet(1.0)
                    taken.setdefault((server, number), []).append(ask(port, path, questions, number, tokens))
    rows = []
    for (server, number), rounds in taken.items():
        answers = [answer for answers, _ in rounds for answer in answers]
        wrong = sum(
            answer.text != text for answers, _ in rounds for answer, text in zip(answers, alone[server], strict=True)
        )
        rows.append(
            {
                "server": server,
                "clients": number,
                "tokens_per_second": count * tokens / median(seconds for _, seconds in rounds),
                "first_token": median(answer.first for answer in answers),
                "slowest": max(answer.seconds for answer in answers),
                "answers": len(answers),
                "wrong": wrong,
            }
        )
    made: dict[str, Any] = rounded({"model": name, "questions": count, "tokens": tokens, "results": rows})
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, MODELS, "olmoe")
    add = parser.add_argument
    add("--clients", metavar="LIST", type=positives, default=CLIENTS, help="at once (default: 1,4,16)")
    add("--questions", metavar="N", type=positive, default=QUESTIONS, help=f"of a turn (default: {QUESTIONS})")
    add_quick(parser, "a small model and few tokens")
    add_threads(parser)
    add_files(parser, "source json markdown")


def run(args: argparse.Namespace) -> int:
    about = begin(args, add_arguments)
    if args.source:
        results = read_json(args.source, "--from", SCHEMA)
    else:
        for package in ("rich", *serve.PACKAGES):
            require(package)
        tokens, turns = (QUICK_TOKENS, QUICK_TURNS) if args.quick else (TOKENS, TURNS)
        count = min(args.questions, QUICK_QUESTIONS) if args.quick else args.questions
        names = choose("shapes", args.shapes or ("tiny" if args.quick else "olmoe"), MODELS)
        cases = [measure(name, args.clients, count, tokens, turns, args.threads) for name in names]
        results = {"schema": SCHEMA, "machine": about, "cases": cases}
    console().print(markdown(results))
    write_outputs(args, results, {"serve": lambda: markdown(results)})
    return 0


def markdown(results: dict[str, Any]) -> str:
    lines = [
        [case["model"], row["server"], str(row["clients"]), f"{row['tokens_per_second']:.3g}",
         f"{row['first_token']:.2f}", f"{row['slowest']:.2f}", f"{row['wrong']} of {row['answers']}"]
        for case in results["cases"] for row in case["results"]
    ]  # fmt: skip
    header = ["model", "server", "clients", "tokens/s", "first token, s", "slowest answer, s", "not as alone"]
    about, case = results["machine"], results["cases"][0]
    note = (
        f"{case['questions']} questions, {case['tokens']} tokens each. {about['model']}, {threads(about['threads'])}, "
        f"{about['isa']}; torch {about['torch']}, transformers {about['transformers']}."
    )
    return f"{markdown_table(header, lines, left=(0, 1))}\n{note}\n"
