# SPDX-License-Identifier: BSD-3-Clause
"""load_model: a model of transformers without its experts, which a store has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from switchgear.files import AnyPath
from switchgear.offload.store import Store


def load_model(
    checkpoint: AnyPath,
    store: Store | AnyPath,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Loads a causal language model of transformers on switchgear, in eval mode, except the experts that `store` has:
    they stay on the meta device until `offload` attaches a cache, so that they are never in memory as a whole.

        store = offload.write_store("olmoe/", "olmoe-experts/", "int4")
        model = offload.load_model("olmoe/", store)
        cache = offload.offload(model, store, bytes=8 << 30)

    Args:
        checkpoint: the folder that the store was written from, or a copy: config.json and safetensors files.
        store: an open store, or its path.
        dtype: of the model; by default that of the store's weights.
        device: of what is loaded. The experts will run there.

    Raises:
        ValueError: the checkpoint cannot be loaded, or its experts are not those of the store.
        StoreError: the store cannot be opened.
    """
    from switchgear.integrations.checkpoint_files import Reader
    from switchgear.integrations.published import commit, compute_buffers, planned, undo

    opened = store if isinstance(store, Store) else Store.open(store)
    dtypes = {kind.dtype for records in opened.layers.values() for kind in records.kinds}
    if dtype is None and len(dtypes) == 1:
        dtype = next(iter(dtypes))
    plan = planned(Path(checkpoint), dtype)
    device = torch.device(device)
    try:
        _check(plan, opened)
        held = {f"{name}.{projection}" for name, layout, _ in plan.experts() for projection in layout.names}
        compute_buffers(plan.model, device)
        reader = Reader(plan.files.headers)
        loaded = {target: read(reader, device) for target, read in plan.reads.items() if target not in held}
    except BaseException:
        undo(plan)
        raise
    commit(plan.model, loaded)
    return plan.model.eval()


def _check(plan: Any, store: Store) -> None:
    names = [name for name, _, _ in plan.experts()]
    if names != list(store.layers):
        wrong = next((name for name in (*names, *store.layers) if (name in names) != (name in store.layers)), "order")
        raise ValueError(f"store: expected the experts of {plan.files.path}, {store.path} differs in {wrong}")
    for name, _, sizes in plan.experts():
        records = store.layers[name]
        first, second = records.kinds
        got = (records.num_experts, first.rows, first.cols, second.rows, second.cols)
        if got != sizes:
            raise ValueError(f"store: expected experts of sizes {list(sizes)} in {name}, {store.path} has {list(got)}")
