# SPDX-License-Identifier: BSD-3-Clause
"""The file formats that are read: how a clean file is made, its reader, a plain reader of the same bytes, and changes
of what is in it.

Both readers give tensors by name, which must have the same bits. Plain readers are short, trust the file and share no
code with the readers.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import math
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import switchgear
from switchgear import adapters, finetune, offload
from switchgear.cli import plan_parallel
from switchgear.cli.common import CommandError
from switchgear.integrations import gguf_file
from switchgear.parallel import checkpoint

Tensors = dict[str, Tensor]
NUMBERS = (-1, 0, 1, 3, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**40)
DTYPES = (torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2, torch.complex64)


class Format(NamedTuple):
    write: Callable[[Path], None]  # clean files, into an empty folder
    read: Callable[[Path], Tensors]
    plain: Callable[[Path], Tensors]
    change: Callable[[Path, random.Random], str]  # of what is in the files; returns its name
    is_documented: Callable[[BaseException], bool]  # whether the reader may raise this


def is_named(error: BaseException) -> bool:
    """A ValueError itself, which says what was expected."""
    return type(error) is ValueError and ("expected" in str(error) or "does not fit the model: " in str(error))


# ---- safetensors -----------------------------------------------------------------------------------------------------

SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip


def plain_safetensors(file: Path) -> Tensors:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for key, entry in json.loads(data[8 : 8 + length]).items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            numbers = bytearray(data[8 + length + begin : 8 + length + end])
            dtype = SAFETENSORS[entry["dtype"]]
            tensors[key] = torch.empty(entry["shape"], dtype=dtype)
            if numbers:
                tensors[key].view(-1).view(torch.uint8).copy_(torch.frombuffer(numbers, dtype=torch.uint8))
    return tensors


def change_tensors(tensors: Tensors, rng: random.Random) -> str:
    """Replaces a tensor by a hostile one; returns what was done."""
    key = rng.choice(sorted(tensors))
    tensor = tensors[key]
    kind = rng.choice(
        ["missing", "extra", "renamed", "dtype", "shape", "flat", "scalar", "empty", "NaN", "Inf", "bits"]
    )
    if kind in ("missing", "renamed"):
        del tensors[key]
    if kind in ("extra", "renamed"):
        tensors[rng.choice([f"{key}_scales", f"{key}.weight", key[1:], "", "é" * 100])] = tensor.clone()
    elif kind == "dtype":
        tensors[key] = tensor.float().to(rng.choice(DTYPES))
    elif kind == "shape":
        shape = rng.choice([(1, *tensor.shape), tensor.shape[::-1], (*tensor.shape, 2)])
        tensors[key] = torch.zeros(shape, dtype=tensor.dtype)
    elif kind == "flat":
        tensors[key] = tensor.flatten().clone()
    elif kind in ("scalar", "empty"):
        tensors[key] = torch.zeros(() if kind == "scalar" else (0, *tensor.shape[1:]), dtype=tensor.dtype)
    elif kind in ("NaN", "Inf") and tensor.is_floating_point() and tensor.itemsize > 1:
        tensors[key] = tensor.clone()
        tensors[key].view(-1)[rng.randrange(tensor.numel())] = math.nan if kind == "NaN" else -math.inf
    elif kind != "missing":
        tensors[key] = torch.randint(0, 256, (tensor.nbytes,)).byte().view(tensor.dtype).view(tensor.shape)
    return f"{kind} tensor"


def change_safetensors(folder: Path, rng: random.Random) -> str:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    kind = change_tensors(tensors, rng)
    save_file(tensors, file)
    return kind


# ---- stored experts --------------------------------------------------------------------------------------------------

FORMS = ("plain", "panels", "compact", "int8", "int4", "fp8", "mxfp4", "nf4", "groups")
HIDDEN, INTERMEDIATE, EXPERTS = 256, 256, 2  # compact does not store narrower ones


@functools.cache
def stored_experts(form: str) -> switchgear.Experts:
    torch.manual_seed(0)
    experts = switchgear.Experts(HIDDEN, INTERMEDIATE, EXPERTS, bias=True, dtype=torch.bfloat16)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    switchgear.store(experts, form)
    return experts


def write_stored(form: str, folder: Path) -> None:
    save_file(stored_experts(form).state_dict(), folder / "model.safetensors")


def read_stored(form: str, folder: Path) -> Tensors:
    """Loads the file, and runs the kernels on the numbers in it."""
    experts = stored_experts(form)
    experts.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        ids = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)
        experts(torch.ones(2, HIDDEN, dtype=torch.bfloat16), ids, torch.ones(2, 2))
    return experts.state_dict()


def plain_stored(form: str, folder: Path) -> Tensors:
    """state_dict() has the file's tensors; plain ones are cast to the parameter's dtype."""
    tensors = plain_safetensors(folder / "model.safetensors")
    dtypes = {key: tensor.dtype for key, tensor in stored_experts(form).state_dict().items()}
    return {key: tensor.to(dtypes.get(key, tensor.dtype)) for key, tensor in tensors.items()}


def is_of_loading(error: BaseException) -> bool:
    """Also safetensors' own, and torch's for missing and unexpected keys and shapes of parameters."""
    is_torchs = type(error) is RuntimeError and str(error).startswith("Error(s) in loading state_dict")
    return is_named(error) or isinstance(error, SafetensorError) or is_torchs


# ---- published checkpoints -------------------------------------------------------------------------------------------

PUBLISHED = {"mxfp4": "gpt_oss", "fp8": "qwen3_moe"}
SIZES = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
QUANTIZATION = {"mxfp4": {"quant_method": "mxfp4"}, "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
SHARD = "model-00001-of-00001.safetensors"


def write_published(method: str, folder: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from tiny_configs import tiny_config

    kind = CONFIG_MAPPING[PUBLISHED[method]]
    tiny = tiny_config(kind).to_dict()
    config = kind(**{**tiny, **{name: size for name, size in SIZES.items() if name in tiny}, "layer_types": None})
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    file = (folder / "model.safetensors").rename(folder / SHARD)  # so that the index is read
    tensors: Tensors = {}
    for key, weight in load_file(file).items():
        if method == "mxfp4" and key.endswith(("gate_up_proj", "down_proj")):
            blocks = *weight.mT.shape[:2], weight.shape[1] // 32
            tensors[f"{key}_blocks"] = torch.randint(0, 256, (*blocks, 16)).byte()
            tensors[f"{key}_scales"] = torch.randint(115, 125, blocks).byte()
        elif method == "fp8" and weight.dim() == 2 and "_proj" in key:
            tensors[key] = weight.to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = torch.rand([-(-size // 128) for size in weight.shape])
        else:
            tensors[key] = weight
    save_file(tensors, file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": QUANTIZATION[method]}))


def read_published(folder: Path) -> Tensors:
    from switchgear.integrations.published import load_published

    return load_published(folder, linears=False).state_dict()


def plain_published(folder: Path) -> Tensors:
    """mxfp4 as in the file; fp8 of experts stacked, of other matrices decoded; all else in bfloat16."""
    found = plain_safetensors(folder / SHARD)
    plain: Tensors = {}
    for key, tensor in found.items():
        layer, _, name = key.partition(".experts.0.")
        if key.endswith(("_blocks", "_scales")):
            plain[key] = tensor
        elif name.startswith(("gate_proj", "down_proj")):
            name, _, suffix = name.partition(".weight")
            experts = [f"{layer}.experts.{expert}." for expert in range(8)]
            if name == "gate_proj":
                parts = [[found[f"{e}{part}_proj.weight{suffix}"] for part in ("gate", "up")] for e in experts]
                plain[f"{layer}.experts.gate_up_proj{suffix}"] = torch.stack([torch.cat(part) for part in parts])
            else:
                downs = [found[f"{e}down_proj.weight{suffix}"] for e in experts]
                plain[f"{layer}.experts.down_proj{suffix}"] = torch.stack(downs)
        elif (".experts." not in key or key.endswith("_bias")) and not key.endswith("_scale_inv"):
            plain[key] = _decoded(tensor, found.get(f"{key}_scale_inv")).to(torch.bfloat16)
    return {key: tensor.float() if key.endswith("_scale_inv") else tensor for key, tensor in plain.items()}


def _decoded(values: Tensor, scales: Tensor | None) -> Tensor:
    if scales is None:
        return values
    spread = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return values.float() * spread[: values.shape[0], : values.shape[1]]


def change_published(folder: Path, rng: random.Random) -> str:
    """Of a tensor, or of an entry of config.json or the index."""
    if rng.random() < 0.4:
        return change_safetensors(folder, rng)
    file = folder / rng.choice(["config.json", "model.safetensors.index.json"])
    entries = json.loads(file.read_text())
    inner = entries if file.name == "config.json" else entries["weight_map"]
    inner = inner["quantization_config"] if file.name == "config.json" and rng.random() < 0.2 else inner
    key = rng.choice(sorted(inner))
    values: list[Any] = [None, [], {}, "", "x", "../x", "/dev/zero", True, 1.5, 1e300, [[1]], *NUMBERS]
    inner[key] = rng.choice(values)
    if rng.random() < 0.2:
        del inner[key]
    file.write_text(json.dumps(entries))
    return f"{key} in {file.name}"


# ---- checkpoints of parallel experts ---------------------------------------------------------------------------------


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), switchgear.MoE(8, 4, 3, 2, bias=True))


def write_parallel(folder: Path) -> None:
    checkpoint.save(make_model(), folder)


def read_parallel(folder: Path) -> Tensors:
    model = make_model()
    checkpoint.load(model, folder)
    return checkpoint.state_dict(model)


def read_whole(folder: Path) -> Tensors:
    return checkpoint.load_whole(folder)


class Fields:
    """Any object of the metadata. What is not needed may be wrong."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["state"][name]


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if module == "torch" else Fields


