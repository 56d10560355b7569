"""`segment`: lazy labels of a dask or numpy image.

The work on blocks (`blocks`) as a graph: one task a block runs the network on the tiles it owns, one labels
it, one checks its cells, one paints. In between stand three small reductions over the whole image: its
parameters, the largest mask, ids.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np

from daskcell.config import SegmentSettings
from daskcell.errors import InputError
from daskcell.geometry import Box, Grid
from daskcell.images.arrays import as_image
from daskcell.preprocess.signal import TILE, aligned
from daskcell.segmentation import blocks
from daskcell.segmentation.core.cells import Cells, check_block, number, refuse_too_many
from daskcell.segmentation.core.ownership import Candidates
from daskcell.segmentation.core.seams import SeamReport, paint_core
from daskcell.segmentation.methods import Method, make_method
from daskcell.segmentation.tissue import is_bright, smallest_level
from daskcell.segmentation.tissue import tissue_mask as find_tissue

_DEFAULT = SegmentSettings()


def segment(
    image: Any,
    method: str | Method | Callable[[np.ndarray], np.ndarray] = _DEFAULT.method,
    model: Any = _DEFAULT.model,
    diameter: float | str | None = _DEFAULT.diameter,
    *,
    channels: list[int] | None = _DEFAULT.channels,
    axes: str | None = None,
    precision: Literal["float32", "bfloat16"] | None = _DEFAULT.precision,
    normalize: Literal["signal", "cellpose"] = _DEFAULT.normalize,
    cellprob_threshold: float = _DEFAULT.cellprob_threshold,
    flow_threshold: float = _DEFAULT.flow_threshold,
    min_size: int = _DEFAULT.min_size,
    max_size_fraction: float = _DEFAULT.max_size_fraction,
    niter: int | None = _DEFAULT.niter,
    batch_size: int | None = _DEFAULT.batch_size,
    tissue_mask: Any = _DEFAULT.tissue_mask,
    device: str = "cpu",
    block: int = 1024,
    halo: int | None = None,
    return_report: bool = False,
    **options: Any,
) -> Any:
    """Find every cell; the same cells for any chunks, blocks and workers.

    Parameters
    ----------
    image : (Y, X) or (C, Y, X) array, dask or numpy, of integers or floats
        With one to three channels (or choose with `channels`). Also an `Image`, xarray, Zarr or torch array.
    method : str, Method or callable
        ``"cellpose"``, ``"watershed"`` or the name of a method that another package installs; a
        `daskcell.segmentation.methods.Method`; or a function from a block ``(C, h, w)`` to labels ``(h, w)``,
        0 for background. A function whose labels depend on pixels beside a cell, as with a filter, is given
        as ``FunctionMethod(function, reach=pixels)``.
    model : str or torch.nn.Module
        Network for Cellpose: a name, a file of weights, or a module as `cellpose.core.run_net` accepts it.
    diameter : float, "auto" or None
        Expected cell diameter in pixels, to which the image is rescaled; None: no rescaling; auto: estimated
        from a first pass, which is computed at once.
    channels : list of int, optional
        Channels to segment, at most three; None: all.
    axes : str, optional
        Order of the axes of `image`, such as ``"YXC"``; None: as the array says, else ``CYX``, or ``YXC`` for
        a last axis of up to 4 (with a warning).
    precision : "float32", "bfloat16" or None
        What the network computes in; None: float32, and bfloat16 for Cellpose-SAM. Only for a `model` that is
        a name or a file.
    normalize : "signal" or "cellpose"
        What becomes 0 and 1 for the network: percentiles 1 and 99 of all pixels, as in Cellpose; or of the
        signal, which differ where an image is padded or nearly empty (see `daskcell.preprocess.signal`).
    cellprob_threshold, flow_threshold, niter, batch_size : float, float, int, int
        As in ``CellposeModel.eval``.
    min_size : int
        Smallest cell in pixels, for all methods.
    max_size_fraction : float
        Cells larger than this share of the whole image are dropped, for all methods.
    tissue_mask : bool or `Image`
        Skip tiles of bare glass (Cellpose), seen in `image`, or in the `Image` that it was made from.
    device : "cpu" or "cuda"
        Where the network runs.
    block : int
        Advanced use: side in pixels of the blocks the work is cut into; changes no label.
    halo : int, optional
        Advanced use: pixels around a block to look at first; changes no label.
    return_report : bool
        Also return the seam report, a `dask.delayed` `SeamReport`.
    **options
        Of the watershed (see `daskcell.config.WatershedSettings`), or of an installed method.

    Returns
    -------
    (Y, X) dask array of uint32
        0 background; cells 1..N in reading order of their first pixels.

    Raises
    ------
    InputError
        No or too many channels, NaN pixels (when computed), unknown method or option.

    Notes
    -----
    Equal to ``CellposeModel.eval`` on the whole array with bsize 256 and tile_overlap 0.1 (Stringer et al.,
    Nature Methods 18, 2021; Pachitariu et al., "Cellpose-SAM", 2025), up to the order of network batches and
    ties.

    Examples
    --------
    Any function of a block, without seams:

    >>> import daskcell as dc
    >>> from skimage.measure import label
    >>> image = np.zeros((90, 90))
    >>> image[20:40, 20:40] = image[60:80, 30:50] = 1
    >>> labels = dc.segment(image, method=lambda block: label(block[0] > 0.3), block=32)
    >>> int(labels.compute().max())
    2
    """
    overview = _overview(image if tissue_mask is True else tissue_mask, image, axes)
    image = as_channels(image, channels, axes)
    shape = image.shape[1:]
    refuse_too_many(shape, min_size)
    settings = _DEFAULT.model_copy(
        update={
            "diameter": diameter,
            "precision": precision,
            "normalize": normalize,
            "cellprob_threshold": cellprob_threshold,
            "flow_threshold": flow_threshold,
            "min_size": min_size,
            "max_size_fraction": max_size_fraction,
            "niter": niter,
            "batch_size": batch_size,
        }
    )
    chosen = make_method(method, settings, model=model, device=device, options=options)
    if chosen.measures_diameter:
        from daskcell.segmentation.diameter import estimate_diameter

        chosen = chosen.with_diameter(estimate_diameter(chosen, ArrayImage(image), shape))
    labels, report = _lay_graph(chosen, image, block, chosen.halo if halo is None else halo, overview)
    return (labels, report) if return_report else labels


def _lay_graph(
    method: Method, image: Any, block: int, halo: int, overview: tuple[Any, bool | None] | None
) -> tuple[Any, Any]:
    """Labels ``(Y, X)`` and the seam report, each as a lazy value."""
    import dask
    import dask.array as da
    from dask.delayed import Delayed
    from dask.highlevelgraph import HighLevelGraph

    shape = image.shape[1:]
    tiles = method.tile_grid(shape)  # refuses a diameter that leaves no pixel
    grid = Grid.regular(shape, block)
    graph = _Graph(dask.base.tokenize(image.name, block, halo, object()))
    # One value each in the graph: a worker gets the network and the image's own graph once.
    shared = graph.add("method", (), method)
    pixels = graph.add("image", (), ArrayImage(image))
    image = image.rechunk({0: -1})
    chunks = Grid.from_chunks(image.chunks[1:])

    def chunks_of(box: Box) -> tuple[list[Box], list[Any]]:
        touching = chunks.touching(box)
        return [chunks.core(at) for at in touching], [(image.name, 0, *at) for at in touching]

    # Facts of the whole image, from chunks that begin where tiles of pixels do.
    aligned_image = image.rechunk((-1, *aligned(image.chunks[1:], TILE)))
    parts_seen = Grid.from_chunks(aligned_image.chunks[1:])
    observed = [
        graph.add(
            "observe",
            at,
            partial(_observe, box=parts_seen.core(at), shape=shape),
            shared,
            (aligned_image.name, 0, *at),
        )
        for at in parts_seen
    ]
    glass = [] if overview is None else [(overview[0].name, 0, 0, 0)]
    fit = partial(_fit, shape=shape, bright=overview and overview[1])
    params = graph.add("params", (), fit, shared, observed, glass)

    # Tiles through the network, each with the block that owns it.
    owner: dict[int, tuple[int, int]] = {}
    networks: dict[tuple[int, int], Any] = {}
    if tiles is not None:
        for at in grid:
            owned = tiles.owned(grid.core(at))
            owner.update(dict.fromkeys(owned, at))
            boxes, parts = chunks_of(Box.hull(tiles.to_image(tiles.box(tile)) for tile in owned))
            run = partial(_run_tiles, tiles=owned, boxes=boxes)
            networks[at] = graph.add("network", at, run, shared, params, parts)

    # Labels of every block; the flow check needs the largest extent of all.
    found = {}
    for at in grid:
        core = grid.core(at)
        grown = core.grow(halo).clip(shape)
        near: list[Any] = []
        boxes, parts = [], []
        if tiles is not None:
            owners = {owner[tile] for tile in tiles.touching(tiles.to_scaled(grown))}
            near = [networks[other] for other in sorted(owners)]
        else:
            boxes, parts = chunks_of(grown)
        label = partial(_label, core=core, halo=halo, shape=shape, boxes=boxes)
        found[at] = graph.add("labels", at, label, shared, params, near, pixels, parts)
    steps = graph.add("steps", (), _steps, [graph.add("extent", at, _extent, found[at]) for at in grid])
    checked = {at: graph.add("check", at, _check, shared, steps, found[at]) for at in grid}

    # Ids, and every block's own pixels.
    facts = [graph.add("facts", at, partial(_facts, grid=grid, at=at), checked[at]) for at in grid]
    numbered = graph.add("ids", (), partial(_number, order=list(grid), shape=shape), facts)
    reports = []
    for at in grid:
        near = _neighbours(grid, at)
        paint = partial(_paint, core=grid.core(at), shape=shape, near=near)
        painted = graph.add("paint", at, paint, [checked[other] for other in near], numbered)
        graph.add("cells", at, _first, painted)
        reports.append(graph.add("report", at, _report, painted, found[at]))
    seams = graph.add("seams", (), partial(_sum_reports, blocks=len(grid), tiles=len(owner)), reports)

    layers = HighLevelGraph.from_collections(
        graph.name("cells"),
        graph.tasks,
        dependencies=[image, aligned_image] + ([] if overview is None else [overview[0]]),
    )
    labels = da.Array(layers, graph.name("cells"), grid.chunks, dtype=np.uint32)
    return labels, Delayed(seams, layers, layer=graph.name("cells"))


class _Graph:
    """Tasks by key; one layer for all of them, so that its size grows with the blocks and no faster."""

    def __init__(self, token: str):
        self.token = token
        self.tasks: dict[Any, Any] = {}

    def name(self, kind: str) -> str:
        return f"{kind}-{self.token}"

    def add(self, kind: str, at: tuple[int, ...], function: Any, *arguments: Any) -> Any:
        """A task of `function` on other tasks' keys (or lists of keys); a value if there are none."""
        key = (self.name(kind), *at) if at else self.name(kind)
        self.tasks[key] = (function, *arguments) if arguments else function
        return key


