"""Generated images of stained cells with known truth: 11 types, four stains, uneven light, noise, clumps.

Used by the demo and to train the embedded networks. Covers drawing only, neither files nor networks.

Stains, one per channel: red membrane and cytoplasm, green cytoplasm, blue DNA, cyan granules. Some types
differ in one property only: `granulocyte_cyan` and `granulocyte_red` in the stain of their granules,
`epithelial` and `epithelial_loose` in their membrane. Light adds up where two cells overlap; the pixel's
label is that of the cell drawn first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from daskcell.errors import InputError

CHANNELS = ("red", "green", "blue", "cyan")


@dataclass(frozen=True)
class CellType:
    """What the cells of one type have in common. Lengths in pixels, stains ``(red, green, blue, cyan)``."""

    name: str
    diameter: float
    """Of a disc of about the cell's area."""
    outline: str = "smooth"
    """``smooth``, ``irregular``, ``spindle`` or ``crescent``."""
    elongation: float = 1.15
    """Long axis over short axis."""
    nuclei: int = 1
    """Nuclei, or lobes of one nucleus."""
    nucleus: float = 0.5
    """Diameter of one nucleus as a share of the cell's."""
    form: str = "round"
    """Of the nucleus: ``round``, ``kidney``, ``lobes`` (touching) or ``plate`` (dividing)."""
    spread: float = 0.0
    """Distance of several nuclei from the cell's centre, as a share of its radius."""
    dna: float = 0.6
    """Brightness of the nucleus in blue."""
    cytoplasm: tuple[float, float, float, float] = (0.18, 0.30, 0.0, 0.04)
    membrane: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    granules: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    granularity: float = 0.0
    """Granules per 100 square pixels of cytoplasm."""
    vacuoles: int = 0
    """Dark holes in the cytoplasm."""
    texture: float = 0.12
    """Relative deviation of the cytoplasm's and DNA's brightness within a cell."""


_GRANULE = (0.18, 0.24, 0.0, 0.04)
CELL_TYPES: tuple[CellType, ...] = (
    CellType("lymphocyte", 19, nucleus=0.80, elongation=1.08, dna=0.75, cytoplasm=(0.08, 0.22, 0.0, 0.02)),
    CellType("monocyte", 33, nucleus=0.60, form="kidney", dna=0.5, texture=0.2,
             cytoplasm=(0.10, 0.42, 0.0, 0.08)),
    CellType("granulocyte_cyan", 27, nuclei=3, nucleus=0.36, form="lobes", spread=0.36, dna=0.7,
             cytoplasm=_GRANULE, granules=(0.0, 0.0, 0.0, 0.55), granularity=7.0),
    CellType("granulocyte_red", 27, nuclei=3, nucleus=0.36, form="lobes", spread=0.36, dna=0.7,
             cytoplasm=_GRANULE, granules=(0.55, 0.0, 0.0, 0.0), granularity=7.0),
    CellType("epithelial", 39, nucleus=0.42, elongation=1.2, membrane=(0.55, 0.0, 0.0, 0.0)),
    CellType("epithelial_loose", 39, nucleus=0.42, elongation=1.2),
    CellType("fibroblast", 34, outline="spindle", elongation=4.2, nucleus=0.42, dna=0.55,
             cytoplasm=(0.42, 0.16, 0.0, 0.05), texture=0.2),
    CellType("macrophage", 44, outline="irregular", elongation=1.2, nucleus=0.34, dna=0.5, vacuoles=6,
             cytoplasm=(0.12, 0.32, 0.0, 0.16), granules=(0.0, 0.35, 0.0, 0.2), granularity=1.2, texture=0.3),
    CellType("binucleate", 50, elongation=1.35, nuclei=2, nucleus=0.32, spread=0.42, dna=0.6,
             cytoplasm=(0.30, 0.20, 0.0, 0.14), texture=0.15),
    CellType("crescent", 26, outline="crescent", nuclei=0, cytoplasm=(0.55, 0.10, 0.0, 0.05), texture=0.06),
    CellType("dividing", 31, elongation=1.05, nucleus=0.62, form="plate", dna=1.0,
             cytoplasm=(0.16, 0.34, 0.0, 0.12)),
)  # fmt: skip
"""The 11 types; a cell's type is its place in this list."""


