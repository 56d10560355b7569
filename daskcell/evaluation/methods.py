"""Methods to score: Cellpose on a whole picture in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from daskcell.config import PreprocessSettings
from daskcell.errors import InputError

Method = Callable[[np.ndarray], Any]
"""From a picture ``(C, Y, X)`` to labels ``(Y, X)``."""


def cellpose_method(
    model: str = "tiny",
    diameter: float | str | None = "auto",
    *,
    preprocess: PreprocessSettings | None = None,
    device: str = "cpu",
    batch_size: int = 8,
    cellprob_threshold: float = 0.0,
    flow_threshold: float = 0.4,
    min_size: int = 15,
    network: Any = None,
) -> Method:
    """Cellpose on the whole picture in memory: its own normalisation, tiles and dynamics, no blocks.

    Parameters
    ----------
    model : name or file of weights, as in `daskcell.load_network`
    diameter : float, None or "auto"
        In pixels; None: no rescaling; ``"auto"``: the median of the cells of a first pass.
    preprocess : settings
        Applied first; None: the picture as it is.
    network : torch module, optional
        Instead of `model`.

    Returns
    -------
    callable from a picture ``(C, Y, X)`` to labels ``(Y, X)`` uint32
    """
    if isinstance(diameter, str) and diameter != "auto":
        raise InputError(f"The diameter {diameter!r} cannot be used: give pixels, 'auto' or nothing.")
    if network is None:
        from daskcell.models import load_network

        network = load_network(model, device)

    def segment(picture: np.ndarray) -> np.ndarray:
        if preprocess is not None:
            from daskcell.preprocess import apply_block, fit_plan

            picture = apply_block(picture, fit_plan(picture, preprocess, is_rgb=len(picture) == 3))
        normalised = _normalised(picture)

        def run(size: float | None) -> np.ndarray:
            return _run_cellpose(
                network, normalised, size, batch_size, cellprob_threshold, flow_threshold, min_size
            )

        if diameter != "auto":
            return run(diameter)  # type: ignore[arg-type]
        first = run(None)
        size = median_diameter(first)
        return first if size is None else run(size)

    return segment


def _normalised(picture: np.ndarray) -> np.ndarray:
    """``(1, Y, X, 3)`` float32, each channel by its 1st and 99th percentile, as ``CellposeModel.eval``."""
    from cellpose import transforms

    image = transforms.convert_image(np.moveaxis(picture[:3], 0, -1), channel_axis=-1)
    return transforms.normalize_img(image[None], normalize=True)


def _run_cellpose(
    network: Any,
    picture: np.ndarray,
    diameter: float | None,
    batch_size: int,
    cellprob_threshold: float,
    flow_threshold: float,
    min_size: int,
) -> np.ndarray:
    from cellpose import core, dynamics, transforms

    height, width = picture.shape[1:3]
    scale = 30.0 / diameter if diameter else 1.0
    y, _ = core.run_net(
        network,
        picture,
        batch_size=batch_size,
        bsize=256,
        rsz=None if scale == 1 else scale,
        tile_overlap=0.1,
    )
    if scale != 1:
        y = transforms.resize_image(y, height, width)
    masks = dynamics.resize_and_compute_masks(
        np.moveaxis(y[0, ..., -3:-1], -1, 0),
        y[0, ..., -1],
        niter=int(200 / scale),
        cellprob_threshold=cellprob_threshold,
        flow_threshold=flow_threshold,
        min_size=min_size,
        device=network.device,
    )
    return masks.astype(np.uint32)


def median_diameter(labels: np.ndarray) -> float | None:
    """Median over the cells of the diameter of the disc of equal area, in pixels; None without cells."""
    areas = np.bincount(np.asarray(labels).ravel())[1:]
    areas = areas[areas > 0]
    return float(np.sqrt(np.median(areas) * 4 / np.pi)) if len(areas) else None
