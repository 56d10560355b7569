"""Local and remote paths (``s3://bucket/key``), read alike; remote ones through fsspec.

A path with ``://`` is remote. Credentials and endpoints come from fsspec's own configuration (variables such
as ``FSSPEC_S3_ENDPOINT_URL``, or ``~/.config/fsspec``), which every process reads for itself: none of it is
sent to workers. Listings are never cached, since other processes may write at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from daskcell.errors import DaskcellError, ImageError, StudyError

BLOCK_BYTES = 2**18
"""Bytes that are fetched at once where a few are needed, such as the directory of a TIFF file."""
BLOCKS_KEPT = 64
GAP_BYTES = 2**17
"""Ranges closer than this are one request, which takes longer than this many bytes."""
RANGE_BYTES = 2**23
"""Longer ranges are fetched in parts, at the same time."""
REQUESTS_AT_ONCE = 16
"""Remote files that are looked at together."""

ZARR_NAMES = ("zarr.json", ".zgroup", ".zattrs", ".zarray")
"""Metadata files, one of which lies in every group and array of Zarr."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_PACKAGES = {
    "s3": "'daskcell[s3]'",
    "s3a": "'daskcell[s3]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
} | dict.fromkeys(("http", "https"), "'daskcell[http]'")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a URL rather than a path on disk."""
    return "://" in os.fspath(path)


def refuse_remote(path: str | os.PathLike[str], what: str) -> None:
    """Raise `StudyError` for a URL (also one that `pathlib` has shortened) where only the disk will do."""
    if _SCHEME.match(os.fspath(path)):
        raise StudyError(
            f"{path} is on object storage, but {what} must be a folder on disk, since it is locked and its "
            "files are renamed. Please name one, and copy it afterwards."
        )


def absolute(path: str | os.PathLike[str]) -> str:
    """`path` independent of the current folder; ``file://`` becomes a path on disk."""
    text = os.fspath(path)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return text.rstrip("/") if is_remote(text) else os.path.abspath(text)


def store(path: str | os.PathLike[str]) -> str | Path:
    """`path` as zarr needs it: in a string it takes ``::`` for a chain of file systems."""
    return os.fspath(path) if is_remote(path) else Path(path)


def join(folder: str, *names: str) -> str:
    """A path below `folder`."""
    return "/".join([folder.rstrip("/"), *names]) if is_remote(folder) else os.path.join(folder, *names)


def printable(text: str) -> str:
    """`text` with the bytes of file names that are not UTF-8 as escapes, such as ``\\xff``."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def split(path: str) -> tuple[str, str]:
    """The folder of `path`, and its name in there."""
    if not is_remote(path):
        return os.path.split(path)
    folder, _, name = path.rstrip("/").rpartition("/")
    return folder, name


def realpath(path: str) -> str:
    """`path` with links resolved, so that two names of one file are equal."""
    return path if is_remote(path) else os.path.realpath(path)


def exists(path: str) -> bool:
    """Whether there is a file or folder."""
    if not is_remote(path):
        return os.path.exists(path)
    with remote_errors(path):
        fs, inner = _at(path)
        return bool(fs.exists(inner)) or (_is_web(path) and is_folder(path))


def is_folder(path: str) -> bool:
    """Whether `path` is a folder; on object storage, whether keys begin with it and a slash.

    A web server has only files: there, what holds metadata of Zarr counts as a folder.
    """
    if not is_remote(path):
        return os.path.isdir(path)
    if _is_web(path):
        return bool(holding(path, ZARR_NAMES, most=1))
    with remote_errors(path):
        fs, inner = _at(path)
        try:
            return bool(fs.info(inner)["type"] == "directory")
        except FileNotFoundError:
            return False


def children(folder: str) -> set[str]:
    """Names of the files and folders in `folder`; empty if there is no such folder."""
    if not is_remote(folder):
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()
    with remote_errors(folder):
        fs, inner = _at(folder)
        try:
            found = fs.ls(inner, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {PurePath(name).name for name in found if name.rstrip("/") != inner.rstrip("/")}


def holding(folder: str, names: Sequence[str], most: int | None = None) -> set[str]:
    """Those of `names` that exist in `folder`, or the first `most` of them. Where a folder cannot be listed
    (on a web server), each is a request.
    """
    if not _is_web(folder):
        return children(folder) & set(names)
    found: set[str] = set()
    with remote_errors(folder):
        for name in names:
            fs, inner = _at(join(folder, name))
            if fs.exists(inner):
                found.add(name)
            if len(found) == most:
                break
    return found


def walk(
    folder: str, failed: Callable[[str, OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk` from the top: folders that the caller removes from the list are not searched.

    Links to folders are followed, except to a folder above; each real folder is searched once. `failed` is
    called with a folder that cannot be listed.
    """
    if not is_remote(folder):
        yield from _walk_here(folder, failed)
        return
    with remote_errors(folder):
        names = _ls(folder)
    folders = sorted(name for name, one in names.items() if one["type"] == "directory")
    yield folder, folders, sorted(name for name, one in names.items() if one["type"] != "directory")
    for name in folders:
        yield from walk(join(folder, name))