def plain_parallel(folder: Path) -> Tensors:
    """As torch.distributed.checkpoint does, it takes the corner of a chunk that is larger than the metadata says."""
    metadata = PlainUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    places = {(index.fqn, tuple(index.offset)): info for index, info in metadata.storage_data.items()}
    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        tensors[name] = torch.zeros(entry.size, dtype=entry.properties.state[0])
        for chunk in entry.chunks:
            info = places[name, tuple(chunk.offsets)]
            data = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
            part = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
            place = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))
            tensors[name][place] = part[tuple(slice(size) for size in chunk.sizes)]
    return tensors


def plain_whole(folder: Path) -> Tensors:
    tensors = plain_parallel(folder)
    names = dict.fromkeys(name.partition("[")[0] for name in tensors)
    experts = {name: [t for key, t in sorted(tensors.items()) if key.startswith(f"{name}[")] for name in names}
    return {name: torch.stack(found) if found else tensors[name] for name, found in experts.items()}


def change_parallel(folder: Path, rng: random.Random) -> str:
    """Of a number, a name or a dtype in the metadata."""
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    name = rng.choice(sorted(metadata.state_dict_metadata))
    entry = metadata.state_dict_metadata[name]
    index = next(index for index in metadata.storage_data if index.fqn == name)
    info, value = metadata.storage_data[index], rng.choice(NUMBERS)
    kind = rng.choice(
        ["offset", "length", "path", "size", "chunk", "all sizes", "dtype", "missing", "renamed", "no chunk"]
    )
    if kind in ("offset", "length"):
        object.__setattr__(info, kind, value)
    elif kind == "path":
        info.relative_path = rng.choice(["", "..", ".metadata", "/dev/zero", "../x", "é", "a\0b", "x" * 5000])
    elif kind == "dtype":
        entry.properties.dtype = rng.choice(DTYPES)
    elif kind == "no chunk":
        entry.chunks = []
    elif kind in ("missing", "renamed"):
        del metadata.state_dict_metadata[name]
        if kind == "renamed":
            metadata.state_dict_metadata[rng.choice(["", f"{name}[0]", name[1:], "optimizer/x"])] = entry
    else:
        sizes = list(entry.size)
        sizes[rng.randrange(len(sizes))] = value
        chunk = entry.chunks[0]
        if kind != "chunk":
            entry.size = tuple(sizes)
        if kind != "size":
            entry.chunks = [type(chunk)(offsets=chunk.offsets, sizes=tuple(sizes))]
    file.write_bytes(pickle.dumps(metadata))
    return kind


