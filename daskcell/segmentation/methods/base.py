"""What a way to find cells is: `Method`.

Cellpose, the watershed, any function and what other packages install are all methods, and are asked the same
questions; ids, seams, workers and files are not theirs. A package adds one by an entry point:

    [project.entry-points."daskcell.methods"]
    bright = "my_package:Bright"         # a subclass of `Method`, or a function from a block to labels

Then ``segment.method: bright`` works in a study, and ``dc.segment(image, method="bright")`` in Python.
`examples/daskcell-plugin` is a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from daskcell.errors import InputError
from daskcell.geometry import Box
from daskcell.preprocess.signal import TILE, count_tiles
from daskcell.segmentation.core import dynamics
from daskcell.segmentation.core.ownership import Thresholds
from daskcell.segmentation.core.tiles import TileGrid
from daskcell.segmentation.image_params import sampling_step

Read = Callable[[Box], np.ndarray]
"""Preprocessed pixels ``(C, h, w)`` of a box of the image."""


class BoxLabels(NamedTuple):
    """Labels of a box of the image, as far as they can be known from its pixels."""

    labels: np.ndarray
    """``(h, w)`` int32, 0 for background, numbered in reading order of each label's first pixel."""
    unsafe: np.ndarray
    """``(h, w)`` bool: pixels whose label may be another one if more of the image were seen."""
    flows: np.ndarray | None = None
    """``(2, h, w)`` float32, along y and x, for the flow check; None: no check."""