class ArrayImage:
    """A Dask array to read boxes from, inside a task too (for a halo larger than foreseen)."""

    def __init__(self, image: Any):
        self.image = image

    def __call__(self, box: Box) -> np.ndarray:
        part = self.image[(slice(None), *box.slices)]
        try:
            from distributed import get_worker, worker_client

            get_worker()
        except (ImportError, ValueError):
            return np.asarray(part.compute(scheduler="synchronous"))
        with worker_client() as client:
            return np.asarray(client.compute(part).result())


def as_channels(image: Any, channels: list[int] | None = None, axes: str | None = None, most: int = 3) -> Any:
    """``(C, Y, X)`` dask array with one to `most` channels; raises `InputError` otherwise."""
    import dask.array as da

    image = as_image(image, axes=axes).data
    if not isinstance(image, da.Array):
        image = da.from_array(image, chunks=(-1, *(min(side, 2048) for side in image.shape[-2:])))
    if 0 in image.shape[1:]:
        raise InputError(f"The image has no pixels (shape {image.shape}).")
    if channels is not None:
        wrong = [c for c in channels if not 0 <= c < image.shape[0]]
        if wrong or not channels:
            raise InputError(f"channels={channels} does not fit an image with {image.shape[0]} channels.")
        image = image[list(channels)]
    if not 1 <= image.shape[0] <= most:
        raise InputError(
            f"The image has {image.shape[0]} channels, and one to {most} can be segmented. "
            "Please choose with channels=[...], or make a colour image with reconstruct()."
        )
    return image