# ---- routing traces --------------------------------------------------------------------------------------------------


def write_trace(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), switchgear.MoE(16, 8, 4, 2))
    with torch.no_grad(), switchgear.RoutingTrace(model, by_token_id=True) as trace:
        model(torch.randint(0, 20, (2, 8)))
    trace.save(folder / "trace")


def read_trace(folder: Path) -> Tensors:
    """Loads it and inspects it."""
    trace = switchgear.RoutingTrace.load(folder / "trace")
    str(trace)
    result: Tensors = {}
    for name, layer in trace.layers.items():
        layer.tokens_by_id()
        result |= {f"{name}.{key}": value for key, value in layer.state().items() if isinstance(value, Tensor)}
    return result


def plain_trace(folder: Path) -> Tensors:
    """Keys of pairs that occur twice are added up."""
    layers = torch.load(folder / "trace", weights_only=True)["layers"]
    known = ["tokens_per_expert", "weight_per_expert", "entropy", "max_violation", "num_dropped", "pairs", "counts"]
    for layer in layers.values():
        counts: dict[int, int] = {}
        for pair, count in zip(layer["pairs"].tolist(), layer["counts"].tolist(), strict=True):
            counts[pair] = counts.get(pair, 0) + count
        layer["pairs"] = torch.tensor(sorted(counts), dtype=torch.int64)
        layer["counts"] = torch.tensor([counts[pair] for pair in sorted(counts)], dtype=torch.int64)
    return {f"{name}.{key}": layer[key] for name, layer in layers.items() for key in known}


