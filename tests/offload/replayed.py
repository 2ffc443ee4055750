# SPDX-License-Identifier: BSD-3-Clause
"""The simulator of tests: a cache is a list of (layer, expert), and every eviction looks at all of it."""

from __future__ import annotations

import math
import random
from typing import Any

from switchgear.offload import Accesses

Expert = tuple[int, int]


class Replay:
    """Plays steps[s][l] = experts through caches of `slots` experts per layer, or one of L times as many."""

    def __init__(self, name: str, steps: Any, slots: int, shared: bool, hot: dict[Expert, int] | None = None) -> None:
        self.name, self.steps, self.hot = name, steps, hot or {}
        self.num_layers = len(steps[0]) if steps else 0
        self.history: list[tuple[int, int, Expert]] = []  # (step, layer, expert) of all uses
        self.loads: dict[Expert, int] = {}
        self.hits, self.misses = [0] * self.num_layers, [0] * self.num_layers
        self.evicted: list[Expert] = []
        caches: list[list[Expert]] = [[] for _ in range(self.num_layers)]
        if shared:
            caches = [caches[0]] * self.num_layers if caches else []
        room = slots * self.num_layers if shared else slots
        for s, step in enumerate(steps):
            for layer, experts in enumerate(step):
                self.play(caches[layer], room, s, layer, [(layer, e) for e in sorted(experts)])

    def play(self, cache: list[Expert], room: int, s: int, layer: int, wanted: list[Expert]) -> None:
        here = [x for x in wanted if x in cache]
        away = [x for x in wanted if x not in cache]
        self.history += [(s, layer, x) for x in here + away]
        self.hits[layer] += len(here)
        self.misses[layer] += len(away)
        for x in away:
            self.loads[x] = s * self.num_layers + layer
        if len(wanted) > room:
            cache += away
            while len(cache) > room:
                self.evict(cache, [], s, layer)
            return
        for x in away:
            if len(cache) == room:
                self.evict(cache, wanted, s, layer)
            cache.append(x)

    def evict(self, cache: list[Expert], keep: list[Expert], s: int, layer: int) -> None:
        others = [x for x in cache if x not in keep]
        victim = min(others, key=lambda x: (self.worth(x, s, layer), self.last(x)))
        cache.remove(victim)
        self.evicted.append(victim)

    def last(self, x: Expert) -> int:
        """Place of the last use."""
        return max(i for i, (_, _, y) in enumerate(self.history) if y == x)

    def worth(self, x: Expert, s: int, layer: int) -> float:
        """The lowest leaves."""
        now = s * self.num_layers + layer
        used = max(t * self.num_layers + at for t, at, y in self.history if y == x)
        count = sum(y == x for _, _, y in self.history)
        ahead = x[0] - layer if x[0] > layer else x[0] - layer + self.num_layers  # layers until its own runs
        match self.name:
            case "lru":
                return used
            case "lfu":
                return count
            case "lfru":
                return count / (now - used + 1)
            case "lifo":
                return -self.loads[x]
            case "static frequency":
                return self.hot.get(x, 0)
            case "frequency/distance":
                return count / ahead
            case "least stale":
                return (1000 if used // self.num_layers == s else 0) - ahead
            case "belady":
                coming = [t for t in range(s + 1, len(self.steps)) if x[1] in self.steps[t][x[0]]]
                coming = [s] * (x[0] > layer and x[1] in self.steps[s][x[0]]) + coming
                return -(coming[0] * self.num_layers + x[0]) if coming else -math.inf
        raise AssertionError(self.name)


def random_steps(seed: int, num_layers: int = 3, num_experts: int = 6, length: int = 40) -> Any:
    """Sets of 0 to 3 experts, skewed, of which some stay from step to step; every tenth is of 5, as a prompt's."""
    rng = random.Random(seed)
    weights = [1 / (i + 1) for i in range(num_experts)]
    steps: list[list[set[int]]] = []
    for s in range(length):
        step = []
        for layer in range(num_layers):
            if steps and rng.random() < 0.3:
                step.append(set(steps[-1][layer]))
                continue
            count = 5 if s % 10 == 9 else rng.randint(0, 3)
            step.append(set(rng.choices(range(num_experts), weights, k=count)))
        steps.append(step)
    return steps


def as_sets(accesses: Accesses) -> Any:
    return [[set(experts) for experts in step] for step in accesses.steps]
