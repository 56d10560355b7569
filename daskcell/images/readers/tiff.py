"""TIFF and formats based on it: OME-TIFF, BigTIFF, ImageJ, SVS, NDPI, SCN, QPTIFF, through tifffile.

Reads only the tiles or strips that a box touches. What the file stores is turned into intensities:

- orientation tags are honoured, alpha is left out, one bit becomes 0 and 1, float16 becomes float32;
- images where 0 is white are inverted, so that larger is brighter;
- a palette that is a ramp (grey, green, "fire") is a way of showing: its indices are the intensities and are
  kept; any other palette is expanded to red, green and blue (`is_ramp`).

A file may hold several images (`Reader.scenes`): those of OME-XML, pages of different sizes or kinds,
positions of a stage. Left out are images of the glass beside a slide (label, macro, thumbnail) and smaller
copies; of what a slide scanner wrote, the largest image and those of the same pixel size are read. Pages that
nobody names are channels up to `PAGES_AS_CHANNELS` of them, and planes of a stack beyond.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box, check_inside
from daskcell.images.axes import SIDE, choose_axes
from daskcell.images.readers import MissingScene, ZChoice, guarded, tiffmeta, tiffpeek
from daskcell.images.readers.array import ArrayReader
from daskcell.images.readers.tiffcheck import Forms, check_data, check_page, check_pages
from daskcell.images.readers.tiffpieces import Pieces
from daskcell.storage import paths

_SINGLE = (".svs", ".ndpi", ".qptiff", ".bif")
"""Slides that are a single image."""
SUFFIXES = (
    ".tif",
    ".tiff",
    ".btf",
    ".tf8",
    ".tf2",
    ".stk",
    ".lsm",
    ".scn",
    *_SINGLE,
)
logging.getLogger("tifffile").addHandler(logging.NullHandler())  # errors report what is wrong

TAKES_AXES = True
PAGES_AS_CHANNELS = 8
BAND_BYTES = 32 * 2**20
"""Stored pixels of one page that are in memory at a time."""

_POSITIONS = "R"
"""Axis of positions of the stage, in stacks of Micro-Manager and in what tifffile writes."""
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_BESIDE = {"label", "macro", "map", "overview", "probability", "thumbnail"}
"""Names tifffile, and with "image" behind them Bio-Formats, give to the other images of a slide."""


def matches(path: str, head: bytes) -> bool:
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def may_be_stack(path: str) -> bool:
    return not path.lower().endswith(_SINGLE) and tiffpeek.may_be_stack(path)


def open(
    path: str, *, t: int = 0, z: ZChoice = "max", axes: str | None = None, scene: int = 0
) -> TiffReader | ArrayReader:
    reader = TiffReader(path, t=t, z=z, axes=axes, scene=scene)
    return reader if reader.rearranged is None else reader.rearranged


def is_ramp(colormap: NDArray) -> bool:
    """Whether a palette ``(3, n)`` only shows intensities: luminance never falls and steps are small.

    True for grey ramps, single colours and the common look-up tables of fluorescence; False for the palettes
    of images reduced to few colours, whose neighbouring entries have nothing to do with each other.
    """
    palette = colormap.astype(np.float64)
    n = palette.shape[1]
    span = palette.max() - palette.min()
    if n < 2 or span == 0:
        return True
    luminance = np.array([0.299, 0.587, 0.114]) @ palette
    rises = np.diff(luminance)
    largest_step = np.abs(np.diff(palette, axis=1)).max()
    # A ramp that is straight takes steps of span / (n - 1); bent ones take a few times that. Two entries are
    # black and white in any order but the inverted one.
    return bool((rises >= -0.01 * span).all() and luminance[-1] > luminance[0]) and bool(
        largest_step <= max(3 * span / (n - 1), 0.1 * span)
    )


@dataclass(frozen=True)
class _Scene:
    """One of the images of a file."""

    name: str
    series: Any
    """Of tifffile; None where its pages are not there."""
    image: int = 0
    """Position in OME-XML."""
    position: int = 0
    """Along an axis of positions of the stage."""


class TiffReader:
    """One image of a TIFF file, at one time point."""

    rearranged: ArrayReader | None = None
    """Reads the file instead, if its pages are not planes of an image, as with channels last."""

    def __init__(
        self, path: str, t: int = 0, z: ZChoice = "max", axes: str | None = None, scene: int = 0
    ) -> None:
        self.path = path
        self.name = (
            Path(path).name.split(".")[0]
            if path.lower().endswith((".ome.tif", ".ome.tiff"))
            else Path(path).stem
        )
        self.remote = paths.is_remote(path)
        self._stream: Any = paths.open_file(path) if self.remote else path
        self.file = tifffile.TiffFile(self._stream, name=Path(path).name if self.remote else None)
        try:
            self._open(t, z, scene, check_pages(self.file, path), axes)
        except BaseException:
            self.close()
            raise

    def _open(self, t: int, z: ZChoice, number: int, forms: Forms, axes: str | None) -> None:
        tiffmeta.check_description(self.file, self.path)
        if not self.file.series:
            raise ImageError(f"Cannot read {self.path}: the TIFF file holds no image.")
        scenes = self._find_scenes()
        self.scenes = tuple(scene.name for scene in scenes)
        if not 0 <= number < len(scenes):
            raise InputError(f"{self.path} holds {len(scenes)} images; there is none with number {number}.")
        scene = scenes[number]
        if scene.series is None:
            raise MissingScene(
                f"Cannot read image {number} of {self.path} ({scene.name}): its pages are not there, or in a "
                "file that is missing."
            )
        self.series = series = scene.series
        self.position = scene.position
        self.keyframe = keyframe = series.keyframe
        check_page(keyframe, self.path)
        tiffmeta.check_counts(self.file, series, scene.image, self.path, forms)
        said = axes if tiffmeta.stated_axes(self.file, series) is None else None
        self.axes = self._name_axes(series, said)
        if not self.axes.endswith(keyframe.axes):
            check_data(series, series.ndim - len(keyframe.axes), self.path, forms)
            self._rearrange(scene, t, z, said)
            return
        self._lay_out(series)
        self._choose(t, z)
        self.orientation = int(keyframe.tags.valueof(274, 1) or 1)
        if self.orientation not in range(1, 9):
            self.orientation = 1
        self.stored_levels = [_yx(series)]
        self.level_series = [series]
        for level in series.levels[1:]:
            if self._is_smaller_copy(level):
                self.stored_levels.append(_yx(level))
                self.level_series.append(level)
        swapped = self.orientation >= 5
        self.levels = tuple((x, y) if swapped else (y, x) for y, x in self.stored_levels)
        for level in self.level_series:
            check_data(level, self.leading, self.path, forms)
        self._set_colours()
        size = tiffmeta.pixel_size(self.file, keyframe, scene.image)
        self.pixel_size = size[::-1] if size and swapped else size
        names = tiffmeta.channel_names(self.file, self.count, scene.image)
        if names is not None and not self.is_rgb:
            self.channels: tuple[str, ...] = names
        piece = keyframe.chunks[:2]
        self.piece = (piece[1], piece[0]) if swapped else (piece[0], piece[1])
        every = [one.series for one in scenes if one.series is not None]
        named = {p.parent.filehandle.path for one in every for p in one.pages if p is not None}
        self.files = (self.path,) if self.remote else tuple(sorted(os.path.realpath(p) for p in named))

    def _name_axes(self, series: Any, said: str | None) -> str:
        """Axes of the whole: those in the file, or else `said`, or else by its shape."""
        stated, pages = tiffmeta.stated_axes(self.file, series), self.keyframe.axes
        if stated is not None or series.ndim == len(pages):
            return stated or str(series.axes)
        sides = self.keyframe.imagelength, self.keyframe.imagewidth
        if said is None and series.ndim == len(pages) + 1 and (pages != "YX" or min(sides) >= SIDE):
            return str(series.axes)  # pages of a size for images: channels or planes
        try:
            found = choose_axes(series.shape, self.path, said)
        except InputError as error:
            raise ImageError(f"Cannot read {self.path}: {error}") from None
        return str(series.axes) if said is None and found == "CYX" else found

    def _rearrange(self, scene: _Scene, t: int, z: ZChoice, said: str | None) -> None:
        """Read a file whose pages are no planes, such as one with channels last, as a whole."""
        if int(self.keyframe.photometric) not in (_BLACK_IS_ZERO, _RGB):
            raise ImageError(
                f"Cannot read {self.path}: its pages are no planes of an image (axes {self.axes})."
            )
        own = said or tiffmeta.stated_axes(self.file, scene.series)
        self.rearranged = ArrayReader(scene.series.asarray(), self.path, own, t, z)
        self.rearranged.name, self.rearranged.scenes = self.name, self.scenes
        self.rearranged.pixel_size = tiffmeta.pixel_size(self.file, self.keyframe, scene.image)
        names = tiffmeta.channel_names(self.file, len(self.rearranged.channels))
        if names is not None and not self.rearranged.is_rgb:
            self.rearranged.channels = names
        self.close()

    def _is_smaller_copy(self, level: Any) -> bool:
        """Whether tifffile's `level` has the axes, pages and kind of pixels of the image."""
        key, own, lead = level.keyframe, self.keyframe, self.leading
        kinds = {int(key.photometric), int(own.photometric)}
        return bool(
            level.axes == self.series.axes
            and level.shape[:lead] == self.series.shape[:lead]
            and (key.dtype, key.samplesperpixel) == (own.dtype, own.samplesperpixel)
            and (len(kinds) == 1 or kinds == {_RGB, _YCBCR})
        )

    def _find_scenes(self) -> list[_Scene]:
        """All images of the file; of what a slide scanner wrote the largest, and others of its pixel size."""
        file, series = self.file, self.file.series
        named = tiffmeta.ome_images(self.file) if series[0].kind == "ome" else []
        found = [_Scene(name, None, i) for i, name in enumerate(named)] or [
            _Scene(one.name if file.is_scn else "", one) for one in series
        ]
        if named:
            owners = self._owners(len(named))
            found = [_Scene(scene.name, owners.get(scene.image), scene.image) for scene in found]
        scanned = [
            one
            for one in found
            if one.series is None or not (_is_beside(one) or one.series.keyframe.is_reduced)
        ]
        if file.is_svs or file.is_scn or file.is_qpi or file.is_bif or file.is_ndpi or file.is_philips:
            scanned = self._of_one_size(scanned or found)
        elif not scanned:  # a thumbnail and nothing else
            scanned = [max(found, key=lambda one: math.prod(_yx(one.series)))]
        return [place for scene in scanned for place in _positions(scene)]

    def _owners(self, count: int) -> dict[int, Any]:
        """The series of each of `count` images of OME-XML; tifffile leaves out those without pages."""
        series = self.file.series
        if len(series) == count:
            return dict(enumerate(series))
        own = {
            (page.parent.filehandle.name, page.index): one
            for one in series
            for page in one.pages
            if page is not None
        }
        first = tiffmeta.first_pages(self.file)
        return {image: own[page] for image, page in enumerate(first) if page in own}

    def _of_one_size(self, scenes: list[_Scene]) -> list[_Scene]:
        """The largest, and those with the same pixel size, which are other areas of the slide."""
        largest = max(scenes, key=lambda one: math.prod(_yx(one.series)))
        size = tiffmeta.pixel_size(self.file, largest.series.keyframe)
        if not self.file.is_scn or size is None:  # of the others tifffile gives one image, and its company
            return [largest]
        return [s for s in scenes if tiffmeta.pixel_size(self.file, s.series.keyframe) == size]

    def _lay_out(self, series: Any) -> None:
        """Assign the pages to channels, planes and time points."""
        page_axes = self.keyframe.axes
        self.leading = len(self.axes) - len(page_axes)
        self.samples = self.keyframe.samplesperpixel
        if self.leading < 0:
            raise ImageError(f"Cannot read {self.path}: axes {self.axes} do not fit its pages ({page_axes}).")
        self.lengths = dict(zip(self.axes[: self.leading], series.shape[: self.leading], strict=True))
        if len(self.lengths) != self.leading:
            raise ImageError(f"Cannot read {self.path}: axes {self.axes} are ambiguous.")
        roles = {axis: axis.lower() for axis in self.lengths if axis in ("C", "Z", "T", _POSITIONS)}
        for axis, length in self.lengths.items():
            if axis in roles:
                continue
            for role in ("c", "z", "t") if length <= PAGES_AS_CHANNELS else ("z", "t", "c"):
                if role not in roles.values():
                    roles[axis] = role
                    break
            else:
                raise ImageError(
                    f"Cannot read {self.path}: axes {self.axes} are more than channel, z and time."
                )
        self.roles = roles
        by_role = {role: self.lengths[axis] for axis, role in roles.items()}
        self.sizes = {"t": by_role.get("t", 1), "z": by_role.get("z", 1)}
        self.page_channels = by_role.get("c", 1)
        self.count = self.page_channels * self.samples

    def _choose(self, t: int, z: ZChoice) -> None:
        if not 0 <= t < self.sizes["t"]:
            raise InputError(f"{self.path} has {self.sizes['t']} time points; there is none with number {t}.")
        if z != "max" and not 0 <= z < self.sizes["z"]:
            raise InputError(f"{self.path} has {self.sizes['z']} planes; there is none with number {z}.")
        self.t = t
        self.planes = range(self.sizes["z"]) if z == "max" else range(z, z + 1)

    def _page_number(self, channel: int, z: int) -> int:
        number = 0
        at = {"t": self.t, "z": z, "c": channel, _POSITIONS.lower(): self.position}
        for axis, length in self.lengths.items():
            number = number * length + at[self.roles[axis]]
        return number

    def _set_colours(self) -> None:
        series, page = self.series, self.keyframe
        photometric, dtype = int(page.photometric), page.dtype
        self.palettes: list[NDArray] = []  # of the pages, where colours are to be looked up
        self.invert_from: int | None = None
        self.keep = list(range(self.samples))
        for k, kind in enumerate(page.extrasamples or ()):
            sample = self.samples - len(page.extrasamples) + k
            if int(kind) in (1, 2) and sample > 0:
                self.keep.remove(sample)
        self.count = self.page_channels * len(self.keep)
        self.is_rgb = False
        self.channels = tuple(f"channel {i + 1}" for i in range(self.count)) if self.count > 1 else ("grey",)
        if photometric == _PALETTE and self.samples == 1 and page.colormap is not None and dtype.kind in "bu":
            lost = [one.parent is not self.file or getattr(one, "is_virtual", False) for one in series.pages]
            own = [page if gone else one.aspage() for one, gone in zip(series.pages, lost, strict=True)]
            stored = [page.colormap if one.colormap is None else one.colormap for one in own]
            if not all(map(is_ramp, stored)):
                self.palettes = [(p >> 8 if p.max() > 255 else p).astype(np.uint8) for p in stored]
                dtype = np.dtype(np.uint8)
                self.count = 3 * self.page_channels
                self.is_rgb = self.page_channels == 1
        elif photometric == _WHITE_IS_ZERO and dtype.kind in "bu":
            self.invert_from = 1 if dtype.kind == "b" else 2**page.bitspersample - 1
        elif photometric in (_RGB, _YCBCR) and self.page_channels == 1 and len(self.keep) == 3:
            self.is_rgb = dtype in (np.uint8, np.uint16)
        if self.is_rgb or (photometric in (_RGB, _YCBCR) and self.count == 3):
            self.channels = ("red", "green", "blue")
        elif photometric == _CMYK and self.count == 4:
            self.channels = ("cyan", "magenta", "yellow", "black")
        elif photometric == _LAB and self.count == 3:
            self.channels = ("lightness", "a", "b")
        elif self.palettes:
            self.channels = tuple(
                f"page {i // 3 + 1} {['red', 'green', 'blue'][i % 3]}" for i in range(self.count)
            )
        self._pieces = Pieces(self.file, self.path, page.dtype, self.samples)
        self.dtype = np.dtype({"?": np.uint8, "e": np.float32}.get(dtype.char, dtype.newbyteorder("=")))

    def read(self, level: int, box: Box) -> NDArray:
        """Pixels ``(C, h, w)`` of `box`, which lies inside the level."""
        check_inside(box, self.levels[level], self.path)
        return guarded(self.path, lambda: self._read(level, box))

    def _read(self, level: int, box: Box) -> NDArray:
        o = self.orientation
        height, width = self.stored_levels[level]
        flip_y, flip_x, swap = o in (3, 4, 6, 7), o in (2, 3, 7, 8), o >= 5
        y0, x0, y1, x1 = (box.x0, box.y0, box.x1, box.y1) if swap else (box.y0, box.x0, box.y1, box.x1)
        if flip_y:
            y0, y1 = height - y1, height - y0
        if flip_x:
            x0, x1 = width - x1, width - x0
        out = np.empty((self.count, *box.shape), self.dtype)
        stored = out.swapaxes(1, 2) if swap else out  # the result, seen as the file stores it
        stored = stored[:, :: -1 if flip_y else 1, :: -1 if flip_x else 1]
        for top, bottom in self._bands(level, y0, y1, x1 - x0):
            self._fill(stored[:, top - y0 : bottom - y0], level, Box(top, x0, bottom, x1))
        return out

    def _bands(self, level: int, y0: int, y1: int, width: int) -> list[tuple[int, int]]:
        """Rows to read at a time: whole pieces, and few, so that planes on their way take little memory."""
        piece = self.level_series[level].keyframe.chunks[0]
        row = width * self.samples * max(self._pieces.dtype.itemsize, self.dtype.itemsize)
        step = max(BAND_BYTES // row // piece, 1) * piece
        return list(pairwise([y0, *range((y0 // step + 1) * step, y1, step), y1]))

    def _fill(self, out: NDArray, level: int, box: Box) -> None:
        """Write the channels of a stored `box` into ``(C, h, w)``."""
        per_page = self.count // self.page_channels
        for channel in range(self.page_channels):
            target = out[channel * per_page : (channel + 1) * per_page]
            for z in self.planes:
                number, first = self._page_number(channel, z), z == self.planes[0]
                straight = target if first and self._is_plain else None
                plane = self._pieces.read(self.level_series[level], number, box, straight)
                if straight is not None:
                    continue
                plane = self._intensities(plane, number)
                if first:
                    target[:] = plane
                else:
                    np.maximum(target, plane, out=target)

    @property
    def _is_plain(self) -> bool:
        """Whether what is stored are the channels as they are."""
        same = len(self.keep) == self.samples and self.dtype == self._pieces.dtype
        return same and not self.palettes and self.invert_from is None

    def _intensities(self, pixels: NDArray, number: int) -> NDArray:
        """Stored samples ``(S, h, w)`` of a page to channels."""
        if self.palettes:
            palette = self.palettes[min(number, len(self.palettes) - 1)]
            return palette[:, pixels[0].astype(np.intp)]
        if len(self.keep) != self.samples:
            pixels = pixels[self.keep]
        pixels = pixels.astype(self.dtype, copy=False)
        return pixels if self.invert_from is None else self.dtype.type(self.invert_from) - pixels

    def close(self) -> None:
        self.file.close()
        if self.remote:  # a stream that was given is not closed with the file
            self._stream.close()

    def __repr__(self) -> str:
        return f"<TiffReader {os.path.basename(self.path)} {self.axes} {self.levels[0]} {self.dtype}>"


def _is_beside(scene: _Scene) -> bool:
    names = {scene.name.lower(), str(scene.series.name).lower()}
    return any(name.removesuffix(" image") in _BESIDE for name in names)


def _positions(scene: _Scene) -> list[_Scene]:
    """A scene for each position of the stage, where they are an axis of the series."""
    if scene.series is None or _POSITIONS not in scene.series.axes:
        return [scene]
    count = scene.series.shape[scene.series.axes.index(_POSITIONS)]
    names = [f"{scene.name}_{i}" if scene.name else "" for i in range(count)]
    return [_Scene(name, scene.series, scene.image, i) for i, name in enumerate(names)]


def _yx(series: Any) -> tuple[int, int]:
    return series.keyframe.imagelength, series.keyframe.imagewidth