def change_trace(folder: Path, rng: random.Random) -> str:
    """Of an entry of a layer."""
    data = torch.load(folder / "trace", weights_only=True)
    (layer,) = data["layers"].values()
    key = rng.choice(sorted(layer))
    others: list[Any] = [
        None,
        [],
        {},
        "x",
        [math.inf, 1],
        [math.nan, 1],
        list(NUMBERS[:2]),
        [2**63, 10**40],
        torch.ones(()),
    ]
    if isinstance(layer[key], Tensor) and rng.random() < 0.7:
        tensors = {key: layer[key]}
        kind = change_tensors(tensors, rng)
        layer.pop(key)
        layer |= tensors
    elif isinstance(layer[key], Tensor) and rng.random() < 0.5:
        number = rng.choice(NUMBERS)
        layer[key] = torch.full_like(layer[key], max(min(number, 2**62), -(2**62)))
        kind = "number"
    else:
        layer[key], kind = rng.choice(others), "value"
    torch.save(data, folder / "trace")
    return f"{kind} {key}"


# ---- a routing of plan-parallel --------------------------------------------------------------------------------------

PLAN_TOKENS = 16


def write_routing(folder: Path) -> None:
    torch.manual_seed(0)
    torch.save(torch.rand(PLAN_TOKENS, 8).argsort(-1)[:, :2], folder / "routing")


def read_routing(folder: Path) -> Tensors:
    """The routing, after the program predicted its cost."""
    parser = argparse.ArgumentParser()
    plan_parallel.add_arguments(parser)
    trace = str(folder / "routing")
    args = parser.parse_args(["--model=mixtral", "--ep=8", "--nodes=2", f"--tokens={PLAN_TOKENS}", f"--trace={trace}"])
    layer = plan_parallel.MODELS["mixtral"].layer
    routing = plan_parallel._routing(args, layer)
    plan_parallel._placement(args, layer, routing)
    return {"": routing[:PLAN_TOKENS]}


