"""Which cells live beside which: neighbours of every cell, and how often types meet, against chance.

    label image ──> centres, contacts (block by block) ──> graph of neighbours ──> counts between types
                                                                              └──> composition, distances

Centres are sums of integers and contacts are sets of pairs, so both are the same for any blocks. The graph is
walked in portions of cells: it is never in memory as a whole, and neither is the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

PORTION = 1 << 15
"""Cells whose neighbours are looked up at a time."""


@dataclass(frozen=True)
class Neighbours:
    """How often cells of each type are neighbours, and what chance alone would give.

    Chance is random labelling: the cells stay where they are, their types are dealt anew. Mean and variance
    of the counts are exact, without permutations: the join counts of Cliff and Ord, "Spatial
    Autocorrelation" (1973), for sampling without replacement.
    """

    counts: pd.DataFrame
    """``(types, types)`` int64, symmetric: pairs of neighbours of the two types, each pair once."""
    expected: pd.DataFrame
    """``(types, types)`` float64: mean of the counts under random labelling."""
    variance: pd.DataFrame
    """``(types, types)`` float64: variance of the counts under random labelling."""
    composition: pd.DataFrame
    """``(cells, types)`` int32: neighbours of each type that a cell has; row i is label i + 1."""
    nearest: pd.DataFrame
    """``(cells, types)`` float64: distance in pixels to the nearest other cell of each type; NaN: none."""

    @property
    def enrichment(self) -> pd.DataFrame:
        """``(types, types)`` float64: standard deviations above the expected count; NaN if it cannot vary."""
        return (self.counts - self.expected) / self.variance.where(self.variance > 0) ** 0.5

    def table(self) -> pd.DataFrame:
        """The same as rows: ``type``, ``other``, ``count``, ``expected``, ``variance``."""
        import pandas as pd

        names = self.counts.index
        return pd.DataFrame(
            {
                "type": np.repeat(names, len(names)),
                "other": np.tile(names, len(names)),
                "count": self.counts.to_numpy().ravel(),
                "expected": self.expected.to_numpy().ravel(),
                "variance": self.variance.to_numpy().ravel(),
            }
        )


def neighbours(
    labels: Any, types: Any, radius: float | None = None, *, k: int | None = None, gap: float | None = None
) -> Neighbours:
    """Count which types of cells are neighbours, and compare with chance.

    Give one of `radius`, `k` and `gap`, which say who is whose neighbour.

    Parameters
    ----------
    labels : (Y, X) array of integers, dask or numpy
        Label image with the ids 1..N; 0 is background.
    types : (N,) sequence
        Type or cluster of each cell, numbers or names; item i is that of label i + 1. Cells of type -1, None
        or NaN are left out: they are nobody's neighbour.
    radius : float
        Cells are neighbours whose centres are at most this many pixels apart.
    k : int
        Cells are neighbours if one is among the `k` nearest of the other, by their centres; of equally near
        ones, those with smaller labels.
    gap : float
        Cells are neighbours that touch (0; also diagonally), or are apart by at most this many pixels.

    Returns
    -------
    Neighbours
        Computed, not lazy. Types are in ascending order.

    Raises
    ------
    InputError
        Not a label image, ids with gaps, as many types as there are not cells, or none or two of `radius`,
        `k`, `gap`.

    Examples
    --------
    >>> import numpy as np
    >>> import daskcell as dc
    >>> labels = np.array([[1, 1, 2, 0, 3, 0, 0, 0, 4]])
    >>> found = dc.neighbours(labels, ["T", "B", "T", "B"], radius=2.5)
    >>> found.counts
       B  T
    B  0  2
    T  2  0
    """
    import dask.array as da
    import pandas as pd

    from daskcell.images.arrays import as_labels

    labels = da.asarray(as_labels(labels))
    names, codes = _types(types)
    ways = {"radius": radius, "k": k, "gap": gap}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise InputError(f"Please give one of radius, k and gap, not {' and '.join(given) or 'none'}.")
    _check(given[0], ways[given[0]])

    centres = centres_of(labels, len(codes))
    taken = np.flatnonzero(codes >= 0)
    place = np.full(len(codes), -1)
    place[taken] = np.arange(len(taken))
    points, kinds = centres[taken], codes[taken]
    if radius is not None:
        edges = _within(points, radius)
    elif k is not None:
        edges = _nearest(points, k)
    else:
        touching = place[contacts(labels, gap or 0.0) - 1]
        edges = _portions(touching[(touching >= 0).all(axis=1)])

    composition = np.zeros((len(codes), len(names)), np.int32)
    degrees = np.zeros(len(taken), np.int64)
    counts = np.zeros((len(names), len(names)), np.int64)
    for first, second in edges:
        np.add.at(composition, (taken[first], kinds[second]), 1)
        np.add.at(composition, (taken[second], kinds[first]), 1)
        degrees += np.bincount(np.concatenate([first, second]), minlength=len(taken))
        np.add.at(
            counts, (np.minimum(kinds[first], kinds[second]), np.maximum(kinds[first], kinds[second])), 1
        )
    counts = np.triu(counts) + np.triu(counts, 1).T
    expected, variance = chance(degrees, np.bincount(kinds, minlength=len(names)))

    return Neighbours(
        pd.DataFrame(counts, names, names),
        pd.DataFrame(expected, names, names),
        pd.DataFrame(variance, names, names),
        pd.DataFrame(composition, columns=names),
        pd.DataFrame(_distances(centres, codes, len(names)), columns=names),
    )


def _types(types: Any) -> tuple[list[Any], np.ndarray]:
    """Names of the types in ascending order, and each cell's place among them; -1: none."""
    import pandas as pd

    try:
        given = np.asarray(types, object)
    except (ValueError, TypeError) as error:
        raise InputError(f"types must be one number or name for each cell: {error}.") from None
    if given.ndim != 1:
        raise InputError(f"types must be one number or name for each cell, not of shape {given.shape}.")
    values = pd.Series(given)
    known = values.notna() & (values != -1)
    try:
        names = sorted(set(values[known]))
    except TypeError:
        raise InputError("types must be numbers or names, not both.") from None
    codes = values.map({name: code for code, name in enumerate(names)}).where(known, -1)
    return names, codes.to_numpy(np.int64)


