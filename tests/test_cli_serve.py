# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear serve` and `switchgear chat`: transformers' server with our models, over HTTP."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import switchgear
from switchgear.cli import main, serve

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
openai = pytest.importorskip("openai", reason="openai, which transformers serve needs, is not installed")
for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package, reason=f"{package}, which transformers serve needs, is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

WORDS = 61
PROMPTS = [" ".join(f"w{(7 * i + j * (i + 3)) % WORDS}" for j in range(3 + 2 * i)) for i in range(8)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of words."""
    path = tmp_path_factory.mktemp("served") / "model"
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, pad_token_id=None, eos_token_id=None,
        bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    transformers.OlmoeForCausalLM(config).save_pretrained(path)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)
    made.save_pretrained(path)
    return path


Start = Callable[..., "openai.OpenAI"]


@pytest.fixture
def started(folder: Path) -> Iterator[Start]:
    """Starts servers with options of the command, and returns a client of each."""
    servers, clients = [], []

    def start(*options: str, model: Path = folder, **of_server: Any) -> openai.OpenAI:
        parser = argparse.ArgumentParser()
        serve.add_arguments(parser)
        args = parser.parse_args([str(model), *options])
        serving = serve.start(args, port=0, non_blocking=True, log_level="error", **of_server)
        servers.append(serving)
        while not serving.server.started:
            serving._thread.join(0.01)
        port = serving.server.servers[0].sockets[0].getsockname()[1]
        clients.append(openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none"))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
    for serving in servers:
        serving.kill_server()


def ask(client: openai.OpenAI, prompt: str, tokens: int = 12) -> str:
    model = client.models.list().data[0].id
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0.0)
    return answer.choices[0].text


def stream(client: openai.OpenAI, prompt: str, tokens: int = 12) -> str:
    model = client.models.list().data[0].id
    messages: Any = [{"role": "user", "content": prompt}]
    chunks = client.chat.completions.create(
        model=model, messages=messages, max_tokens=tokens, temperature=0.0, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def generated(folder: Path, prompt: str, tokens: int = 12) -> str:
    """What `generate` answers, without a server."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    switchgear.accelerate(model, whole_layers=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    return text


def test_clients_at_once_get_the_tokens_of_a_lone_request(started: Start, folder: Path) -> None:
    client = started()
    alone = [generated(folder, prompt) for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    with ThreadPoolExecutor(8) as pool:
        for call in (ask, stream):
            answers = pool.map(lambda prompt: call(client, prompt), PROMPTS * 3)  # noqa: B023
            assert [answer.split() for answer in answers] == [text.split() for text in alone * 3]
