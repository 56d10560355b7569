"""Images with truth, ready to train the segmenter: raw channels, flows, foreground, diameter.

Covers reading folders and tables of images and masks, masks of stained smears, drawing generated fields, and
Cellpose's flows. What happens to an image on its way into a batch is in `augment`.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from daskcell.errors import ImageError, InputError
from daskcell.geometry import Box
from daskcell.storage.atomic import save_arrays

IMAGES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
_LARGE = 60.0
"""White cells of smears are shrunk to at least this diameter: flows of larger ones cost minutes."""
_COLUMNS = ("image", "mask", "group", "white_cell", "rows")


@dataclass(frozen=True)
class Sample:
    """One image with its cells.

    `kind` chooses the augmentation: ``grey`` (fluorescence or phase, one channel), ``colour`` (stained
    tissue, three), ``smear`` (stained blood, three), ``stains`` (one channel a stain; any number).
    """

    name: str
    kind: str
    group: str
    channels: np.ndarray
    """``(C, Y, X)`` as stored."""
    flows: np.ndarray
    """``(2, Y, X)`` float16: unit vectors (y, x) toward each cell's centre, 0 outside cells."""
    labels: np.ndarray
    """``(Y, X)`` int32."""
    centres: np.ndarray
    """``(n, 2)`` float32 (y, x) of each cell."""
    diameter: float
    """Median over the cells of the diameter of the disc of equal area, in pixels."""


def make_sample(
    name: str, channels: np.ndarray, labels: np.ndarray, group: str, kind: str, cache: Path | None = None
) -> Sample | None:
    """A sample with Cellpose's flows; None if the image has no cell.

    Flows take most of the time of preparing: with the folder `cache` they are computed once.
    """
    labels = np.ascontiguousarray(labels, np.int32)
    areas = np.bincount(labels.ravel())[1:]
    present = np.flatnonzero(areas) + 1
    if not len(present):
        return None
    compact = np.zeros(len(areas) + 1, np.int32)
    compact[present] = np.arange(1, len(present) + 1)
    labels = compact[labels]
    ys, xs = np.nonzero(labels)
    owner, count = labels[ys, xs] - 1, len(present)
    size = np.bincount(owner, minlength=count)
    centres = np.stack([np.bincount(owner, weights=p, minlength=count) / size for p in (ys, xs)], axis=1)
    return Sample(
        name,
        kind,
        group,
        np.ascontiguousarray(channels),
        _cached(cache, ("flows", labels), lambda: _flows(labels)),
        labels,
        centres.astype(np.float32),
        float(np.median(2 * np.sqrt(size / np.pi))),
    )


def _flows(labels: np.ndarray) -> np.ndarray:
    import torch
    from cellpose import dynamics

    found = dynamics.labels_to_flows([labels], device=torch.device("cpu"))[0]
    return np.asarray(found[2:4], np.float16)


def _cached(cache: Path | None, key: Sequence[object], build: Callable[[], np.ndarray]) -> np.ndarray:
    """An array kept in a folder under the hash of what it is made from."""
    if cache is None:
        return build()
    digest = hashlib.sha256()
    for part in key:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str} {part.shape};".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(f"{part};".encode())
    path = cache / f"{digest.hexdigest()[:32]}.npy"
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        array = build()
        cache.mkdir(parents=True, exist_ok=True)
        save_arrays(path, array)
        return array


@dataclass(frozen=True)
class ImagePair:
    """Where an image to train on and its mask are."""

    image: Path
    mask: Path | None
    """None: a stained smear, whose cells are outlined by `smears.outline_smear`."""
    group: str
    white_cell: float | None = None
    """Diameter in pixels of a white cell of a smear."""
    rows: tuple[int, int | None] = (0, None)
    """First row of the image that is used, and the first that is not."""


