"""Files are opened in a process beside this one, which may crash, hang or run out of memory without harm.

A damaged file can make a decoder divide by zero, loop for ever or ask for terabytes. So one child process
per worker opens files and sends pixels; it is bounded in memory and in computing time, and a new one takes
its place when it is gone. Opened sources stay open in the child (`KEPT` of them), so a healthy file is
opened once.

    this process                              child (python -m daskcell.images.reader_process)
    SandboxReader.read(level, box)  ----->    Reader.read(level, box)
                                    <-----    pixels, or one sentence
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from multiprocessing.connection import Connection, Pipe
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from daskcell import allocator
from daskcell.errors import DaskcellError, ImageError
from daskcell.geometry import Box
from daskcell.images.joined import SourceReader
from daskcell.images.readers import Reader, is_zarr_folder, kinds
from daskcell.images.shared_buffers import Sheets, possible
from daskcell.images.sources import Source
from daskcell.storage import paths

MEMORY_BYTES = 900 * 2**20
"""What the child may hold. Pictures in one compressed piece that need more are given it (`_allow`)."""
OPEN_SECONDS = 5.0
"""Computing time in which a file must be open."""
READ_SECONDS = 4.0
"""Computing time for a block, besides one second for every `SLOWEST` bytes of it."""
SLOWEST = 2 * 2**20
WALL_SECONDS = 600.0
"""Longest wait for slow storage."""
KEPT = 2
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    **{name: str(size) for name, size in allocator.VARIABLES.items()},
}


class SandboxReader:
    """A `Source` opened in the child; what its reader says of itself is copied here."""

    channels: tuple[str, ...]
    dtype: np.dtype
    notes: tuple[str, ...]

    def __init__(self, source: Source) -> None:
        self.source = source
        self.identity = source.identity()
        vars(self).update(sandbox().ask(self.source, self.identity, None, OPEN_SECONDS))

    def read(self, level: int, box: Box) -> NDArray:
        """Pixels ``(C, h, w)`` of `box`."""
        height, width = box.shape
        size = len(self.channels) * height * width * self.dtype.itemsize
        seconds = OPEN_SECONDS + READ_SECONDS + size / SLOWEST  # it may have to be opened again
        return sandbox().ask(self.source, self.identity, (level, box), seconds, size)

    def close(self) -> None:
        """The child closes what it has not read for a while."""


def open_safely(source: Source) -> Reader:
    """Open `source` in the sandbox; Zarr, and everything where pipes are not POSIX, here.

    The only way to open one: the process that calls this decodes no file.

    Raises
    ------
    ImageError
        If a file cannot be read, channels have different sizes or types, or a channel is not there.
    """
    if os.name != "posix" or all(is_zarr_folder(file) for file in source.files):
        return SourceReader(source)
    return cast(Reader, SandboxReader(source))


class Sandbox:
    """The child process: started when first asked, and again after it was lost."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()
        self._sheets = Sheets()
        self._owner = os.getpid()

    def ask(
        self, source: Source, identity: str, what: tuple[int, Box] | None, seconds: float, size: int = 0
    ) -> Any:
        """The header of `source`, or `size` bytes of pixels of a box, within `seconds` of computing.

        Raises `ImageError` for what the reader refuses, and if the child is lost.
        """
        with self._lock:
            self._start()
            assert self._child is not None
            assert self._pipe is not None
            try:
                sheet = self._lend(size)
                self._pipe.send((source, identity, what, sheet and sheet.path))
                self._wait(seconds, source)
                answer = self._pipe.recv()
                if isinstance(answer, tuple):
                    shape, dtype = answer
                    if sheet is not None:
                        return self._sheets.array(sheet, shape, dtype)
                    return np.frombuffer(self._pipe.recv_bytes(), dtype).reshape(shape)
            except (EOFError, OSError):
                code = self._child.wait()
                self.stop()
                raise ImageError(f"Cannot read {_files(source)}: {_cause(code)}.") from None
            except BaseException:
                self.stop()  # interrupted: an answer on its way must not become that of the next question
                raise
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _lend(self, size: int) -> Any:
        """Shared memory for the pixels; None where there is none left, and they come through the pipe."""
        try:
            return self._sheets.lend(size) if size and possible() else None
        except OSError:
            return None

    def _wait(self, seconds: float, source: Source) -> None:
        """Wait for an answer, as long as the child does not compute too long."""
        import psutil

        assert self._child is not None
        assert self._pipe is not None
        try:
            process = psutil.Process(self._child.pid)
            before = process.cpu_times()
            end = time.monotonic() + WALL_SECONDS + seconds
            while not self._pipe.poll(0.25):
                now = process.cpu_times()
                if now.user + now.system - before.user - before.system > seconds or time.monotonic() > end:
                    self.stop()
                    raise ImageError(f"Cannot read {_files(source)}: decoding it does not come to an end.")
        except psutil.Error:
            return  # it is gone: reading from it says so

    def _start(self) -> None:
        if self._child is not None and self._child.poll() is None:
            return
        self.stop()
        self._pipe, theirs = Pipe()
        environment = dict(os.environ, **ENVIRONMENT)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "daskcell.images.reader_process", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        try:
            self._pipe.recv()  # "ready": starting Python is not counted as opening a file
        except EOFError:
            code = self._child.wait()
            raise DaskcellError(f"The process that opens files could not start (exit code {code}).") from None

    def stop(self) -> None:
        """End the child; the next question starts a new one."""
        if self._pipe is not None:
            self._pipe.close()
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        self._child = self._pipe = None