def _walk_here(
    root: str, failed: Callable[[str, OSError], None] | None
) -> Iterator[tuple[str, list[str], list[str]]]:
    top = os.path.realpath(root)
    seen: set[str] = set()
    waiting, links = [root], deque[str]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()  # so that real paths come first
        real_path = os.path.realpath(folder)
        if real_path in seen or (real_path != top and os.path.commonpath((real_path, top)) == real_path):
            continue
        seen.add(real_path)
        try:
            with os.scandir(folder) as entries:
                found = sorted((one.name, os.path.isdir(one.path), one.is_symlink()) for one in entries)
        except OSError as error:
            if failed is not None:
                failed(folder, error)
            continue
        folders = [name for name, is_dir, _ in found if is_dir]
        yield folder, folders, [name for name, is_dir, _ in found if not is_dir]
        linked = {name for name, _, is_link in found if is_link}
        links.extend(os.path.join(folder, name) for name in folders if name in linked)
        waiting.extend(os.path.join(folder, name) for name in reversed(folders) if name not in linked)


def matching(pattern: str) -> list[str]:
    """Paths that match a pattern with ``*``, in any order."""
    import glob

    if not is_remote(pattern):
        # A folder of that very name is no pattern: in "plate[1]/*.tif", only the star is one.
        folder, rest = os.path.split(pattern)
        while not os.path.exists(folder) and glob.has_magic(folder):
            folder, name = os.path.split(folder)
            rest = os.path.join(name, rest)
        return glob.glob(os.path.join(glob.escape(folder), rest), recursive=True)
    with remote_errors(pattern):
        fs, inner = _at(pattern)
        return [fs.unstrip_protocol(found) for found in fs.glob(inner)]


def version(path: str) -> tuple[int, int | str]:
    """Size in bytes, and what changes with the content: the time in ns, or a hash of the ETag or time.

    Raises `OSError` if there is no file.
    """
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    with remote_errors(path, missing=False):
        fs, inner = _at(path)
        return _version(fs.info(inner))


def versions_below(path: str) -> dict[str, tuple[int, int | str]]:
    """`version` of every file below a remote folder by its relative name; of a file, its own as ``""``.

    A web server lists no folder: there, a Zarr image consists of the metadata and chunks of its levels.
    """
    if _is_web(path):
        files = _zarr_files(path)
        if not files:
            with remote_errors(path):
                return {"": version(path)}
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            versions = pool.map(lambda name: _version_or_none(join(path, name)), files)
            return {name: one for name, one in zip(files, versions, strict=True) if one is not None}
    with remote_errors(path):
        fs, inner = _at(path)
        found = fs.find(inner, detail=True)
        if not found:
            raise FileNotFoundError(path)
        return {name.removeprefix(inner).lstrip("/"): _version(one) for name, one in sorted(found.items())}


def read_head(path: str, count: int) -> bytes:
    """The first `count` bytes of a file, or all if it is shorter; none of a folder."""
    if not is_remote(path):
        if os.path.isdir(path):
            return b""
        with open(path, "rb") as file:
            return file.read(count)
    if _is_web(path) and is_folder(path):
        return b""
    with remote_errors(path):
        fs, inner = _at(path)
        status = fs.info(inner)
        if status["type"] == "directory" or not status["size"]:
            return b""  # no range of it can be requested
        return bytes(fs.cat_file(inner, start=0, end=count))


def read(path: str) -> bytes:
    """A whole file."""
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read()
    with remote_errors(path):
        fs, inner = _at(path)
        return bytes(fs.cat_file(inner))


def open_file(path: str) -> BinaryIO:
    """A file for random access; of a remote one, only the blocks around what is read are fetched."""
    if not is_remote(path):
        return open(path, "rb")
    with remote_errors(path):
        fs, inner = _at(path)
        options = {"maxblocks": BLOCKS_KEPT}
        file: BinaryIO = fs.open(
            inner, "rb", block_size=BLOCK_BYTES, cache_type="blockcache", cache_options=options
        )
        return file


