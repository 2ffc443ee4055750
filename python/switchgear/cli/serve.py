# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear serve MODEL`: transformers' server of an OpenAI-style API, with a model that this library loads."""

from __future__ import annotations

import argparse
import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..files import is_gguf, read_json
from ..utils.packages import first_line
from ..weights.store import PLAIN_LINEARS, store
from .checkpoint import DTYPES, TINY, find_folder, load_model
from .common import CommandError, positive, require, settings, size
from .store import add_forms

PACKAGES = ("transformers", "fastapi", "uvicorn", "openai")
_OF_CONFIG = DTYPES[0]  # auto


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add = parser.add_argument
    add("--host", default="localhost", help="address to listen on")
    add("--port", type=int, default=8000, metavar="N", help="port to listen on")
    add("--server", metavar="NAME=VALUE", action="append", default=[],
        help="an option of `transformers serve`: continuous_batching=true")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model and how it is loaded."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"folder of a checkpoint, or a GGUF file; {TINY}: the model of train-tiny")
    add("--dtype", choices=DTYPES, default=_OF_CONFIG,
        help="of the model; auto: that of the checkpoint, float32 for a GGUF file")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    add_forms(parser)
    add("--store", metavar="DIR", help="read experts from this store of offload-store when a token needs them")
    add("--memory", type=size, metavar="SIZE", help="for the experts of --store: 8G, 512M")
    add("--adapter", metavar="DIR", help="folder of LoRA adapters, as PEFT saves them")
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer (default: the model's)")
# fmt: on


def run(args: argparse.Namespace) -> int:
    of_server = settings(args.server, "transformers serve", _TAKEN, option="server")
    start(args, host=args.host, port=args.port, **of_server)
    return 0


_TAKEN = ("self", "force_model", "host", "port", "dtype", "device", "non_blocking", "trust_remote_code", "quantization")


def start(args: argparse.Namespace, **options: Any) -> Any:
    """Transformers' server, with options of its own. It returns when the server has ended, or, with non_blocking=True,
    at once. CommandError for a model that cannot be loaded and for options that the server does not have."""
    for package in PACKAGES:
        require(package)
    from transformers.cli import serve
    from transformers.cli.serving import model_manager

    known = inspect.signature(serve.Serve).parameters
    if unknown := sorted(options.keys() - known):
        some = ", ".join(name for name in known if name not in _TAKEN)
        raise CommandError(f"--server: expected an option of transformers serve ({some}), got {unknown[0]}")
    if (args.store is None) != (args.memory is None):
        raise CommandError("expected --store with --memory, got one of them")
    if args.store is not None and (args.form or args.linears):
        raise CommandError("expected --store, which has the form of its experts, without --form and --linears")
    torch.set_num_threads(args.threads)
    module: Any = model_manager
    before = module.ModelManager
    module.ModelManager = _manager_class(before, args)
    try:
        return serve.Serve(force_model=args.model, device="cpu", **options)
    finally:
        module.ModelManager = before


def _manager_class(base: Any, args: argparse.Namespace) -> Any:
    """Transformers' manager of models, which loads that of the arguments alone."""

    class Manager(base):  # type: ignore[misc]
        def _load_processor(self, model_id_and_revision: str, **_: Any) -> Any:
            self._check(model_id_and_revision)
            return load_tokenizer(args)

        def _load_model(self, model_id_and_revision: str, **_: Any) -> Any:
            self._check(model_id_and_revision)
            return load(args)

        def _check(self, name: str) -> None:
            if name != self.process_model_name(args.model):
                raise ValueError(f"model: expected {args.model!r}, which this server has, got {name!r}")

    return Manager


# ---- the model -------------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> Any:
    """The model of the arguments, whole layers of which run on switchgear."""
    from ..integrations.transformers import accelerate

    source = _find(args.model)
    try:
        model = _load_plain(args, source)
        if args.adapter is not None:
            _load_adapter(model, Path(args.adapter))
        if args.form is not None or args.linears is not None:
            options = settings(args.set, "the form", ("model", "form", "linears", "skip", "low_memory", "keep_plain"))
            skip = PLAIN_LINEARS if args.skip is None else args.skip
            store(model, args.form, linears=args.linears, skip=skip, low_memory=True, **options)
        if args.store is not None:
            from ..offload import offload

            offload(model, args.store, bytes=args.memory)
        with suppress(ValueError):  # a class that switchgear does not run: the model's own code does
            accelerate(model, whole_layers=True)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise CommandError(f"cannot load {args.model}: {error}") from None
    return model


def _find(name: str) -> Path:
    return Path(name) if is_gguf(name) else find_folder(name)


def _load_plain(args: argparse.Namespace, source: Path) -> Any:
    from ..integrations.gguf import load_gguf
    from ..integrations.packed import METHOD
    from ..integrations.published import load_published
    from ..offload import load_model as load_without_experts

    dtype = None if args.dtype == _OF_CONFIG else getattr(torch, args.dtype)
    if args.store is not None:
        return load_without_experts(source, args.store, dtype=dtype)
    if is_gguf(source):
        return load_gguf(source, dtype=dtype or torch.float32)
    quantization = read_json(source / "config.json").get("quantization_config")
    if quantization is not None and quantization.get("quant_method") != METHOD:
        return load_published(source, dtype=dtype or torch.bfloat16)
    return load_model(source, args.dtype)


def _load_adapter(model: Any, folder: Path) -> None:
    from ..adapters import load_peft

    try:
        load_peft(model, folder)
    except ValueError as error:  # it has adapters of other modules, too
        try:
            require("peft")
            model.load_adapter(folder)
        except CommandError:
            raise error from None


def load_tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer of the arguments, or a processor of text and images."""
    transformers = require("transformers")
    source = _find(args.model) if args.tokenizer is None else Path(args.tokenizer)
    try:
        if is_gguf(source):
            return transformers.PreTrainedTokenizerFast.from_pretrained(source.parent, gguf_file=source.name)
        return transformers.AutoProcessor.from_pretrained(source, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise CommandError(f"{source} has no tokenizer that can be loaded, {first_line(error)}; --tokenizer") from None
