"""Readers of microscope files: one small protocol, and a module for each kind of file.

A reader is opened on the worker that reads and is never pickled. Which reader opens a file is decided by the
file's content, in this order: readers registered by other packages under the entry point group
``daskcell.readers`` (modules or objects like `Kind`), then the ones here and those of `extras`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from daskcell.errors import DaskcellError, ImageError, warn
from daskcell.geometry import Box
from daskcell.storage import paths

ZChoice = int | Literal["max"]


class MissingScene(ImageError):
    """One of the images of a file is missing; others may exist."""


@runtime_checkable
class Reader(Protocol):
    """One image, opened: ``(C, Y, X)`` at one time point and one plane (or the maximum over planes)."""

    name: str
    axes: str
    """Axes of the file, such as ``TCZYX``; S are the samples of a colour image."""
    levels: tuple[tuple[int, int], ...]
    """Height and width of every level in the file, the largest first."""
    channels: tuple[str, ...]
    pixel_size: tuple[float, float] | None
    """``(y, x)`` in micrometres at the first level, where the file says."""
    dtype: np.dtype
    is_rgb: bool
    sizes: dict[str, int]
    """Number of time points and planes: ``{"t": 1, "z": 1}``."""
    files: tuple[str, ...]
    """All files that are read (real paths or URLs): several if one refers to others."""
    scenes: tuple[str, ...]
    """Names of all images that the file holds (scenes, positions, series), empty for those without; this is
    one of them. Readers of other packages may omit it."""
    piece: tuple[int, int]
    """Height and width of the tiles or strips of the file: reads should be multiples of them."""

    def read(self, level: int, box: Box) -> NDArray:
        """Pixels ``(C, h, w)`` of `box`, which lies inside the level."""
        ...

    def close(self) -> None: ...


class Kind(Protocol):
    """A kind of file; modules serve as kinds.

    A kind may also have ``may_be_stack(path) -> bool``, which quickly says (False) that a file is one plane
    at one time; without it, files are opened to know. Where ``TAKES_AXES`` is true, ``open`` takes ``axes``,
    the order of the axes as the settings say it, for files that do not. Where its readers name several
    `Reader.scenes`, ``open`` must take ``scene``, the position of the one to read. A reader may have
    ``notes``: sentences about what it assumes.
    """

    SUFFIXES: tuple[str, ...]

    def matches(self, path: str, head: bytes) -> bool: ...

    def open(self, path: str, *, t: int = 0, z: ZChoice = "max") -> Reader: ...


@cache
def kinds() -> tuple[Any, ...]:
    """All kinds of files that can be read; those of other packages come first."""
    from daskcell.images.readers import array, extras, omezarr, raster, tiff

    registered = []
    for point in entry_points(group="daskcell.readers"):
        try:
            registered.append(point.load())
        except Exception as error:  # of another package: what it would read is not read, all else is
            message = f"The reader '{point.name}' ({point.value}) cannot be used: {error}."
            warn(message, UserWarning)
    return (*registered, omezarr, array, tiff, *extras.KINDS, raster)


@cache
def suffixes() -> tuple[str, ...]:
    """Suffixes of the files that are looked for in folders; a file that is named may have any."""
    return tuple(suffix for kind in kinds() for suffix in getattr(kind, "SUFFIXES", ()))


def may_be_stack(path: str) -> bool:
    """Whether a file may hold several scenes, times or planes; by its name or first bytes."""
    for kind in kinds():
        if path.lower().endswith(tuple(kind.SUFFIXES)):
            look = getattr(kind, "may_be_stack", None)
            return look is None or bool(look(path))
    return True


def open_reader(
    path: str | Path, *, t: int = 0, z: ZChoice = "max", axes: str | None = None, scene: int = 0
) -> Reader:
    """Open a file (or OME-Zarr folder) for reading; of several images in it the one at position `scene`.

    Raises
    ------
    ImageError
        One sentence: which file, and why it cannot be read.
    """
    path = os.fspath(path)
    kind = _kind_of(path)
    chosen: dict[str, Any] = {"scene": scene} if scene else {}
    if axes is not None and getattr(kind, "TAKES_AXES", False):
        chosen["axes"] = axes
    return guarded(path, partial(kind.open, path, t=t, z=z, **chosen))


def is_zarr_folder(path: str) -> bool:
    """Whether `path` is a folder that is opened by the readers of Zarr here, not by another package's."""
    from daskcell.images.readers import array, omezarr

    return paths.is_folder(path) and omezarr.is_zarr(path) and _kind_of(path) in (omezarr, array)


def _kind_of(path: str) -> Any:
    head = _head(path)
    for kind in kinds():
        if kind.matches(path, head):
            return kind
    raise ImageError(f"Cannot read {path}: {_what(path, head)}.")


def guarded(path: str, action: Callable[[], Any]) -> Any:
    """Run `action`; errors of codecs are raised as `ImageError` that names the file."""
    try:
        return action()
    except DaskcellError:
        raise
    except MemoryError:
        raise ImageError(f"Cannot read {path}: it takes more memory than there is.") from None
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
    ) as error:  # of a parser that met nonsense
        raise ImageError(f"Cannot read {path}: damaged, its structure makes no sense.") from error
    except Exception as error:
        if paths.is_remote(path) and paths.is_transport_error(error):
            with paths.remote_errors(path):
                raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"Cannot read {path}: damaged or not supported ({reason}).") from error


def _head(path: str) -> bytes:
    try:
        return paths.read_head(path, 512)
    except OSError as error:
        raise ImageError(f"Cannot read {path}: {paths.why_unreadable(path, error)}.") from None


def _what(path: str, head: bytes) -> str:
    if paths.is_folder(path):
        return "the folder is not an OME-Zarr image"
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the image itself (run 'git lfs pull')"
    if not any(head):
        return "it begins with nothing but zeros and is no image"
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed with gzip; please unpack it"
    if head.startswith(b"PK"):
        return "it is a zip archive; please unpack it"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is a web page (perhaps an error page of a download), not an image"
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        return "it is a text file, not an image"
    return "it is no kind of image daskcell knows (TIFF, PNG, JPEG, OME-Zarr)"
