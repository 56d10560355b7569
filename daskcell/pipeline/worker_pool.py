"""The workers of a run: started when they are needed, and the number of slides to drive at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from daskcell.compute import Workers, start_workers
from daskcell.compute.task_queue import owner_of
from daskcell.config import HERE, QUEUES, ComputeSettings, Config
from daskcell.segmentation.memory import needed_memory, refuse_too_little_memory, settings_halo
from daskcell.study import sweep

if TYPE_CHECKING:
    from pathlib import Path

_AT_ONCE = (2, 16)
"""Fewest slides, so that the serial steps of one do not leave the workers idle; and most, since one process
cannot drive more."""


class WorkerPool:
    """Workers that are started when they are first needed: continuing a finished study needs none.

    Parameters
    ----------
    out
        Folder of the study: its tasks are told from those of other runs.
    client
        As given to `run`.
    stack
        Ends the workers.
    on_task
        Called after every task.
    notify
        Called with sentences about the workers.
    is_small
        Whether all work is so little that ``auto`` means this process.
    """

    def __init__(
        self,
        out: Path,
        client: Any,
        config: Config,
        stack: contextlib.ExitStack,
        on_task: Callable[[], None],
        notify: Callable[[str], None] | None = None,
        is_small: Callable[[], bool] = lambda: False,
    ):
        self._client, self._config, self._stack, self._on_task = client, config, stack, on_task
        self._out, self._notify, self._is_small = out, notify, is_small
        self._workers: Workers | None = None

    @property
    def started(self) -> bool:
        """Whether any work was begun."""
        return self._workers is not None

    def get(self) -> Workers:
        if self._workers is None:
            config, seconds = self._config, self._config.compute.task_seconds
            name = f"daskcell-{owner_of(self._out)}"  # several runs may share workers
            memory = comfortable_memory(config)
            start = start_workers(self._compute(), self._notify, memory, self._client, name)
            workers = self._stack.enter_context(start).watched(self._on_task, seconds)
            refuse_small_workers(workers, config, given=self._client is not None)
            self._workers = workers.claim(self._out, self._notify)
            sweep(self._out)
        return self._workers

    def _compute(self) -> ComputeSettings:
        """The settings, with a kind in place of ``auto``: starting workers takes longer than little work."""
        compute = self._config.compute
        if self._client is not None or compute.kind != "auto":
            return compute
        here = compute.workers is None and compute.network_device == "cpu" and self._is_small()
        return compute.model_copy(update={"kind": "inline" if here else "local"})


def refuse_small_workers(workers: Workers, config: Config, *, given: bool = False) -> None:
    """Raise `ComputeError` if the blocks of `config` do not fit its workers, or `given` ones."""
    kind, setting = config.compute.kind, "compute.memory"
    if given or kind not in (*QUEUES, *HERE):
        setting = "the memory limit of your Dask workers"
    elif kind in QUEUES:
        setting = "compute.jobs.memory"
    refuse_too_little_memory(
        workers.memory, config.compute.block, networks_bytes(config), setting, settings_halo(config.segment)
    )


def networks_bytes(config: Config) -> int:
    """Size of the files of the networks that every worker loads; none where those with a GPU do."""
    from daskcell.models import find_encoder, find_network

    if config.compute.network_device != "cpu":
        return 0
    files = [find_encoder(config.features.encoder)]
    if config.segment.method == "cellpose":
        files.append(find_network(config.segment.model))
    return sum(file.stat().st_size for file in files)


def comfortable_memory(config: Config) -> int:
    """Bytes for each worker of this machine: more than it needs itself, since it has a process that opens its
    files, and Dask pauses workers at 0.8 of their limit."""
    halo = settings_halo(config.segment)
    return int(1.5 * needed_memory(config.compute.block, networks_bytes(config), halo))


def slides_at_once(workers: Workers, blocks: int) -> int:
    """How many slides of `blocks` blocks to drive at a time: enough to give all workers a few tasks."""
    if workers.client is None:
        return 1
    fewest, most = _AT_ONCE
    return min(max(fewest, -(-2 * workers.count // blocks)), most)
