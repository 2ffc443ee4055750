# SPDX-License-Identifier: BSD-3-Clause
"""switchgear's exchange as an expert-parallel implementation for Hugging Face transformers.

Importing this module registers the name "switchgear":

    import switchgear.parallel.transformers
    from transformers.distributed import DistributedConfig
    model = AutoModelForCausalLM.from_pretrained(
        path, experts_implementation="switchgear",
        distributed_config=DistributedConfig(tp_size=2, ep_size=2, ep_implementation="switchgear"),
    )
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.distributed.expert_parallel import AllToAllEP, EPImplementation, EPImplementationInterface

from switchgear.integrations import transformers as integration
from switchgear.integrations.experts import find_unreadable
from switchgear.integrations.gates import find_gate
from switchgear.parallel.exchange import Layer
from switchgear.parallel.experts import exchange_moe
from switchgear.parallel.group import ExpertParallel
from switchgear.parallel.local import Weights
from switchgear.parallel.placement import Placement
from switchgear.weights.adapted import read_by

NAME = "switchgear"
_groups: weakref.WeakValueDictionary[tuple[Any, ...], ExpertParallel] = weakref.WeakValueDictionary()


def parallel_of(ep_group: dist.ProcessGroup, tp_group: dist.ProcessGroup | None) -> ExpertParallel:
    """The one ExpertParallel of all layers with these groups. Gradients are sums, as in transformers."""
    key = (tuple(dist.get_process_group_ranks(ep_group)), tp_group and tuple(dist.get_process_group_ranks(tp_group)))
    parallel = _groups.get(key)
    if parallel is None or parallel.peers.failure is not None:
        parallel = _groups[key] = ExpertParallel(ep_group, tp_group=tp_group, average_gradients=False)
    return parallel


class SwitchgearEP(EPImplementation):
    """Replaces the forward of an experts module, which holds the local part of its parameters.

    Experts that the fused kernel does not support (see `path_of`) use transformers' AllToAllEP.
    """

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self._other = AllToAllEP(experts, ep_mesh, tp_mesh)
        self._module = experts
        self._num_local = int(experts.num_experts)
        tp_group = tp_mesh.get_group() if tp_mesh.size() > 1 else None
        self.parallel = parallel_of(ep_mesh.get_group(), tp_group)
        self._number = self.parallel.next_layer()
        self._layer: Any = None

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        module = self._module
        weights = integration.weights_in(module)
        gate = find_gate(module)
        if gate is None or integration.has_post_norm(module) or find_unreadable(weights) is not None:
            other: Tensor = self._other(hidden_states, top_k_index, top_k_weights)
            return other
        if self._layer is None:
            size = self.parallel.size
            placement = Placement.contiguous(self._num_local * size, size)
            self._layer = Layer(self.parallel, placement, gate, self._number, weights.down_proj.shape[1:])
        first, second, *biases = weights
        plain = None
        if isinstance(first, Tensor) and isinstance(second, Tensor):  # else stored, or with adapters
            plain = Weights(first, second, *biases)
        choice, run = (top_k_index, top_k_weights), self._run_module
        y: Tensor = exchange_moe(self._layer, hidden_states, *choice, plain, run, read_by(module))
        return y

    def _run_module(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Local ids, with transformers' sentinel for empty choices."""
        ids = torch.where(ids < 0, self._num_local, ids).long()
        y: Tensor = self.experts_forward(x, ids, weights.to(x.dtype))
        return y


EPImplementationInterface.register(NAME, SwitchgearEP)
