# SPDX-License-Identifier: BSD-3-Clause
"""calibrate: one pass over batches, from which all compression of a model is computed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from switchgear.checks import Count, Seed, checked, list_of_names
from switchgear.compress.sums import (
    Domains,
    ExpertSums,
    Hessians,
    LayerCalibration,
    Samples,
    compute_hessians,
    sum_rows,
)
from switchgear.files import AnyPath, bytes_of, replacing, require_regular
from switchgear.integrations.blocks import ExpertLayer, expert_layers
from switchgear.integrations.moe_blocks import MoeBlock
from switchgear.trace import Observation, observe
from switchgear.utils.modules import set_eval

_FORMAT = "switchgear calibration 1"
_NO_TENSORS = (int, float, str, type(None))


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Statistics of a model's MoE layers on some data. `+` joins parts of the data, such as several processes'.

    Attributes: layers, by name of the block (moe_blocks). Each has `domains`, `sums(domain)`, `sample(domain)`,
    `hessians` and `ratio_median(domain)`.
    """

    layers: dict[str, LayerCalibration] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        """The labels of all batches, sorted."""
        return sorted({name for layer in self.layers.values() for name in layer.domains})

    def __repr__(self) -> str:
        return f"Calibration({len(self.layers)} layers, domains {self.domains})"

    def __add__(self, other: Calibration) -> Calibration:
        """Raises ValueError for a calibration of another model, or if one alone has Hessians."""
        if not isinstance(other, Calibration):
            return NotImplemented
        self._check(other.layers)
        return Calibration({name: layer + other.layers[name] for name, layer in self.layers.items()})

    def check(self, model: nn.Module, names: Collection[str] | None = None, domains: Domains = None) -> None:
        """Raises ValueError unless the model has the layers (of these names), and the domains are known."""
        self._check({name: _describe_layer(layer) for name, layer in expert_layers(model, names).items()})
        if domains is None:
            return
        wanted = list_of_names("domains", domains)
        unknown = [name for name in wanted if name not in self.domains]
        if unknown or not wanted:
            known = ", ".join(map(repr, self.domains))
            raise ValueError(f"domains: expected some of {known}, got {unknown[0] if wanted else wanted!r}")

    def _check(self, layers: Mapping[str, LayerCalibration]) -> None:
        if missing := sorted(set(layers) - set(self.layers)):
            raise ValueError(f"calibration: expected one of this model, got none of its layer {missing[0]!r}")
        for name, layer in layers.items():
            mine = self.layers[name]
            if mine.shape != layer.shape:
                of = ("num_experts", "top_k", "hidden_size", "intermediate_size", "the router's weight")
                what, old, new = next(d for d in zip(of, mine.shape, layer.shape, strict=True) if d[1] != d[2])
                raise ValueError(f"calibration: expected one of this model, got another {what} in {name}: {old}, {new}")

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path: AnyPath) -> None:
        """Writes a safetensors file; its metadata is JSON. Needs the package safetensors."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        layers = []
        for index, (name, layer) in enumerate(self.layers.items()):
            for part, values in (("sums", layer.domains), ("samples", layer.samples)):
                for number, domain in enumerate(values):
                    for key, tensor in values[domain].tensors().items():
                        tensors[f"{index}.{part}.{number}.{key}"] = tensor.contiguous()
            if layer.hessians is not None:
                tensors |= {f"{index}.hessians.{key}": tensor for key, tensor in vars(layer.hessians).items()}
            layers.append({
                "name": name, "shape": layer.shape, "domains": list(layer.domains),
                "samples": {domain: sample.limit for domain, sample in layer.samples.items()},
                "hessians": layer.hessians is not None,
            })  # fmt: skip
        with replacing(path) as unfinished:
            save_file(tensors, unfinished, {"format": _FORMAT, "layers": json.dumps(layers)})

    @classmethod
    def load(cls, path: AnyPath) -> Calibration:
        """Reads a file of `save`. Raises ValueError for any other file."""
        from safetensors import SafetensorError, safe_open

        try:
            require_regular(path, os.stat(path))
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError("another format")
                layers = json.loads(metadata["layers"])
                return cls({layer["name"]: _load_layer(file, index, layer) for index, layer in enumerate(layers)})
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"path: expected a file of Calibration.save, got {path} ({error})") from error


def check_finite(name: str, *statistics: Tensor) -> None:
    """Raises ValueError, which names the layer, for statistics with NaN or infinities."""
    if not all(bool(tensor.isfinite().all()) for tensor in statistics):
        raise ValueError(f"calibration: expected finite statistics of the experts of {name}, got NaN or infinities")


def _load_layer(file: Any, index: int, layer: Mapping[str, Any]) -> LayerCalibration:
    def read(part: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        found = {name: file.get_tensor(f"{index}.{part}.{name}") for name in shapes}
        for name, shape in shapes.items():
            if list(found[name].shape) != list(shape):
                raise ValueError(f"{part}.{name} has shape {list(found[name].shape)}, not {list(shape)}")
        return found

    num_experts, top_k, hidden_size, intermediate_size, gate = layer["shape"]
    zeros = ExpertSums.zeros(num_experts, hidden_size, intermediate_size)
    of_sums = {name: tensor.shape for name, tensor in zeros.tensors().items()}
    domains = {domain: ExpertSums(**read(f"sums.{i}", of_sums)) for i, domain in enumerate(layer["domains"])}
    samples = {}
    for number, (domain, limit) in enumerate(layer["samples"].items()):
        rows, choices = file.get_tensor(f"{index}.samples.{number}.topk_ids").shape
        shapes = {
            "keys": (rows,),
            "x": (rows, hidden_size),
            "topk_ids": (rows, choices),
            "topk_weights": (rows, choices),
        }
        samples[domain] = Samples(int(limit), **read(f"samples.{number}", shapes))
    hessians = None
    if layer["hessians"]:
        sides = {"inputs": hidden_size, "hidden": intermediate_size}
        hessians = Hessians(**read("hessians", {name: (num_experts, size, size) for name, size in sides.items()}))
    return LayerCalibration(num_experts, top_k, hidden_size, intermediate_size, gate, domains, samples, hessians)


# ---- the pass --------------------------------------------------------------------------------------------------------


@checked
@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    hessians: bool = False,
    samples: Count = 512,
    layers: Collection[str] | None = None,
    seed: Seed = 0,
) -> Calibration:
    """Runs the model on batches and keeps statistics of each MoE layer and domain.

        batches = ({**tokenizer(text, return_tensors="pt"), "domain": "code"} for text in texts)
        calibration = calibrate(model, batches, hessians=True)
        calibration.save("calibration.safetensors")

    Batches stream: memory does not grow with their number. Padding is left out, of which the model's attention_mask
    [B,S] or [B,1,1,S] tells. Statistics are computed from what the experts get, so the weights are renormalised if the
    model does that.

    Args:
        model: has MoE layers of switchgear or Hugging Face; see moe_blocks.
        batches: dicts of the forward's arguments, tuples of them, or single tensors. A dict may have the key "domain",
            a name. The model runs in eval mode.
        hessians: also keep Xᵀ X of both projections of each expert, which GPTQ needs: E · (H² + I²) · 4 bytes a layer.
        samples: tokens to keep of each layer and domain: for criterion="reconstruction", merging by outputs and
            `expert_errors`. They are a uniform sample.
        layers: names of blocks; all by default.
        seed: of the sample. Give processes that calibrate on parts of the data different seeds.

    Raises:
        TypeError: batches that are none, such as one tensor or lists of numbers.
        ValueError: no MoE layers, experts that are stored in another form or distributed over processes, no batches, or
            only padding.
    """
    each, parts = _iterate(batches), expert_layers(model, layers)
    collector = _Collector(parts, hessians, samples, seed)
    with set_eval(model), observe(model, collector.see, layers=list(parts)):
        for batch in each:
            collector.domain, arguments, named = _split_batch(batch)
            model(*arguments, **named)
    if not any(layer.domains for layer in collector.layers.values()):
        raise ValueError("batches: expected tokens that are not padding, got none")
    return Calibration(collector.layers)


def _iterate(batches: Any) -> Iterator[Any]:
    """TypeError for what has no batches, and for a tensor or a dict, which is one."""
    if not isinstance(batches, (Tensor, Mapping)):
        with suppress(TypeError):
            return iter(batches)
    got = type(batches).__name__
    raise TypeError(f"batches: expected a list of batches, got {got} (pass [batch] for one)")


def _split_batch(batch: Any) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        named = dict(batch)
    elif isinstance(batch, (tuple, list)):
        arguments = tuple(batch)
    elif isinstance(batch, Tensor):
        arguments = (batch,)
    else:
        raise TypeError(f"batches: expected dicts, tuples or tensors, got {type(batch).__name__}")
    domain = named.pop("domain", "")
    if not isinstance(domain, str):
        raise TypeError(f"domain: expected a name, got {type(domain).__name__}")
    if all(isinstance(leaf, _NO_TENSORS) for leaf in tree_leaves((arguments, named))):
        raise TypeError(f"batches: expected tensors in each batch, got a {type(batch).__name__} without any")
    return domain, arguments, named


class _Collector:
    def __init__(self, parts: Mapping[str, ExpertLayer], hessians: bool, samples: int, seed: int) -> None:
        self.parts, self.hessians, self.samples = parts, hessians, samples
        self.domain = ""
        self.layers = {name: _describe_layer(part) for name, part in parts.items()}
        # One generator per layer: all layers keep the same tokens.
        self.keys = {name: torch.Generator().manual_seed(seed) for name in parts}

    def see(self, name: str, seen: Observation) -> None:
        part = self.parts[name]
        x, ids, weights, logits = seen.x, seen.topk_ids, seen.topk_weights, seen.router_logits
        if seen.token_mask is not None:
            kept = seen.token_mask.to(x.device)
            x, ids, weights = x[kept], ids[kept], weights[kept]
            logits = logits[kept] if logits is not None else None
        if not len(x):
            return
        ids = torch.where((ids < 0) | (ids >= part.num_experts), -1, ids)
        weights = weights.masked_fill(ids < 0, 0)
        rows = part.rows(x, ids, weights)
        sums = sum_rows(rows, weights, logits, part.intermediate_size)
        keys = torch.randint(2**62, (len(x),), generator=self.keys[name])
        sample = Samples.of(self.samples, keys, x, ids, weights)
        layer = self.layers[name]
        self.layers[name] = layer + replace(
            layer, domains={self.domain: sums}, samples={self.domain: sample} if self.samples else {},
            hessians=compute_hessians(rows) if self.hessians else None,
        )  # fmt: skip


def _describe_layer(part: ExpertLayer) -> LayerCalibration:
    return LayerCalibration(
        part.num_experts, part.block.top_k, part.hidden_size, part.intermediate_size, hash_gate(part.block)
    )


def hash_gate(block: MoeBlock) -> str:
    """Identifies the weight of a router."""
    weight = block.gate_weight()
    if weight is None or weight.is_meta:
        return ""
    return hashlib.sha256(bytes_of(weight.detach().cpu().contiguous())).hexdigest()[:16]
