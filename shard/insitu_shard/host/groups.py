"""The shard groups of one host: processes that are started and ended as it is told."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from insitu_proto.v1.host_service_pb2 import HostedModel, HostedModelState, HostReport
from insitu_wire.supervised import SupervisedProcess

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A group takes 30 s at most to finish what it runs.
_STOP_SECONDS = 40.0


class HostedGroups:
    """One process a loaded model. What ends by itself is started again."""

    def __init__(self, arguments: Mapping[str, Sequence[str]], *, max_loaded: int) -> None:
        """Makes it, with nothing loaded.

        Args:
            arguments: what the shard group of each model is started with.
            max_loaded: how many there may be at once.
        """
        self.wanted: frozenset[str] = frozenset()
        """The models to have loaded."""
        self._arguments = arguments
        self._max_loaded = max_loaded
        self._processes: dict[str, SupervisedProcess] = {}
        self._end_by: dict[str, float] = {}
        self._problems: dict[str, str] = {}

    def step(self) -> None:
        """Does what can be done now to have what is wanted loaded, and nothing else."""
        for model, process in list(self._processes.items()):
            if model in self._end_by:
                self._see_end(model, process)
            elif model in self.wanted:
                self._keep(model, process)
            else:
                process.terminate()
                self._end_by[model] = time.monotonic() + _STOP_SECONDS
        for model in self._arguments:
            is_missing = model in self.wanted and model not in self._processes
            if is_missing and len(self._processes) < self._max_loaded:
                self._start(model)

    def report(self) -> HostReport:
        """Tells the state of each model."""
        models = [
            HostedModel(
                model=model, state=self._state(model), problem=self._problems.get(model, "")
            )
            for model in self._arguments
        ]
        return HostReport(models=models)

    def stop(self) -> None:
        """Ends all groups, each after it has finished what it runs."""
        for process in self._processes.values():
            process.terminate()
        end_by = time.monotonic() + _STOP_SECONDS
        for process in self._processes.values():
            process.stop(max(0.0, end_by - time.monotonic()))

    def _start(self, model: str) -> None:
        arguments = list(self._arguments[model])
        process = SupervisedProcess("insitu host", "insitu_shard", arguments, float("inf"))
        self._processes[model] = process
        process.start()

    def _keep(self, model: str, process: SupervisedProcess) -> None:
        process.restart_if_ended(f"the shard group of {model}")
        if process.is_paused:
            self._problems[model] = f"its process ended with status {process.process.returncode}"

    def _see_end(self, model: str, process: SupervisedProcess) -> None:
        if process.process.poll() is None and time.monotonic() < self._end_by[model]:
            return
        process.stop(0.0)
        del self._processes[model], self._end_by[model]
        self._problems.pop(model, None)

    def _state(self, model: str) -> HostedModelState.ValueType:
        if model in self._end_by:
            return HostedModelState.HOSTED_MODEL_STATE_UNLOADING
        if model in self._processes or model in self.wanted:
            return HostedModelState.HOSTED_MODEL_STATE_LOADING
        return HostedModelState.HOSTED_MODEL_STATE_UNLOADED
