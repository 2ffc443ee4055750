# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints on disk and texts for them, for the commands that read both. Nothing is downloaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import read_json, reading
from ..utils.packages import first_line
from .common import CommandError, at_least, positive, require

TINY = "tiny"  # names the model of train-tiny that is in the cache
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
LENGTH, ROWS = 256, 8  # of a batch
MOST_TEXT = 1 << 30  # bytes of a file; a token has a few
DTYPES = ("auto", "float32", "bfloat16", "float16")


def find_folder(name: str) -> Path:
    """The folder of a checkpoint. CommandError if it is none."""
    if name == TINY:
        return newest_tiny()
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise CommandError(
            f"expected a folder with a checkpoint of transformers (config.json), or {TINY!r}; got {name}"
        )
    for file in folder.iterdir():  # others than we read, too
        if file.exists() and not file.is_file() and not file.is_dir():
            raise CommandError(f"expected files in {folder}, got {file.name}, which is a pipe or a device")
    return folder


def cache_root() -> Path:
    """$XDG_CACHE_HOME/switchgear, by default ~/.cache/switchgear."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "switchgear"


def newest_tiny() -> Path:
    """The folder of the model in the cache that train-tiny trained last, an accepted one before all others."""
    found = []
    for path in cache_root().glob("tiny-*/tiny.json"):
        about = _about_tiny(path.parent)
        found.append((bool(about["sensitivity"]["accepted"]), path.stat().st_mtime, path.parent))
    if not found:
        raise CommandError("no trained model in the cache; run `switchgear train-tiny` first, it takes ten minutes")
    return max(found, key=lambda entry: entry[:2])[2]


def tiny_texts(folder: Path, part: str) -> dict[str, bytes]:
    """The texts that train-tiny keeps beside its model, by domain. part: "calibration" or "held_out"."""
    domains = _about_tiny(folder)["domains"]
    try:
        return {name: _read_text(folder / "text" / f"{name}.{part}") for name in domains}
    except (OSError, ValueError) as error:
        raise not_tiny(folder, error) from None


def _about_tiny(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = read_json(folder / "tiny.json")
        about["sensitivity"]["accepted"], about["domains"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise not_tiny(folder, error) from None
    return about


def not_tiny(folder: Path, reason: Exception) -> CommandError:
    return CommandError(f"{folder}: expected a model of `switchgear train-tiny` ({reason})")


# fmt: off
def add_arguments(parser: argparse.ArgumentParser, *, tokens: int | None = None, texts: str = "") -> None:
    """The model, its dtype and the threads; with `tokens`, the texts to read and how much of them."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"folder of a checkpoint; {TINY}: the model of train-tiny")
    if tokens is not None:
        add("--text", metavar="FILE", nargs="+", default=[],
            help=f"{texts} (default: those of a model of train-tiny)")
        add("--tokens", type=positive, default=tokens, metavar="N", help="tokens to read of each text")
        add("--length", type=at_least(2), metavar="N",
            help=f"tokens of a sequence (default: {LENGTH}, or fewer if the model has fewer positions)")
    add("--dtype", choices=DTYPES, default="auto", help="of the model; auto: that of the checkpoint")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="CPU threads")
# fmt: on


def load_model(folder: Path, dtype: str = "auto", *, whole: bool = False) -> Any:
    """The model, in eval mode, with its experts on switchgear if they can run there. CommandError if it cannot be
    loaded, with the reason: a truncated shard, a missing file, an unknown type.

    whole: every tensor of the checkpoint, for commands that write it again. Otherwise the causal language model alone,
    which may be a part of it, where transformers has one for its type."""
    transformers = require("transformers")
    from switchgear.integrations.transformers import accelerate

    transformers.logging.set_verbosity_error()
    try:
        kind = _find_class(folder, whole)
        model, loaded = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    except CommandError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds
        raise CommandError(f"cannot load {folder}: {first_line(error)}") from None
    name = type(model).__name__
    if missing := sorted(loaded["missing_keys"]):  # transformers has drawn them
        raise CommandError(f"{folder}: expected all tensors of {name}, {len(missing)} missing, such as {missing[0]}")
    if whole and (unused := sorted(loaded["unexpected_keys"])):  # transformers leaves out what it ignores
        raise CommandError(f"{folder}: expected tensors of {name} alone, got {len(unused)} others, such as {unused[0]}")
    model.eval()
    with suppress(ValueError):  # a class that switchgear does not run: the model's own code does
        accelerate(model)
    return model


