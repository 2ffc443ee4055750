# SPDX-License-Identifier: BSD-3-Clause
"""The examples run, and show what they claim."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from switchgear.parallel.checkpoint import load_whole

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_train_layer_learns() -> None:
    errors = load("train_layer")["train"](60)
    assert errors[-1] < errors[0] / 5


def test_numpy_routing_agrees_with_moe() -> None:
    # float32 sums for a hidden state of 16 through two projections, in two orders
    assert load("numpy_routing")["main"]() < 1e-5


def test_custom_pieces_keep_the_capacity() -> None:
    tokens_per_expert = load("custom_pieces")["main"]()
    assert int(tokens_per_expert.max()) == 16


def test_mixtral_agrees_with_eager() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    # float32, two layers: about a hundred roundings of 6e-8 before a logit
    assert load("mixtral")["main"]() < 1e-5


def test_gguf_is_written_back_with_the_same_bytes() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert load("gguf")["main"]()[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_grpo_has_the_log_probabilities_of_its_rollouts(steps: int, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    results = load("grpo")["main"](steps, dtype)
    assert {result.difference for result in results} == {0.0}
    if dtype is torch.float32:  # with instructions for bfloat16 torch may have no difference in it either
        assert max(result.plain_difference for result in results) > 0
    if steps == 40:
        assert results[-1].reward > results[0].reward + 0.15


@pytest.mark.slow
def test_row32_towards_understanding_moe_needs_a_mixture_of_nonlinear_experts() -> None:
    """The authors' accuracies: 100.0 (runs from 98.1 on), 92.9, 79.6 and 68.3 %; single networks: see the example."""
    found = load("cluster_task")["main"]()
    assert found["mixture, nonlinear"] > 0.98
    assert found["entropy"] < 0.1  # each expert has its own cluster
    assert found["mixture, nonlinear"] > found["mixture, linear"] > 0.85
    assert max(found["single, nonlinear"], found["single, linear"]) < 0.75