def _observe(method: Method, part: np.ndarray, *, box: Box, shape: tuple[int, int]) -> list[np.ndarray]:
    return blocks.observe(method, lambda box: part, [box], shape)


def _fit(
    method: Method,
    observed: list[list[np.ndarray]],
    overview: list[np.ndarray],
    *,
    shape: tuple[int, int],
    bright: bool | None,
) -> Any:
    tissue = None
    if overview and method.uses_network:
        small = np.asarray(overview[0])
        tissue = find_tissue(small, is_bright(small) if bright is None else bright)
    return blocks.fit(method, observed, shape, tissue)


def _overview(seen: Any, image: Any, axes: str | None) -> tuple[Any, bool | None] | None:
    """The smallest level of what tissue is seen in; whether its ground is bright (None: by the pixels)."""
    if seen is False:
        return None
    level = as_channels(seen, axes=axes if seen is image else None, most=1 << 16)
    if level.shape[1:] != as_channels(image, axes=axes, most=1 << 16).shape[1:]:
        raise InputError(f"The tissue is seen in an image of shape {level.shape}, not in one of this size.")
    return smallest_level(level), getattr(seen, "is_rgb", None)


def _run_tiles(
    method: Method, params: Any, parts: list[np.ndarray], *, tiles: list[int], boxes: list[Box]
) -> dict[int, np.ndarray]:
    skipped = method.skipped_tiles(params)
    tiles = [tile for tile in tiles if tile not in skipped]
    return dict(zip(tiles, method.run_tiles(partial(_assemble, boxes, parts), params, tiles), strict=True))


