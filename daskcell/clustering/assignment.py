"""The nearest centre of every row, as fast as a matrix product and as exact as double precision.

A product in single precision finds the nearest centre of nearly every row, but its last bits depend on the
number of rows, the processor and the library, and a cell halfway between two clusters would change sides. It
is therefore trusted only where the margin exceeds its largest possible error (Higham, Accuracy and Stability
of Numerical Algorithms, 2002, section 3.5); the few ambiguous rows are computed in double precision, one by
one.

In each feature, rows are multiples of a power of two (`ClusterModel.steps_`) with some 21 significant bits.
Sums in double precision are therefore exact for billions of rows, and the same in any order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from daskcell.clustering import _kernels

TILE = 512
"""Rows processed at a time, few enough to stay in the processor's cache."""
_BITS = 20
_HALF_ULP = 2.0**-24
_TINY = 2.0**-125
"""Larger than the error of products that underflow in single precision."""


class NearestCenters:
    """Finds the nearest of the `centers`, ``(k, c)`` float64, for rows ``(n, c)`` float32."""

    def __init__(self, centers: np.ndarray):
        c = centers.shape[1]
        self.centers = np.ascontiguousarray(centers, np.float64)
        self._columns = np.ascontiguousarray(self.centers.T)
        squares = (self.centers**2).sum(axis=1)
        with np.errstate(over="ignore"):  # rows that overflow are ambiguous
            self._single = self._columns.astype(np.float32)
            self._half = (squares / 2).astype(np.float32)
        # A product of c terms is wrong by at most c half-ulps of |x| |c|; rounding adds a few.
        self._longest = longest = float(np.sqrt(squares.max(initial=0.0)))
        self._share = share = 2 * (c + 8) * _HALF_ULP * (1 + 1e-3)
        self._slope, self._offset = share * longest, share * longest**2 + c * _TINY
        self.rechecked = 0
        """Ambiguous rows so far, which were computed in double precision."""

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """Nearest centre of each row, ``(n,)`` int32; of equally near ones, the first."""
        labels = np.empty(len(rows), np.int32)
        nothing = np.zeros((0, rows.shape[1]))
        self.update(rows, np.arange(len(rows)), labels, np.zeros(0), nothing, np.zeros(0, np.int64))
        return labels

    def add(self, rows: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add rows to `sums` ``(k, c)`` float64 and `counts` ``(k,)`` int64 of their nearest centres.

        Returns
        -------
        labels : (n,) int32
        margins : (n,) float64
            Lower bound of how much farther the second nearest centre is.
        """
        labels, margins = np.full(len(rows), -1, np.int32), np.empty(len(rows))
        self.update(rows, np.arange(len(rows)), labels, margins, sums, counts)
        return labels, margins

    def update(
        self,
        rows: np.ndarray,
        again: np.ndarray,
        labels: np.ndarray,
        margins: np.ndarray,
        sums: np.ndarray,
        counts: np.ndarray,
    ) -> None:
        """Replace the labels and margins of the rows `again` (increasing row numbers).

        Rows that change their label are moved in `sums` and `counts`. If `margins` is empty, only `labels` is
        written.
        """
        self.rechecked += _kernels.assign(
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
            margins,
            sums,
            counts,
        )

    def squares(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Squared distance of each row to its centre, ``(n,)`` float64."""
        return _kernels.squared_distances(rows, self.centers, labels)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit matrix products to one thread; the parallelism is that of the workers."""
    with _blas_controller().limit(limits=1):
        yield


@lru_cache(maxsize=1)
def _blas_controller() -> Any:
    import scipy.linalg  # noqa: F401 (whose products compiled code uses)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")  # as slow as a block of rows, hence cached


def grid_steps(rows: np.ndarray) -> np.ndarray:
    """Power of two to whose multiples each feature is rounded, ``(c,)`` float64, from a sample of rows."""
    size = np.sqrt((rows.astype(np.float64) ** 2).mean(axis=0)) if len(rows) else np.ones(rows.shape[1])
    size[size == 0] = size.max(initial=0.0) or 1.0
    return np.exp2(np.floor(np.log2(size)) - _BITS)
