# SPDX-License-Identifier: BSD-3-Clause
"""Conversions of checkpoint directories (safetensors), tensor by tensor: memory for one tensor, not for a model.

run({"operation": "upcycle", "num_experts": 8, "top_k": 2}, "llama/", "mixtral/")
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchgear.convert.average import Merging
from switchgear.convert.directory import (
    CONFIG,
    CONVERSION,
    TEMPLATES,
    ConversionError,
    DamagedCheckpoint,
    Directory,
    DiskFull,
    Progress,
    RecipeError,
    compute_sha256,
    count_bytes,
    divide_into_shards,
    list_beside_weights,
    read_full_config,
    write_index,
    write_shard,
    write_text,
)
from switchgear.convert.layouts import plan_layout
from switchgear.convert.plans import ConversionPlan, Item
from switchgear.convert.recipes import plan_dense, plan_experts, plan_merge, plan_split, plan_upcycle
from switchgear.files import AnyPath, Unfinished, read_json, require_regular

REPORT = "conversion.json"
OPTIONS: dict[str, tuple[str, ...]] = {
    "upcycle": ("num_experts", "top_k", "layers", "router_init", "noise", "seed", "family"),
    "split": ("num_experts", "top_k", "layers", "method", "shared", "importance", "keep", "rescale", "router_init",
              "seed", "family"),
    "experts": ("top_k", "layers", "family", "router", "router_init", "merge", "weights", "density", "scale", "seed",
                "noise", "base"),
    "merge": ("method", "weights", "density", "scale", "seed", "base"),
    "dense": ("method", "weights", "rank"),
    "layout": ("to",),
}  # fmt: skip
ROUTERS = ("random", "zeros")  # values of `router` that are no files
REQUIRED = {"split": ("num_experts", "top_k"), "layout": ("to",)}


@dataclass(frozen=True)
class Recipe:
    """What to do with a checkpoint; plain JSON.

    operation: "upcycle" and "split" (one dense model), "experts" and "merge" (several), "dense" (an MoE model),
        "layout" (an MoE model; to: per_expert, fused, megatron, megatron_te, megatron_grouped).
    options: of upcycle, split_dense, from_dense_experts, merge_models and to_dense. importance and router are paths of
        safetensors files with a tensor "0", "1", … per layer; base is a checkpoint directory.
    max_shard_size: bytes of a file, or "5GB".
    """

    operation: str
    options: Mapping[str, Any] = field(default_factory=dict)
    max_shard_size: int | str = "5GB"

    def __post_init__(self) -> None:
        if not isinstance(self.operation, str) or self.operation not in OPTIONS:
            raise RecipeError(f"operation: expected {', '.join(OPTIONS)}, got {self.operation!r}")
        allowed = OPTIONS[self.operation]
        if unknown := sorted(set(self.options) - set(allowed)):
            raise RecipeError(f"{unknown[0]}: expected an option of {self.operation} ({', '.join(allowed)}), got none")
        if missing := [name for name in REQUIRED.get(self.operation, ()) if name not in self.options]:
            raise RecipeError(f"{missing[0]}: expected it for {self.operation}, got none")
        self.shard_bytes()
        try:
            json.dumps(dict(self.options))
        except (TypeError, ValueError) as error:
            raise RecipeError(f"options: expected plain JSON, got {error}") from None

    @classmethod
    def of(cls, given: Recipe | Mapping[str, Any] | AnyPath) -> Recipe:
        """Reads a dict {"operation": …, "num_experts": …}, or a JSON file with one."""
        if isinstance(given, Recipe):
            return given
        if not isinstance(given, Mapping):
            try:
                given = read_json(given)
            except (OSError, ValueError, TypeError) as error:
                raise RecipeError(f"recipe: expected a dict or a JSON file, got {given} ({error})") from error
            if not isinstance(given, Mapping):
                raise RecipeError(f"recipe: expected a JSON object, got {type(given).__name__}")
        if "operation" not in given:
            raise RecipeError(f"operation: expected one of {', '.join(OPTIONS)} in the recipe, got none")
        options = {key: value for key, value in given.items() if key not in ("operation", "max_shard_size")}
        if not all(isinstance(key, str) for key in options):
            raise RecipeError("recipe: expected names of options, got other keys")
        return cls(given["operation"], options, given.get("max_shard_size", "5GB"))

    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes. Raises ValueError for another unit than KB, MB, GB."""
        units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
        text = str(self.max_shard_size).strip().upper()
        number, unit = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
        try:
            size = int(float(number) * unit)
        except (ValueError, OverflowError):
            size = 0
        if size < 1:
            raise RecipeError(f"max_shard_size: expected bytes or a size such as 5GB, got {self.max_shard_size!r}")
        return size

    def as_dict(self) -> dict[str, Any]:
        """The recipe as a file would hold it."""
        return {"operation": self.operation, **self.options, "max_shard_size": self.max_shard_size}


