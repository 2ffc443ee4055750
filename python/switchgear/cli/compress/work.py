# SPDX-License-Identifier: BSD-3-Clause
"""Reads and runs recipes. Every mistake in one is named before anything is loaded. The result appears at once or not at
all, and an interrupted run continues after its last finished step.

All is written into OUT.partial: the calibration and the model after each step, and then the result, which is renamed to
OUT. journal.json there says that the folder is of this command, of which recipe and which checkpoint. Other files in it
are never touched.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from switchgear import compress as functions
from switchgear.checks import Range, Size, convert, convert_arguments
from switchgear.compress import Calibration, calibrate
from switchgear.compress.levels import Widths, choose_form
from switchgear.convert.directory import list_beside_weights
from switchgear.files import JOURNAL, LOCK, UNFINISHED, has_links, locked, read_json, replacing, write_whole
from switchgear.utils.packages import first_line, page
from switchgear.weights import restore, stored_of

from ..checkpoint import cut_texts, load_model, read_texts
from ..common import CommandError, progress

WRITTEN = (JOURNAL, f"{JOURNAL}*{UNFINISHED}", "step-*", "calibration-*.safetensors")  # into OUT.partial
STEPS = ("prune_experts", "merge_experts", "prune_weights", "quantize")  # of switchgear.compress
GIVEN = ("model", "calibration")  # arguments that the command passes itself
MIXED = ("of", "average", "alpha", "beta", "gamma", "tolerance")  # options of bits by expert
CALIBRATION: dict[str, Any] = {"text": list[str], "tokens": Size, "length": Annotated[int, Range(2, 2**31 - 1)] | None}


# ---- recipes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    do: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def function(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(functions, self.do)
        return found

    @property
    def needs_hessians(self) -> bool:
        return self.options.get("method") == "gptq"

    @property
    def needs_calibration(self) -> bool:
        """Random pruning, and rounding to a fixed number of bits, need none."""
        if self.do == "prune_experts":
            return self.options.get("criterion") != "random"
        if self.do == "prune_weights":
            return self.options.get("metric") != "magnitude"
        return self.do != "quantize" or self.needs_hessians or self.distributes_bits

    @property
    def distributes_bits(self) -> bool:
        """Whether `bits` says what allocate_bits distributes, not how many bits layers get."""
        bits = self.options.get("bits")
        return isinstance(bits, Mapping) and any(name in bits for name in MIXED)


@dataclass(frozen=True)
class Recipe:
    steps: tuple[Step, ...]
    text: tuple[str, ...]  # files, each a domain
    tokens: int  # of each
    length: int | None  # of a sequence; see checkpoint.length_for

    def as_dict(self) -> dict[str, Any]:
        steps = [{"do": step.do, **step.options} for step in self.steps]
        files = [Path(file).name for file in self.text]
        return {"calibration": {"text": files, "tokens": self.tokens, "length": self.length}, "steps": steps}


def read(path: str) -> Recipe:
    """CommandError with the place of the mistake. Paths of texts are relative to the recipe."""
    try:
        data = read_json(path)
    except OSError as error:
        raise CommandError(f"--recipe: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(f"--recipe: {path} is not JSON: {error}") from None
    return parse(data, Path(path).parent)


def parse(data: Any, folder: Path) -> Recipe:
    _check_keys("recipe", data, ("calibration", "steps"))
    how = data.get("calibration", {})
    _check_keys("recipe: calibration", how, tuple(CALIBRATION))
    how = {"text": [], "tokens": 65536, "length": None} | how
    try:
        for name, hint in CALIBRATION.items():
            convert(name, how[name], hint)
    except (TypeError, ValueError) as error:
        raise CommandError(f"recipe: calibration.{error}") from None
    steps = data.get("steps")
    if not isinstance(steps, list) or not steps:
        raise CommandError(f"recipe: steps: expected a list of at least one, got {steps!r}")
    parsed = tuple(_step(f"recipe: steps[{i}]", step) for i, step in enumerate(steps))
    return Recipe(parsed, tuple(str(folder / file) for file in how["text"]), how["tokens"], how["length"])


def _step(place: str, data: Any) -> Step:
    if not isinstance(data, dict) or data.get("do") not in STEPS:
        got = data.get("do") if isinstance(data, dict) else data
        raise CommandError(f"{place}: do: expected one of {', '.join(STEPS)}, got {got!r}")
    signature = inspect.signature(getattr(functions, data["do"]))
    known = [name for name in signature.parameters if name not in GIVEN]
    options = {name: value for name, value in data.items() if name != "do"}
    for name in options:
        if name not in known:
            raise CommandError(f"{place}: expected options of {data['do']} ({', '.join(known)}), got {name!r}")
    if data["do"] == "quantize":
        options.setdefault("store", False)  # from_pretrained does not know the stored form
    step = Step(data["do"], options)
    if step.distributes_bits:
        _check_keys(f"{place}: bits", options["bits"], MIXED)
    try:
        signature.bind(None, **options, calibration=None)  # all functions take one, and merge_experts needs it
        _check_values(step)
    except (TypeError, ValueError) as error:
        raise CommandError(f"{place}: {data['do']}: {error}") from None
    return step


def _check_values(step: Step) -> None:
    """Raises TypeError or ValueError for values that suit no model, by the annotations of the functions."""
    options = dict(step.options)
    if step.distributes_bits:
        bits = dict(options.pop("bits"))
        convert("of", bits.pop("of", [1]), Widths)
        _check(functions.allocate_bits, bits)
    _check(step.function, options)
    if step.do == "quantize":
        defaults = {"bits": 1 if step.distributes_bits else 4, "group_size": 128, "symmetric": True}
        choose_form(**{name: options.get(name, default) for name, default in defaults.items()}, store=options["store"])


def _check(function: Callable[..., Any], options: dict[str, Any]) -> None:
    convert_arguments(function, inspect.signature(function), options)


def _check_keys(place: str, data: Any, known: tuple[str, ...]) -> None:
    if not isinstance(data, dict):
        raise CommandError(f"{place}: expected an object with {', '.join(known)}, got {type(data).__name__}")
    for name in data:
        if name not in known:
            raise CommandError(f"{place}: expected {', '.join(known)}, got {name!r}")


# ---- runs ------------------------------------------------------------------------------------------------------------


def compress(source: Path, recipe: Recipe, out: Path, dtype: str = "auto", *, fresh: bool = False) -> Iterator[str]:
    """Yields a line per step. CommandError for whatever the user can mend; then OUT does not exist."""
    place = "recipe: calibration.text"
    needs_text = any(step.needs_calibration for step in recipe.steps)
    texts = read_texts(recipe.text, source, place, to_calibrate=True) if needs_text else {}
    partial = Partial(out, identity(source, recipe, texts, dtype), fresh)
    try:
        done = partial.steps()
        if done:
            yield f"continuing after step {len(done)} of {len(recipe.steps)}"
        model = load_model(partial.model() if done else source, dtype, whole=True)
        for i, step in enumerate(recipe.steps[len(done) :], len(done)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the recipe rounds them
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
            f"rounded weights are saved as plain ones, which transformers loads; {page('cli')} says how to store them, "
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


def _calibrate(model: Any, source: Path, recipe: Recipe, texts: dict[str, bytes], hessians: bool) -> Calibration:
    cut = cut_texts(texts, model, source, tokens=recipe.tokens, length=recipe.length)
    batches: list[dict[str, Any]] = [
        {"input_ids": rows, "domain": name, "use_cache": False} for name, parts in cut.items() for rows in parts
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
            files = {file.name for file in self.folder.iterdir()} if self.folder.exists() else set()
            if self._read().get("command") != "compress" and not files <= {LOCK}:
                raise CommandError(f"{self.folder} exists and is not of this command; it was left as it is")
            if has_links(self.folder):
                raise CommandError(f"--out: expected no links in {self.folder}, which it would write through")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.folder)
            found = self._read()
            done = len(found.get("steps", ()))
            if found.get("identity") == identity and not fresh and (not done or self._model(done).exists()):
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
        options = {"plain": True} if any(stored_of(module) for module in model.modules()) else {}
        model.save_pretrained(self._model(step + 1), **options)
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
        write_whole(result / "compression.json", json.dumps(about, indent=1) + "\n")
        result.rename(self.out)
        self._remove()

    def _model(self, steps: int) -> Path:
        return self.folder / f"step-{steps}"

    def _calibration(self, step: int) -> Path:
        return self.folder / f"calibration-{step}.safetensors"

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
            found = read_json(self.folder / JOURNAL)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            found = None
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        write_whole(self.folder / JOURNAL, json.dumps(self._journal))