def plain_routing(folder: Path) -> Tensors:
    ids = torch.load(folder / "routing", weights_only=True)
    return {"": ids.repeat(PLAN_TOKENS, 1)[:PLAN_TOKENS].int()}


def change_routing(folder: Path, rng: random.Random) -> str:
    ids = torch.load(folder / "routing", weights_only=True)
    if rng.random() < 0.5:
        tensors = {"ids": ids}
        kind = change_tensors(tensors, rng)
        data: Any = tensors.get("ids", rng.choice([tensors, None, 3, []]))
    else:
        data, kind = ids, "number"
        ids[rng.randrange(PLAN_TOKENS), 0] = rng.choice([n for n in NUMBERS if n < 2**63] + [-(2**63), -(2**32) + 500])
    torch.save(data, folder / "routing")
    return kind


def is_of_the_program(error: BaseException) -> bool:
    return type(error) is CommandError and "--trace" in str(error)


# ---- adapters --------------------------------------------------------------------------------------------------------

LAYERS = {"up": (16, 4), "down": (4, 16)}  # of read_lora: in, out
PROJECTIONS = {"base_layer.": ("gate_up_proj", 8, 16), "": ("down_proj", 16, 4)}  # of load_peft: out, in


def adapted_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(switchgear.MoE(16, 4, 3, 2))


def write_peft(folder: Path) -> None:
    model = adapted_model()
    for parameter in adapters.add_lora(model, 2, alpha=3):
        nn.init.normal_(parameter)
    adapters.save_peft(model, folder)


def read_peft(folder: Path) -> Tensors:
    model = adapted_model()
    adapters.load_peft(model, folder)
    found: Tensors = {}
    for name, (a, b, lora) in adapters.lora_of(model).items():
        found |= {f"{name}.A": a, f"{name}.B": b, f"{name}.scale": torch.tensor(lora.scale, dtype=torch.float64)}
    return found


def plain_peft(folder: Path) -> Tensors:
    tensors, found = plain_safetensors(folder / "adapter_model.safetensors"), {}
    for inner, (name, rows, cols) in PROJECTIONS.items():
        a, b = (tensors[f"base_model.model.0.experts.{inner}lora_{letter}.weight"].float() for letter in "AB")
        found[f"0.experts.{name}.A"] = a.view(3, 2, cols)
        found[f"0.experts.{name}.B"] = b.view(rows, 2, 3).permute(2, 0, 1)
        found[f"0.experts.{name}.scale"] = _scale(folder)
    return found


