# SPDX-License-Identifier: BSD-3-Clause
"""Training some experts of a model alone (expert-specialized fine-tuning, ESFT, arXiv:2407.01906).

    with switchgear.RoutingTrace(model) as trace:
        for batch in sample:
            model(batch)
    selection = finetune.select_experts(trace, mass=0.2)
    optimizer = torch.optim.AdamW(finetune.freeze_except(model, selection))
    …                                              # train as usual
    finetune.save_selected(model, "experts.pt")    # these experts only
    finetune.unfreeze(model)

freeze.py  which experts a task uses, and training them alone;  files.py  saving them
"""

from __future__ import annotations

from switchgear.finetune.freeze import (
    Selected,
    freeze_except,
    load_selected,
    save_selected,
    select_experts,
    selected_experts,
    unfreeze,
)

__all__ = [
    "Selected",
    "freeze_except",
    "load_selected",
    "save_selected",
    "select_experts",
    "selected_experts",
    "unfreeze",
]
