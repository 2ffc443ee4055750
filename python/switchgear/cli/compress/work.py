# SPDX-License-Identifier: BSD-3-Clause
"""Runs a recipe. The result appears at once or not at all, and an interrupted run continues after its last finished
step.

All is written into OUT.partial: the calibration and the model after each step, and then the result, which is renamed to
OUT. journal.json there says that the folder is of this command, of which recipe and which checkpoint. Other files in it
are never touched.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from switchgear import compress as functions
from switchgear.compress import Calibration, calibrate
from switchgear.convert.directory import list_beside_weights
from switchgear.files import JOURNAL, LOCK, UNFINISHED, locked, replacing, write_whole
from switchgear.utils.packages import first_line
from switchgear.weights import restore

from ..checkpoint import choose_length, cut_batches, load_model, read_texts
from ..common import CommandError
from ..progress import progress
from .recipe import Recipe, Step

WRITTEN = (JOURNAL, f"{JOURNAL}*{UNFINISHED}", "step-*", "calibration-*.safetensors")  # into OUT.partial


def compress(source: Path, recipe: Recipe, out: Path, dtype: str = "auto", *, fresh: bool = False) -> Iterator[str]:
    """Yields a line per step. CommandError for whatever the user can mend; then OUT does not exist."""
    place = "recipe: calibration.text"
    texts = read_texts(recipe.text, source, place, to_calibrate=True) if _needs_text(recipe) else {}
    partial = Partial(out, identity(source, recipe, texts, dtype), fresh)
    try:
        done = partial.steps()
        if done:
            yield f"continuing after step {len(done)} of {len(recipe.steps)}"
        model = load_model(partial.model() if done else source, dtype, whole=True)
        for i, step in enumerate(recipe.steps[len(done) :], len(done)):
            restore(model)  # a step may have stored weights; a resumed run reads plain ones, too
            calibration = partial.calibration(i)
            if calibration is None and step.needs_calibration:
                calibration = _calibrate(model, source, recipe, texts, step.needs_hessians)
                partial.save_calibration(i, calibration)
            result = apply(step, model, calibration, f"recipe: steps[{i}]")
            done.append({"do": step.do, "result": result.as_dict()})
            partial.save_model(model, i, done)
            yield f"{step.do}: {result}"
        partial.finish(source, {"recipe": recipe.as_dict(), "model": source.name, "steps": done})
    except OSError as error:  # a full disk, for one; safetensors' errors, too, have this base or the next
        path = error.filename2 or error.filename or partial.folder  # filename2: where a copy goes
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise CommandError(f"cannot write {partial.folder}: {error}") from None
    finally:
        partial.close()
    if any(step.do == "quantize" and not step.options["store"] for step in recipe.steps):
        yield (
            "rounded weights are saved as plain ones, which transformers loads; docs/cli.md says how to store them, "
            "and what GPTQ loses then"
        )
    yield f"{out}: {sum(file.stat().st_size for file in out.glob('*.safetensors')) / 1e6:,.1f} MB"


def apply(step: Step, model: Any, calibration: Calibration | None, place: str) -> Any:
    """The result of one step. CommandError where the function refuses, with its reason."""
    options = dict(step.options)
    if step.needs_calibration:
        options["calibration"] = calibration
    try:
        if step.distributes_bits:
            assert calibration is not None
            bits = options["bits"]
            how: Any = {name: value for name, value in bits.items() if name != "of"}
            sizes: Any = {name: options[name] for name in ("group_size", "symmetric") if name in options}
            errors = functions.expert_errors(model, calibration, tuple(bits.get("of", (1, 2, 3))), **sizes)
            options["bits"] = functions.allocate_bits(errors, **how)
            if not step.needs_hessians:
                options.pop("calibration")
        return step.function(model, **options)
    except (ValueError, TypeError) as error:
        raise CommandError(f"{place}: {step.do}: {error}") from None


def _needs_text(recipe: Recipe) -> bool:
    return any(step.needs_calibration for step in recipe.steps)


def _calibrate(model: Any, source: Path, recipe: Recipe, texts: dict[str, bytes], hessians: bool) -> Calibration:
    length = choose_length(model, recipe.length)
    batches: list[dict[str, Any]] = [
        {"input_ids": rows, "domain": name, "use_cache": False}
        for name, text in texts.items()
        for rows in cut_batches(text, model, source, tokens=recipe.tokens, length=length, name=name)
    ]

    def counted() -> Iterator[dict[str, Any]]:
        for i, batch in enumerate(batches):
            yield batch
            advance(i + 1, len(batches), str(batch["domain"]))

    with progress("calibrating") as advance:
        try:
            return calibrate(model, counted(), hessians=hessians)
        except ValueError as error:
            raise CommandError(f"cannot calibrate: {error}") from None
        except (AttributeError, TypeError, RuntimeError) as error:  # the model's own code raises them
            raise CommandError(f"cannot calibrate: {first_line(error)}") from None


def identity(source: Path, recipe: Recipe, texts: dict[str, bytes], dtype: str) -> str:
    """Changes with the recipe, the texts and the files of the checkpoint."""
    files = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(source.iterdir()) if f.is_file()]
    digest = hashlib.sha256(json.dumps([recipe.as_dict(), files, dtype]).encode())
    for name, text in texts.items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(text).digest())
    return digest.hexdigest()


class Partial:
    """OUT.partial and its journal, which is written last: what it names is complete. One process at a time."""

    def __init__(self, out: Path, identity: str, fresh: bool) -> None:
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self._journal: dict[str, Any] = {"command": "compress", "identity": identity, "steps": [], "calibrations": []}
        try:
            if not self._is_ours():
                raise CommandError(f"{self.folder} exists and is not of this command; it was left as it is")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.folder)
            found = self._read()
            if found.get("identity") == identity and not fresh and self._is_there(found["steps"]):
                self._journal = found
            else:  # of another recipe, or its result has become OUT: it cannot continue
                self._discard()
                self._write()
        except BlockingIOError:
            raise CommandError(f"--out: another process is writing {self.folder}") from None
        except OSError as error:
            raise CommandError(f"--out: cannot write to {self.folder}: {error.strerror}") from None

    def close(self) -> None:
        """Leaves nothing behind if neither a step nor its calibration is finished."""
        if not self._journal["steps"] and not self._journal["calibrations"]:
            self._remove()
        self._lock.close()

    def steps(self) -> list[dict[str, Any]]:
        return list(self._journal["steps"])

    def model(self) -> Path:
        return self._model(len(self._journal["steps"]))

    def calibration(self, step: int) -> Calibration | None:
        return Calibration.load(self._calibration(step)) if step in self._journal["calibrations"] else None

    def save_calibration(self, step: int, calibration: Calibration) -> None:
        calibration.save(self._calibration(step))
        self._journal["calibrations"] = [step]
        self._write()

    def save_model(self, model: Any, step: int, done: list[dict[str, Any]]) -> None:
        """The model after a step; then the one before it and its calibration are removed."""
        before = self.model()
        model.save_pretrained(self._model(step + 1))
        self._journal.update(steps=list(done), calibrations=[])
        self._write()
        shutil.rmtree(before, ignore_errors=True)
        self._calibration(step).unlink(missing_ok=True)

    def finish(self, source: Path, about: dict[str, Any]) -> None:
        result = self.model()
        for left in result.rglob(f"*{UNFINISHED}"):  # by a run that was killed
            left.unlink()
        for name in list_beside_weights(source):
            if not (result / name).exists():  # save_pretrained has written some
                (result / name).parent.mkdir(exist_ok=True)
                with replacing(result / name) as unfinished:
                    shutil.copyfile(source / name, unfinished)
        (result / "compression.json").write_text(json.dumps(about, indent=1) + "\n")
        result.rename(self.out)
        self._remove()

    def _model(self, steps: int) -> Path:
        return self.folder / f"step-{steps}"

    def _is_there(self, steps: Sequence[Any]) -> bool:
        """Whether the model after the last step is, if there is one."""
        return not steps or self._model(len(steps)).exists()

    def _calibration(self, step: int) -> Path:
        return self.folder / f"calibration-{step}.safetensors"

    def _is_ours(self) -> bool:
        """Whether the folder is of this command, or there is nothing in it."""
        if self._read().get("command") == "compress":
            return True
        return not self.folder.exists() or all(file.name == LOCK for file in self.folder.iterdir())

    def _discard(self) -> None:
        """Deletes what this command wrote, and nothing else."""
        for pattern in WRITTEN:
            for path in self.folder.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _remove(self) -> None:
        """The same, and the folder if nothing else is in it."""
        self._discard()
        (self.folder / LOCK).unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _read(self) -> dict[str, Any]:
        """The journal; empty if there is none."""
        try:
            found = json.loads((self.folder / JOURNAL).read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            found = None
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        write_whole(self.folder / JOURNAL, json.dumps(self._journal))