class Method:
    """A way to find cells.

    A subclass says how a block is labelled (`segment`), and what has to be known of the whole image before
    (`observe`, `fit`): percentiles, a threshold, a background. Its options are the arguments it is made with,
    most simply the fields of a dataclass. It is sent to workers, and made anew for every task of a study:
    what takes long to load, such as a network, belongs in a function with a cache (`functools.cache`).

    Blocks are labelled with a halo around them. A cell is taken from the block that holds its first pixel,
    and the halo is doubled as long as a cell comes within `reach` of its border; so the labels are those of
    the whole image for any blocks, provided that `reach` is right. Holes in cells are filled, as for all
    methods, and cells below ``min_size`` pixels dropped.

    Attributes
    ----------
    version : str
        To be changed when the same image and options give other labels: studies then find the cells anew.
        Empty: the version of the package that installs the method.
    halo : int
        Pixels around a block to look at first. Changes no label.
    reach : int
        A label depends on no pixel farther from it than this: 0 for connected pixels above a threshold, the
        radius of a filter, and so on.
    thresholds : Thresholds
        Set from ``min_size`` and ``max_size_fraction``, which hold for all methods.

    Examples
    --------
    Otsu's threshold of the whole image:

    >>> from skimage.filters import threshold_otsu
    >>> from skimage.measure import label
    >>> class Otsu(Method):
    ...     def observe(self, block, box, shape):
    ...         return sample(block[:1], box, shape)
    ...
    ...     def fit(self, observed, shape):
    ...         return float(threshold_otsu(observed[0]))
    ...
    ...     def segment(self, block, params):
    ...         return label(block[0] > params)
    >>> image = np.zeros((90, 90))
    >>> image[20:40, 20:40] = image[60:80, 30:50] = 1
    >>> import daskcell as dc
    >>> int(dc.segment(image, method=Otsu(), block=32).compute().max())
    2
    """

    version: str = ""
    halo: int = 64
    reach: int = 0
    thresholds: Thresholds = Thresholds(flow=0.0)

    # -- what a method says of itself ------------------------------------------------------------------
    def observe(self, block: np.ndarray, box: Box, shape: tuple[int, int]) -> Sequence[np.ndarray]:
        """What one block contributes to the facts of the whole image.

        Parameters
        ----------
        block : (C, h, w) array
            Preprocessed pixels, without NaN or infinity. Every pixel of the image is in one block.
        box : Box
            Where the block lies; it begins at multiples of 4 pixels.
        shape : (Y, X)
            Size of the whole image in pixels.

        Returns
        -------
        sequence of arrays
            Small: such as the pixels of a sample (`sample`), or a histogram.
        """
        return ()

    def merge(self, observed: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """What several blocks contribute together: by default, their arrays one after the other.

        May be asked again for what it returned. A method whose `observe` counts adds up instead.
        """
        return [np.concatenate(arrays) for arrays in zip(*observed, strict=True)]

    def fit(self, observed: list[np.ndarray], shape: tuple[int, int]) -> Any:
        """Facts of the whole image, handed to `segment` with every block.

        Parameters
        ----------
        observed : list of arrays
            What all blocks contributed, as `merge` returns it, in any order.
        shape : (Y, X)
            Size of the image in pixels.

        Returns
        -------
        object
            What JSON can hold: numbers, strings, lists, dictionaries (arrays become lists). It must not
            depend on how the image was cut, so neither on the order of what was observed.
        """
        return None

    def segment(self, block: np.ndarray, params: Any) -> np.ndarray:
        """Labels of a block.

        Parameters
        ----------
        block : (C, h, w) array
            Preprocessed pixels of a block and its halo.
        params
            What `fit` returned.

        Returns
        -------
        (h, w) array of integers
            A number for each cell, in any order; the smallest, 0, is background.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a method segment(block, params).")

    # -- what the drivers ask; the answers for any method of `segment` ---------------------------------
    def segment_box(
        self, box: Box, read: Read, params: Any, shape: tuple[int, int], outputs: Mapping[int, np.ndarray]
    ) -> BoxLabels:
        """Labels of any box of the image, and where they depend on what lies outside it.

        Parameters
        ----------
        outputs : mapping of int to (3, 256, 256) float32
            Outputs of the network for the tiles that touch the box (but for `skipped_tiles`).
        """
        labels = as_labels(self.segment(read(box), params), box.shape)
        return BoxLabels(labels, touches_rim(labels, box, shape, self.reach))

    def dump_params(self, params: Any) -> Any:
        """What `fit` returned, as JSON."""
        return params

    def load_params(self, values: Any) -> Any:
        """What `dump_params` returned, from JSON."""
        return values

    def describe(self, params: Any) -> dict[str, Any]:
        """What of `params` is told with the seam report."""
        return {}

    # -- of methods with a network -----------------------------------------------------------------------
    uses_network: ClassVar[bool] = False
    """Tiles go through a network first (`run_tiles`), on workers with a GPU where there are any."""

    @property
    def measures_diameter(self) -> bool:
        """Whether the cells' diameter is to be measured before `fit`, in a first pass of the network."""
        return False

    def first_pass(self) -> Method:
        """The method as it measures diameters, whatever its own thresholds and diameter."""
        return self

    def contrast(self, windows: Sequence[np.ndarray]) -> list[float]:
        """How much each of some parts of the image ``(C, h, w)`` seems to hold."""
        return [float(np.std(window.astype(np.float32))) for window in windows]

    def with_diameter(self, diameter: float | None) -> Method:
        """The method for cells of a measured diameter in pixels (None: no cells were found)."""
        return self

    def adapt(self, params: Any) -> Method:
        """The method for an image of these facts; its `halo` and `tile_grid` are then final."""
        return self

    def tile_grid(self, shape: tuple[int, int]) -> TileGrid | None:
        """Tiles of an image of `shape` ``(Y, X)`` that the network sees; None: there is no network."""
        return None

    def without_tissue(self, params: Any, tissue: np.ndarray) -> Any:
        """`params` with the tiles left out that hold no pixel of `tissue` ``(y, x)`` bool, a mask of the
        whole image at any size."""
        return params

    def skipped_tiles(self, params: Any) -> frozenset[int]:
        """Tiles that need not go through the network."""
        return frozenset()

    def run_tiles(self, read: Read, params: Any, tiles: Sequence[int]) -> Iterator[np.ndarray]:
        """Outputs of the network for `tiles`, each ``(3, 256, 256)`` float32, one after another."""
        raise NotImplementedError


def sample(block: np.ndarray, box: Box, shape: tuple[int, int]) -> list[np.ndarray]:
    """Pixels of each channel of a block that percentiles of the whole image are taken of.

    All pixels of an image of up to 224^3 pixels, and about 224 x 224 evenly spaced ones of a larger one, as
    Cellpose takes them; the same pixels for any blocks.

    Parameters
    ----------
    block : (C, h, w) array
    box : Box
        Where the block lies.
    shape : (Y, X)
        Size of the whole image.

    Returns
    -------
    list of (n,) arrays, one a channel
    """
    step = sampling_step(shape)
    return [plane[-box.y0 % step[0] :: step[0], -box.x0 % step[1] :: step[1]].ravel() for plane in block]


def count_values(block: np.ndarray, box: Box) -> np.ndarray:
    """Counts of pixels and tiles (`daskcell.preprocess.signal`) of a block that begins at multiples of
    `TILE` pixels."""
    assert box.y0 % TILE == box.x0 % TILE == 0, f"tiles are cut by the block at {box}"
    return count_tiles(block.astype(np.uint8) if block.dtype.kind == "b" else block)


def refuse_unusable(block: np.ndarray, box: Box) -> None:
    """Raise `InputError` for pixels that are NaN, infinite or complex."""
    if block.dtype.kind not in "buif":
        raise InputError(f"Cannot segment pixels of type {block.dtype}. Please give integers or floats.")
    if block.dtype.kind == "f" and not np.isfinite(block).all():
        count = int((~np.isfinite(block)).sum())
        raise InputError(
            f"The image has {count} NaN or infinite pixels in rows {box.y0}-{box.y1}, "
            f"columns {box.x0}-{box.x1}. Please replace them first."
        )


def as_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Any integer labels as int32, numbered in reading order."""
    labels = np.asarray(labels)
    if labels.shape != shape or labels.dtype.kind not in "bui":
        raise InputError(
            f"A segmentation method must return whole-number labels of shape {shape}, but returned "
            f"{labels.dtype} of shape {labels.shape}."
        )
    _, dense = np.unique(labels, return_inverse=True)
    dense = dense.reshape(shape).astype(np.int32)
    if labels.size and labels.min() > 0:
        dense += 1  # no background here: the smallest label is a cell too
    dynamics.renumber(dense)
    return dense


def touches_rim(labels: np.ndarray, box: Box, shape: tuple[int, int], reach: int = 0) -> np.ndarray:
    """Pixels ``(h, w)`` bool of labels that come within `reach` of a side of `box` with more image beyond."""
    # Rows up to `reach` may be another label; a cell in the next one may go on into them.
    depth = reach + 1
    sides: list[tuple[bool, Any]] = [
        (box.y0 > 0, np.s_[:depth]),
        (box.x0 > 0, np.s_[:, :depth]),
        (box.y1 < shape[0], np.s_[-depth:]),
        (box.x1 < shape[1], np.s_[:, -depth:]),
    ]
    uncertain = np.zeros(labels.max(initial=0) + 1, bool)
    beside = np.zeros(labels.shape, bool)
    for inside, side in sides:
        if inside:
            uncertain[labels[side]] = True
            beside[side] = reach > 0
    uncertain[0] = False
    return uncertain[labels] | beside
