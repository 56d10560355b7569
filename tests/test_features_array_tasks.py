"""The lazy functions run the engine's tasks: a bounded number at a time, and with the engine's threads."""

from __future__ import annotations

import threading

import dask.array as da
import numpy as np
import pytest

from daskcell.features import array_tasks, embed, measure, tasks


def column(blocks: int = 40) -> np.ndarray:
    """A cell in every block of 8 x 8 pixels."""
    labels = np.zeros((8 * blocks, 8), np.uint32)
    for i in range(blocks):
        labels[8 * i + 2 : 8 * i + 5, 2:6] = i + 1
    return labels


@pytest.mark.slow
def test_under_a_client_some_tasks_are_submitted_at_a_time(monkeypatch):
    from distributed import Client

    monkeypatch.setattr(array_tasks, "_FEWEST", 2)
    sent, done, most = 0, 0, 0
    pieces, held = array_tasks.ArrayTasks._pieces, array_tasks.Pieces

    def count(self, boxes):
        nonlocal sent, most
        sent += 1
        most = max(most, sent - done)
        return pieces(self, boxes)

    def counted(*args):
        nonlocal done
        done += 1
        return held(*args)

    labels = da.from_array(column(), chunks=8)
    expected = measure(column())
    monkeypatch.setattr(array_tasks.ArrayTasks, "_pieces", count)
    monkeypatch.setattr(array_tasks, "Pieces", counted)  # looked up by the task, in this process
    with Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None):
        assert measure(labels).equals(expected)
    assert done == 80, "cells are found, then measured"
    assert most == 4


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["crop", "mask"])
def test_no_bit_depends_on_the_threads_that_torch_is_set_to(pooling):
    import torch

    labels = column(3)
    image = np.random.default_rng(0).random((3, *labels.shape), np.float32)

    class Network(torch.nn.Module):
        """Gives the number of threads it runs with."""

        def forward(self, x):
            return torch.full((len(x), 2), float(torch.get_num_threads()))

        def stages(self, x):
            return [torch.full((len(x), 2, 16, 16), float(torch.get_num_threads()))]

    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            vectors = [embed(image, labels, name, pooling=pooling) for name in (Network(), "tiny")]
            assert set(np.unique(vectors[0])) <= {0.0, 1.0}
            assert torch.get_num_threads() == threads, "and the user's setting is put back"
            if threads == 2:
                expected = vectors[1]
            np.testing.assert_array_equal(vectors[1], expected)
        assert set(np.unique(embed(image, labels, Network(), threads=2))) == {2.0}
    finally:
        torch.set_num_threads(before)


def test_cells_are_measured_by_the_task_itself_and_not_while_crops_are_cut_ahead(monkeypatch):
    """Control of the order: reading and cropping run ahead in other threads."""
    from daskcell.features.cell_index import ReadPlan, block_records
    from daskcell.features.crops import Framing
    from daskcell.features.embedders import CropEmbedder
    from daskcell.features.encoders import Encoder
    from daskcell.features.textures import Greys
    from daskcell.geometry import Box

    threads: dict[str, set[int]] = {"read": set(), "measured": set(), "encoded": set()}
    measure_block = tasks.measure_block

    def measured(*args):
        threads["measured"].add(threading.get_ident())
        return measure_block(*args)

    def encode(batch):
        threads["encoded"].add(threading.get_ident())
        return batch[:, 0, 0]

    labels = column(6)
    boxes = [Box(8 * i, 0, 8 * i + 8, 8) for i in range(6)]

    class Source(array_tasks.Pieces):
        def cells(self, box):
            threads["read"].add(threading.get_ident())
            return super().cells(box)

    source = Source(
        labels.shape,
        {box: labels[box.slices] for box in boxes},
        {box: np.ones((1, *box.shape), np.float32) for box in boxes},
    )
    reads = [ReadPlan(box, block_records(labels[box.slices], (box.y0, box.x0))) for box in boxes]
    embedder = CropEmbedder(Encoder("test", encode, 4, batch_size=4), Framing(4, (0.0,), (1.0,), (0.0,)))
    monkeypatch.setattr(tasks, "measure_block", measured)
    greys = Greys((0.0,), (1.0,))
    rows, vectors = tasks.describe(source, reads, embedder, greys, ("shape", "intensity"))
    assert threads["measured"] == threads["encoded"] == {threading.get_ident()}
    assert threads["read"] & {threading.get_ident()} == set()
    np.testing.assert_array_equal(rows, tasks.measure(source, reads, greys, ("shape", "intensity")))
    np.testing.assert_array_equal(vectors, tasks.embed(source, reads, embedder))
