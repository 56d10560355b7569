"""Kinds of files that other libraries read, each an extra of daskcell; recognised by content and name.

    openslide   MRXS, VMS, VMU, SVSLIDE and other slides that tifffile does not read
    wsidicom    slides in DICOM, one file each
    bioio       CZI, ND2, LIF

A library is imported when a file of its kind is opened; if it is missing, the error names the extra.
"""

from __future__ import annotations

from importlib import import_module

from daskcell.errors import ImageError
from daskcell.images.readers import Reader, ZChoice
from daskcell.storage import paths


class Extra:
    """A `Kind` that an extra reads.

    Parameters
    ----------
    name
        Of the extra, and of the module here that wraps it.
    module
        What must be importable.
    starts
        First bytes of its files, with their offsets; empty: the suffix decides.
    """

    def __init__(
        self, name: str, module: str, suffixes: tuple[str, ...], starts: tuple[tuple[int, bytes], ...] = ()
    ) -> None:
        self.name, self.module, self.SUFFIXES, self.starts = name, module, suffixes, starts

    def matches(self, path: str, head: bytes) -> bool:
        if self.starts:
            return any(head[at : at + len(start)] == start for at, start in self.starts)
        return path.lower().endswith(self.SUFFIXES)

    def open(self, path: str, *, t: int = 0, z: ZChoice = "max", scene: int = 0) -> Reader:
        if paths.is_remote(path):
            raise ImageError(
                f"Cannot read {path}: files of this kind are read from disk only; please copy it."
            )
        try:
            for module in self.module.split():
                import_module(module)
        except ImportError as error:
            raise ImageError(
                f"Cannot read {path}: files of this kind need an extra. Please: pip install "
                f"'daskcell[{self.name}]' ({error})."
            ) from None
        chosen = {"scene": scene} if scene else {}
        opened: Reader = import_module(f"daskcell.images.readers.{self.name}").open(path, t=t, z=z, **chosen)
        return opened


OPENSLIDE = Extra("openslide", "openslide", (".mrxs", ".vms", ".vmu", ".svslide"))
WSIDICOM = Extra("wsidicom", "wsidicom", (".dcm",), ((128, b"DICM"),))
CZI = Extra("bioio", "bioio bioio_czi", (".czi",), ((0, b"ZISRAWFILE"),))
ND2 = Extra("bioio", "bioio bioio_nd2", (".nd2",), ((0, b"\xda\xce\xbe\x0a"), (0, b"\0\0\0\x0cjP  ")))
LIF = Extra("bioio", "bioio bioio_lif", (".lif",), ((0, b"\x70\0\0\0"),))
KINDS = (OPENSLIDE, WSIDICOM, CZI, ND2, LIF)