class Field(NamedTuple):
    """One field of view with its truth."""

    channels: np.ndarray
    """``(4, Y, X)`` uint8: red, green, blue, cyan."""
    labels: np.ndarray
    """``(Y, X)`` uint32: whole cells, 1..N in reading order of their first pixel; 0 background."""
    types: np.ndarray
    """``(N,)`` int64: type of cell ``i + 1``, an index into `CELL_TYPES`."""


def synthesize_field(
    shape: tuple[int, int] = (1024, 1280),
    seed: int = 0,
    *,
    cells: int | None = None,
    clumping: float = 0.45,
    noise: float = 1.0,
    types: Sequence[int] | None = None,
) -> Field:
    """Draw a field of stained cells.

    Parameters
    ----------
    shape
        ``(Y, X)`` in pixels, each at least 32.
    seed
        The same seed gives the same image.
    cells
        Number aimed at; None: one per 3200 square pixels. Fewer are drawn where there is no room.
    clumping
        Share of cells placed against another cell, from 0 to 1.
    noise
        Strength of shot noise, read noise and debris; 0 gives a clean image.
    types
        Types to draw, in equal numbers; None: all 11.

    Raises
    ------
    InputError
        The image is too small or a type does not exist.
    """
    return _draw(shape, seed, cells, clumping, noise, types)[0]


def synthesize_nuclei(shape: tuple[int, int], seed: int, **options: Any) -> tuple[Field, np.ndarray]:
    """`synthesize_field` and, for each pixel of a nucleus, the label of its cell ``(Y, X)`` uint32."""
    settings: dict[str, Any] = {"cells": None, "clumping": 0.45, "noise": 1.0, "types": None} | options
    return _draw(shape, seed, **settings)


