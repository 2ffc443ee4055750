# SPDX-License-Identifier: BSD-3-Clause
"""TRL's GRPOTrainer in bfloat16: how far apart the log-probabilities of rollout and trainer are, by step, with
transformers' own code, with the rollout's routing replayed, and with whole layers on switchgear.

    python examples/clients/trl_grpo.py [--steps 60] [--plot grpo.png]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from contextlib import nullcontext
from typing import Any

import small
import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

import switchgear
from switchgear.routing import record, replay

SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 2, "head_dim": 16}
PROMPT, ANSWER = 8, 16


def select(logits: Tensor, answers: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]


class Trainer(GRPOTrainer):
    """Compares each training step with its rollout."""

    def watch(self, replays: bool) -> Trainer:
        self.replays, self.generate, self.differences = replays, self.model.generate, []
        self.model.generate = self.roll_out
        return self

    def roll_out(self, generation_config: Any, **inputs: Any) -> Tensor:
        generation_config.output_logits = generation_config.return_dict_in_generate = True
        with record(self.model) if self.replays else nullcontext() as self.choices:
            out = self.generate(generation_config=generation_config, **inputs)
        found = select(torch.stack(out.logits, 1), out.sequences[:, -len(out.logits) :])
        self.rollout = {tuple(row): (i, found[i]) for i, row in enumerate(out.sequences.tolist())}
        return out.sequences

    def _get_per_token_logps_and_entropies(  # TRL's has a product of its own in the place of the model's head
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any
    ) -> tuple[Tensor, Tensor, None]:
        order, wanted = zip(*[self.rollout[tuple(row)] for row in input_ids.tolist()], strict=True)
        with replay(self.model, self.choices, sequences=order) if self.replays else nullcontext():
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        logits = logits[:, -logits_to_keep - 1 : -1]
        found = select(logits, input_ids[:, -logits_to_keep:])
        apart = (found.detach() - torch.stack(wanted)).abs() * attention_mask[:, -logits_to_keep:]
        self.differences.append(float(apart.max()))
        return found, torch.distributions.Categorical(logits=logits.detach().float()).entropy(), None


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of bytes that are larger than the byte before."""
    return [sum(b > a for a, b in itertools.pairwise(ids)) / ANSWER for ids in completion_ids]


def train(setting: str, steps: int) -> list[float]:
    """The largest difference of each step."""
    model = small.model("grouped_mm", torch.bfloat16, SIZES)
    if setting == "switchgear":
        switchgear.accelerate(model, whole_layers=True)
    torch.manual_seed(0)
    texts = ["".join(map(chr, row)) for row in torch.randint(1, 256, (64, PROMPT)).tolist()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            folder, max_steps=steps, per_device_train_batch_size=32, num_generations=8, learning_rate=3e-3,
            max_completion_length=ANSWER, use_cpu=True, bf16=False, router_aux_loss_coef=0.0, report_to=[],
            gradient_checkpointing=False, logging_steps=1, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            model, reward, arguments, Dataset.from_dict({"prompt": texts}), processing_class=small.tokenizer()
        ).watch(setting == "replay")
        trainer.train()
    return trainer.differences


def draw(found: dict[str, list[float]], path: str) -> None:
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for setting, differences in found.items():
        axes.plot(differences, label=setting)
    axes.set(xlabel="step", ylabel="largest difference", title="Log-probabilities of rollout and trainer")
    axes.set_yscale("symlog", linthresh=1e-2)  # 0.0 has a place
    axes.legend()
    pyplot.savefig(path, dpi=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plot")
    options = parser.parse_args()
    found = {}
    for setting in ("transformers", "replay", "switchgear"):
        found[setting] = train(setting, options.steps)
        median = sorted(found[setting])[options.steps // 2]
        print(f"| TRL's GRPOTrainer, {setting} | largest {max(found[setting]):.1e}, median {median:.1e} |", flush=True)
    if any(found["switchgear"]):
        raise AssertionError(f"rollout and trainer differ by {max(found['switchgear'])}")
    if options.plot:
        draw(found, options.plot)