def _label(
    method: Method,
    params: Any,
    networks: list[dict[int, np.ndarray]],
    image: ArrayImage,
    parts: list[np.ndarray],
    *,
    core: Box,
    halo: int,
    shape: tuple[int, int],
    boxes: list[Box],
) -> tuple[Candidates, SeamReport]:
    expected = core.grow(halo).clip(shape)

    def read(box: Box) -> np.ndarray:
        return _assemble(boxes, parts, box) if parts and box == expected else image(box)

    labelled = blocks.label_block(method, params, read, core, halo, shape, ChainMap(*networks))
    assert labelled.found is not None
    retried = int(labelled.halo_retries > 0)
    return labelled.found, SeamReport(halo_retries=retried, repeated=len(labelled.extra_tiles))


def _extent(labelled: tuple[Candidates, SeamReport]) -> int:
    return labelled[0].extent


def _steps(extents: list[int]) -> int:
    return 2 * max(extents, default=0)


def _check(method: Method, steps: int, labelled: tuple[Candidates, SeamReport]) -> Cells:
    return check_block(labelled[0], steps, method.thresholds)


def _facts(cells: Cells, *, grid: Grid, at: tuple[int, int]) -> tuple[np.ndarray, Cells | None]:
    """Anchors; and all cells if one reaches beyond the neighbouring blocks."""
    reach = Box.hull(grid.core(other) for other in _neighbours(grid, at))
    return cells.anchors, None if (cells.reach & reach) == cells.reach else cells


def _number(
    facts: list[tuple[np.ndarray, Cells | None]], *, order: list[tuple[int, int]], shape: tuple[int, int]
) -> tuple[dict[tuple[int, int], np.ndarray], dict[tuple[int, int], Cells]]:
    """Ids of every block's cells; and the far-reaching cells."""
    ids = number([anchors[:, 0] * shape[1] + anchors[:, 1] for anchors, _ in facts])
    far = {at: cells for at, (_, cells) in zip(order, facts, strict=True) if cells is not None}
    return dict(zip(order, ids, strict=True)), far


def _paint(
    cells: list[Cells], numbered: Any, *, core: Box, shape: tuple[int, int], near: list[tuple[int, int]]
) -> tuple[np.ndarray, SeamReport]:
    ids, far = numbered
    reaching = far | dict(zip(near, cells, strict=True))
    return paint_core([(reaching[at], ids[at]) for at in sorted(reaching)], core, shape)


def _first(painted: tuple[np.ndarray, SeamReport]) -> np.ndarray:
    return painted[0]


def _report(
    painted: tuple[np.ndarray, SeamReport], labelled: tuple[Candidates, SeamReport]
) -> tuple[SeamReport, int]:
    return painted[1] + labelled[1], int(painted[0].max(initial=0))


def _sum_reports(reports: list[tuple[SeamReport, int]], *, blocks: int, tiles: int) -> SeamReport:
    total = SeamReport(blocks=blocks, tiles=tiles)
    for report, _ in reports:
        total += report
    total.tiles += total.repeated
    total.cells = max((last for _, last in reports), default=0)
    return total


def _neighbours(grid: Grid, at: tuple[int, int]) -> list[tuple[int, int]]:
    down, across = grid.counts
    return [
        (i, j)
        for i in range(max(0, at[0] - 1), min(down, at[0] + 2))
        for j in range(max(0, at[1] - 1), min(across, at[1] + 2))
    ]


def _assemble(boxes: list[Box], parts: list[np.ndarray], box: Box) -> np.ndarray:
    """Pixels of `box` from the chunks that hold them."""
    first = np.asarray(parts[0])
    out = np.empty((first.shape[0], *box.shape), first.dtype)
    for chunk, part in zip(boxes, parts, strict=True):
        shared = chunk & box
        if not shared.is_empty:
            out[(slice(None), *shared.within(box))] = np.asarray(part)[(slice(None), *shared.within(chunk))]
    return out
