"""Worker processes on this machine: one per core, and one per GPU."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from daskcell.compute.process import CHANGEABLE, THREAD_VARIABLES
from daskcell.config import ComputeSettings
from daskcell.errors import ComputeError, ConfigError

SCRIPT_MARK = "DASKCELL_SCRIPT_MARK"
"""Variable with the path of a file that a child process creates if importing its parent's script calls
daskcell."""
_OURS = ("nanny.pre-spawn-environ", "worker.daemon", "deploy.lost-worker-timeout")


def visible_gpus() -> list[str]:
    """Names for ``CUDA_VISIBLE_DEVICES`` of the GPUs this process may use; raises `ComputeError` for none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ComputeError(
            "A GPU was asked for (compute.kind 'gpu' or compute.device 'cuda'), but none is visible here. "
            "Please run where there is one, or set compute.kind to 'local' and compute.device to 'cpu'."
        )
    listed = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return listed[:count] if len(listed) >= count else [str(number) for number in range(count)]


def local_cluster(settings: ComputeSettings, gpus: list[str], least: int = 0) -> Any:
    """A `distributed.SpecCluster` of nannies; call under `local_settings`. `least` is `share_machine`'s."""
    from distributed import Scheduler, SpecCluster

    count, memory = share_machine(settings, len(gpus), least)
    scheduler = {"host": "127.0.0.1", "port": 0} | dashboard_options(settings.dashboard)
    return SpecCluster(
        workers=_spec(settings.threads, count, gpus, memory),
        scheduler={"cls": Scheduler, "options": scheduler},
        name=f"daskcell-{os.getpid()}",
    )


def share_machine(settings: ComputeSettings, gpus: int, least: int) -> tuple[int, str]:
    """Number of CPU workers, and what each worker may take of the memory.

    Where the settings leave both open, there is a worker for each core, or fewer, so that each has `least`
    bytes.
    """
    import dask.system
    import distributed.system

    total = int(distributed.system.MEMORY_LIMIT * 0.95)
    count = settings.workers or max(1, dask.system.CPU_COUNT // settings.threads)
    if settings.memory != "auto":
        return count, settings.memory
    if settings.workers is None and least:
        count = max(1, min(count, total // least - gpus))
    return count, str(total // (count + gpus))


def _spec(threads: int, count: int, gpus: list[str], memory: str) -> dict[str, dict[str, Any]]:
    from distributed import Nanny

    limits = dict.fromkeys(THREAD_VARIABLES, str(threads))
    common: dict[str, Any] = {
        "host": "127.0.0.1",
        "nthreads": 1,
        "memory_limit": memory,
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
    }
    spec: dict[str, dict[str, Any]] = {}
    for number in range(count):
        # Hidden from CPU workers, so that none takes GPU memory by accident.
        env = limits | ({"CUDA_VISIBLE_DEVICES": ""} if gpus else {})
        labels = {"resources": {"CPU": 1}} if gpus else {}
        spec[f"cpu-{number}"] = {"cls": Nanny, "options": common | labels | {"env": env}}
    for number, gpu in enumerate(gpus):
        env = limits | {"CUDA_VISIBLE_DEVICES": gpu}
        spec[f"gpu-{number}"] = {"cls": Nanny, "options": common | {"resources": {"GPU": 1}, "env": env}}
    return spec


def dashboard_options(address: int | str | None) -> dict[str, Any]:
    """Options of a Dask scheduler: no dashboard, or one on 127.0.0.1 unless `address` names another host."""
    if address is None:
        return {"dashboard": False, "dashboard_address": "127.0.0.1:0"}
    host, colon, port = str(address).rpartition(":")
    if not port.isdigit():
        raise ConfigError(
            f"compute.dashboard is {address!r}, not a port or an address such as 127.0.0.1:8787."
        )
    return {"dashboard": True, "dashboard_address": f"{host if colon else '127.0.0.1'}:{port}"}


def changed_settings(most: int = 8) -> list[str]:
    """Names of Dask settings that a site file, an environment variable or a script has changed."""
    import dask

    def flat(values: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(values, dict):
            return {name: values}
        found: dict[str, Any] = {}
        for key, value in values.items():
            found |= flat(value, f"{name}.{key}".lstrip(".").replace("_", "-"))
        return found

    usual = flat(dask.config.merge(*dask.config.defaults))
    ours = {f"distributed.{name}" for name in _OURS}
    names = [
        name
        for name, value in sorted(flat(dask.config.config).items())
        if name.startswith(("distributed.", "temporary-directory")) and usual.get(name) != value
        and not any(name.startswith(own) for own in ours)
    ]  # fmt: skip
    return names[:most] + (["..."] if len(names) > most else [])


@contextlib.contextmanager
def local_settings(threads: int) -> Iterator[None]:
    """Dask's settings for nannies of this process, on top of the user's; restored on leaving.

    A nanny sets variables in this process's own environment, for its children. If they stayed there, every
    process started later would inherit them: ``DASK_LOGGING__DISTRIBUTED`` would silence all jobs.
    """
    import dask

    # Set before the process starts: libraries read these once, when they load.
    early = dict(dask.config.get("distributed.nanny.pre-spawn-environ"))
    early |= dict.fromkeys(CHANGEABLE, str(threads)) | {"DASK_LOGGING__DISTRIBUTED": "critical"}
    changed = {
        "distributed.nanny.pre-spawn-environ": early,
        "distributed.worker.daemon": False,
        # A process that starts again imports torch first, which takes long on a busy machine.
        "distributed.deploy.lost-worker-timeout": "2 minutes",
    }
    names = {*early, "PYTHONHASHSEED", "__DASK_PARENT_PID", SCRIPT_MARK}
    before = {name: os.environ.get(name) for name in names}
    try:
        with dask.config.set(changed), tempfile.TemporaryDirectory(prefix="daskcell-") as folder:
            os.environ[SCRIPT_MARK] = os.path.join(folder, "unguarded")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