_sandbox: Sandbox | None = None


def sandbox() -> Sandbox:
    """The sandbox of this process; a fork does not share its parent's."""
    global _sandbox
    if _sandbox is None or _sandbox._owner != os.getpid():
        _sandbox = Sandbox()
        atexit.register(_sandbox.stop)
    return _sandbox


def _files(source: Source) -> str:
    return ", ".join(source.files)


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return "decoding it took more memory than there is"
    return f"damaged, decoding it crashed ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _serve(pipe: Connection) -> None:
    """The child: answer questions until nobody asks any more."""
    base = _limit_memory(0)
    threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
    kept: OrderedDict[str, Reader] = OrderedDict()
    kinds()  # their imports are no part of opening a file
    pipe.send("ready")
    while True:
        try:
            source, identity, what, place = pipe.recv()
        except EOFError:
            return
        try:
            name = f"{source!r} {identity}"
            if name not in kept:
                while len(kept) >= KEPT:
                    kept.popitem(last=False)[1].close()
                _limit_memory(0, base)
                kept[name] = SourceReader(source)
                _allow(source, kept[name], base)
            kept.move_to_end(name)
            reader = kept[name]
            if what is None:
                pipe.send({field: getattr(reader, field) for field in (*Reader.__annotations__, "notes")})
            else:
                pixels = np.ascontiguousarray(reader.read(*what))
                if place is not None:
                    with open(place, "r+b") as shared:
                        shared.write(pixels.data)
                pipe.send((pixels.shape, pixels.dtype))
                if place is None:
                    pipe.send_bytes(pixels.data.cast("B"))
                del pixels  # or it would still be there while the next is read
        except DaskcellError as error:
            pipe.send(type(error)(str(error)))
        except MemoryError:
            pipe.send(
                ImageError(f"Cannot read {_files(source)}: it takes more memory than a worker may have.")
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            pipe.send(ImageError(f"Cannot read {_files(source)}: damaged or not supported ({reason})."))


def _allow(source: Source, reader: Any, base: int) -> None:
    """More memory for a picture that is one large compressed piece and can only be read whole."""
    height, width = reader.piece
    size = height * width * len(reader.channels) * reader.dtype.itemsize
    on_disk = sum(paths.version(file)[0] for file in source.files)
    if size > MEMORY_BYTES // 8 and on_disk * 2000 > size:
        _limit_memory(4 * size, base)


def _limit_memory(more: int, base: int = 0) -> int:
    """Bound the address space to what was mapped at the start (returned), `MEMORY_BYTES` and `more`."""
    try:
        import resource
    except ImportError:  # not on this system
        return 0
    import psutil

    base = base or psutil.Process().memory_info().vms
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = base + MEMORY_BYTES + more
    with contextlib.suppress(ValueError, OSError):  # systems that name the limit but do not keep it
        resource.setrlimit(
            resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
        )
    return base


def _follow_parent(parent: int) -> None:
    """End with the process that asked, even in the middle of a decoder that does not."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


if __name__ == "__main__":
    # The module is imported a second time under its own name, so that both sides pickle the same classes.
    from daskcell.images import reader_process as module

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    module._serve(Connection(int(sys.argv[1])))
