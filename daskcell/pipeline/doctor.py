"""Finds what would stop a run, before it is started: one line per check.

Checks versions, GPUs, weights, disks and ports of this machine; with jobs or a scheduler in the settings it
also asks for a worker of every kind and checks the same there. It writes one file in the output folder and
removes it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from daskcell.config import HERE, QUEUES, Config
from daskcell.errors import DaskcellError

SHOWN = ("dask", "distributed", "zarr", "torch")
"""Packages whose versions are compared between this machine and the workers, besides daskcell's own."""
_LITTLE_BYTES = 10e9
_LOCAL_SYSTEMS = {"btrfs", "ext2", "ext3", "ext4", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `text` of a warning or a failure says what to do."""

    about: str
    verdict: Literal["ok", "warn", "fail"]
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:<5} {self.about:<9} {self.text}"


def examine(config: Config, out: Path | None = None, *, ask: bool = True) -> Iterator[Finding]:
    """All checks, each as soon as it is made.

    Parameters
    ----------
    config
        Settings of the run to come.
    out
        Its output folder; None: not looked at.
    ask
        Whether to ask for workers where the settings name a queue or a scheduler (`compute.wait` seconds at
        most, two minutes where that is not set).
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        _versions,
        lambda: _gpus(config),
        lambda: _weights(config),
        lambda: _disks(config, out),
        lambda: _network(config),
    ]
    if ask and config.compute.kind not in HERE:
        checks.append(lambda: _workers(config, out))
    for check in checks:
        yield from check()


def installed() -> dict[str, str]:
    """Versions that must agree between this machine and the workers."""
    found = {"python": platform.python_version()}
    for name in ("daskcell", *SHOWN):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# -- this machine --------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    wrong = []
    for line in metadata.requires("daskcell") or []:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            version = ""
        if not version or not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed.name}{needed.specifier} (here: {version or 'none'})")
    if wrong:
        yield Finding("versions", "fail", f"daskcell needs {', '.join(wrong)}. Please install it anew.")
    else:
        yield Finding("versions", "ok", _listing(installed()))


def _gpus(config: Config) -> Iterator[Finding]:
    from daskcell.compute import visible_gpus

    compute = config.compute
    wanted = compute.network_device == "cuda"
    here = wanted and compute.kind in HERE
    try:
        names = visible_gpus()
    except DaskcellError as error:
        if here:
            yield Finding("GPU", "fail", str(error))
        else:
            where = "looked for on the workers" if wanted else "not needed (compute.device is cpu)"
            yield Finding("GPU", "ok", f"none here; {where}")
        return
    import torch

    try:
        for number in range(len(names)):
            torch.ones(8, 8, device=f"cuda:{number}").sum().item()
        kinds = {torch.cuda.get_device_name(number) for number in range(len(names))}
        text = f"{len(names)} here ({', '.join(sorted(kinds))})"
        yield Finding("GPU", "ok", text if wanted else f"{text}, not used: compute.kind 'gpu' would")
    except RuntimeError as error:
        yield Finding("GPU", "fail" if here else "warn", f"{error}. Please check the driver.".splitlines()[0])


def _weights(config: Config) -> Iterator[Finding]:
    from daskcell.pipeline import fingerprints
    from daskcell.pipeline.stages import STAGES

    try:
        found = fingerprints(config)
        damaged = _damaged_encoder(config.features.encoder)
    except DaskcellError as error:
        yield Finding("weights", "fail", str(error))
        return
    if damaged is not None:
        yield Finding("weights", "fail", damaged)
        return
    named = ((name, stage.files(config)) for name, stage in STAGES.items())
    texts = [f"{files.name} {found[name][:8]}" for name, files in named if files and files.name]
    yield Finding("weights", "ok", f"{', '.join(texts)} (sha256)")
    yield from _emulated(config)


def _emulated(config: Config) -> Iterator[Finding]:
    """Networks that are to compute in what this processor lacks."""
    from daskcell.models.precision import has_bfloat16
    from daskcell.pipeline.stages import DESCRIBE, SEGMENT

    if config.compute.network_device != "cpu" or has_bfloat16("cpu"):
        return
    settings = {"segment.precision": SEGMENT, "features.precision": DESCRIBE}
    names = [name for name, stage in settings.items() if stage.precision(config) == "bfloat16"]
    if names:
        text = "this processor emulates bfloat16, some ten times slower than float32. Please set "
        yield Finding("precision", "warn", f"{text}{' and '.join(names)} to float32.")


def _damaged_encoder(name: str) -> str | None:
    """What is wrong with a file whose name holds the beginning of its hash, as torchvision's do."""
    from daskcell.models.registry import find_encoder

    path = find_encoder(name)
    expected = re.search(r"-([0-9a-f]{8,})\.pth$", path.name)
    if expected is None:
        return None
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest().startswith(expected[1]):
            return None
    return f"{path} is damaged. Please remove it and run 'daskcell weights fetch {name}'."


