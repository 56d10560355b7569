"""Block tasks on Dask arrays: which pieces each task needs, and at most some tasks at a time.

    arrays ──> pieces of a task's boxes ──> task (`features.tasks`) ──> results, in the order of the calls

Under a Dask client tasks go through the engine's queue (`compute.Workers`), without one to Dask's own
scheduler. Tasks that follow each other share the chunks they need, so no more are submitted at once than two
rows of blocks have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcell.compute import Workers, threads_limited
from daskcell.geometry import Box, Grid

if TYPE_CHECKING:
    import dask.array as da

Call = tuple[Sequence[Box], Sequence[Any]]
"""Boxes that a task reads, and its arguments besides the pixels."""
_FEWEST = 64
"""Tasks that may always be under way."""


@dataclass(frozen=True)
class Pieces:
    """A `tasks.PixelSource` that holds the boxes of one task."""

    shape: tuple[int, int]
    labels: dict[Box, np.ndarray]
    image: dict[Box, np.ndarray]

    def cells(self, box: Box) -> np.ndarray:
        return self.labels[box]

    def pixels(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        return self.image[box], self.image[box]


@dataclass(frozen=True)
class ArrayTasks:
    """Runs tasks over labels ``(Y, X)`` and, where there is one, an image ``(C, Y, X)``.

    Attributes
    ----------
    threads : int or None
        Threads that numerical libraries use within a task; None: as many as they are set to.
    """

    labels: da.Array
    image: da.Array | None
    threads: int | None = None

    @property
    def grid(self) -> Grid:
        """The chunks of the labels."""
        return Grid.from_chunks(self.labels.chunks)

    def run(self, function: Callable[..., Any], calls: Sequence[Call], kind: Any = "cpu") -> list[Any]:
        """``function(source, *arguments)`` for every call, in their order."""
        most = max(_FEWEST, 2 * self.grid.counts[1])
        client = _client()
        if client is not None:
            return self._run_on(client, function, calls, kind, most)
        import dask

        results: list[Any] = []
        for start in range(0, len(calls), most):
            jobs = []
            for boxes, arguments in calls[start : start + most]:
                # Each as one value: Dask need not look into them for values to wait for.
                values = [dask.delayed(value, traverse=False) for value in (tuple(boxes), *arguments)]
                task = dask.delayed(_run_on_pieces, pure=False)
                jobs.append(task(function, self.threads, self.labels.shape, self._pieces(boxes), *values))
            results += dask.compute(*jobs)
        return results

    def _run_on(
        self, client: Any, function: Callable[..., Any], calls: Sequence[Call], kind: Any, most: int
    ) -> list[Any]:
        workers, waiting = Workers(client), iter(enumerate(calls))
        most = max(most, 4 * workers.count)
        window = workers.window(most)
        # Arguments of many tasks, such as a network, travel once.
        uses = Counter(id(value) for _, arguments in calls for value in arguments)
        sent: dict[int, Any] = {}

        def send(value: Any) -> Any:
            if uses[id(value)] > 1 and id(value) not in sent:
                sent[id(value)] = client.submit(_same, value, pure=False)
            return sent.get(id(value), value)

        def submit(count: int) -> None:
            for number, (boxes, arguments) in islice(waiting, count):
                values = [send(value) for value in arguments]
                pieces = client.compute(self._pieces(boxes))
                window.submit(
                    number, _run_on_pieces, function, self.threads, self.labels.shape, pieces, tuple(boxes),
                    *values, kind=kind,
                )  # fmt: skip

        submit(most)
        results: dict[int, Any] = {}
        for number, result in window:
            results[number] = result
            submit(1)
        return [results[number] for number in range(len(calls))]

    def _pieces(self, boxes: Sequence[Box]) -> list[Any]:
        """The labels of every box, then the image's pixels, as delayed values."""
        arrays = [self.labels] if self.image is None else [self.labels, self.image]
        cuts = [array[(..., *box.slices)] for array in arrays for box in boxes]
        # One chunk, so that Dask hands over the array and does not copy the graph (delayed(array) does).
        return [cut.rechunk(cut.shape).to_delayed().item() for cut in cuts]


def _run_on_pieces(
    function: Callable[..., Any],
    threads: int | None,
    shape: tuple[int, int],
    pieces: Sequence[np.ndarray],
    boxes: Sequence[Box],
    *arguments: Any,
) -> Any:
    labels = dict(zip(boxes, pieces[: len(boxes)], strict=True))
    image = dict(zip(boxes, pieces[len(boxes) :], strict=False))
    source = Pieces(shape, labels, image)
    if threads is None:
        return function(source, *arguments)
    with threads_limited(threads):
        return function(source, *arguments)


def _same(value: Any) -> Any:
    return value


def _client() -> Any:
    """The Dask client that the user's code computes with; None within a task, whose worker would wait."""
    import dask.base

    owner = getattr(dask.base.get_scheduler(), "__self__", None)
    if owner is None:
        return None
    from distributed import get_worker

    try:
        get_worker()
    except ValueError:
        return owner
    return None
