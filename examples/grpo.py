# SPDX-License-Identifier: BSD-3-Clause
"""Reinforcement learning of a Hugging Face MoE model (GRPO, arXiv:2402.03300): `generate` writes answers, and a trainer
learns from them. On switchgear's whole layers, both give a token the same log-probability, to the last bit.

    python examples/grpo.py [--steps 40] [--dtype bfloat16]

Each step prints the largest difference between the two, and that of the same weights in transformers alone, where the
last bits depend on the cache and on the size of a batch, and can change a token's experts. The model is small, starts
at random, and learns to write numbers that go up.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

import switchgear

WORDS, PROMPT, ANSWER = 32, 4, 8
PROMPTS, GROUP, MICRO_BATCH = 8, 12, 16


class Step(NamedTuple):
    loss: float
    reward: float
    difference: float  # largest, of log-probabilities of rollout and trainer
    plain_difference: float  # the same without switchgear


def build(dtype: torch.dtype) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_experts=8, num_experts_per_tok=2, initializer_range=0.1, pad_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return OlmoeForCausalLM(config).to(dtype)


def reward_of(sequences: Tensor) -> Tensor:
    """[n]: the share of the answer's numbers that are larger than the number before."""
    return (sequences[:, PROMPT:] > sequences[:, PROMPT - 1 : -1]).float().mean(1)


def advantage_of(rewards: Tensor) -> Tensor:
    """[n, 1]: each reward beside those of the other answers to its prompt."""
    groups = rewards.view(PROMPTS, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)


def select_log_probs(logits: Tensor, answers: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, answers[..., None])[..., 0]


def roll_out(model: OlmoeForCausalLM, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """(sequences [n, PROMPT + ANSWER], log-probabilities of the answers [n, ANSWER])."""
    out = model.generate(
        prompts, max_new_tokens=ANSWER, do_sample=True, top_k=0, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences, select_log_probs(torch.stack(out.logits, 1), out.sequences[:, PROMPT:])


def find_log_probs(model: OlmoeForCausalLM, sequences: Tensor) -> Tensor:
    """[n, ANSWER]: of the answers, in one forward over whole sequences, with gradients."""
    logits = model(sequences, use_cache=False).logits[:, PROMPT - 1 : -1]
    return select_log_probs(logits, sequences[:, PROMPT:])


def learn(model: OlmoeForCausalLM, sequences: Tensor, advantage: Tensor) -> tuple[float, Tensor]:
    """Accumulates gradients over micro-batches. Returns the loss, and the trainer's log-probabilities [n, ANSWER].

    The ratio of a policy to its own rollout is 1, so GRPO's gradient is that of advantage × log-probability.
    """
    loss, log_probs = 0.0, []
    for part, weight in zip(sequences.split(MICRO_BATCH), advantage.split(MICRO_BATCH), strict=True):
        log_probs.append(find_log_probs(model, part))
        part_loss = -(weight * log_probs[-1]).sum() / (len(sequences) * ANSWER)
        part_loss.backward()
        loss += part_loss.item()
    return loss, torch.cat(log_probs).detach()


def main(steps: int = 40, dtype: torch.dtype = torch.float32) -> list[Step]:
    torch.manual_seed(0)
    model, plain = build(dtype), build(dtype)
    switchgear.accelerate(model, whole_layers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    results = []
    for index in range(steps):
        prompts = torch.randint(WORDS // 2, (PROMPTS, PROMPT)).repeat_interleave(GROUP, 0)
        plain.load_state_dict(model.state_dict())
        sequences, rollout = roll_out(plain, prompts)
        with torch.no_grad():
            trainer = torch.cat([find_log_probs(plain, part) for part in sequences.split(MICRO_BATCH)])
        plain_difference = float((trainer - rollout).abs().max())

        sequences, rollout = roll_out(model, prompts)
        rewards = reward_of(sequences)
        optimizer.zero_grad()
        loss, trainer = learn(model, sequences, advantage_of(rewards))
        optimizer.step()
        results.append(Step(loss, float(rewards.mean()), float((trainer - rollout).abs().max()), plain_difference))
        print(
            f"step {index:3}  loss {loss:7.3f}  reward {results[-1].reward:.2f}  rollout and trainer differ by "
            f"{results[-1].difference} (transformers alone: {plain_difference:.1e})"
        )
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    main(options.steps, getattr(torch, options.dtype))
