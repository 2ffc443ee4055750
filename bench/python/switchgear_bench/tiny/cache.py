# SPDX-License-Identifier: BSD-3-Clause
"""Where the trained model is kept: a checkpoint of transformers, with the text it is judged by.

    config.json, model.safetensors     as save_pretrained writes them
    text/<domain>.calibration, .held_out    bytes: 64 KB that it was trained on, and text that it has never seen
    tiny.json                          recipe, sources and digest of the text, losses and sensitivity

A folder is complete or absent: it is written beside its place and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from switchgear.cli.checkpoint import cache_root, newest_tiny, not_tiny
from switchgear.cli.common import CommandError, require
from switchgear.files import AnyPath

from .model import CONFIG
from .sensitivity import Sensitivity
from .text import Domain, tensor
from .train import Recipe

CALIBRATION_BYTES = 2**16
FORMAT = 1


class Tiny(NamedTuple):
    """A trained model and its text."""

    folder: Path
    about: dict[str, Any]  # tiny.json
    domains: list[Domain]  # their `train` is the calibration text

    def model(self) -> Any:
        """Loads the model; its experts run on switchgear."""
        transformers = require("transformers")
        require("switchgear.integrations.transformers")
        transformers.logging.set_verbosity_error()
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype="float32", experts_implementation="switchgear"
        ).eval()


def folder_of(recipe: Recipe, domains: Sequence[Domain]) -> Path:
    """The place of a model in the cache: another recipe or another text is another place."""
    return cache_root() / f"tiny-{_digest([FORMAT, recipe, CONFIG], domains)[:12]}"


def text_digest(domains: Sequence[Domain]) -> str:
    """Identifies the text that a model is trained and judged by."""
    return _digest([], domains)


def _digest(about: Sequence[Any], domains: Sequence[Domain]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for domain in domains:
        digest.update(domain.name.encode() + domain.train.numpy().tobytes() + domain.held_out.numpy().tobytes())
    return digest.hexdigest()


def save(model: Any, recipe: Recipe, domains: Sequence[Domain], sensitivity: Sensitivity, folder: Path) -> Tiny:
    """Writes the folder, in place of an earlier one. CommandError if it cannot; then nothing there has changed, and a
    model that is complete stays beside it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CommandError(f"cannot write to {folder.parent}: {error.strerror}") from None
    try:
        beside.chmod(0o755)
        model.save_pretrained(beside)
        (beside / "text").mkdir()
        for domain in domains:
            for name, text in (("calibration", domain.train[:CALIBRATION_BYTES]), ("held_out", domain.held_out)):
                (beside / "text" / f"{domain.name}.{name}").write_bytes(text.numpy().tobytes())
        about = {
            "format": FORMAT, "recipe": recipe._asdict(), "domains": {d.name: d.source for d in domains},
            "text": text_digest(domains), "sensitivity": sensitivity.as_dict(),
        }  # fmt: skip
        (beside / "tiny.json").write_text(json.dumps(about, indent=1) + "\n")
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            raise CommandError(f"cannot write {folder}: {error.strerror or error}") from None
        raise
    try:
        _replace(folder, beside)
    except OSError as error:
        raise CommandError(f"cannot replace {folder}: {error.strerror}; the trained model is in {beside}") from None
    return load(folder)


def _replace(folder: Path, new: Path) -> None:
    """Only a model of train-tiny is replaced, never a folder of something else."""
    before = new.with_name(f"{new.name}-before")
    if folder.exists():
        if any(folder.iterdir()) and not (folder / "tiny.json").exists():
            raise FileExistsError(errno.EEXIST, "it is no model of train-tiny")
        folder.rename(before)
    try:
        new.rename(folder)
    except OSError:
        if before.exists():
            before.rename(folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def load(folder: AnyPath) -> Tiny:
    """CommandError if the folder has no model of train-tiny."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "tiny.json").read_text())
        domains = [
            Domain(name, source, *(_read(folder / "text" / f"{name}.{part}") for part in ("calibration", "held_out")))
            for name, source in about["domains"].items()
        ]
        about["recipe"].items()
        Sensitivity(**{key: value for key, value in about["sensitivity"].items() if key != "accepted"})
        return Tiny(folder, about, domains)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise not_tiny(folder, error) from None


def _read(path: Path) -> Tensor:
    return tensor(path.read_bytes())


def newest() -> Tiny:
    """The model in the cache that was trained last, an accepted one before all others."""
    return load(newest_tiny())