def _disks(config: Config, out: Path | None) -> Iterator[Finding]:
    import dask

    scratch = Path(dask.config.get("temporary-directory", None) or tempfile.gettempdir())
    yield _room("scratch", scratch)
    if out is None:
        return
    yield _room("room", out)
    try:
        with _token(out):
            yield Finding("output", "ok", f"{out} can be written to")
    except OSError as error:
        yield Finding("output", "fail", f"{out} cannot be written to ({error.strerror}).")
        return
    if config.compute.kind in QUEUES:
        system = file_system(out)
        if system in _LOCAL_SYSTEMS:
            text = f"{out} is on {system}, most often one machine's own. Please check that all nodes see it."
            yield Finding("output", "warn", text)
        else:
            yield Finding("output", "ok", f"{out} is on {system}, as the nodes may see it")


def _room(about: str, folder: Path) -> Finding:
    existing = _existing(folder)
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:.0f} GB free in {folder}"
    if free < _LITTLE_BYTES:
        return Finding(about, "warn", f"{text}, which is little. Please make room, or choose another.")
    return Finding(about, "ok", text)


def _network(config: Config) -> Iterator[Finding]:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
        yield Finding("ports", "ok", "127.0.0.1 can be listened on and reached")
    except OSError as error:
        yield Finding("ports", "fail", f"127.0.0.1 cannot be listened on and reached ({error}).")
    name = config.compute.jobs.interface
    if config.compute.kind in QUEUES and name is not None:
        from distributed.utils import get_ip_interface

        try:
            yield Finding("interface", "ok", f"{name} is {get_ip_interface(name)}")
        except ValueError as error:
            yield Finding("interface", "fail", f"compute.jobs.interface: {error}")


# -- the workers ---------------------------------------------------------------------------------------


def _workers(config: Config, out: Path | None) -> Iterator[Finding]:
    """One job of every kind, or all workers of a scheduler."""
    from daskcell.compute import start_workers

    compute = config.compute
    one = {"count": 1, "minimum": 1}
    changes: dict[str, Any] = {
        "wait": compute.wait or 120.0,
        "jobs": compute.jobs.model_copy(update=one),
        "gpu_jobs": compute.gpu_jobs and compute.gpu_jobs.model_copy(update=one),
    }
    about = "jobs" if compute.kind in QUEUES else "scheduler"
    try:
        with (
            _token(out) if out is not None else contextlib.nullcontext() as token,
            start_workers(compute.model_copy(update=changes)) as workers,
        ):
            client: Any = workers.client
            answers = client.run(look_around, str(token) if token else None, on_error="return")
            labels = {
                address: "".join(worker.get("resources") or {})
                for address, worker in client.scheduler_info(n_workers=-1)["workers"].items()
            }
            yield Finding(about, "ok", f"{compute.kind} gave {len(answers)} worker{'s' * (len(answers) > 1)}")
            for address, answer in answers.items():
                yield _judge(f"{labels.get(address, '')} {address}".strip(), answer)
    except DaskcellError as error:
        yield Finding(about, "fail", str(error))
    except OSError as error:
        yield Finding(about, "fail", f"{out} cannot be written to ({error.strerror}).")


def _judge(worker: str, answer: Any) -> Finding:
    if isinstance(answer, BaseException):
        return Finding("worker", "fail", f"{worker}: {answer}. Is daskcell installed there?")
    own, theirs = installed(), answer["versions"]
    differ = {name: theirs.get(name) for name in own if theirs.get(name) != own[name]}
    if differ:
        text = f"{worker} on {answer['host']} has {_listing(differ)}, here is {_listing(own)}."
        return Finding("worker", "fail", f"{text} Please use one environment for all.")
    if answer["sees_output"] is False:
        text = f"{worker} on {answer['host']} does not see the output folder. Please choose one that all see."
        return Finding("worker", "fail", text)
    sees = ", sees the output folder" if answer["sees_output"] else ""
    gpu = f", {answer['gpu']}" if answer["gpu"] else ""
    return Finding("worker", "ok", f"{worker} on {answer['host']}: same versions{sees}{gpu}")


def look_around(token: str | None) -> dict[str, Any]:
    """What a worker tells of its own machine; `token` is a file it should find there."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    sees = None if token is None else os.path.isfile(token)
    return {"host": socket.gethostname(), "versions": installed(), "gpu": gpu, "sees_output": sees}


# -- small things --------------------------------------------------------------------------------------


def file_system(path: Path) -> str:
    """Kind of the file system that `path` is on or would be, such as ``ext4`` or ``lustre``."""
    where = os.path.realpath(_existing(path))
    best, kind = "", "unknown"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            mount, system = line.split()[1:3]
            mount = mount.encode().decode("unicode_escape")  # blanks are written as \040
            inside = os.path.commonpath([mount, where]) == mount if mount.startswith("/") else False
            if inside and len(mount) >= len(best):
                best, kind = mount, system
    return kind


@contextlib.contextmanager
def _token(folder: Path) -> Iterator[Path]:
    """A file in `folder`, or where it would be made; written under another name first, as results are."""
    path = _existing(folder) / f".daskcell-doctor-{secrets.token_hex(4)}"
    try:
        path.with_suffix(".tmp").write_bytes(b"daskcell")
        path.with_suffix(".tmp").rename(path)
        yield path
    finally:
        path.unlink(missing_ok=True)
        path.with_suffix(".tmp").unlink(missing_ok=True)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _listing(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
