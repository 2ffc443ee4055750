# SPDX-License-Identifier: BSD-3-Clause
"""A GGUF file as a model of transformers: its weights stay in the mapped file. The file is that of a small random model
unless you name one; `save_gguf` writes the model back for llama.cpp.

    python examples/gguf.py [FILE.gguf]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import switchgear


def make_file(path: Path) -> None:
    config = OlmoeConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=512, num_experts=8, num_experts_per_tok=2, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = OlmoeForCausalLM(config).eval()
    switchgear.accelerate(model)
    switchgear.save_gguf(model, path, "q4_k_m")


def main(path: Path | None = None) -> tuple[list[int], bool]:
    """Returns tokens, and whether a model that is written back has the bytes of the file."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            make_file(path := Path(folder) / "small.gguf")
        model = switchgear.load_gguf(path)
        print(f"{type(model).__name__} of {path.stat().st_size / 1e6:.1f} MB; its lm_head: {model.lm_head}")
        ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False)[0].tolist()
        print("tokens:", ids)
        back = Path(folder) / "back.gguf"
        switchgear.save_gguf(model, back, like=path)
        is_same = back.read_bytes() == path.read_bytes()
        print("written back:", "the same bytes" if is_same else "other bytes")
        del model  # which the file must outlive
    return ids, is_same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", metavar="FILE.gguf")
    main(parser.parse_args().path)
