"""The nearest centre of every row: at the speed of a matrix product, with the answer of exact distances.

A product in single precision tells the nearest centre of nearly every row, but its last bits change with the
number of rows, the processor and the library, and a cell between two groups would change sides. So it decides
only where its lead is larger than any error it can have (Higham, Accuracy and Stability of Numerical
Algorithms, 2002, section 3.5); the few other rows are worked out in double precision, one by one.

Rows are multiples of a power of two in each feature (`ClusterModel.steps_`) of some 21 significant bits, so
that sums in double precision are exact for thousands of millions of rows: the same in any order and grouping.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from daskcell.clustering import _kernels

TILE = 512
"""Rows that are worked on at a time, so that they stay in the processor's cache."""
_BITS = 20
_HALF_ULP = 2.0**-24
_TINY = 2.0**-125
"""More than what is lost where products are too small for single precision."""


class Nearest:
    """Finds the nearest of `centers`, (k, c) float64, for rows ``(n, c)`` float32."""

    def __init__(self, centers: np.ndarray):
        c = centers.shape[1]
        self.centers = np.ascontiguousarray(centers, np.float64)
        self._columns = np.ascontiguousarray(self.centers.T)
        squares = (self.centers**2).sum(axis=1)
        with np.errstate(over="ignore"):  # what overflows is doubtful
            self._single = self._columns.astype(np.float32)
            self._half = (squares / 2).astype(np.float32)
        # A product of c terms is wrong by c half-ulps of |x| |c|; rounding of centres and sums adds a few.
        self._longest = longest = float(np.sqrt(squares.max(initial=0.0)))
        self._share = share = 2 * (c + 8) * _HALF_ULP * (1 + 1e-3)
        self._slope, self._offset = share * longest, share * longest**2 + c * _TINY
        self.doubted = 0
        """Rows that had to be worked out in double precision, so far."""

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """``(n,)`` int32; of equally near centres the first."""
        labels = np.empty(len(rows), np.int32)
        nothing = np.zeros((0, rows.shape[1]))
        self.look(rows, np.arange(len(rows)), labels, np.zeros(0), nothing, np.zeros(0, np.int64))
        return labels

    def add(self, rows: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add rows to the `sums` ``(k, c)`` float64 and `counts` ``(k,)`` int64 of their centres.

        Returns
        -------
        labels : (n,) int32
        leads : (n,) float64
            How much farther, at least, the second nearest centre is.
        """
        labels, leads = np.full(len(rows), -1, np.int32), np.empty(len(rows))
        self.look(rows, np.arange(len(rows)), labels, leads, sums, counts)
        return labels, leads

    def look(
        self,
        rows: np.ndarray,
        again: np.ndarray,
        labels: np.ndarray,
        leads: np.ndarray,
        sums: np.ndarray,
        counts: np.ndarray,
    ) -> None:
        """Put the labels and leads of the rows numbered `again` (rising) in place of those they have.

        `sums` and `counts` follow those rows that change sides; without `leads` nothing does.
        """
        self.doubted += _kernels.assign(
            np.asarray(rows),
            again,
            self._single,
            self._half,
            self._columns,
            self._slope,
            self._offset,
            self._share,
            self._longest,
            TILE,
            labels,
            leads,
            sums,
            counts,
        )

    def squares(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Squared distance of each row to its centre, ``(n,)`` float64."""
        return _kernels.square_distances(rows, self.centers, labels)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products in one thread: the workers are many already."""
    with _products().limit(limits=1):
        yield


@lru_cache(maxsize=1)
def _products() -> Any:
    import scipy.linalg  # noqa: F401 (whose products compiled code uses)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")  # looking for it takes as long as a block of rows


def steps(rows: np.ndarray) -> np.ndarray:
    """The power of two of which each feature is to be a multiple, ``(c,)`` float64, by typical rows."""
    size = np.sqrt((rows.astype(np.float64) ** 2).mean(axis=0)) if len(rows) else np.ones(rows.shape[1])
    size[size == 0] = size.max(initial=0.0) or 1.0
    return np.exp2(np.floor(np.log2(size)) - _BITS)
