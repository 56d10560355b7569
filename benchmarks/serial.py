"""The report's own way, in one plain file: in memory, one picture after another, no daskcell.

Reads pictures, rebuilds the colour picture from its channels, adjusts the histogram, filters, writes the
preprocessed ``.tif``, segments (Cellpose's own ``eval``, or the watershed with its two cures), crops every
cell, describes the crops with a network, groups them with k-means and colours the cells by group.

It is the oracle for small pictures in the tests, and the baseline all claims of speed are measured against.
Only the weights come from daskcell (`load_network`, `load_encoder`): both sides must run the same networks.

    python benchmarks/serial.py PICTURES -o OUT [--method watershed] [--encoder resnet152] [--k 11]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "cyan": (0, 1, 1)}
SUFFIXES = {".tif", ".tiff", ".png", ".jpg", ".jpeg"}


# -- reading and preprocessing ---------------------------------------------------------------------
def read_picture(files: list[Path]) -> np.ndarray:
    """One picture from one file a channel, or from a single file: ``(C, Y, X)``."""
    import tifffile
    from skimage import io

    planes = []
    for file in files:
        tiff = file.suffix.lower() in (".tif", ".tiff")
        plane = tifffile.imread(file) if tiff else io.imread(file)
        if plane.ndim == 3 and plane.shape[-1] in (3, 4):
            plane = np.moveaxis(plane[..., :3], -1, 0)
        planes.append(plane if plane.ndim == 3 else plane[None])
    return np.concatenate(planes)


def reconstruct(
    channels: np.ndarray,
    colors: tuple[str, ...] = ("red", "green", "blue", "cyan"),
    ratio: tuple | None = None,
) -> np.ndarray:
    """Colour picture ``(3, Y, X)`` as the weighted sum of stains; integers saturate."""
    colors = colors[: len(channels)]
    ratio = ratio or (1,) * len(colors)
    total = np.zeros((3, *channels.shape[1:]))
    for channel, color, weight in zip(channels, colors, ratio, strict=True):
        total += weight * np.array(COLORS[color], float)[:, None, None] * channel
    if channels.dtype.kind in "ui":
        total = np.clip(np.rint(total), 0, np.iinfo(channels.dtype).max)
    return total.astype(channels.dtype)


def adjust_histogram(picture: np.ndarray, low: float = 0.2, high: float = 99.8) -> np.ndarray:
    """Stretch each channel between two percentiles of the whole picture."""
    from skimage.exposure import rescale_intensity

    top = np.iinfo(picture.dtype).max if picture.dtype.kind in "ui" else 1.0
    return np.stack(
        [
            rescale_intensity(c, tuple(np.percentile(c, (low, high)).astype(float)), (0, top)).astype(c.dtype)
            for c in picture
        ]
    )


def gaussian(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian filter of each channel (reflected at the border, cut at four sigma); integers are rounded."""
    from scipy import ndimage

    smooth = ndimage.gaussian_filter(picture.astype(float), (0, sigma, sigma))
    return (np.rint(smooth) if picture.dtype.kind in "ui" else smooth).astype(picture.dtype)


# -- segmentation ----------------------------------------------------------------------------------
def cellpose_model(net: Any) -> Any:
    """Cellpose's own `CellposeModel` around `net`, so that its genuine ``eval`` runs with any network.

    `net` is what ``cellpose.core.run_net`` accepts: ``.device``, ``.dtype``, ``forward(x) -> (y, style)``.
    """
    from cellpose.models import CellposeModel

    # __init__ would build the 1.2 GB network and fetch its weights; eval needs no more than these attributes.
    model = CellposeModel.__new__(CellposeModel)
    model.net = net
    model.device = net.device
    model.gpu = net.device.type == "cuda"
    model.backbone = "sam_vitl"  # what eval takes tiles of 256 for
    model.pretrained_model = "daskcell"
    return model


def segment_cellpose(
    picture: np.ndarray, net: Any, diameter: float | str | None = None, **options: Any
) -> np.ndarray:
    """Labels ``(Y, X)`` uint32 of a picture ``(C, Y, X)`` by ``CellposeModel.eval`` on the whole.

    ``diameter="auto"``: a first pass without, its median diameter for the second.
    """
    model = cellpose_model(net)
    image = np.moveaxis(picture[:3], 0, -1)

    def run(size: float | None) -> np.ndarray:
        masks = model.eval(image, channel_axis=-1, diameter=size, bsize=256, tile_overlap=0.1, **options)[0]
        return masks.astype(np.uint32)

    if diameter != "auto":
        return run(diameter)  # type: ignore[arg-type]
    first = run(None)
    areas = np.bincount(first.ravel())[1:]
    areas = areas[areas > 0]
    return run(float(np.sqrt(np.median(areas) * 4 / np.pi))) if len(areas) else first