def write_linear_peft(folder: Path) -> None:
    torch.manual_seed(0)
    tensors: Tensors = {}
    for name, (size_in, size_out) in LAYERS.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, size_in)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(size_out, 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": False, "target_parameters": None}))


def read_linear_peft(folder: Path) -> Tensors:
    found: Tensors = {}
    for name, (a, b, alpha) in adapters.read_lora(folder).layers.items():
        found |= {f"{name}.A": a, f"{name}.B": b, f"{name}.scale": torch.tensor(alpha / len(a), dtype=torch.float64)}
    return found


def plain_linear_peft(folder: Path) -> Tensors:
    found: Tensors = {}
    for key, tensor in plain_safetensors(folder / "adapter_model.safetensors").items():
        layer, _, rest = key.removeprefix("base_model.model.").rpartition(".lora_")
        found[f"{layer}.{rest[0]}"] = tensor
        if rest[0] == "A":
            found[f"{layer}.scale"] = _scale(folder, len(tensor))
    return found


def _scale(folder: Path, rank: int = 2) -> Tensor:
    config = json.loads((folder / "adapter_config.json").read_text())
    alpha = float(config["lora_alpha"])
    alpha = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    return torch.tensor(alpha / rank, dtype=torch.float64)


def change_peft(folder: Path, rng: random.Random) -> str:
    """Of a tensor, or of an entry of the config."""
    if rng.random() < 0.4:
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        kind = change_tensors(tensors, rng)
        save_file(tensors, file)
        return kind
    return change_entry(folder / "adapter_config.json", rng)


def change_entry(file: Path, rng: random.Random) -> str:
    entries = json.loads(file.read_text())
    key = rng.choice(sorted(entries))
    entries[key] = rng.choice([None, [], {}, "", "x", ["x"], {"x": 1}, {"(": 2}, True, 1.5, 1e300, [[1]], *NUMBERS])
    if rng.random() < 0.2:
        del entries[key]
    file.write_text(json.dumps(entries))
    return f"{key} in {file.name}"


# ---- selected experts ------------------------------------------------------------------------------------------------


def write_selected(folder: Path) -> None:
    model = adapted_model()
    finetune.freeze_except(model, {"0": [0, 2]}, also=["0.gate"])
    finetune.save_selected(model, folder / "experts")


def read_selected(folder: Path) -> Tensors:
    model = adapted_model()
    nn.init.zeros_(model[0].experts.down_proj)
    finetune.load_selected(model, folder / "experts")
    return model.state_dict()


def plain_selected(folder: Path) -> Tensors:
    data, model = torch.load(folder / "experts", weights_only=True), adapted_model()
    nn.init.zeros_(model[0].experts.down_proj)
    tensors = model.state_dict()
    for module, rows in data["experts"].items():
        ids = rows.pop("experts")
        for name, values in rows.items():
            for expert, value in zip(ids.tolist(), values, strict=True):
                tensors[f"{module}.{name}"][expert] = value
    for name, values in data["others"].items():
        tensors[name].copy_(values)
    return tensors


def change_selected(folder: Path, rng: random.Random) -> str:
    """Of a tensor, a name or a number of an expert."""
    file = folder / "experts"
    data = torch.load(file, weights_only=True)
    (module, rows), kind = next(iter(data["experts"].items())), "number of an expert"
    if rng.random() < 0.5:
        kind = change_tensors(rng.choice([rows, data["others"]]), rng)
    elif rng.random() < 0.5:
        rows["experts"][rng.randrange(2)] = rng.choice([n for n in NUMBERS if n < 2**31])
    else:
        kind = rng.choice(["module", "value", "format", "rows"])
        data["experts"] = {rng.choice(["", "1.experts", "0", "0.gate"]): rows} if kind == "module" else data["experts"]
        value = rng.choice([None, [], {}, "x", 3, [0, 2]])
        if kind == "value":
            data[rng.choice(sorted(data))] = value
        elif kind == "format":
            data["format"] = rng.choice(NUMBERS)
        elif kind == "rows":
            data["experts"][module] = value
    torch.save(data, file)
    return kind


# ---- stores of experts -----------------------------------------------------------------------------------------------

STORES: dict[str, dict[str, Any]] = {
    "plain": {"form": "plain"},
    "int4": {"form": "int4", "group_size": 32},
    "bits": {"form": "groups", "bits": [1, 3, 2], "group_size": 32},
}
INDEX = "index.json"
OTHERS = (None, True, 1.5, "", "data", "int8", "float16", "../x", [], {}, [[]], *NUMBERS)


def write_experts(form: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(switchgear.MoE(64, 32, 3, 2) for _ in range(2))).bfloat16()
    offload.write_store(model, folder / "store", **STORES[form])
    for file in (folder / "store").iterdir():
        file.rename(folder / file.name)
    (folder / "store").rmdir()


def read_experts(folder: Path) -> Tensors:
    """The tensors of all records, of a store whose checksums hold and whose weights can be decoded."""
    store = offload.Store.open(folder)
    store.verify()
    tensors = {}
    for layer, records in store.layers.items():
        data = (folder / records.file).read_bytes()
        memory = torch.zeros(records.num_experts, records.record_bytes, dtype=torch.uint8)
        for expert, (begin, size) in enumerate(zip(records.offsets, records.sizes, strict=True)):
            memory[expert, :size] = torch.frombuffer(bytearray(data[begin : begin + size]), dtype=torch.uint8)
            for part in records.parts_of(expert):
                tensors[f"{layer} {expert} {part.projection} {part.field}"] = part.view(memory[expert : expert + 1])[0]
        for weight in records.weights(memory):
            weight.plain()
    return tensors


def plain_experts(folder: Path) -> Tensors:
    tensors = {}
    for layer in json.loads((folder / INDEX).read_text())["layers"]:
        data, at = (folder / layer["file"]).read_bytes(), 0
        for expert in range(layer["num_experts"]):
            missing = 0  # bytes of planes that this expert has fewer than the most
            for part in layer["parts"]:
                shape, begin, dtype = list(part["shape"]), at + part["offset"] - missing, getattr(torch, part["dtype"])
                if layer.get("bits") and part["field"] == "data":
                    shape[0] = layer["bits"][expert][part["projection"]]
                    missing += (part["shape"][0] - shape[0]) * math.prod(shape[1:])
                end = begin + math.prod(shape) * dtype.itemsize
                tensor = torch.frombuffer(bytearray(data[begin:end]), dtype=dtype).view(shape)
                tensors[f"{layer['name']} {expert} {part['projection']} {part['field']}"] = tensor
            at += -(-(end - at) // 4096) * 4096 if layer.get("bits") else layer["record_bytes"]
    return tensors


def change_experts(folder: Path, rng: random.Random) -> str:
    """Of a value in the index, whose digest is then right."""
    file = folder / INDEX
    entries = json.loads(file.read_text())
    where, at = [], entries
    while isinstance(at, (dict, list)) and at and (not where or rng.random() < 0.95):
        where.append(rng.choice(sorted(at) if isinstance(at, dict) else range(len(at))))
        parent, at = at, at[where[-1]]
    if rng.random() < 0.2:
        del parent[where[-1]]
    else:
        parent[where[-1]] = rng.choice((*OTHERS, at + 64 if type(at) is int else at))
    rest = {key: value for key, value in entries.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**rest, "digest": digest}))
    return f"change of {'.'.join(map(str, where))}"


