"""Files are opened and decoded in a child process, which may crash, hang or run out of memory without harm.

A damaged file can make a decoder divide by zero, loop forever or allocate terabytes. So each worker has one
child that opens files and sends pixels. Its memory and CPU time are limited, and a new one is started when it
has died. Up to `KEPT` sources stay open in the child, so that each is opened once. This protects against
damaged files, not against malicious ones: what the child sends is unpickled here.

    this process                              child (python -m daskcell.images.reader_process)
    ProcessReader.read(level, box)  ----->    Reader.read(level, box)
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
from daskcell.images.shared_buffers import BufferPool, is_available
from daskcell.images.sources import Source
from daskcell.storage import paths

MEMORY_BYTES = 900 * 2**20
"""Memory limit of the child. Raised for images in one compressed piece that need more (`_allow`)."""
OPEN_SECONDS = 5.0
"""CPU time in which a file must be open."""
READ_SECONDS = 4.0
"""CPU time for a block, besides one second for every `SLOWEST` bytes of it."""
SLOWEST = 2 * 2**20
WALL_SECONDS = 600.0
"""Longest wait for slow storage."""
KEPT = 2
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    **{name: str(size) for name, size in allocator.VARIABLES.items()},
}


class ProcessReader:
    """A `Source` that is open in the child; the attributes of its reader are copied here."""

    channels: tuple[str, ...]
    dtype: np.dtype
    notes: tuple[str, ...]

    def __init__(self, source: Source) -> None:
        self.source = source
        self.identity = source.identity()
        vars(self).update(get_reader_process().ask(self.source, self.identity, None, OPEN_SECONDS))

    def read(self, level: int, box: Box) -> NDArray:
        """Pixels ``(C, h, w)`` of `box`."""
        height, width = box.shape
        size = len(self.channels) * height * width * self.dtype.itemsize
        seconds = OPEN_SECONDS + READ_SECONDS + size / SLOWEST  # it may have to be opened again
        return get_reader_process().ask(self.source, self.identity, (level, box), seconds, size)

    def close(self) -> None:
        """Nothing to do: the child closes the sources that it has not read for longest."""


def open_safely(source: Source) -> Reader:
    """Open `source` in the child process; Zarr, and everything on systems that are not POSIX, in this one.

    The only way to open one: the calling process decodes no file.

    Raises
    ------
    ImageError
        If a file cannot be read, channels have different sizes or types, or a channel is not there.
    """
    if os.name != "posix" or all(is_zarr_folder(file) for file in source.files):
        return SourceReader(source)
    return cast(Reader, ProcessReader(source))


class ReaderProcess:
    """The child process: started by the first request, and again after it has died."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()
        self._buffers = BufferPool()
        self._owner = os.getpid()

    def ask(
        self, source: Source, identity: str, what: tuple[int, Box] | None, seconds: float, size: int = 0
    ) -> Any:
        """The attributes of `source`, or `size` bytes of pixels of a box, within `seconds` of CPU time.

        Raises `ImageError` for what the reader refuses, and if the child dies.
        """
        with self._lock:
            self._start()
            assert self._child is not None
            assert self._pipe is not None
            try:
                buffer = self._acquire(size)
                self._pipe.send((source, identity, what, buffer and buffer.path))
                self._wait(seconds, source)
                answer = self._pipe.recv()
                if isinstance(answer, tuple):
                    shape, dtype = answer
                    if buffer is not None:
                        return self._buffers.array(buffer, shape, dtype)
                    return np.frombuffer(self._pipe.recv_bytes(), dtype).reshape(shape)
            except (EOFError, OSError):
                code = self._child.wait()
                self.stop()
                raise ImageError(f"Cannot read {_files(source)}: {_cause(code)}.") from None
            except BaseException:
                self.stop()  # interrupted: the pending answer must not become that of the next request
                raise
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _acquire(self, size: int) -> Any:
        """Shared memory for the pixels; None if there is none, and they are sent through the pipe."""
        try:
            return self._buffers.acquire(size) if size and is_available() else None
        except OSError:
            return None

    def _wait(self, seconds: float, source: Source) -> None:
        """Wait for an answer; end the child if it takes more CPU time than allowed."""
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
            return  # the child has died, which the next read reports

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
        """End the child; the next request starts a new one."""
        if self._pipe is not None:
            self._pipe.close()
        if self._child is not None and self._owner == os.getpid() and self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        self._child = self._pipe = None


_process: ReaderProcess | None = None


def get_reader_process() -> ReaderProcess:
    """The child of this process; after a fork, a new one."""
    global _process
    if _process is None or _process._owner != os.getpid():
        _process = ReaderProcess()
        atexit.register(_process.stop)
    return _process


def _files(source: Source) -> str:
    return ", ".join(source.files)


def _cause(code: int) -> str:
    if code == -signal.SIGKILL:
        return "decoding it took more memory than there is"
    return f"damaged, decoding it crashed ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _serve(pipe: Connection) -> None:
    """In the child: answer requests until the pipe is closed."""
    base = _limit_memory(0)
    threading.Thread(target=_follow_parent, args=(os.getppid(),), daemon=True).start()
    kept: OrderedDict[str, Reader] = OrderedDict()
    kinds()  # their imports do not count as opening a file
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
    """Allow more memory for an image that is one large compressed piece, which can only be decoded whole."""
    height, width = reader.piece
    size = height * width * len(reader.channels) * reader.dtype.itemsize
    on_disk = sum(paths.version(file)[0] for file in source.files)
    if size > MEMORY_BYTES // 8 and on_disk * 2000 > size:
        _limit_memory(4 * size, base)


def _limit_memory(more: int, base: int = 0) -> int:
    """Limit the address space to what was mapped at the start (returned), `MEMORY_BYTES` and `more`."""
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
    """End with the parent process, even while a decoder hangs."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


if __name__ == "__main__":
    # The module is imported a second time under its own name, so that both sides pickle the same classes.
    from daskcell.images import reader_process as module

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    module._serve(Connection(int(sys.argv[1])))