def list_sources(path: str | Path) -> list[ImagePair]:
    """Images to train on or to validate with.

    Parameters
    ----------
    path
        A folder with ``images/`` and label images of the same names in ``masks/``; the group of an image, by
        which images are balanced, is its name up to the last underscore. Or a table (``.csv``) with the
        columns image, mask, group (files relative to the table's folder) and, if wanted, white_cell (the
        diameter in pixels of a white blood cell: the image is a stained smear without a mask) and rows
        (``0:200``: only these are used).

    Raises
    ------
    InputError
        If there is no image, a mask is missing, or the table lacks a column.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return _list_table(path)
    images = sorted(p for p in (path / "images").glob("*") if p.suffix.lower() in IMAGES)
    if not images:
        raise InputError(f"{path} has no images to train on. Please give a folder with images/ and masks/.")
    masks = {p.stem: p for p in (path / "masks").glob("*")}
    for image in images:
        if image.stem not in masks:
            raise InputError(
                f"{image} has no mask. Please put a label image of that name into {path / 'masks'}."
            )
    return [ImagePair(p, masks[p.stem], p.stem.rpartition("_")[0] or "all") for p in images]


def _list_table(path: Path) -> list[ImagePair]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            names, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"Cannot read the table {path}: {error}.") from None
    missing = [name for name in _COLUMNS[:3] if name not in names]
    if missing or not rows:
        lack = f"no column {' or '.join(missing)}" if missing else "no rows"
        raise InputError(
            f"The table {path} has {lack}. Please give the columns image, mask and group, and an image a row."
        )
    sources = []
    for number, row in enumerate(rows, start=2):
        mask, cell, part = (row.get(name) or "" for name in ("mask", "white_cell", "rows"))
        try:
            start, _, stop = part.partition(":")
            rows_used = (int(start or 0), int(stop) if stop else None)
            diameter = float(cell) if cell else None
        except ValueError:
            raise InputError(
                f"Row {number} of {path} has rows={part!r} and white_cell={cell!r}. Please give rows such as "
                "0:200 and a diameter in pixels."
            ) from None
        if bool(mask) == bool(cell):
            raise InputError(
                f"Row {number} of {path} must have either a mask or, for a stained smear, a white_cell."
            )
        image = path.parent / (row["image"] or "")
        sources.append(
            ImagePair(image, path.parent / mask if mask else None, row["group"] or "all", diameter, rows_used)
        )
    return sources


def read_samples(
    paths: Iterable[str | Path],
    *,
    most: int | None = None,
    cache: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Sample]:
    """Samples of folders and tables of images (`list_sources`); images without a cell are left out.

    One channel is taken for fluorescence or phase contrast, three for a stained image.

    Parameters
    ----------
    most
        Images of a group that are read at most, the first ones; None: all.
    cache
        Folder that keeps flows and masks of smears from one training to the next.
    report
        Called with a line now and then.

    Raises
    ------
    InputError
        As `list_sources`; or a mask is of another size than its image, or no mask has a cell.
    ImageError
        If a file cannot be read.
    """
    sources, counts, samples = [], Counter[str](), []
    for path in paths:
        for source in list_sources(path):
            counts[source.group] += 1
            if most is None or counts[source.group] <= most:
                sources.append(source)
    for i, source in enumerate(sources):
        sample = _read_sample(source, cache)
        if sample is not None:
            samples.append(sample)
        if (i + 1) % 50 == 0:
            report(f"prepared {i + 1} of {len(sources)} images")
    if sources and not samples:
        raise InputError(
            f"No mask in {', '.join(sorted({str(s.mask.parent) for s in sources if s.mask}))} has a cell, so "
            "there is nothing to learn."
        )
    return samples


def _read_sample(source: ImagePair, cache: Path | None) -> Sample | None:
    channels = _read(source.image)[:3]
    if len(channels) == 2:
        raise ImageError(f"{source.image} has 2 channels. Please give a grey or colour image.")
    kind = "grey" if len(channels) == 1 else "colour"
    if source.mask is None:
        from daskcell.training.smears import VERSION, outline_smear

        if kind != "colour" or channels.dtype != np.uint8:
            raise InputError(
                f"{source.image} is no 8-bit colour image, so its cells cannot be outlined as those of a "
                "stained smear. Please give a mask."
            )
        rgb, size = np.moveaxis(channels, 0, -1), source.white_cell or 0.0
        labels = _cached(cache, ("smear", VERSION, size, rgb), lambda: outline_smear(rgb, size)[0])
        kind, shrink = "smear", max(1, int(size // _LARGE))
        if shrink > 1:
            rows, columns = (n // shrink * shrink for n in labels.shape)
            blocks = channels[:, :rows, :columns].reshape(
                3, rows // shrink, shrink, columns // shrink, shrink
            )
            channels = blocks.mean(axis=(2, 4)).round().astype(np.uint8)
            labels = labels[shrink // 2 : rows : shrink, shrink // 2 : columns : shrink]
    else:
        labels = np.squeeze(_read(source.mask))
        if channels.shape[1:] != labels.shape:
            raise InputError(
                f"{source.mask} is {labels.shape} pixels but its image {channels.shape[1:]}. Please give "
                "masks of the images' sizes."
            )
    used = slice(*source.rows)
    channels, labels = channels[:, used], labels[used]
    return make_sample(source.image.stem, channels, labels, source.group, kind, cache)


def _read(path: Path) -> np.ndarray:
    """Pixels ``(C, Y, X)`` of a file, decoded beside this process: a damaged one does it no harm."""
    from daskcell.images import Source
    from daskcell.images.reader_process import open_safely

    reader = open_safely(Source(path.stem, (str(path),)))
    try:
        if max(reader.sizes.values()) > 1:
            raise ImageError(
                f"{path} holds several planes or time points. Please save the one to learn from."
            )
        return reader.read(0, Box(0, 0, *reader.levels[0]))
    finally:
        reader.close()


def draw_samples(count: int, seed: int = 0, side: int = 512, cache: Path | None = None) -> Iterable[Sample]:
    """Generated fields of whole cells, of varied density, clumping and noise; one a seed."""
    from daskcell.evaluation.generated import synthesize_field

    for i in range(count):
        rng = np.random.default_rng([seed, i])
        field = synthesize_field(
            (side, side),
            int(rng.integers(2**31)),
            cells=int(side * side / np.exp(rng.uniform(np.log(1300), np.log(4500)))),
            clumping=float(rng.uniform(0.2, 0.8)),
            noise=float(np.exp(rng.uniform(np.log(0.3), np.log(4.0)))),
        )
        sample = make_sample(f"field{i}", field.channels, field.labels, "generated cells", "stains", cache)
        if sample is not None:
            yield sample


def draw_membranes(count: int, seed: int = 0, side: int = 384, cache: Path | None = None) -> Iterable[Sample]:
    """Generated sheets of cells that touch, of which only the membranes are stained; one a seed."""
    for i in range(count):
        channels, labels = _sheet(np.random.default_rng([seed, i, 1]), side)
        sample = make_sample(f"sheet{i}", channels, labels, "generated membranes", "grey", cache)
        if sample is not None:
            yield sample


def _sheet(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    from scipy import ndimage
    from scipy.spatial import cKDTree
    from skimage.segmentation import find_boundaries

    def cloud(sigma: float) -> np.ndarray:
        field = ndimage.gaussian_filter(rng.standard_normal((side, side)), sigma, mode="reflect")
        return field / field.std()

    diameter = np.exp(rng.uniform(np.log(14), np.log(55)))
    points = rng.uniform(-diameter, side + diameter, (max(12, int((side / diameter + 2) ** 2)), 2))
    pixels = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).astype(float)
    stretch = np.array([1.0, np.exp(rng.uniform(-0.5, 0.5))])
    for _ in range(rng.integers(1, 4)):  # Lloyd's rounds: cells of a sheet are of about one size
        nearest = cKDTree(points * stretch).query(pixels[::3, ::3].reshape(-1, 2) * stretch)[1]
        counts = np.bincount(nearest, minlength=len(points))
        for axis in (0, 1):
            means = np.bincount(nearest, pixels[::3, ::3, axis].ravel(), len(points)) / np.maximum(counts, 1)
            points[:, axis] = np.where(counts > 0, means, points[:, axis])
    bent = pixels + rng.uniform(0.02, 0.1) * diameter * np.stack([cloud(diameter / 4) for _ in range(2)], -1)
    labels = 1 + cKDTree(points * stretch).query(bent.reshape(-1, 2) * stretch)[1].reshape(side, side)
    edge = find_boundaries(labels, mode="inner")
    width = rng.uniform(0.8, 2.2)
    signal = np.exp(-((ndimage.distance_transform_edt(~edge) / width) ** 2))
    signal *= np.clip(1 + rng.uniform(0.1, 0.45) * cloud(diameter / 3), 0.15, 3)
    inside = (
        rng.uniform(0, 0.35)
        * np.clip(1 + 0.4 * cloud(3), 0, None)
        * rng.uniform(0.6, 1.4, len(points) + 1)[labels]
    )
    outside = cloud(1.5 * diameter) > rng.uniform(1.0, 4.0)  # the sheet has holes, or none
    gone = np.unique(labels[outside])
    labels = np.where(np.isin(labels, gone), 0, labels)
    light = np.clip(1 + rng.uniform(0, 0.4) * cloud(side / 4), 0.3, None)
    image = ndimage.gaussian_filter(
        np.where(labels > 0, signal + inside, 0.3 * signal * rng.random()) * light, 0.7
    )
    photons = np.exp(rng.uniform(np.log(8), np.log(200)))
    image = rng.poisson(photons * np.clip(image + rng.uniform(0.02, 0.2), 0, None)) / photons
    return image[None].astype(np.float32), labels.astype(np.int32)
