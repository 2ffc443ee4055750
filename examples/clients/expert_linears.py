# SPDX-License-Identifier: BSD-3-Clause
"""Tools for linear layers, on experts that `switchgear.as_linears` shows as such: each gives what it gives on a model
whose experts are nn.Linear modules of their own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import small
import torch
from torch import Tensor, nn

import switchgear.integrations.transformers

# Groups of 128 weights, which are those of the schemes named W4A16.
SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
PLAIN = ["lm_head", "re:.*mlp.gate$"]


class ExpertModules(nn.ModuleList):
    """An expert after the other, as before transformers stacked them."""

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        for gate_up, down in zip(stacked.gate_up_proj.detach(), stacked.down_proj.detach(), strict=True):
            expert = nn.ModuleDict()
            for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
                expert[name] = nn.Linear(*reversed(weight.shape), bias=False)
                expert[name].weight = nn.Parameter(weight.clone())
            self.append(expert)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = x.new_empty(*ids.shape, x.shape[1])
        for e, expert in enumerate(self):
            tokens, choices = torch.where(ids == e)
            if len(tokens):
                a = nn.functional.silu(expert["gate_proj"](x[tokens])) * expert["up_proj"](x[tokens])
                rows = rows.index_put((tokens, choices), expert["down_proj"](a))
        y = torch.zeros_like(x)
        for row, weight in zip(rows.unbind(1), weights.unbind(1), strict=True):  # with one rounding, as our kernel does
            y = torch.addcmul(y.double(), row.double(), weight[:, None].double()).to(x.dtype)
        return y


@contextmanager
def unchanged(_: nn.Module) -> Iterator[None]:
    yield


def quantize(model: Any, inputs: Tensor) -> Tensor:
    """torchao: int8 weights, by output channel."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and ".experts." in name)
    with torch.no_grad():
        return model(inputs).logits


def adapt(model: Any, inputs: Tensor) -> Tensor:
    """PEFT: two steps of LoRA on all linears."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(inputs, labels=inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return adapted(inputs).logits


def compress(model: Any, inputs: Tensor, modifiers: list[Any]) -> Tensor:
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(IntermediatesCache, "pin_memory"):  # needs a GPU
        model.config.save_pretrained(folder)
        model.config.name_or_path = folder
        batches = torch.utils.data.DataLoader([{"input_ids": row} for row in inputs], batch_size=2)
        oneshot(
            model=model, dataset=batches, processor=small.tokenizer(), recipe=modifiers, moe_calibrate_all_experts=False
        )
    with torch.no_grad():
        return model(inputs).logits


def compress_gptq(model: Any, inputs: Tensor) -> Tensor:
    """llm-compressor: GPTQ."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return compress(model, inputs, [GPTQModifier(targets="Linear", scheme="W4A16_ASYM", ignore=PLAIN)])


def compress_awq(model: Any, inputs: Tensor) -> Tensor:
    """llm-compressor: AWQ."""
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    quantizer = QuantizationModifier(targets="Linear", scheme="W4A16_ASYM", ignore=PLAIN)
    return compress(model, inputs, [AWQModifier(n_grid=5, offload_device=None), quantizer])


def round_weights(model: Any, inputs: Tensor) -> Tensor:
    """auto-round: four steps of learning how to round."""
    from auto_round import AutoRound

    rows: Any = [{"input_ids": row[None]} for row in inputs]
    sizes = {"nsamples": len(inputs), "seqlen": inputs.shape[1], "batch_size": 2, "iters": 4}
    rounded, _ = AutoRound(model, small.tokenizer(), "W4A16", sym=False, dataset=rows, **sizes, amp=False).quantize()
    with torch.no_grad():
        return rounded(inputs).logits


def attribute(model: Any, inputs: Tensor) -> Tensor:
    """Captum: gradient times activation of each expert's projections, for the likeliest next byte."""
    from captum.attr import LayerGradientXActivation

    layers = [m for name, m in model.named_modules() if ".experts." in name and isinstance(m, nn.Linear)]
    method = LayerGradientXActivation(lambda x: model(inputs_embeds=x).logits[:, -1].amax(-1), layers)
    return torch.cat([scores.flatten() for scores in method.attribute(model.get_input_embeddings()(inputs))])


TOOLS = {
    "torchao, int8": quantize, "PEFT, all-linear": adapt, "llm-compressor, GPTQ": compress_gptq,
    "llm-compressor, AWQ": compress_awq, "auto-round": round_weights, "Captum": attribute,
}  # fmt: skip


def compare(name: str) -> None:
    inputs = torch.stack([piece["input_ids"] for piece in small.pieces()[:4]])[:, :64]
    results: list[Tensor] = []
    plain = small.model("switchgear", changes=SIZES).eval()
    with torch.no_grad():
        logits = plain(inputs).logits
    for show in (unchanged, switchgear.as_linears):
        model: Any = small.model("switchgear", changes=SIZES).eval()
        if show is unchanged:
            for layer in model.model.layers:
                layer.mlp.experts = ExpertModules(layer.mlp.experts)
        with show(model):
            results.append(TOOLS[name](model, inputs).detach())
        with torch.no_grad():
            results.append(model(inputs).logits)
    wanted, _, inside, outside = results
    difference = float((inside - wanted).abs().max() / wanted.abs().max())
    changed, left = float((results[1] - logits).abs().max()), float((outside - results[1]).abs().max())
    if not max(difference, left) <= 1e-4:
        raise AssertionError(f"{name}: differs by {difference} inside, {left} outside")
    print(f"| {name} | {difference:.1e} | {changed:.1e} | {left:.1e} |", flush=True)


if __name__ == "__main__":
    print("| tool | inside: difference of its result, relative | change of logits by it | difference of it outside |")
    for tool in sys.argv[1:] or TOOLS:
        compare(tool)