def segment_watershed(
    picture: np.ndarray,
    dark: bool = False,
    opening: int = 2,
    min_distance: int = 7,
    merge_similarity: float | None = 0.75,
    min_size: int = 15,
) -> np.ndarray:
    """The report's watershed: Otsu, opening (first cure), distance, markers, flood, merging (second cure)."""
    from scipy import ndimage
    from skimage import feature, filters, measure, morphology, segmentation

    gray = picture.astype(float).mean(axis=0)
    gray = -gray if dark else gray
    cells = gray > filters.threshold_otsu(gray)
    if opening:
        cells = ndimage.binary_opening(cells, morphology.disk(opening))
    distance = ndimage.distance_transform_edt(cells)
    pieces = measure.label(cells)
    peaks = feature.peak_local_max(distance, min_distance=min_distance, labels=pieces)
    markers = np.zeros(gray.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = segmentation.watershed(-distance, markers, mask=cells)
    if merge_similarity is not None:
        labels = merge_similar(labels, gray - gray.min(), merge_similarity)
    sizes = np.bincount(labels.ravel())
    labels[sizes[labels] < min_size] = 0
    return segmentation.relabel_sequential(labels)[0].astype(np.uint32)


def merge_similar(labels: np.ndarray, gray: np.ndarray, similarity: float) -> np.ndarray:
    """Join touching regions whose shared border keeps `similarity` of the darker region's brightness."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = int(labels.max()) + 1
    inner = np.bincount(labels.ravel(), gray.ravel(), count) / np.maximum(np.bincount(labels.ravel()), 1)
    pairs, border = [], []
    for a, b, ga, gb in (
        (labels[1:], labels[:-1], gray[1:], gray[:-1]),
        (labels[:, 1:], labels[:, :-1], gray[:, 1:], gray[:, :-1]),
    ):
        touch = (a != b) & (a > 0) & (b > 0)
        pairs.append(np.stack([np.minimum(a[touch], b[touch]), np.maximum(a[touch], b[touch])]))
        border.append((ga[touch] + gb[touch]) / 2)
    if not sum(map(len, border)):
        return labels
    (first, second), where = np.unique(np.concatenate(pairs, axis=1), axis=1, return_inverse=True)
    where = where.ravel()
    mean = np.bincount(where, np.concatenate(border)) / np.bincount(where)
    join = mean >= similarity * np.minimum(inner[first], inner[second])
    graph = coo_matrix((np.ones(join.sum()), (first[join], second[join])), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(labels.dtype)[labels]


# -- cells, features, groups -----------------------------------------------------------------------
def crop_cells(picture: np.ndarray, labels: np.ndarray, size: int, margin: float = 0.1) -> np.ndarray:
    """Every cell, blanked around and resized: ``(n, 3, size, size)`` float32 on a 0-1 scale."""
    from scipy import ndimage
    from skimage.transform import resize

    top = np.iinfo(picture.dtype).max if picture.dtype.kind in "ui" else 1.0
    rgb = picture if len(picture) == 3 else np.repeat(picture[:1], 3, axis=0)
    crops = np.zeros((int(labels.max()), 3, size, size), np.float32)
    for i, box in enumerate(ndimage.find_objects(labels.astype(np.int64))):
        half = (max(s.stop - s.start for s in box) * (1 + 2 * margin)) / 2
        centre = [(s.start + s.stop) / 2 for s in box]
        y, x = (slice(max(0, int(c - half)), int(np.ceil(c + half))) for c in centre)
        cell = rgb[:, y, x] * (labels[y, x] == i + 1) / top
        crops[i] = resize(cell, (3, size, size), order=1, anti_aliasing=False)
    return crops


def load_features_net(encoder: str) -> tuple[Any, int]:
    """A network and the side of its crops: any torchvision name (ImageNet weights), or ``tiny``."""
    if encoder == "tiny":
        from daskcell.models import load_encoder

        return load_encoder(encoder), 64
    import torchvision

    return torchvision.models.get_model(encoder, weights="DEFAULT").eval(), 224


def describe(net: Any, crops: np.ndarray, imagenet: bool, batch: int = 32) -> np.ndarray:
    """The network's outputs for every crop: ``(n, d)`` float32."""
    import torch

    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None] if imagenet else torch.zeros(3, 1, 1)
    scale = torch.tensor([0.229, 0.224, 0.225])[:, None, None] if imagenet else torch.ones(3, 1, 1)
    with torch.inference_mode():
        parts = [
            net((torch.from_numpy(crops[i : i + batch]) - mean) / scale) for i in range(0, len(crops), batch)
        ]
    return torch.cat(parts).float().numpy()


