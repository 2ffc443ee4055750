# SPDX-License-Identifier: BSD-3-Clause
"""train_gate: the gate of a trained adapter, by which mixtures find the tokens that it is for (PHATGOOSE)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from switchgear.adapters.linear_adapters import Adapter, Source, read_lora
from switchgear.adapters.mixture import mixture
from switchgear.complaints import check_module
from switchgear.functional import as_number
from switchgear.reference import check_size
from switchgear.routing.router import Router


def train_gate(
    model: nn.Module,
    adapter: Source,
    loss: Callable[[nn.Module], Tensor],
    *,
    steps: int = 100,
    lr: float = 5e-3,
) -> Adapter:
    """Trains a vector v for each layer of an adapter, y = base(x) + sigmoid(v · x) · adapter(x), everything else frozen
    (PHATGOOSE, arXiv:2402.05859). Returns the adapter with these gates; the model is as before.

        adapters = [train_gate(model, folder, loss_on_its_task) for folder, loss_on_its_task in …]
        mix = mixture(model, adapters)                            # no joint training

    Args:
        adapter: see read_lora.
        loss: a function of the model that returns a scalar. It is called once per step, for the next batch of the
            adapter's task.
        steps, lr: of Adam from v = 0. The authors' code has the same, after a warm-up of 6 % of the steps.

    Raises:
        TypeError: a loss that is no function, or does not return a tensor.
        ValueError: an adapter that does not fit the model, or a loss that is no scalar or makes the gates NaN or
            infinite.
    """
    check_module("model", model)
    check_size("steps", steps, 0)
    as_number("lr", lr)
    if not callable(loss):
        raise TypeError(f"loss: expected a function of the model, got {type(loss).__name__}")
    adapter = read_lora(adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    mix = mixture(model, [replace(adapter, gates=None)], top_k=1, score_function="sigmoid")
    try:
        model.requires_grad_(False)
        vectors: dict[str, Tensor] = {}
        for name, layer in mix.layers.items():
            assert isinstance(layer.gate, Router)
            assert layer.gate.weight is not None
            wide = torch.promote_types(layer.gate.weight.dtype, torch.float32)  # bfloat16 would lose Adam's steps
            layer.gate.to(wide)
            vectors[name] = layer.gate.weight.requires_grad_(True)
            nn.init.zeros_(vectors[name])
        optimizer = torch.optim.Adam(vectors.values(), lr)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                value = loss(model)
                if not isinstance(value, Tensor):
                    raise TypeError(f"loss: expected it to return a tensor, got {value!r}")
                if value.numel() != 1:
                    raise ValueError(f"loss: expected it to return a scalar, got shape {list(value.shape)}")
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        gates = {name: vector.detach()[0].clone() for name, vector in vectors.items()}
    finally:
        mix.undo()
        for parameter in trained:
            parameter.requires_grad_(True)
    if wrong := [name for name, gate in gates.items() if not bool(gate.isfinite().all())]:
        raise ValueError(f"loss: expected finite gradients, got a gate of {wrong[0]} with NaN or infinity")
    return replace(adapter, gates=gates)
