# SPDX-License-Identifier: BSD-3-Clause
"""Whole models in llama.cpp: the logits of a GGUF file's tokens, which are numbers. Needs `llama-cpp-python`."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .competitors import Skip, look_in_folder


def package() -> Any:
    """llama_cpp. Raises Skip if it is missing."""
    look_in_folder()
    try:
        return importlib.import_module("llama_cpp")
    except (ImportError, OSError) as error:
        raise Skip(str(error)) from None


class Llama:
    """A GGUF file, mapped, in llama.cpp on the CPU. length: of the longest text, in tokens.
    sequences: texts at once at most. adapter: a file of LoRA adapters."""

    def __init__(self, path: Path, length: int, threads: int, sequences: int = 1, adapter: Path | None = None) -> None:
        library = self._library = package()
        library.llama_backend_init()
        self._silent = library.llama_log_callback(lambda *_: None)  # must live as long as the library
        library.llama_log_set(self._silent, None)
        options = library.llama_model_default_params()
        options.n_gpu_layers, options.use_mmap = 0, True
        model = library.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise RuntimeError("llama.cpp does not load the model")
        self._vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = length * sequences, length, sequences
        self._batch = library.llama_batch_init(sequences, 0, 1)
        settings.n_threads = settings.n_threads_batch = threads
        self._context = library.llama_init_from_model(model, settings)
        if adapter is not None:
            made = library.llama_adapter_lora_init(model, str(adapter).encode())
            if not made:
                raise RuntimeError("llama.cpp does not load the adapter")
            pointers = (library.llama_adapter_lora_p_ctypes * 1)(made)
            library.llama_set_adapters_lora(self._context, pointers, 1, (ctypes.c_float * 1)(1.0))

    def step(self, ids: list[int], place: int | None = None) -> Tensor:
        """Token ids that follow those before -> logits [V] of the last one. place: of the ids, each of a text of its
        own, and logits are [texts, V]; None: all are of one text."""
        library = self._library
        if place is None:
            array = (library.llama_token * len(ids))(*ids)  # which the batch points into
            batch = library.llama_batch_get_one(array, len(ids))
        else:
            batch = self._batch
            batch.n_tokens = len(ids)
            for text, token in enumerate(ids):
                batch.token[text], batch.pos[text], batch.logits[text] = token, place, 1
                batch.n_seq_id[text], batch.seq_id[text][0] = 1, text
        if library.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp does not decode")
        places = [-1] if place is None else range(len(ids))
        pointers = [library.llama_get_logits_ith(self._context, index) for index in places]
        arrays = [ctypes.cast(one, ctypes.POINTER(ctypes.c_float * self._vocab_size)).contents for one in pointers]
        logits = torch.stack([torch.frombuffer(array, dtype=torch.float32) for array in arrays])
        return logits[0] if place is None else logits

    def forget(self) -> None:
        """Starts a new text."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
