# SPDX-License-Identifier: BSD-3-Clause
"""One experts implementation of the demo in its own process, with its own peak memory and allocator.

The parent sends (command, keyword arguments); the worker answers with the value. `train` answers once per
step, so that the parent can show progress and alternate between workers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any, NamedTuple

import torch

from switchgear.cli.common import CommandError, require
from switchgear.routing import load_balancing_loss
from switchgear.trace import Observation, observe

from .. import machine
from .agreement import Gradient, Load
from .clock import ExpertsClock
from .corpus import batches, load_corpus
from .models import build_model, describe, experts_modules

# Coefficient of the balance loss. Each layer has its own: transformers' loss concatenates the layers, so that one may
# neglect the experts that another prefers, and DeepSeek-V3 has none. Without, a layer uses a few experts only.
BALANCE = 0.05


class Settings(NamedTuple):
    family: str
    implementation: str
    dtype: str
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    seed: int
    threads: int
    text: str | None
    twin: bool = False  # start from weights moved by one rounding, to measure the effect of rounding only


class Step(NamedTuple):
    loss: float  # nats per byte, without the balancing loss
    seconds: float  # forward, backward and optimizer
    experts_forward: float  # seconds of it
    experts_backward: float
    optimizer: float
    load: Load


@torch.no_grad()
def nudge(model: torch.nn.Module, seed: int) -> None:
    """Moves every weight to one of its two neighbours in its own format, at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        # Adjacent values have adjacent bit patterns, except across zero, which is never reached here.
        bits = parameter.view({2: torch.int16, 4: torch.int32}[parameter.element_size()])
        up = torch.randint(2, bits.shape, generator=generator, dtype=torch.int8)
        bits += torch.where(parameter == 0, 0, 2 * up - 1).to(bits.dtype)


class Worker:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.set_num_threads(settings.threads)
        corpus = load_corpus(settings.text)
        size = (settings.batch_size, settings.sequence_length)
        self.train_batches = batches(corpus.train, settings.steps, *size, settings.seed)
        self.held_out_batches = batches(corpus.held_out, 4, *size, settings.seed + 1)
        self.prompt = corpus.held_out
        dtype = getattr(torch, settings.dtype)
        self.model: Any = build_model(settings.family, settings.implementation, dtype, settings.seed)
        if settings.twin:
            nudge(self.model, settings.seed)
        self.experts = experts_modules(self.model)
        if not self.experts:
            raise CommandError(f"{settings.family}: no module goes through transformers' experts interface")
        self.clock = ExpertsClock(self.experts)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        warmup = max(1, min(20, settings.steps // 10))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda i: min((i + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, i / settings.steps)))),
        )
        self.next_step = 0

    def describe(self) -> dict[str, Any]:
        return describe(self.model) | {"memory_before_training": machine.peak_memory_bytes()}

    def _loss(self, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(the minimised loss, the cross entropy without the balance loss)"""
        layers: list[torch.Tensor] = []

        def see(name: str, seen: Observation) -> None:
            assert seen.router_logits is not None
            layers.append(load_balancing_loss(seen.router_logits, seen.topk_ids))

        with observe(self.model, see):
            output = self.model(input_ids=batch, labels=batch, use_cache=False)
        return output.loss + BALANCE * torch.stack(layers).mean(), float(output.loss.detach())

    def probe(self) -> list[Gradient]:
        """Gradients of the experts' parameters, layer by layer, for the first batch at the current weights."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self._loss(self.train_batches[0])[0])
        generator = torch.Generator().manual_seed(self.settings.seed)
        gradients = []
        for parameter in (parameter for module in self.experts for parameter in module.parameters()):
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            direction = torch.randn(gradient.shape, generator=generator)
            gradients.append(Gradient(float(gradient.norm()), float((gradient * direction).sum())))
        self.optimizer.zero_grad(set_to_none=True)
        return gradients

    def train(self, count: int) -> Iterator[Step]:
        self.model.train()
        for batch in self.train_batches[self.next_step : self.next_step + count]:
            self.clock.reset()
            start = perf_counter()
            self.optimizer.zero_grad(set_to_none=True)
            loss, cross_entropy = self._loss(batch)
            torch.autograd.backward(loss)
            before_optimizer = perf_counter()
            self.optimizer.step()
            end = perf_counter()
            self.schedule.step()
            self.next_step += 1
            clock = self.clock
            yield Step(cross_entropy, end - start, clock.forward, clock.backward, end - before_optimizer, clock.load())

    @torch.no_grad()
    def finish_training(self) -> dict[str, Any]:
        """Loss on held-out text, and the peak memory so far."""
        peak = machine.peak_memory_bytes()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        self.model.eval()
        losses = [self._loss(batch)[1] for batch in self.held_out_batches]
        return {"held_out_loss": sum(losses) / len(losses), "peak_memory": peak}

    def save(self, path: str) -> None:
        torch.save(self.model.state_dict(), path)

    def load(self, path: str) -> None:
        self.model.load_state_dict(torch.load(path, weights_only=True))
        if self.settings.twin:
            nudge(self.model, self.settings.seed)

    @torch.no_grad()
    def generate(self, prompt_length: int, new_tokens: int, temperature: float) -> dict[str, Any]:
        """Prefills a held-out prompt, then samples bytes. Returns the times, the bytes and the prompt's logits."""
        transformers = require("transformers")
        generator = torch.Generator().manual_seed(self.settings.seed)
        prompt = self.prompt[:prompt_length].long()[None]
        # `cache` is the newer name of `past_key_values`; the cache itself is filled in place either way.
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        arguments = {name: transformers.DynamicCache(config=self.model.config), "use_cache": True}
        self.clock.reset()
        start = perf_counter()
        output = self.model(input_ids=prompt, **arguments)
        prefill, prefill_experts = perf_counter() - start, self.clock.forward
        logits = output.logits[0].float()
        self.clock.reset()
        sampled: list[int] = []
        start = perf_counter()
        for _ in range(new_tokens):
            probabilities = (output.logits[0, -1].float() / temperature).softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)
            sampled.append(int(token))
            output = self.model(input_ids=token[None], **arguments)
        decode = perf_counter() - start
        return {
            "prefill": prefill,
            "prefill_experts": prefill_experts,
            "decode": decode / new_tokens,
            "decode_experts": self.clock.forward / new_tokens,
            "prompt": bytes(prompt[0].tolist()),
            "sampled": bytes(sampled),
            "logits": logits.numpy(),
        }


def serve(connection: Connection, settings: Settings) -> None:
    """The worker process: builds, then answers commands until the parent closes the pipe (processes.py)."""
    worker = Worker(settings)
    connection.send(("ok", worker.describe()))
    while True:
        command, arguments = connection.recv()
        value = getattr(worker, command)(**arguments)
        for item in value if command == "train" else (value,):
            connection.send(("ok", item))