def _draw(
    shape: tuple[int, int],
    seed: int,
    cells: int | None,
    clumping: float,
    noise: float,
    types: Sequence[int] | None,
) -> tuple[Field, np.ndarray]:
    height, width = (int(side) for side in shape)
    if min(height, width) < 32:
        raise InputError(
            f"Cannot draw a field of {height} x {width} pixels. Please ask for at least 32 x 32."
        )
    types = list(range(len(CELL_TYPES))) if types is None else [int(t) for t in types]
    if not types or not all(0 <= t < len(CELL_TYPES) for t in types):
        raise InputError(f"Cell types are numbers from 0 to {len(CELL_TYPES) - 1}, not {types}.")
    rng = np.random.default_rng(seed)
    cells = max(len(types), height * width // 3200) if cells is None else int(cells)

    canvas = _Canvas(height, width, rng)
    for kind in rng.permutation(np.resize(types, cells)):
        canvas.place(int(kind), clumping)
    light = canvas.finish()
    channels = _photograph(light, rng, noise)

    # Ids in reading order of the first pixel, whatever the order of drawing.
    present, first = np.unique(canvas.labels, return_index=True)
    first, present = first[present > 0], present[present > 0]
    order = present[np.argsort(first)]
    renumber = np.zeros(len(canvas.kinds) + 1, np.uint32)
    renumber[order] = np.arange(1, len(order) + 1, dtype=np.uint32)
    labels = renumber[canvas.labels]
    kinds = np.asarray(canvas.kinds, np.int64)[order - 1]
    return Field(channels, labels, kinds), np.where(canvas.nuclei, labels, 0).astype(np.uint32)


class _Canvas:
    """Cells drawn so far: light per stain, labels, nuclei."""

    def __init__(self, height: int, width: int, rng: np.random.Generator):
        self.rng = rng
        self.shape = height, width
        self.light = np.zeros((4, height, width), np.float32)
        self.grains = np.zeros((4, height, width), np.float32)
        self.labels = np.zeros((height, width), np.int32)
        self.nuclei = np.zeros((height, width), bool)
        self.kinds: list[int] = []
        self.centres: list[tuple[float, float, float]] = []
        # One tile of each texture, cropped at random for each cell: drawing noise per cell costs more.
        self.fine, self.coarse = (_texture(rng, sigma) for sigma in (1.0, 3.0))

    def place(self, kind: int, clumping: float) -> bool:
        """Draw one cell where there is room; False after 30 attempts."""
        rng, spec = self.rng, CELL_TYPES[kind]
        radius = spec.diameter / 2 * float(np.exp(rng.normal(0, 0.09)))
        reach = int(np.ceil(radius * (1.3 * np.sqrt(max(spec.elongation, 1.7)) + 0.35))) + 3
        outline = _Outline(spec, radius, rng)
        grid = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
        depth = outline.depth(*grid)
        body = depth > 0
        body_area = int(body.sum())
        for _ in range(30):
            y, x = self._spot(radius, clumping)
            window, inner = self._window(y, x, reach)
            if window is None:
                continue
            here, taken = body[inner], self.labels[window] > 0
            mine = here & ~taken
            visible, free = int(here.sum()), int(mine.sum())
            if visible < 0.35 * body_area or visible - free > 0.10 * visible or free < 40:
                continue
            pieces, count = ndimage.label(mine)
            if count > 1:
                mine = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
            if mine.sum() < 0.85 * visible:
                continue
            self.kinds.append(kind)
            self.centres.append((y, x, radius))
            self.labels[window][mine] = len(self.kinds)
            self._paint(spec, outline, radius, grid, depth, window, inner, mine)
            return True
        return False

    def _spot(self, radius: float, clumping: float) -> tuple[float, float]:
        rng = self.rng
        if self.centres and rng.random() < clumping:
            y, x, other = self.centres[int(rng.integers(len(self.centres)))]
            angle, distance = rng.uniform(0, 2 * np.pi), (radius + other) * rng.uniform(0.88, 1.08)
            return y + distance * np.sin(angle), x + distance * np.cos(angle)
        return rng.uniform(0, self.shape[0]), rng.uniform(0, self.shape[1])

    def _window(self, y: float, x: float, reach: int) -> tuple[Any, Any]:
        y0, x0 = round(y) - reach, round(x) - reach
        side = 2 * reach + 1
        top, left = max(0, -y0), max(0, -x0)
        bottom, right = min(side, self.shape[0] - y0), min(side, self.shape[1] - x0)
        if bottom <= top or right <= left:
            return None, None
        window = slice(y0 + top, y0 + bottom), slice(x0 + left, x0 + right)
        return window, (slice(top, bottom), slice(left, right))

    def _paint(
        self,
        spec: CellType,
        outline: _Outline,
        radius: float,
        grid: np.ndarray,
        depth: np.ndarray,
        window: Any,
        inner: Any,
        mine: np.ndarray,
    ) -> None:
        rng = self.rng
        cover = 1 / (1 + np.exp(-np.clip(depth / 0.6, -30, 30)))
        dome = np.sqrt(np.clip(depth / (0.6 * radius), 0, 1))
        fine, coarse = self._crop(self.fine, depth.shape), self._crop(self.coarse, depth.shape)
        grain = np.clip(1 + spec.texture * (0.5 * fine + 0.9 * coarse), 0.1, None)
        nucleus = outline.nucleus(*grid)
        inside = 1 / (1 + np.exp(-np.clip(nucleus / 0.6, -30, 30))) * cover
        body = cover * (0.65 + 0.35 * dome) * grain
        for _ in range(spec.vacuoles):
            hole_y, hole_x = rng.normal(0, 0.45 * radius, 2)
            size = rng.uniform(0.09, 0.17) * radius
            body *= 1 - 0.8 / (1 + np.exp((np.hypot(grid[0] - hole_y, grid[1] - hole_x) - size) / 0.6))
        # The nucleus displaces most of the cytoplasm above and below it.
        body *= 1 - 0.55 * inside
        rim = cover * np.exp(-(((depth - 1.2) / 1.3) ** 2))
        brightness = float(np.exp(rng.normal(0, 0.15))) * np.exp(rng.normal(0, 0.08, 3))
        chromatin = inside * spec.dna * np.clip(1 + 0.5 * spec.texture * (fine + coarse), 0.2, None)
        for channel in range(4):
            ink = (
                spec.cytoplasm[channel] * brightness[0] * body + spec.membrane[channel] * brightness[1] * rim
            )
            if channel == 2:
                ink = ink + chromatin * brightness[2]
            self.light[channel][window] += ink[inner]
        self.nuclei[window] |= mine & (nucleus[inner] > 0)
        if spec.granularity:
            ys, xs = np.nonzero(mine & (nucleus[inner] < 0) & (depth[inner] > 1))
            pick = rng.integers(0, max(1, len(ys)), rng.poisson(spec.granularity * len(ys) / 100))
            strength = brightness[1] * rng.gamma(6.0, 1 / 6.0, len(pick))
            for channel, ink in enumerate(spec.granules):
                if ink and len(pick):
                    spots = ys[pick] + window[0].start, xs[pick] + window[1].start
                    np.add.at(self.grains[channel], spots, (ink * strength).astype(np.float32))

    def _crop(self, tile: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        y, x = (
            int(self.rng.integers(0, side - length + 1))
            for side, length in zip(tile.shape, shape, strict=True)
        )
        return tile[y : y + shape[0], x : x + shape[1]]

    def finish(self) -> np.ndarray:
        """Light per stain ``(4, Y, X)`` float32, before the microscope."""
        sigma = 1.0
        peak = np.float32(2 * np.pi * sigma**2)
        return self.light + np.stack([ndimage.gaussian_filter(g, sigma) for g in self.grains]) * peak


class _Outline:
    """Signed depth below a cell's and its nuclei's outline, in pixels, positive inside."""

    def __init__(self, spec: CellType, radius: float, rng: np.random.Generator):
        self.spec, self.radius = spec, radius
        self.angle = rng.uniform(0, 2 * np.pi)
        self.stretch = np.sqrt(max(1.0, spec.elongation * float(np.exp(rng.normal(0, 0.06)))))
        strong = spec.outline == "irregular"
        orders = np.arange(2, 8)
        size = (0.30 if strong else 0.055) / orders ** (0.5 if strong else 0.8)
        self.waves = [
            (k, a * rng.normal(), rng.uniform(0, 2 * np.pi)) for k, a in zip(orders, size, strict=True)
        ]
        self.bend = rng.normal(0, 0.10) if spec.outline == "spindle" else 0.0
        self.dent = rng.uniform(0.42, 0.52)
        drift = rng.normal(0, 0.05, 2) * radius
        self.nuclei = [(*(drift + at), *shape) for at, shape in self._nuclei(rng)]

    def _turn(self, y, x):
        return (
            x * np.float32(np.cos(self.angle)) + y * np.float32(np.sin(self.angle)),
            y * np.float32(np.cos(self.angle)) - x * np.float32(np.sin(self.angle)),
        )

    def depth(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        u, v = self._turn(y, x)
        long, short = self.radius * self.stretch, self.radius / self.stretch
        if self.spec.outline == "spindle":
            # A lens: two arcs that meet in points. 1.25 keeps its area near that of the disc.
            long, short = 1.25 * long, 1.25 * short
            v = v - self.bend * (u * u / long - long / 3)
            arc = (long**2 + short**2) / (2 * short)
            return np.minimum(arc - np.hypot(u, v - (arc - short)), arc - np.hypot(u, v + (arc - short)))
        if self.spec.outline == "crescent":
            outer = 1.3 * self.radius
            return np.minimum(outer - np.hypot(u, v), np.hypot(u - self.dent * outer * 1.5, v) - 0.95 * outer)
        theta = np.arctan2(v / short, u / long)
        edge = 1.0
        for k, size, phase in self.waves:
            edge = edge + np.float32(size) * np.cos(k * theta + np.float32(phase))
        return (np.maximum(edge, 0.45) - np.hypot(u / long, v / short)) * short

    def _nuclei(self, rng):
        spec, size = self.spec, self.spec.nucleus * self.radius * float(np.exp(rng.normal(0, 0.05)))
        if spec.nuclei == 0:
            return []
        if spec.form == "plate":
            return [((0.0, 0.0), (size, 0.26 * size, rng.uniform(0, np.pi)))]
        if spec.outline == "spindle":
            return [((0.0, 0.0), (1.45 * size, 0.62 * size, 0.0))]
        if spec.nuclei == 1:
            return [((0.0, 0.0), (1.06 * size, 0.94 * size, rng.uniform(0, np.pi)))]
        start = 0.0 if spec.nuclei == 2 else rng.uniform(0, 2 * np.pi)
        # Lobes fill an arc, separate nuclei lie on opposite sides of the centre.
        step = 1.75 if spec.form == "lobes" else 2 * np.pi / spec.nuclei
        reach = spec.spread * self.radius
        angles = [start + i * step + rng.normal(0, 0.12) for i in range(spec.nuclei)]
        return [
            ((reach * np.sin(a), reach * np.cos(a)), (1.1 * size, 0.92 * size, rng.uniform(0, np.pi)))
            for a in angles
        ]

    def nucleus(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        u, v = self._turn(y, x)
        depth = np.full(u.shape, -1e3, np.float32)
        for at_v, at_u, long, short, angle in self.nuclei:
            du, dv = u - at_u, v - at_v
            cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            a, b = du * cosine + dv * sine, dv * cosine - du * sine
            one = (1 - np.hypot(a / long, b / short)) * short
            if self.spec.form == "kidney":
                one = np.minimum(one, np.hypot(a, b - 0.95 * short) - 0.62 * short)
            depth = np.maximum(depth, one)
        return depth


def _texture(rng: np.random.Generator, sigma: float) -> np.ndarray:
    tile = ndimage.gaussian_filter(rng.standard_normal((384, 384)).astype(np.float32), sigma, mode="wrap")
    return tile / tile.std()


def _photograph(light: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    """What a camera makes of `light`: blur, haze, uneven illumination, debris, shot and read noise."""
    _, height, width = light.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij", sparse=True)
    centre = rng.uniform(-0.4, 0.4, 2)
    fall = rng.uniform(0.12, 0.28)
    lamp = (1 - fall * ((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 2).astype(np.float32)
    images = np.empty(light.shape, np.uint8)
    dust = _debris((height, width), rng, noise)
    for channel, ink in enumerate(light):
        ink = ink + dust * rng.uniform(0.1, 0.5)
        sharp = ndimage.gaussian_filter(ink, rng.uniform(0.7, 1.1))
        haze = ndimage.zoom(ndimage.gaussian_filter(ink[::8, ::8], 4), 8, order=1)[:height, :width]
        if haze.shape != sharp.shape:
            haze = np.pad(
                haze, [(0, a - b) for a, b in zip(sharp.shape, haze.shape, strict=True)], mode="edge"
            )
        offset = rng.uniform(0.03, 0.06) + rng.uniform(0, 0.03) * (y * rng.normal() + x * rng.normal()) / 2
        signal = np.clip((0.9 * sharp + 0.12 * haze + offset) * lamp, 0, None)
        if noise > 0:
            photons = 350 / noise
            signal = rng.poisson(signal * photons) / photons + rng.normal(0, 0.008 * noise, signal.shape)
        images[channel] = np.clip(np.rint(signal * 230 + 4), 0, 255)
    return images


def _debris(shape: tuple[int, int], rng: np.random.Generator, noise: float) -> np.ndarray:
    """Small specks that are no cells."""
    specks = np.zeros(shape, np.float32)
    count = rng.poisson(noise * shape[0] * shape[1] / 25000)
    spots = rng.integers(0, shape[0], count), rng.integers(0, shape[1], count)
    np.add.at(specks, spots, rng.uniform(3, 14, count).astype(np.float32))
    return ndimage.gaussian_filter(specks, 1.3)
