# SPDX-License-Identifier: BSD-3-Clause
"""Integrations with other libraries. `switchgear.integrations.transformers` is for Hugging Face transformers.

transformers.py  the public functions
whole_blocks.py  an MoE block in one call; decoding.py: a decoder layer in a handful; cache.py: its keys and values;
                 layer_classes.py: forms of layers; layer_trials.py: which one a layer has
modules.py       what a module of experts is and how it runs; undecorated.py: the table of replaced forwards, and
                 a trial of each; forwards.py: which forward a module or a part of it runs
experts.py       one layer of experts; gates.py: recognises its gate
moe_blocks.py    the MoE blocks of a model
hook_points.py   hooks that see and change a block's choice; choices.py: installs them; routers.py: repeats a router's
                 selection
published.py     loads published checkpoints; published_matrices.py: their formats of 2 to 8 bits;
                 checkpoint_files.py: their files and names
gguf.py          models out of GGUF files, and back; gguf_file.py: the files
saving.py        save_pretrained with stored weights; packed.py: what it writes, and how from_pretrained reads it
"""

import re

OLDEST_TRANSFORMERS = (5, 20)  # in earlier releases some routers return other outputs


def is_too_old(version: str) -> bool:
    """Whether a version of transformers, like "5.24.0", is before OLDEST_TRANSFORMERS. An unknown one is not."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < OLDEST_TRANSFORMERS
