"""One run at a time on a study: a lock file with an owner and a heartbeat.

The file is created by a hard link, which is atomic on shared file systems too, and its owner touches it
regularly. A lock is stale if its owner was a process of this host that has ended, or if it was not touched
for `STALE_SECONDS`. A stale lock is removed under a guard (a folder, which only one process can create),
and only if it is still the same one: of two processes that find it stale, the later finds a new lock and is
refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from daskcell.errors import StudyError

BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0


class Lock:
    """Holds ``<folder>/.lock`` while entered; raises `StudyError` if another run holds it."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / ".lock"
        self.token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = False
        """Whether another run took the lock, because this one did not touch it (on a suspended machine)."""

    def __enter__(self) -> Lock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(100):
            if self._create():
                self._thread = threading.Thread(target=self._beat, name="study lock", daemon=True)
                self._thread.start()
                return self
            holder = self._read()
            if holder is not None and not _is_ours(holder):
                raise StudyError(
                    f"{self.path} was not written by daskcell, which keeps a lock of that name. Please "
                    "remove it if no other run is at work, or choose another folder."
                )
            if holder is not None and not self._is_stale(holder):
                raise StudyError(
                    f"Another run works on {self.path.parent} (process {holder.get('pid')} on "
                    f"{holder.get('host')}). Please wait until it ends, or stop it."
                )
            self._break(holder)
        raise StudyError(
            f"The lock {self.path} cannot be taken. Please remove it if no other run is at work."
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        holder = self._read()
        if holder is not None and holder.get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise `StudyError` if the lock is no longer ours."""
        if self.lost:
            raise StudyError(
                f"Another run took over {self.path.parent} while this one was suspended; this one stops."
            )

    def _create(self) -> bool:
        values = {
            "token": self.token,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "born": _born(os.getpid()),
        }
        # Written under another name and linked, so that no process reads a half-written lock.
        mine = self.path.with_name(f".lock-{self.token}")
        mine.write_text(json.dumps(values))
        try:
            os.link(mine, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with open(self.path, "x") as stream:
                    stream.write(json.dumps(values))
            except FileExistsError:
                return False
        finally:
            mine.unlink(missing_ok=True)
        return True

    def _read(self) -> dict[str, Any] | None:
        try:
            values = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def _is_stale(self, holder: dict[str, Any]) -> bool:
        if holder.get("host") == socket.gethostname() and isinstance(holder.get("pid"), int):
            # A process number may be used again, by a process that started at another time.
            return _born(holder["pid"]) is None or _born(holder["pid"]) != holder.get("born")
        try:
            age = self._now() - self.path.stat().st_mtime
        except FileNotFoundError:
            return True
        return age > STALE_SECONDS

    def _now(self) -> float:
        """The time by the clock of the file system, which may differ from that of this host."""
        probe = self.path.with_name(f".lock-{self.token}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _break(self, holder: dict[str, Any] | None) -> None:
        """Remove the stale lock of `holder`, one process at a time."""
        if holder is None:
            return
        guard = self.path.with_name(".lock-breaking")
        try:
            guard.mkdir()
        except FileExistsError:
            with contextlib.suppress(OSError):
                if (
                    self._now() - guard.stat().st_mtime > STALE_SECONDS
                ):  # the process that made it died meanwhile
                    guard.rmdir()
            time.sleep(0.05)
            return
        try:
            if self._read() == holder:
                self.path.unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):
                guard.rmdir()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            holder = self._read()
            if holder is None or holder.get("token") != self.token:
                self.lost = True
                return
            try:
                os.utime(self.path)
            except OSError:
                time.sleep(1)


def holder(folder: str | Path) -> dict[str, Any] | None:
    """The content of the lock of a run that works on a folder now; None if there is none."""
    lock = Lock(folder)
    found = lock._read()
    return found if found and _is_ours(found) and not lock._is_stale(found) else None


def _is_ours(holder: dict[str, Any]) -> bool:
    return {"token", "pid", "host"} <= holder.keys()


def _born(pid: int) -> str | None:
    """Start time of a process of this host, in ticks since boot; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:  # no /proc (macOS): only whether it is alive can be found out
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "alive"
    return "alive"