@dataclass(frozen=True)
class Report:
    """What was written; the same as conversion.json in the target."""

    target: Path
    layers: tuple[tuple[str, str, int, str], ...]
    notes: tuple[str, ...]
    num_bytes: int
    shards: Mapping[str, str]  # sha256 by file
    resumed: tuple[str, ...]  # shards that an earlier run had finished


def run(
    recipe: Recipe | Mapping[str, Any] | AnyPath,
    source: AnyPath | Sequence[AnyPath],
    target: AnyPath,
    progress: Progress | None = None,
    *,
    resume: bool = True,
) -> Report:
    """Converts a checkpoint directory. Needs memory for one tensor of the result, and 64 MiB for mapped files.

    The result is written into a directory `target`.partial, which is renamed when all is done: there is never half a
    checkpoint at `target`. The same call continues a conversion that was interrupted: finished shards are checked by
    their sha256 and kept.

    Args:
        recipe: a Recipe, a dict such as {"operation": "upcycle", "num_experts": 8}, or a JSON file.
        source: a directory with config.json and safetensors files; several for "experts" and "merge".
        target: a directory that does not exist.
        progress: called as progress(bytes written, bytes in all, name of the tensor).
        resume: False discards what an interrupted conversion has written.

    Raises:
        RecipeError: a recipe that is wrong, or that the source or its family cannot satisfy. Nothing is written.
        DamagedCheckpoint: a source with missing or truncated files.
        DiskFull: the result does not fit; checked before, and while writing.
        ConversionError: other reasons, such as a target that exists.
    """
    recipe, target = Recipe.of(recipe), Path(target)
    paths = [Path(source)] if isinstance(source, (str, os.PathLike)) else [Path(path) for path in source]
    if os.path.lexists(target):
        raise ConversionError(f"target: expected a directory that does not exist, got {target}")
    if not paths or (len(paths) > 1 and recipe.operation not in ("experts", "merge")):
        raise RecipeError(f"source: expected one directory for {recipe.operation}, got {len(paths)}")
    sources = [Directory(path) for path in paths]
    plan = plan_recipe(recipe, sources)
    shards = divide_into_shards(plan.items, recipe.shard_bytes())
    with Unfinished.opened(CONVERSION, target, _identity(recipe, sources), resume) as unfinished:
        resumed = tuple(name for name in shards if _is_finished(unfinished, name))
        _write(unfinished, shards, resumed, progress or (lambda *_: None))
        return _finish(unfinished, recipe, paths[0], plan, shards, resumed)


def _is_finished(unfinished: Unfinished, name: str) -> bool:
    entry, file = unfinished.pieces.get(name), unfinished.folder / name
    return entry is not None and file.is_file() and compute_sha256(file) == entry["sha256"]


def _identity(recipe: Recipe, sources: Sequence[Directory]) -> str:
    """Changes with the recipe and with every file that the result is made of."""
    base = recipe.options.get("base")
    folders = [*sources, *([Directory(base)] if base is not None else [])]
    named = [recipe.options[name] for name in ("importance", "router") if recipe.options.get(name) is not None]
    files = [compute_sha256(Path(path)) for path in named if path not in ROUTERS]
    about = [recipe.as_dict(), [folder.identity() for folder in folders], files, torch.__version__]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _write(
    unfinished: Unfinished, shards: Mapping[str, list[Item]], resumed: Sequence[str], progress: Progress
) -> None:
    sizes = {name: sum(map(count_bytes, items)) for name, items in shards.items()}
    total, done = sum(sizes.values()), 0
    missing = total - sum(sizes[name] for name in resumed)
    folder = unfinished.folder
    if (free := shutil.disk_usage(folder).free) < missing:
        raise DiskFull(errno.ENOSPC, f"no room for {folder}: {missing} bytes are needed, {free} are free")

    def count(size: int, key: str) -> None:
        nonlocal done
        done += size
        progress(done, total, key)

    for name, items in shards.items():
        if name in resumed:
            count(sizes[name], name)
            continue
        try:
            sha256 = write_shard(folder / name, items, count)
            unfinished.add(name, {"sha256": sha256, "bytes": (folder / name).stat().st_size})
        except (RuntimeError, ValueError) as error:  # safetensors and torch raise them for files that changed meanwhile
            if isinstance(error, ConversionError):
                raise
            raise DamagedCheckpoint(f"{name}: {error}") from error


