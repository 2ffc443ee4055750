# SPDX-License-Identifier: BSD-3-Clause
"""Integrations with other libraries. `switchgear.integrations.transformers` is for Hugging Face transformers.

transformers.py  the public functions; experts.py: one layer of experts; gates.py: recognises its gate
swap.py          replaces a module's forward; forwards.py: how, and restores it; undecorated.py: the table of forwards;
                 parts.py: submodules whose parameters they read; bypass.py: refuses a class's own forward; samples.py:
                 arguments for a trial
moe_blocks.py    the MoE blocks of a model; whole_blocks.py: a block in one call
places.py        where a block says its choice; choices.py: sees and changes it; routers.py: repeats a router's
                 selection
published.py     loads published checkpoints; published_keys.py: their names; published_groups.py: integers with
                 scales; published_nf4.py: nf4; checkpoint_files.py: their files
saving.py        save_pretrained with stored experts
compare.py       a model on switchgear against itself in transformers
"""

import re

OLDEST_TRANSFORMERS = (5, 20)  # in earlier releases some routers return other outputs


def is_too_old(version: str) -> bool:
    """Whether a version of transformers, like "5.24.0", is before OLDEST_TRANSFORMERS. An unknown one is not."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < OLDEST_TRANSFORMERS
