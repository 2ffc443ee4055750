# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear serve` and `switchgear chat`: transformers' server with our models, over HTTP."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import switchgear
from switchgear.cli import main, serve

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import gguf_models  # noqa: E402

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


def generated(folder: Path, prompt: str, model: Any = None, tokens: int = 12) -> str:
    """What `generate` answers, without a server."""
    if model is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        switchgear.accelerate(model, whole_layers=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
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


@pytest.mark.parametrize(
    "options",
    [
        ["--form", "int4", "--set", "group_size=32", "--linears", "int8"],
        ["--dtype", "bfloat16", "--store", "STORE", "--memory", "64K"],
        ["--adapter", "ADAPTER"],
    ],
    ids=["stored", "offloaded", "adapted"],
)
def test_a_model_is_loaded_as_told(options: list[str], started: Start, folder: Path, tmp_path: Path) -> None:
    """In a stored form, with its experts on disk, with adapters: the tokens of the same calls in Python."""
    dtype = torch.bfloat16 if "--dtype" in options else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    switchgear.accelerate(model)
    if "--form" in options:
        switchgear.store(model, "int4", linears="int8", group_size=32)
    if "--store" in options:
        switchgear.offload.write_store(model, tmp_path / "STORE", "int8")
        switchgear.store(model, "int8")
    if "--adapter" in options:
        for parameter in switchgear.adapters.add_lora(model, rank=2, alpha=8):
            torch.nn.init.normal_(parameter)
        switchgear.adapters.save_peft(model, tmp_path / "ADAPTER")
    switchgear.accelerate(model, whole_layers=True)
    client = started(*(str(tmp_path / each) if each in ("STORE", "ADAPTER") else each for each in options))
    assert [ask(client, prompt) for prompt in PROMPTS[:3]] == [
        generated(folder, prompt, model) for prompt in PROMPTS[:3]
    ]


def test_a_gguf_file_is_served(started: Start, folder: Path, tmp_path: Path) -> None:
    model = gguf_models.make_model("olmoe")
    switchgear.save_gguf(model, tmp_path / "small.gguf", "q8_0")
    client = started("--tokenizer", str(folder), model=tmp_path / "small.gguf")
    model = switchgear.load_gguf(tmp_path / "small.gguf")
    switchgear.accelerate(model, whole_layers=True)
    assert ask(client, PROMPTS[0]) == generated(folder, PROMPTS[0], model)


def test_another_model_is_refused(started: Start) -> None:
    client = started()
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="another", prompt="w1")


def test_options_of_the_server_reach_it(started: Start) -> None:
    client = started(continuous_batching=True, cb_num_blocks=64, cb_max_batch_tokens=64)
    alone = [ask(client, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: ask(client, prompt), PROMPTS)) == alone


def test_chat_talks_to_the_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["w1 w2 w3", "!exit"])
    monkeypatch.setattr("transformers.cli.chat.RichInterface.input", lambda self: next(lines))
    monkeypatch.setattr("transformers.cli.chat.RichInterface.confirm", lambda self, message: False)
    asked = ["--generate", "max_new_tokens=12", "--generate", "do_sample=false"]
    assert main(["chat", str(folder), *asked]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert generated(folder, "w1 w2 w3") in printed


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--server", "batching=true"], "batching"),
        (["--server", "port=1"], "port=1"),
        (["--memory", "8G"], "--store"),
        (["--store", "experts", "--memory", "8G", "--form", "int4"], "--form"),
        (["--store", "experts", "--memory", "8G"], "experts"),
        (["--form", "int5"], "int5"),
        (["--adapter", "adapters"], "adapters"),
        (["--tokenizer", "words"], "words"),
    ],
)
def test_mistakes_are_named(options: list[str], named: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder), *options]) == 2
    assert named in capsys.readouterr().err


def test_a_missing_package_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(folder)]) == 2
    assert "pip install 'switchgear[serve]'" in capsys.readouterr().err