def plan_recipe(recipe: Recipe, sources: Sequence[Directory]) -> ConversionPlan:
    """The plan of a recipe: all checks of shapes and of the family, and no data. RecipeError for what is impossible."""
    try:
        if recipe.operation in ("experts", "merge"):
            return _plan_several(recipe.operation, sources, dict(recipe.options))
        return _plan_one(recipe.operation, sources[0], dict(recipe.options))
    except ConversionError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error


def _plan_one(operation: str, source: Directory, options: dict[str, Any]) -> ConversionPlan:
    if operation == "layout":
        return plan_layout(source.config(), source, options["to"])
    if (path := options.get("importance")) is not None:
        options["importance"] = _read_layers("importance", path)
    plans: dict[str, Callable[..., ConversionPlan]] = {
        "upcycle": plan_upcycle, "split": plan_split, "dense": plan_dense,
    }  # fmt: skip
    return plans[operation](read_full_config(source), source, **options)


def _plan_several(operation: str, sources: Sequence[Directory], options: dict[str, Any]) -> ConversionPlan:
    base, method = options.pop("base", None), options.pop("method" if operation == "merge" else "merge", "average")
    if base is not None and not isinstance(base, str):
        raise TypeError(f"base: expected a directory, got {type(base).__name__}")
    names = ("weights", "density", "scale", "seed")
    merging = Merging(method, **{name: options.pop(name) for name in names if name in options})
    read_config = Directory.config if operation == "merge" else read_full_config
    models = [(read_config(source), source) for source in sources]
    origin = None if base is None else Directory(base)
    of_base = None if origin is None else (read_config(origin), origin)
    if operation == "merge":
        return plan_merge(models, of_base, merging)
    router = options.pop("router", "random")
    rows = None if router in ROUTERS else _read_layers("router", router)
    if router == "zeros":
        options["router_init"] = 0.0
    options.setdefault("top_k", min(2, len(sources)))
    return plan_experts(models, of_base, router=rows, merging=merging, seed=merging.seed, **options)


def _read_layers(name: str, path: Any) -> dict[int, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        require_regular(path, os.stat(path))
        return {int(key): tensor for key, tensor in load_file(path).items()}
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise RecipeError(
            f"{name}: expected a safetensors file with a tensor per layer, got {path} ({error})"
        ) from error


def _finish(
    unfinished: Unfinished, recipe: Recipe, source: Path, plan: ConversionPlan, shards: Mapping[str, list[Item]],
    resumed: tuple[str, ...],
) -> Report:  # fmt: skip
    """Writes what is beside the shards, and gives the directory its name."""
    folder, target = unfinished.folder, unfinished.target
    total = sum(map(count_bytes, plan.items))
    shutil.rmtree(folder / TEMPLATES, ignore_errors=True)
    unfinished.clear(unfinished.pieces)  # an earlier run may have ended here
    for name in list_beside_weights(source):
        with CONVERSION.named_errors(source / name):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy2(source / name, folder / name)
    write_index(folder, shards)
    report = {
        "recipe": recipe.as_dict(), "layers": [list(layer) for layer in plan.layers], "notes": list(plan.notes),
        "shards": {name: unfinished.pieces[name]["sha256"] for name in shards},
    }  # fmt: skip
    write_text(folder / REPORT, json.dumps(report, indent=2))
    write_text(folder / CONFIG, json.dumps(plan.config, indent=2, sort_keys=True) + "\n")
    unfinished.commit()
    return Report(target, plan.layers, plan.notes, total, report["shards"], resumed)  # type: ignore[arg-type]