@pytest.mark.slow
def test_train_parallel_has_the_losses_of_one_process(tmp_path: Path) -> None:
    """Equal up to rounding in another order, which grows over 60 steps by about 1.1× per step, from 1e-7."""
    losses = load("train_parallel")["train"](60, str(tmp_path / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += [str(EXAMPLES / "train_parallel.py"), "--steps", "60", "--losses", str(tmp_path / "losses")]
    subprocess.run([*command, "--save", str(tmp_path / "four")], check=True, capture_output=True, timeout=120)
    distributed = [float(line) for line in (tmp_path / "losses").read_text().split()]
    assert losses[-1] < losses[0] / 3
    assert distributed == pytest.approx(losses, rel=1e-4)
    one, four = (load_whole(tmp_path / name) for name in ("one", "four"))
    assert {name: tensor.shape for name, tensor in four.items()} == {name: tensor.shape for name, tensor in one.items()}


@pytest.mark.slow
def test_train_parallel_goes_on_while_ranks_are_lost(tmp_path: Path) -> None:
    """Under torchrun. Ranks are killed or stopped and come back; no step is missing, and the log can be drawn."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "train_parallel.py"), "--steps", "400", "--chaos", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    plot = load("plot_chaos")
    entries = [entry for rank in plot["read"](tmp_path).values() for entry in rank]
    assert {entry["step"] for entry in entries if "step" in entry} == set(range(400))
    assert {entry["ranks"] for entry in entries if "step" in entry} == {1, 2}
    errors = {entry["step"]: entry["error"] for entry in entries if "step" in entry}
    assert errors[399] < errors[0] / 3
    if importlib.util.find_spec("matplotlib"):
        plot["main"](tmp_path, tmp_path / "chaos.png")
        assert (tmp_path / "chaos.png").stat().st_size < 100_000


@pytest.mark.slow
def test_train_parallel_names_a_killed_rank(tmp_path: Path) -> None:
    """First, before any traceback, of which the ranks print one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += [str(EXAMPLES / "train_parallel.py"), "--steps", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step   50"):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[2]), signal.SIGKILL)
        lines = [line for line in process.stdout if not line.startswith("step")]
    assert re.match(r"rank \d died in ", lines[0])
    assert "its process is gone; " in lines[0]
    assert sum(re.match(r"\[rank\d\]: Traceback", line) is not None for line in lines) <= 1
    assert not any("aborted" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 30])
@pytest.mark.some(1)
def test_replay_removes_the_difference_of_two_networks(steps: int, tmp_path: Path) -> None:
    """Two processes: a policy in bfloat16 generates, one in float32 learns from its answers with its choices."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "replay.py"), "--steps", str(steps), "--results", str(tmp_path / "results")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    rows = [[float(value) for value in line.split()] for line in (tmp_path / "results").read_text().splitlines()]
    rewards, free, replayed = zip(*rows, strict=True)
    assert max(free[:5]) > 3 * max(replayed[:5])
    if steps == 30:
        assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15


def test_trace_routing_shows_what_the_router_learned() -> None:
    before, after = load("trace_routing")["main"]()
    assert after > before + 0.1


@pytest.mark.slow
def test_lora_moe_in_a_tiny_form() -> None:
    """A few steps: each adapter learns its own domain, and the mixture both."""
    losses = load("lora_moe")["main"](8, 20)
    for domain in ("code", "english"):
        assert losses[f"adapter {domain}"][domain] < losses["base"][domain]
        assert losses["mixture"][domain] < losses["base"][domain]


@pytest.mark.parametrize("steps", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_finetune_experts_leaves_what_the_task_does_not_use(steps: int) -> None:
    """Fewer bytes by the fraction of experts, and less of the first task forgotten than by training all."""
    results = load("finetune_experts")["main"](steps)
    assert results["selected"].kilobytes < 0.5 * results["all"].kilobytes
    if steps == 60:
        assert results["selected"].python < results["all"].python


def test_distill_teaches_a_student() -> None:
    results = load("distill")["main"](60)
    assert len(results) == 3
    assert max(results.values()) < 1.6  # an untrained student is 2.5 nats away, a trained one 0.7 to 1.1
    assert max(results, key=lambda name: results[name]) == "as it routes"  # both methods gain


def test_each_example_is_tested() -> None:
    tested = {
        "grpo",
        "gguf",
        "lora_moe",
        "lora_trainer",
        "train_parallel",
        "plot_chaos",
        "train_layer",
        "numpy_routing",
        "custom_pieces",
        "mixtral",
        "cluster_task",
        "trace_routing",
        "replay",
        "finetune_experts",
        "distill",
        "upcycle",
        "bigger_than_memory",
    }
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_lora_trainer_learns_and_the_saved_adapters_too(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    losses = load("lora_trainer")["train"](20, str(tmp_path))
    assert losses["after"] < losses["before"] - 0.3
    assert abs(losses["loaded"] - losses["after"]) < 0.1
    assert abs(losses["merged"] - losses["loaded"]) < 1e-3


@pytest.mark.slow
def test_upcycle_starts_at_the_loss_of_the_dense_model() -> None:
    losses = load("upcycle")["main"](30)
    assert losses["upcycled"] <= losses["dense"] + 1e-5  # a float32 loss of about 3
    assert losses["upcycled, trained on"] < losses["upcycled"]


@pytest.mark.slow
def test_bigger_than_memory_writes_the_text_of_the_whole_model(tmp_path: Path) -> None:
    """The hits are those of the simulator, with each policy. The model is untrained, which changes no claim."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from switchgear_bench.tiny import model, text
    from switchgear_bench.tiny.cache import save
    from switchgear_bench.tiny.sensitivity import Sensitivity
    from switchgear_bench.tiny.train import QUICK

    bytes_of = torch.randint(256, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    domains = [text.Domain("random", "a generator", bytes_of, bytes_of)]
    measured = Sensitivity({}, [], 0.0, 0.0, [0.0, 0.0], 0.0, 0.0)
    folder = save(model.build(0), QUICK, domains, measured, tmp_path / "tiny").folder
    found = load("bigger_than_memory")["main"](str(folder))
    assert len(found) == 6  # all but Belady
    for name, each in found.items():
        assert each.is_equal, name
        assert each.hits == each.simulated, name
        assert each.misses > 0, name
