# SPDX-License-Identifier: BSD-3-Clause
"""Small trainable weights added to frozen experts; see docs/adapters.md.

lora.py      add_lora, remove_lora, lora_of; sites.py: the projections of a model that can have adapters
merge.py     merge, unmerge
peft_files.py  load_peft, save_peft; wrappers.py: models that PEFT has wrapped
"""

from __future__ import annotations

from switchgear.adapters.lora import Adapter, add_lora, lora_of, remove_lora
from switchgear.adapters.merge import merge, unmerge
from switchgear.adapters.peft_files import load_peft, save_peft

__all__ = ["Adapter", "add_lora", "load_peft", "lora_of", "merge", "remove_lora", "save_peft", "unmerge"]