def _check(name: str, value: Any) -> None:
    least = {"radius": 1, "k": 1, "gap": 0}[name]
    whole = name != "k" or (isinstance(value, int | np.integer) and not isinstance(value, bool))
    if not whole or not isinstance(value, int | float | np.number) or not least <= value < math.inf:
        what = "a whole number" if name == "k" else "a number of pixels"
        raise InputError(f"{name} must be {what}, {least} or more, not {value!r}.")


def centres_of(labels: Any, count: int) -> np.ndarray:
    """Centres of mass (y, x) of the cells of a dask label image ``(Y, X)``: ``(count, 2)`` float64.

    Raises
    ------
    InputError
        The ids are not 1..count.
    """
    import dask

    corners = [np.cumsum((0, *sizes))[:-1].tolist() for sizes in labels.chunks]
    blocks = [
        dask.delayed(sums_of_block)(block, (y, x))
        for y, row in zip(corners[0], labels.to_delayed(), strict=True)
        for x, block in zip(corners[1], row, strict=True)
    ]
    sums = np.zeros((count, 3), np.int64)
    for ids, part in dask.compute(*blocks):
        if len(ids) and not (ids[0] >= 1 and ids[-1] <= count):
            wrong = ids[0] if ids[0] < 1 else ids[-1]
            raise InputError(
                f"The labels have the id {wrong}, but there are types for {count} cells. Item i of the types "
                "must be that of label i + 1, with ids 1..N."
            )
        sums[ids - 1] += part
    if (missing := np.flatnonzero(sums[:, 0] == 0)).size:
        raise InputError(f"No pixel has the label {missing[0] + 1}, but there are types for {count} cells.")
    return sums[:, 1:] / sums[:, :1]


