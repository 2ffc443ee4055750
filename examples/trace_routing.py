# SPDX-License-Identifier: BSD-3-Clause
"""Which experts serve which tokens: a small model learns a language of four topics, and a trace shows the experts of
each topic. Then the experts of one topic are disabled.

    python examples/trace_routing.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import switchgear
from switchgear import MoE, RoutingTrace

TOPICS, WORDS, HIDDEN, EXPERTS = 4, 8, 32, 8  # word w belongs to topic w // WORDS


class Model(nn.Module):
    """Predicts the next word from the last one only, so the experts have to know the words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOPICS * WORDS, HIDDEN)
        self.moe = MoE(HIDDEN, 32, EXPERTS, top_k=2)
        self.head = nn.Linear(HIDDEN, TOPICS * WORDS)

    def forward(self, input_ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.moe(self.embedding(input_ids)))
        return y


def sentences(count: int, generator: torch.Generator) -> Tensor:
    """[count, 12]: each sentence walks around the circle of one topic's words, one or two words a step."""
    topic = torch.randint(TOPICS, (count, 1), generator=generator)
    start = torch.randint(WORDS, (count, 1), generator=generator)
    steps = torch.randint(1, 3, (count, 11), generator=generator).cumsum(1)
    return topic * WORDS + (start + nn.functional.pad(steps, (1, 0))) % WORDS


def loss_of(model: Model, words: Tensor) -> Tensor:
    logits = model(words[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())


def main(steps: int = 150) -> tuple[float, float]:
    """The loss on one topic with all experts, and without the three that the topic uses most."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, sentences(64, generator)).backward()
        optimizer.step()

    with torch.no_grad():
        words = sentences(200, generator)
        with RoutingTrace(model, by_token_id=True) as trace:
            model(words)
        print(trace, "\n")

        by_word = trace.layers["moe.gate"].tokens_by_id()
        by_topic = torch.zeros(TOPICS, EXPERTS, dtype=torch.int64)
        for word, counts in by_word.items():
            by_topic[word // WORDS] += counts
        for topic, counts in enumerate(by_topic):
            print(f"topic {topic}: tokens of each expert {counts.tolist()}")

        about = words[words[:, 0] // WORDS == 0]
        favourites = by_topic[0].topk(3).indices.tolist()
        before = float(loss_of(model, about))
        with switchgear.override(model, disable=favourites):
            after = float(loss_of(model, about))
        print(f"\nloss on topic 0: {before:.2f}, without experts {sorted(favourites)}: {after:.2f}")
    return before, after


if __name__ == "__main__":
    main()