def is_of_a_store(error: BaseException) -> bool:
    return type(error) is offload.StoreError and "expected" in str(error)


# ---- GGUF files ------------------------------------------------------------------------------------------------------

GGUF_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_BLOCKS = {  # of tensors: columns and bytes of a block
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip


def gguf_pieces() -> list[bytes]:
    """A file in pieces: those of 4 and 8 bytes are numbers."""

    def string(text: str) -> list[bytes]:
        return [struct.pack("<Q", len(text)), text.encode()]

    text = "\N{GREEK SMALL LETTER ALPHA}x".encode()
    values = {"a.bool": (7, [b"\1"]), "a.text": (8, [struct.pack("<Q", len(text)), text]), "a.float": (6, [b"abcd"])}
    values["general.alignment"] = (4, [struct.pack("<I", 32)])
    values["a.list"] = (9, [struct.pack("<I", 8), struct.pack("<Q", 2), *string("one"), *string("")])
    values["a.numbers"] = (9, [struct.pack("<I", 5), struct.pack("<Q", 3), bytes(range(12))])
    inner = [struct.pack("<I", 1), struct.pack("<Q", 1), b"\2"]
    values["a.nested"] = (9, [struct.pack("<I", 9), struct.pack("<Q", 2), *inner, *inner])
    tensors = {"f32": (0, (3, 5), 0), "q4_k": (12, (256, 2, 2), 64), "q8_0": (8, (32,), 640), "i8": (24, (), 704)}
    pieces = [b"GGUF", struct.pack("<I", 3), struct.pack("<Q", len(tensors)), struct.pack("<Q", len(values))]
    for key, (number, value) in values.items():
        pieces += [*string(key), struct.pack("<I", number), *value]
    for name, (number, shape, offset) in tensors.items():
        pieces += [*string(name), struct.pack("<I", len(shape)), *(struct.pack("<Q", size) for size in shape)]
        pieces += [struct.pack("<I", number), struct.pack("<Q", offset)]
    pieces.append(bytes(-sum(map(len, pieces)) % 32))
    return [*pieces, random.Random(0).randbytes(736)]


def write_gguf(folder: Path) -> None:
    (folder / "x.gguf").write_bytes(b"".join(gguf_pieces()))


def read_gguf(folder: Path) -> Tensors:
    file = gguf_file.read_gguf(folder / "x.gguf")
    found = {name: tensor.data.reshape(-1).view(torch.uint8) for name, tensor in file.tensors.items()}
    return found | {f"{key} of metadata": _text(file.get(key)) for key in file.metadata}


def _text(value: object) -> Tensor:
    return torch.tensor(list(repr(value).encode("utf-8", "surrogatepass")), dtype=torch.uint8)


def plain_gguf(folder: Path) -> Tensors:
    data, at = (folder / "x.gguf").read_bytes(), 24

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return value

    def text() -> str:
        return bytes(take(f"{take('Q')}s")).decode("utf-8", "surrogateescape")

    def value(number: int) -> Any:
        if number == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return text() if number == 8 else take(GGUF_CODES[number])

    assert data[:4] == b"GGUF"
    _, num_tensors, num_values = struct.unpack_from("<IQQ", data, 4)
    found, places = {}, []
    for _ in range(num_values):
        key = text()
        found[key] = value(take("I"))
    for _ in range(num_tensors):
        name, shape = text(), [take("Q") for _ in range(take("I"))]
        places.append((name, shape, take("I"), take("Q")))
    alignment = found.get("general.alignment", 32)
    begin, result = -(-at // alignment) * alignment, {f"{key} of metadata": _text(one) for key, one in found.items()}
    for name, shape, number, offset in places:
        columns, size = GGUF_BLOCKS[number]
        count = math.prod(shape) // columns * size
        result[name] = torch.tensor(list(data[begin + offset : begin + offset + count]), dtype=torch.uint8)
    return result


def change_gguf(folder: Path, rng: random.Random) -> str:
    """A number of a clean file becomes another one."""
    pieces = gguf_pieces()
    index = rng.choice([index for index, piece in enumerate(pieces) if len(piece) in (4, 8)])
    size = len(pieces[index])
    new = rng.choice((*NUMBERS, *range(42))) % 256**size
    pieces[index] = new.to_bytes(size, "little")
    (folder / "x.gguf").write_bytes(b"".join(pieces))
    return f"number {index} becomes {new}"


FORMATS: dict[str, Format] = {
    **{
        f"store {form}": Format(
            functools.partial(write_experts, form), read_experts, plain_experts, change_experts, is_of_a_store
        )
        for form in STORES
    },
    **{
        f"stored {form}": Format(
            functools.partial(write_stored, form), functools.partial(read_stored, form),
            functools.partial(plain_stored, form), change_safetensors, is_of_loading,
        )
        for form in FORMS
    },
    **{
        f"published {method}": Format(
            functools.partial(write_published, method), read_published, plain_published, change_published, is_named
        )
        for method in PUBLISHED
    },
    "parallel": Format(write_parallel, read_parallel, plain_parallel, change_parallel, is_named),
    "parallel, whole": Format(write_parallel, read_whole, plain_whole, change_parallel, is_named),
    "peft, experts": Format(write_peft, read_peft, plain_peft, change_peft, is_named),
    "peft, linear": Format(write_linear_peft, read_linear_peft, plain_linear_peft, change_peft, is_named),
    "selected experts": Format(write_selected, read_selected, plain_selected, change_selected, is_named),
    "trace": Format(write_trace, read_trace, plain_trace, change_trace, is_named),
    "gguf": Format(write_gguf, read_gguf, plain_gguf, change_gguf, is_named),
    "routing": Format(write_routing, read_routing, plain_routing, change_routing, is_of_the_program),
}  # fmt: skip