def sums_of_block(labels: np.ndarray, corner: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a block, ascending, and int64 rows (pixels, sum of y, sum of x) in the image's coordinates."""
    y, x = np.nonzero(labels)
    ids, where = np.unique(labels[y, x].astype(np.int64), return_inverse=True)
    sums = np.zeros((len(ids), 3), np.int64)
    sums[:, 0] = np.bincount(where, minlength=len(ids))
    for column, at in enumerate((y + corner[0], x + corner[1]), start=1):
        np.add.at(sums[:, column], where, at)
    return ids, sums


def contacts(labels: Any, gap: float) -> np.ndarray:
    """Pairs of labels, ``(n, 2)`` int64 ascending, that touch or are at most `gap` pixels apart.

    Each block is read with a margin and gives the pairs that one of its own pixels takes part in.
    """
    import dask
    import dask.array as da

    reach = math.floor(gap + math.sqrt(2))
    depth = tuple(min(reach, side) for side in labels.shape)
    grown = da.overlap.overlap(labels, depth=dict(enumerate(depth)), boundary="none")
    blocks = [dask.delayed(contacts_of_block)(block, gap) for block in grown.to_delayed().ravel()]
    found = [pairs for pairs in dask.compute(*blocks) if len(pairs)]
    return np.unique(np.concatenate(found), axis=0) if found else np.empty((0, 2), np.int64)


def contacts_of_block(labels: np.ndarray, gap: float) -> np.ndarray:
    """Pairs of labels in a block ``(h, w)`` some pixels of which are at most ``gap + sqrt(2)`` apart."""
    reach = math.floor(gap + math.sqrt(2))
    keys: list[np.ndarray] = []
    for dy in range(reach + 1):
        for dx in range(-reach if dy else 1, reach + 1):
            if math.hypot(dy, dx) > gap + math.sqrt(2):
                continue
            one = labels[: labels.shape[0] - dy, max(0, -dx) : labels.shape[1] - max(0, dx)]
            two = labels[dy:, max(0, dx) : labels.shape[1] + min(0, dx)]
            meet = (one != two) & (one != 0) & (two != 0)
            pairs = np.sort(np.stack([one[meet], two[meet]], axis=1).astype(np.int64), axis=1)
            keys.append(np.unique(pairs, axis=0))
    return np.unique(np.concatenate(keys), axis=0) if keys else np.empty((0, 2), np.int64)


Edges = Iterator[tuple[np.ndarray, np.ndarray]]
"""Portions of the graph: the ends of each pair, which comes once."""


def _portions(pairs: np.ndarray) -> Edges:
    for start in range(0, len(pairs), PORTION):
        yield pairs[start : start + PORTION, 0], pairs[start : start + PORTION, 1]


def _within(points: np.ndarray, radius: float) -> Edges:
    from scipy.spatial import cKDTree

    if not len(points):
        return
    tree = cKDTree(points)
    for start in range(0, len(points), PORTION):
        part = cKDTree(points[start : start + PORTION])
        near = part.sparse_distance_matrix(tree, radius, output_type="coo_matrix")
        first, second = near.row + start, near.col
        yield first[first < second], second[first < second]


def _nearest(points: np.ndarray, k: int) -> Edges:
    """Each portion gives the pairs whose smaller cell is in it."""
    pairs = [
        np.stack([np.repeat(np.arange(start, start + len(near)), near.shape[1]), near.ravel()], axis=1)
        for start, near in _nearest_of(points, k)
    ]
    if pairs:
        every = np.sort(np.concatenate(pairs), axis=1)
        yield from _portions(np.unique(every, axis=0))


def _nearest_of(points: np.ndarray, k: int) -> Iterator[tuple[int, np.ndarray]]:
    from scipy.spatial import cKDTree

    k = min(k, len(points) - 1)
    if k < 1:
        return
    tree = cKDTree(points)
    for start in range(0, len(points), PORTION):
        part = points[start : start + PORTION]
        # As far as the k-th nearest; all that are equally far, among whom the label decides.
        limit = tree.query(part, k + 1)[0][:, -1]
        rows = tree.query_ball_point(part, np.nextafter(limit, np.inf))
        near = np.empty((len(part), k), np.int64)
        for row, found in enumerate(rows):
            others = np.array([at for at in found if at != start + row])
            apart = ((points[others] - part[row]) ** 2).sum(axis=1)
            near[row] = others[np.lexsort((others, apart))[:k]]
        yield start, near


def _distances(centres: np.ndarray, codes: np.ndarray, types: int) -> np.ndarray:
    """Distance from every cell to the nearest other of each type."""
    from scipy.spatial import cKDTree

    found = np.full((len(codes), types), np.nan)
    for kind in range(types):
        own = np.flatnonzero(codes == kind)
        distance, _ = cKDTree(centres[own]).query(centres, [1, 2])
        of_others = distance[:, 0]
        of_others[own] = distance[own, 1]
        found[:, kind] = np.where(np.isfinite(of_others), of_others, np.nan)
    return found


def chance(degrees: np.ndarray, sizes: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the counts of a graph between types that are dealt at random.

    Parameters
    ----------
    degrees : (n,) int
        Neighbours of each cell.
    sizes : (types,) int
        Cells of each type, n in all.

    Returns
    -------
    mean, variance : (types, types) float64

    Notes
    -----
    With E edges, K ordered pairs of edges that share a cell, and D that share none, the second moment of a
    count is E times the probability that one edge is of the two types, plus K and D times that of two such
    edges. Integers of any size are used, so nothing cancels.
    """
    from fractions import Fraction

    n, edges = int(sum(sizes)), int(degrees.sum()) // 2
    sharing = int((degrees * (degrees - 1)).sum())
    apart = edges * (edges - 1) - sharing

    def falling(value: int, times: int) -> int:
        return math.prod(range(value - times + 1, value + 1)) if value >= times else 0

    def share(ways: int, cells: int) -> Fraction:
        return Fraction(ways, falling(n, cells)) if n >= cells else Fraction(0)

    mean, variance = np.zeros((2, len(sizes), len(sizes)))
    for r, a in enumerate(map(int, sizes)):
        for s, b in enumerate(map(int, sizes)):
            if r == s:
                one, two = share(falling(a, 2), 2), share(falling(a, 3), 3)
                both = share(falling(a, 4), 4)
            else:
                one, two = share(2 * a * b, 2), share(a * b * (a + b - 2), 3)
                both = share(4 * falling(a, 2) * falling(b, 2), 4)
            first = edges * one
            mean[r, s] = float(first)
            variance[r, s] = float(first + sharing * two + apart * both - first**2)
    return mean, variance