def read_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Bytes of the ranges ``(offset, count)`` of a remote file, in their order, with as few requests as
    possible. A range that goes beyond the end of the file is cut off there.
    """
    spans = _spans(ranges)
    with remote_errors(path):
        fs, inner = _at(path)
        starts, ends = [s for s, _ in spans], [e for _, e in spans]
        parts = fs.cat_ranges([inner] * len(spans), starts, ends, on_error="raise") if spans else []
    result = []
    for offset, count in ranges:
        result.append(
            b"".join(
                part[max(offset - start, 0) : offset + count - start]
                for start, end, part in zip(starts, ends, parts, strict=True)
                if start < offset + count and end > offset
            )
        )
    return result


def write(path: str, data: bytes) -> None:
    """Write a small remote file in one request, which replaces what was there."""
    with remote_errors(path):
        fs, inner = _at(path)
        fs.pipe_file(inner, data)


def remove_remote(path: str) -> None:
    """Remove all objects whose keys begin with `path` and a slash."""
    with remote_errors(path):
        fs, inner = _at(path)
        if found := fs.find(inner):
            fs.rm(found)


@contextlib.contextmanager
def remote_errors(path: str, *, missing: bool = True) -> Iterator[None]:
    """Turn errors of a remote file system into `ImageError` with one sentence; nothing for local paths.

    Unless `missing`, a file that does not exist raises `FileNotFoundError`.
    """
    if not is_remote(path):
        yield
        return
    try:
        yield
    except DaskcellError:
        raise
    except FileNotFoundError as error:
        if not missing:
            raise
        reason = f" ({error})" if "bucket" in str(error) else ""
        raise ImageError(f"There is no file or folder {path}{reason}.") from None
    except PermissionError as error:
        raise ImageError(
            f"{path} may not be accessed ({_short(error)}). Please check the credentials; fsspec's "
            "configuration and the variables of its file system are used."
        ) from None
    except ImportError as error:
        scheme = path.partition("://")[0]
        raise ImageError(
            f"{path} needs a package that is not installed ({_short(error)}). Please: pip install "
            f"{_PACKAGES.get(scheme, 'the fsspec file system of ' + scheme)}."
        ) from None
    except Exception as error:  # of the file system's own kinds: no endpoint, no credentials, no such scheme
        raise ImageError(f"{path} cannot be accessed ({_short(error)}).") from error


def is_transport_error(error: BaseException) -> bool:
    """Whether an error comes from accessing a file (network, permissions) rather than from its content."""
    if isinstance(error, (ConnectionError, TimeoutError, PermissionError, FileNotFoundError)):
        return True
    return type(error).__module__.partition(".")[0] in ("aiohttp", "aiobotocore", "botocore")


def _spans(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Requests ``(start, end)``, ascending, without overlap: close ranges joined, long ones cut."""
    joined: list[list[int]] = []
    for offset, count in sorted((o, c) for o, c in ranges if c > 0):
        if joined and offset <= joined[-1][1] + GAP_BYTES:
            joined[-1][1] = max(joined[-1][1], offset + count)
        else:
            joined.append([offset, offset + count])
    return [
        (at, min(at + RANGE_BYTES, end)) for start, end in joined for at in range(start, end, RANGE_BYTES)
    ]


def _is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _zarr_files(path: str) -> list[str]:
    """Relative names that the files of a Zarr array, or of the levels of an OME-Zarr image, may have; none if
    `path` is neither."""
    import zarr

    names = sorted(holding(path, ZARR_NAMES))
    if not names:
        return []
    with remote_errors(path), contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        node = zarr.open(path, mode="r", use_consolidated=False)
        arrays: dict[str, Any] = {"": node}
        if isinstance(node, zarr.Group):
            attributes: dict[str, Any] = dict(node.attrs)
            scales = attributes.get("ome", attributes)["multiscales"]
            levels = [str(level["path"]) for scale in scales for level in scale["datasets"]]
            arrays = {level: node[level] for level in levels if level in node}
        for level, array in arrays.items():
            own = sorted(holding(join(path, level), ZARR_NAMES)) if level else []
            names += [join(level, name) if level else name for name in (*own, *_chunk_names(array))]
    return names


def _chunk_names(array: Any) -> Iterator[str]:
    sides = array.shards or array.chunks
    counts = [-(-length // side) for length, side in zip(array.shape, sides, strict=True)]
    return (array.metadata.encode_chunk_key(at) for at in product(*map(range, counts)))


def _version_or_none(path: str) -> tuple[int, int | str] | None:
    try:
        return version(path)
    except (FileNotFoundError, ImageError):  # some servers forbid what is not there
        return None


def _ls(folder: str) -> dict[str, dict[str, Any]]:
    fs, inner = _at(folder)
    return {
        PurePath(one["name"]).name: one
        for one in fs.ls(inner, detail=True)
        if one["name"].rstrip("/") != inner.rstrip("/")  # an empty object that represents the folder
    }


def _version(info: dict[str, Any]) -> tuple[int, int | str]:
    tag = (
        info.get("ETag")
        or info.get("etag")
        or info.get("LastModified")
        or info.get("Last-Modified")
        or info.get("mtime")
        or ""
    )
    return int(info["size"] or 0), hashlib.sha256(str(tag).strip('"').encode()).hexdigest()[:16]


def _at(path: str) -> tuple[Any, str]:
    import fsspec

    fs, inner = fsspec.url_to_fs(path, use_listings_cache=False)
    return fs, str(inner)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def why_unreadable(path: str | Path, error: OSError) -> str:
    """Why a file cannot be read, as the end of a sentence; of a dangling link, where it leads."""
    if not is_remote(path) and os.path.islink(path) and not os.path.exists(path):
        return f"it is a link to {os.readlink(path)}, which is not there"
    return str(error.strerror or error)
