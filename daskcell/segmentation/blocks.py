"""The work on one block, as functions of arrays: what the lazy arrays and the engine both run.

    observe(blocks) ──> fit ──> image parameters
    run_tiles(block)          the method's own: tiles through a network
    label_block(block)        candidates: labels that are the block's own
    check_block, paint_core   see `core.cells` and `core.seams`

Pixels come by `read`, from chunks of an array or from a study; what the tasks hand on to each other lies in a
Dask graph or in files. Neither is known here.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.segmentation.core.ownership import Candidates, own_labels
from daskcell.segmentation.methods.base import BoxLabels, Method, Read, refuse_unusable


def observe(method: Method, read: Read, boxes: Iterable[Box], shape: tuple[int, int]) -> list[np.ndarray]:
    """What some blocks contribute to the facts of the whole image, read one after another.

    Raises
    ------
    InputError
        For pixels that are NaN, infinite or complex.
    """
    observed = []
    for box in boxes:
        block = read(box)
        refuse_unusable(block, box)
        observed.append(method.observe(block, box, shape))
    return method.merge(observed)


def fit(
    method: Method,
    observed: list[list[np.ndarray]],
    shape: tuple[int, int],
    tissue: np.ndarray | None = None,
) -> Any:
    """Facts of the whole image, the same whether they come from a file or from memory.

    Parameters
    ----------
    observed
        What `observe` returned for all blocks.
    tissue : (y, x) bool, optional
        Mask of the whole image at any size; tiles without tissue are left out.
    """
    params = method.fit(method.merge(observed), shape)
    if tissue is not None:
        params = method.without_tissue(params, tissue)
    try:
        values = json.dumps(method.dump_params(params), default=_plain)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{type(method).__name__}.fit must return what JSON can hold (numbers, strings, lists, "
            f"dictionaries): {error}."
        ) from None
    return method.load_params(json.loads(values))


def _plain(value: Any) -> Any:
    """NumPy's arrays and numbers as JSON has them."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"not {type(value).__name__}")


class Labelled(NamedTuple):
    """What `label_block` found."""

    found: Candidates | None
    """None: tiles are missing."""
    halo_retries: int
    """How often the halo was doubled."""
    extra_tiles: list[int]
    """Tiles beyond those given: that went through the network, or, with nothing found, have to."""


def label_block(
    method: Method,
    params: Any,
    read: Read,
    core: Box,
    halo: int,
    shape: tuple[int, int],
    outputs: Mapping[int, np.ndarray],
    *,
    run_network: bool = True,
) -> Labelled:
    """Labels that are the own ones of the block `core`.

    Parameters
    ----------
    halo : int
        Pixels around the core to look at first.
    outputs : mapping of int to (3, 256, 256) float32
        The network's output for tiles: those within the halo, and any others.
    run_network : bool
        Run the network here on tiles that a larger halo needs besides; else say which they are. Only some
        workers may have the GPU it runs on.
    """
    grid, skipped = method.adapt(params).tile_grid(shape), method.skipped_tiles(params)
    extra: dict[int, np.ndarray] = {}
    missing: list[int] = []
    known = ChainMap(extra, outputs)  # type: ignore[arg-type]

    def segment_box(box: Box) -> BoxLabels | None:
        if grid is not None:
            touching = grid.touching(grid.to_scaled(box))
            missing[:] = [tile for tile in touching if tile not in known and tile not in skipped]
        if missing and not run_network:
            return None
        if missing:
            extra.update(zip(missing, method.run_tiles(read, params, missing), strict=True))
        return method.segment_box(box, read, params, shape, known)

    found, doublings = own_labels(core, halo, shape, segment_box, method.thresholds)
    return Labelled(found, doublings, missing if found is None else list(extra))
