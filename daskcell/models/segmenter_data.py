"""Pictures with truth, ready to train the segmenter: raw channels, flows, foreground, diameter.

Covers reading folders of pictures and masks, drawing generated fields, and Cellpose's flows. What happens to
a picture on its way into a batch is in `segmenter_augment`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from daskcell.errors import ImageError, InputError

PICTURES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True)
class Sample:
    """One picture with its cells.

    `kind` chooses the augmentation: ``grey`` (fluorescence or phase, one channel), ``colour`` (stained,
    three), ``stains`` (one channel a stain; any number).
    """

    name: str
    kind: str
    group: str
    channels: np.ndarray
    """``(C, Y, X)`` float32, as stored."""
    flows: np.ndarray
    """``(2, Y, X)`` float16: unit vectors (y, x) toward each cell's centre, 0 outside cells."""
    labels: np.ndarray
    """``(Y, X)`` int32."""
    centres: np.ndarray
    """``(n, 2)`` float32 (y, x) of each cell."""
    diameter: float
    """Median over the cells of the diameter of the disc of equal area, in pixels."""


def make_sample(name: str, channels: np.ndarray, labels: np.ndarray, group: str, kind: str) -> Sample | None:
    """A sample with Cellpose's flows; None if the picture has no cell."""
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
        np.ascontiguousarray(channels, np.float32),
        _flows(labels),
        labels,
        centres.astype(np.float32),
        float(np.median(2 * np.sqrt(size / np.pi))),
    )


def _flows(labels: np.ndarray) -> np.ndarray:
    import torch
    from cellpose import dynamics

    found = dynamics.labels_to_flows([labels], device=torch.device("cpu"))[0]
    return np.asarray(found[2:4], np.float16)


def read_folder(folder: str | Path, *, report: Callable[[str], None] = lambda line: None) -> list[Sample]:
    """Samples from ``folder/images`` and label images of the same names in ``folder/masks``.

    A file's group, by which pictures are balanced, is its name up to the last underscore. One channel is
    taken for fluorescence or phase contrast, three for a stained picture.

    Raises
    ------
    InputError
        If there is no picture, or a mask is missing or of another size.
    ImageError
        If a file cannot be read.
    """
    folder = Path(folder)
    pictures = sorted(p for p in (folder / "images").glob("*") if p.suffix.lower() in PICTURES)
    if not pictures:
        raise InputError(
            f"{folder} has no pictures to train on. Please give a folder with images/ and masks/."
        )
    masks = {p.stem: p for p in (folder / "masks").glob("*")}
    samples: list[Sample] = []
    for i, path in enumerate(pictures):
        if path.stem not in masks:
            raise InputError(
                f"{path} has no mask. Please put a label image of that name into {folder / 'masks'}."
            )
        picture, labels = _read(path), np.squeeze(_read(masks[path.stem]))
        channels = picture[None] if picture.ndim == 2 else np.moveaxis(picture[..., :3], -1, 0)
        if channels.shape[1:] != labels.shape:
            raise InputError(
                f"{masks[path.stem]} is {labels.shape} pixels but its picture {channels.shape[1:]}. "
                "Please give masks of the pictures' sizes."
            )
        kind = "grey" if len(channels) == 1 else "colour"
        sample = make_sample(path.stem, channels, labels, path.stem.rpartition("_")[0] or "all", kind)
        if sample is not None:
            samples.append(sample)
        if (i + 1) % 20 == 0:
            report(f"read {i + 1} of {len(pictures)} pictures of {folder}")
    if not samples:
        raise InputError(f"No mask in {folder / 'masks'} has a cell, so there is nothing to learn.")
    return samples


def _read(path: Path) -> np.ndarray:
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            import tifffile

            pixels = tifffile.imread(path)
        else:
            from skimage.io import imread

            pixels = imread(path)
    except Exception as error:
        raise ImageError(f"Cannot read {path}: {error}. Please remove it or mend it.") from error
    if not pixels.size:
        raise ImageError(f"{path} holds no picture. Please remove it or mend it.")
    return pixels


def draw_samples(count: int, seed: int = 0, side: int = 512) -> Iterable[Sample]:
    """Generated fields of whole cells, of varied density, clumping and noise; one a seed."""
    from daskcell.synthetic import synthesize_field

    for i in range(count):
        rng = np.random.default_rng([seed, i])
        field = synthesize_field(
            (side, side),
            int(rng.integers(2**31)),
            cells=int(side * side / np.exp(rng.uniform(np.log(1300), np.log(4500)))),
            clumping=float(rng.uniform(0.2, 0.8)),
            noise=float(np.exp(rng.uniform(np.log(0.3), np.log(4.0)))),
        )
        sample = make_sample(f"field{i}", field.channels, field.labels, "generated", "stains")
        if sample is not None:
            yield sample