def group(features: np.ndarray, k: int = 11, components: int | None = 32, seed: int = 0) -> np.ndarray:
    """Group of every cell by k-means on standardised, projected features."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    points = StandardScaler().fit_transform(features)
    if components:
        points = PCA(min(components, *points.shape), random_state=seed).fit_transform(points)
    return KMeans(k, n_init=4, random_state=seed).fit_predict(points)


def overlay(picture: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Cells coloured by group over the picture: ``(Y, X, 3)`` uint8."""
    from skimage.color import hsv2rgb, label2rgb

    top = np.iinfo(picture.dtype).max if picture.dtype.kind in "ui" else 1.0
    rgb = picture if len(picture) == 3 else np.repeat(picture[:1], 3, axis=0)
    value = np.concatenate([[0], groups + 1])[labels]
    shades = int(value.max())
    colors = hsv2rgb(np.stack([np.arange(shades) / max(shades, 1), np.ones(shades), np.ones(shades)], -1))
    mixed = label2rgb(value, np.moveaxis(rgb / top, 0, -1), colors=colors, alpha=0.4, bg_label=0)
    return np.rint(np.clip(mixed, 0, 1) * 255).astype(np.uint8)


# -- the whole way ---------------------------------------------------------------------------------
class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def find_pictures(folder: Path, channels: list[str] | None) -> dict[str, list[Path]]:
    """Files by picture. Files that differ only in one of `channels` (parts of names) are one picture."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not channels:
        return {f.stem: [f] for f in files}
    pictures: dict[str, dict[int, Path]] = {}
    for file in files:
        for i, channel in enumerate(channels):
            if channel in file.stem:
                pictures.setdefault(file.stem.replace(channel, "", 1), {})[i] = file
                break
    return {name: [found[i] for i in sorted(found)] for name, found in pictures.items()}


def run(
    folder: Path,
    out: Path,
    *,
    channels: list[str] | None = None,
    ratio: tuple[float, ...] | None = None,
    sigma: float | None = None,
    method: str = "cellpose",
    model: str = "tiny",
    diameter: float | str | None = "auto",
    encoder: str = "tiny",
    k: int = 11,
) -> dict[str, Any]:
    """Everything, picture after picture; returns counts and seconds by stage."""
    import tifffile

    watch = Stopwatch()
    out.mkdir(parents=True, exist_ok=True)
    with watch("load networks"):
        net = None
        if method == "cellpose":
            from daskcell.models import load_network

            net = load_network(model)
        features_net, size = load_features_net(encoder)

    pictures = find_pictures(folder, channels)
    kept, features = {}, []
    for name, files in pictures.items():
        with watch("read"):
            picture = read_picture(files)
        with watch("preprocess"):
            if len(files) > 1:
                picture = reconstruct(picture, ratio=ratio)
            picture = adjust_histogram(picture)
            if sigma:
                picture = gaussian(picture, sigma)
        with watch("write preprocessed"):
            colour = len(picture) == 3
            image = np.moveaxis(picture, 0, -1) if colour else picture
            kind = "rgb" if colour else "minisblack"
            tifffile.imwrite(out / f"{name}_preprocessed.tif", image, photometric=kind)
        with watch("segment"):
            labels = segment_watershed(picture) if net is None else segment_cellpose(picture, net, diameter)
        with watch("write labels"):
            tifffile.imwrite(out / f"{name}_cells.tif", labels, compression="zlib")
        if not labels.max():
            continue
        with watch("crop"):
            crops = crop_cells(picture, labels, size)
        with watch("features"):
            features.append(describe(features_net, crops, imagenet=encoder != "tiny"))
        kept[name] = (picture, labels)

    if features:
        with watch("cluster"):
            groups = group(np.concatenate(features), k)
        with watch("overlay"):
            start = 0
            for (name, (picture, labels)), part in zip(kept.items(), features, strict=True):
                coloured = overlay(picture, labels, groups[start : start + len(part)])
                tifffile.imwrite(out / f"{name}_clusters.tif", coloured, photometric="rgb")
                start += len(part)
    return {"pictures": len(pictures), "cells": sum(map(len, features)), "seconds": watch.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument(
        "--channels", nargs="+", help="parts of file names, one a channel, in order R G B Cyan"
    )
    parser.add_argument("--ratio", nargs="+", type=float)
    parser.add_argument("--sigma", type=float)
    parser.add_argument("--method", choices=["cellpose", "watershed"], default="cellpose")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--diameter", type=lambda v: v if v == "auto" else float(v), default="auto")
    parser.add_argument("--encoder", default="tiny", help="tiny, or a torchvision name such as resnet152")
    parser.add_argument("-k", type=int, default=11)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    options["ratio"] = tuple(options["ratio"]) if options["ratio"] else None
    figures = run(options.pop("folder"), options.pop("out"), **options)
    if as_json:
        print(json.dumps(figures))
        return
    print(f"{figures['pictures']} pictures, {figures['cells']} cells")
    for stage, seconds in figures["seconds"].items():
        print(f"{seconds:10.2f} s  {stage}")
    print(f"{sum(figures['seconds'].values()):10.2f} s  in all")


if __name__ == "__main__":
    main()