def _find_class(folder: Path, whole: bool) -> Any:
    """The class that the config names, with all parts of the model. Without a name, and for parts, that of causal
    language models."""
    transformers = require("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    causal = transformers.AutoModelForCausalLM
    if not config.architectures or (not whole and type(config) in causal._model_mapping):
        return causal
    found = getattr(transformers, config.architectures[0], None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CommandError(f"{folder}: expected a class of transformers, got {config.architectures[0]}")
    return found


def read_texts(
    files: Sequence[str], folder: Path, option: str = "--text", *, to_calibrate: bool = False
) -> dict[str, bytes]:
    """The texts by domain, the name of a file without its ending. Without files, those of a model of train-tiny: the
    held-out ones, or, to calibrate, some of those that it was trained on, since the others judge the result."""
    if not files:
        if not (folder / "tiny.json").exists():
            raise CommandError(f"{option}: expected files, since {folder} has no text of its own")
        return tiny_texts(folder, "calibration" if to_calibrate else "held_out")
    texts: dict[str, bytes] = {}
    for file in map(Path, files):
        try:
            text = _read_text(file)
        except (OSError, ValueError) as error:
            raise CommandError(f"{option}: cannot read {file}: {getattr(error, 'strerror', error)}") from None
        if file.stem in texts:
            raise CommandError(f"{option}: expected files of different names, got {file.stem} twice")
        texts[file.stem] = text
    return texts


def _read_text(file: Path) -> bytes:
    with reading(file) as opened:
        text = opened.read(MOST_TEXT + 1)
    if len(text) > MOST_TEXT:
        raise ValueError(f"expected at most {MOST_TEXT >> 30} GiB")
    return text


def choose_length(model: Any, wanted: int | None) -> int:
    """Tokens of a sequence: by default LENGTH, or fewer if the model has fewer positions."""
    return wanted or min(LENGTH, getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH)


def cut_texts(
    texts: Mapping[str, bytes], model: Any, folder: Path, *, tokens: int, length: int | None
) -> dict[str, list[Tensor]]:
    """The first `tokens` tokens of each text in windows, by domain: batches [<= ROWS, length] int64. length: see
    choose_length. A model of 256 tokens without a tokenizer reads bytes. CommandError for a text shorter than a
    window."""
    length, batches = choose_length(model, length), {}
    if tokens < length:
        raise CommandError(f"tokens: expected at least a window of {length}, got {tokens}")
    for name, text in texts.items():
        ids = _tokenize(text[: 16 * tokens], model, folder)[:tokens]  # a token has a few bytes
        count = ids.numel() // length
        if not count:
            raise CommandError(f"{name} is too short: {ids.numel()} tokens, a window has {length}")
        batches[name] = list(torch.split(ids[: count * length].view(count, length), ROWS))
    return batches


def _tokenize(text: bytes, model: Any, folder: Path) -> Tensor:
    has_tokenizer = any((folder / name).exists() for name in TOKENIZERS)
    if model.config.get_text_config().vocab_size == 256 and not has_tokenizer:
        return (
            torch.frombuffer(bytearray(text), dtype=torch.uint8).long() if text else torch.zeros(0, dtype=torch.int64)
        )
    if not has_tokenizer:
        raise CommandError(f"{folder} has no tokenizer: expected one of {', '.join(TOKENIZERS)}")
    transformers = require("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(f"{folder} has no tokenizer that can be loaded: {reason}") from None
    return torch.tensor(tokenizer(text.decode("utf-8", "replace"))["input_ids"], dtype=torch.int64)
