"""How well a segmenter finds the cells of pictures with truth; used while training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from daskcell.models.segmenter_augment import DIAMETER
from daskcell.models.segmenter_data import Sample


def picture_of(sample: Sample) -> np.ndarray:
    """``(Y, X, 3)`` float32 as the network sees it: usual colours, 1st to 99th percentile to 0..1."""
    channels = sample.channels
    if len(channels) == 4:
        channels = np.stack([channels[0], channels[1] + channels[3], channels[2] + channels[3]])
    channels = np.repeat(channels, 3, 0) if len(channels) == 1 else channels[:3]
    low, high = np.percentile(channels, [1, 99], axis=(1, 2), keepdims=True)
    span = np.where(high - low > 1e-6, high - low, np.inf)
    return np.moveaxis((channels - low) / span, 0, -1).astype(np.float32)


def find_cells(
    net: torch.nn.Module,
    picture: np.ndarray,
    diameter: float | None = None,
    *,
    bfloat16: bool = False,
    cellprob_threshold: float = 0.0,
) -> np.ndarray:
    """Labels ``(Y, X)`` of a normalised picture ``(Y, X, 3)`` through cellpose's own tiles and dynamics."""
    from cellpose import core, dynamics, transforms

    height, width = picture.shape[:2]
    rescale = DIAMETER / diameter if diameter else 1.0
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        y, _ = core.run_net(net, picture[None], bsize=256, rsz=None if rescale == 1 else rescale)
    y = y[0]
    if rescale != 1:
        y = transforms.resize_image(y, height, width)
    return dynamics.resize_and_compute_masks(
        np.moveaxis(y[..., :2], -1, 0),
        y[..., 2],
        niter=int(200 / rescale),
        cellprob_threshold=cellprob_threshold,
        flow_threshold=0.4,
        device=torch.device("cpu"),
    ).astype(np.uint32)


def median_diameter(labels: np.ndarray) -> float | None:
    """Median over the cells of the diameter of the disc of equal area; None without cells."""
    areas = np.bincount(labels.ravel())[1:]
    return float(np.median(2 * np.sqrt(areas[areas > 0] / np.pi))) if areas.any() else None


def counts(truth: np.ndarray, found: np.ndarray, iou: Sequence[float] = (0.5, 0.75)) -> np.ndarray:
    """``(len(iou), 3)``: true positives, false positives, false negatives at each overlap."""
    from cellpose import metrics

    _, tp, fp, fn = metrics.average_precision(
        truth.astype(np.int32), found.astype(np.int32), threshold=list(iou)
    )
    return np.stack([tp, fp, fn], axis=1)


def score(net: torch.nn.Module, samples: Sequence[Sample]) -> dict[str, dict[str, np.ndarray]]:
    """Pooled counts per group of pictures, in one pass without a diameter and in two passes."""
    table: dict[str, dict[str, np.ndarray]] = {}
    for sample in samples:
        picture = picture_of(sample)
        first = find_cells(net, picture)
        second = find_cells(net, picture, median_diameter(first)) if first.any() else first
        row = table.setdefault(sample.group, {"one pass": np.zeros((2, 3)), "two passes": np.zeros((2, 3))})
        row["one pass"] += counts(sample.labels, first)
        row["two passes"] += counts(sample.labels, second)
    return table


def score_table(net: torch.nn.Module, samples: Sequence[Sample]) -> str:
    """`score` as lines of text: TP / (TP + FP + FN) at overlaps of 0.5 and 0.75."""
    table = score(net, samples)
    kinds = {s.group: s.kind for s in samples}
    for kind in sorted(set(kinds.values())):
        parts = [table[group] for group in kinds if kinds[group] == kind]
        if len(parts) > 1:
            table[f"all {kind}"] = {way: np.sum([p[way] for p in parts], axis=0) for way in parts[0]}
    lines = ["group                     cells   one pass .5 / .75    two passes .5 / .75"]
    for group, row in table.items():
        first, second = (c[:, 0] / np.maximum(c.sum(1), 1) for c in (row["one pass"], row["two passes"]))
        cells = int(row["one pass"][0, 0] + row["one pass"][0, 2])
        lines.append(
            f"{group:24s} {cells:6d}   {first[0]:.3f} / {first[1]:.3f}        "
            f"{second[0]:.3f} / {second[1]:.3f}"
        )
    return "\n".join(lines)
