# SPDX-License-Identifier: BSD-3-Clause
"""A callback of transformers' Trainer that reports the load of the experts together with the loss."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from switchgear.checks import Count, checked
from switchgear.trace import RoutingTrace
from switchgear.trace.load import LoadMeter, write_of


class ExpertLoadCallback(TrainerCallback):
    """Records the routing of training steps, and adds its statistics (see LoadMeter) to each log of the training loss.

        trainer = Trainer(model, args, …)
        ExpertLoadCallback().attach(trainer)       # before the reporters, so that all of them see the statistics
        Trainer(model, args, callbacks=[ExpertLoadCallback(writer)], …)      # or with a writer of its own

    Steps of evaluation are not recorded. After a step that raised, the model is watched until the next `train`. In a
    distributed run each process records its own tokens; the first one reports.

    Args:
        writer: where to write, besides the logs: see switchgear.trace.load.write_of. None: nowhere else.
        max_layers: at most so many layers have keys of their own.
        prefix: of the keys.
    """

    @checked
    def __init__(self, writer: Any = None, *, max_layers: Count = 8, prefix: str = "moe") -> None:
        self._write = None if writer is None else write_of(writer)
        self._max_layers, self._prefix = max_layers, prefix
        self.trace: RoutingTrace | None = None
        self._meter: LoadMeter | None = None
        self._recording = ExitStack()

    def attach(self, trainer: Any) -> ExpertLoadCallback:
        """Puts itself in front of the trainer's callbacks."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._recording.close()
        self.trace = RoutingTrace(model)
        self._meter = LoadMeter(self.trace, max_layers=self._max_layers, prefix=self._prefix)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trace is not None and not self.trace.is_recording:
            self._recording.enter_context(self.trace)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recording.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._recording.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._meter is None or logs is None or "loss" not in logs:
            return
        metrics = self._meter.read()
        logs.update(metrics)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)  # the Trainer has copied the logs there already
        if self._write is not None and metrics and state.is_world_process_zero:
            self._write(metrics, state.global_step)
