# SPDX-License-Identifier: BSD-3-Clause
"""Reinforcement learning with routing replay, in two processes: one generates in bfloat16 and records its routers'
choices, the other trains in float32 (GRPO, arXiv:2402.03300) and replays them.

    torchrun --nproc-per-node 2 examples/replay.py [--steps 60]

Without replay, the two choose different experts for some tokens, and the ratios of their probabilities are off before
the policy has changed at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from switchgear import MoE
from switchgear.routing import RoutingRecord, record, replay

WORDS, HIDDEN, PROMPT, ANSWER, PROMPTS, GROUP = 16, 32, 4, 6, 8, 16
TRAINER, ROLLOUT = 0, 1  # ranks


class Cache:
    """What the model knows of the tokens so far."""

    def __init__(self, state: Tensor) -> None:
        self.state, self.length = state, 0

    def get_seq_length(self) -> int:
        return self.length


class Policy(nn.Module):
    """A moving average of the last tokens, and two MoE layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, HIDDEN)
        self.layers = nn.ModuleList(MoE(HIDDEN, 32, num_experts=16, top_k=2, normalize=True) for _ in range(2))
        self.head = nn.Linear(HIDDEN, WORDS)

    def forward(self, input_ids: Tensor, past_key_values: Cache | None = None) -> Tensor:
        tokens = self.embedding(input_ids)
        cache = past_key_values or Cache(torch.zeros_like(tokens[:, 0]))
        states = []
        for token in tokens.unbind(1):
            cache.state = 0.5 * cache.state + token
            states.append(cache.state)
        cache.length += tokens.shape[1]
        x = torch.stack(states, 1)
        for layer in self.layers:
            x = x + layer(x)
        logits: Tensor = self.head(x)
        return logits.float()


def reward_of(tokens: Tensor) -> Tensor:
    """[n]: how much of the answer is in the topic of the prompt's last word, one of four."""
    topic = tokens * 4 // WORDS
    return (topic[:, PROMPT:] == topic[:, PROMPT - 1 : PROMPT]).float().mean(1)


@torch.no_grad()
def generate(policy: Policy, prompts: Tensor) -> tuple[Tensor, Tensor, RoutingRecord]:
    """(tokens [n, PROMPT + ANSWER], log-probabilities of the answers [n, ANSWER], the routers' choices)."""
    tokens, logs = prompts, []
    cache = Cache(torch.zeros(len(prompts), HIDDEN, dtype=policy.embedding.weight.dtype))
    step = prompts
    with record(policy) as choices:
        for _ in range(ANSWER):
            log_p = policy(step, past_key_values=cache)[:, -1].log_softmax(-1)
            step = log_p.exp().multinomial(1)
            logs.append(log_p.gather(1, step))
            tokens = torch.cat([tokens, step], 1)
    return tokens, torch.cat(logs, 1), choices


def log_probabilities(policy: Policy, tokens: Tensor) -> Tensor:
    """[n, ANSWER]: of the answers, in one forward over whole sequences."""
    log_p = policy(tokens[:, :-1]).log_softmax(-1)[:, PROMPT - 1 :]
    return log_p.gather(2, tokens[:, PROMPT:, None])[..., 0]


def train_step(
    policy: Policy, optimizer: torch.optim.Optimizer, tokens: Tensor, old: Tensor, choices: RoutingRecord
) -> dict[str, float]:
    """One step of GRPO: advantages within each group of answers to a prompt, and ratios clipped at 0.8 and 1.2."""
    rewards = reward_of(tokens)
    by_prompt = rewards.view(PROMPTS, GROUP)
    advantage = (by_prompt - by_prompt.mean(1, keepdim=True)) / (by_prompt.std(1, keepdim=True) + 1e-4)
    advantage = advantage.view(-1, 1)
    with torch.no_grad():
        free = log_probabilities(policy, tokens)
    with replay(policy, choices):
        log_p = log_probabilities(policy, tokens)
        ratio = (log_p - old).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    return {
        "reward": float(rewards.mean()),
        "free": float((free - old).abs().amax()),  # how far two networks with the same weights are apart
        "replayed": float((log_p.detach() - old).abs().amax()),
    }


def main(steps: int = 60) -> list[dict[str, float]]:
    """Trains, and returns the reward and the largest differences of log-probabilities by step (on the trainer)."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    policy = Policy()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    results = []
    for step in range(steps):
        for tensor in policy.state_dict().values():
            dist.broadcast(tensor, TRAINER)
        sent: list[object] = [None]
        if rank == ROLLOUT:
            prompts = torch.randint(WORDS, (PROMPTS, PROMPT)).repeat_interleave(GROUP, 0)
            behaviour = Policy().bfloat16()
            behaviour.load_state_dict(policy.state_dict())
            sent = [generate(behaviour, prompts)]
        dist.broadcast_object_list(sent, ROLLOUT)
        if rank == TRAINER:
            results.append(train_step(policy, optimizer, *sent[0]))  # type: ignore[misc]
            if step % 10 == 0 or step == steps - 1:
                last = results[-1]
                print(
                    f"step {step:3}  reward {last['reward']:.2f}  largest difference of log-probabilities: "
                    f"{last['free']:.3f} free, {last['replayed']:.3f} replayed"
                )
    dist.destroy_process_group()
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--results", type=Path, help="write reward, free and replayed of each step here")
    options = parser.parse_args()
    found = main(options.steps)
    if options.results and found:
        options.results.write_text("\n".join(" ".join(str(value) for value in row.values()) for row in found))
