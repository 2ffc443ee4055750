# SPDX-License-Identifier: BSD-3-Clause
"""Distil a Mixture-of-Experts teacher into a small dense student (arXiv:2502.12947): from the teacher as it routes,
with knowledge augmentation (passes with sampled experts), and with a student-aware router.

Both methods gain here, where each of eight experts is trained on half of the tokens. Of a teacher with one expert per
token (top_k=1) the others know nothing of it, and students of both methods are worse than that of routing alone.

    python examples/distill.py [--steps 200]
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from switchgear import distill

WORDS, HIDDEN, EXPERTS = 64, 32, 8


class Teacher(nn.Module):
    """Predicts the next word from the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, HIDDEN)
        balance = [switchgear.routing.SwitchLoss(1e-2)]
        self.moe = switchgear.MoE(HIDDEN, 32, EXPERTS, top_k=4, normalize=True, balance=balance)
        self.head = nn.Linear(HIDDEN, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        y: Tensor = self.head(x + self.moe(x))
        return y


def language() -> Tensor:
    """The probabilities of the next word after each word, [WORDS, WORDS]."""
    return (3 * torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0))).softmax(-1)


def sample(probabilities: Tensor, seed: int, count: int = 256) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (count,), generator=generator)
    return words, torch.multinomial(probabilities[words], 1, generator=generator)[:, 0]


def train_teacher(probabilities: Tensor, steps: int) -> Teacher:
    teacher = Teacher()
    optimizer = torch.optim.Adam(teacher.parameters(), 1e-2)
    for step in range(steps):
        words, following = sample(probabilities, step)
        optimizer.zero_grad()
        (F.cross_entropy(teacher(words), following) + switchgear.balance_loss(teacher)).backward()
        optimizer.step()
    return teacher.eval()


def distil(teacher: Teacher, probabilities: Tensor, method: str, steps: int) -> float:
    """Trains a student. Returns its divergence from the language: KL(language || student), in nats."""
    torch.manual_seed(1)
    teacher = copy.deepcopy(teacher)
    student = nn.Sequential(nn.Embedding(WORDS, 12), nn.Linear(12, 32), nn.SiLU(), nn.Linear(32, WORDS))
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    router_optimizer = torch.optim.Adam(distill.router_parameters(teacher), 1e-3)
    for step in range(steps):
        words, _ = sample(probabilities, 10**6 + step)
        logits = student(words)
        if method == "knowledge augmentation":
            passes = distill.knowledge_augment(teacher, words, samples=2)
        elif method == "student-aware router":
            passes = [distill.student_aware_router(teacher, logits, router_optimizer, words)]
        else:
            with torch.no_grad():
                passes = [teacher(words)]
        loss = torch.stack([distill.reverse_kl(logits, target) for target in passes]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.kl_div(student(torch.arange(WORDS)).log_softmax(-1), probabilities, reduction="batchmean"))


def main(steps: int = 200) -> dict[str, float]:
    torch.manual_seed(0)
    probabilities = language()
    teacher = train_teacher(probabilities, 2 * steps)
    results = {}
    for method in ("as it routes", "knowledge augmentation", "student-aware router"):
        results[method] = distil(teacher, probabilities, method, steps)
        print(f"teacher {method:<24} student's divergence from the language {results[method]:.3f} nats")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
