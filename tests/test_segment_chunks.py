"""Labels do not depend on how a picture is cut, or on who works on the parts."""

from __future__ import annotations

from itertools import pairwise

import dask
import dask.array as da
import numpy as np
import pytest
from blobs import BlobNetwork, blobs, same_cells
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daskcell.segmentation import segment


def run(image, workers=1, **options):
    """Labels and seam report, by so many threads."""
    labels = segment(image, **{"diameter": None, "return_report": True} | options)
    return dask.compute(*labels, scheduler="threads" if workers > 1 else "synchronous", num_workers=workers)


@st.composite
def cut_pictures(draw):
    """A shape, and chunks of it: cut anywhere, of one pixel to the whole."""
    shape = draw(st.tuples(st.integers(20, 600), st.integers(20, 600)))
    chunks = []
    for side in shape:
        edges = draw(st.sets(st.integers(1, side - 1), max_size=4))
        chunks.append(tuple(b - a for a, b in pairwise([0, *sorted(edges), side])))
    return shape, tuple(chunks)


watersheds = st.fixed_dictionaries(
    {
        "opening": st.integers(0, 4),
        "min_distance": st.integers(1, 12),
        "merge": st.booleans(),
        "merge_similarity": st.floats(0.3, 1),
    }
)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    cut=cut_pictures(),
    block=st.integers(40, 500),
    halo=st.sampled_from([None, 8, 50]),
    workers=st.integers(1, 4),
    seed=st.integers(0, 1000),
    watershed=st.none() | watersheds,
)
def test_labels_do_not_depend_on_chunks_blocks_halos_or_workers(cut, block, halo, workers, seed, watershed):
    shape, chunks = cut
    image = blobs(shape, seed)
    options = {"model": BlobNetwork()} if watershed is None else {"method": "watershed"} | watershed
    expected, _ = run(image, block=4096, **options)
    labels, report = run(da.from_array(image, chunks=chunks), workers, block=block, halo=halo, **options)
    np.testing.assert_array_equal(labels, expected)
    assert report.cells == expected.max()
    assert report.conflicts == 0


@pytest.mark.slow
def test_threads_of_the_network_change_at_most_one_cell_in_a_thousand():
    import torch

    image, net, threads = blobs((1300, 1400), 12), BlobNetwork(), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(run(image, model=net, block=500)[0])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        same, found, true = same_cells(other, results[0])
        assert found == true > 1000
        assert same >= 0.999 * true


@pytest.mark.slow
def test_each_tile_goes_through_the_network_once():
    net = BlobNetwork()
    _, report = run(blobs((600, 800), 5), model=net, block=300, batch_size=1)
    assert net.tiles == report.tiles == 3 * 4
    assert report.repeated == 0


@pytest.mark.slow
def test_worker_processes_give_the_same_labels_however_many_there_are():
    from distributed import Client, LocalCluster

    image = blobs((400, 330), 9)
    expected, _ = run(image, model=BlobNetwork(), block=4096)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        for count in (1, 2):
            cluster.scale(count)
            client.wait_for_workers(count)
            # The halo is too small: blocks that look further ask the scheduler from within their task.
            labels, report = segment(
                da.from_array(image, chunks=((77, 200, 123), 190)),
                model=BlobNetwork(), diameter=None, block=128, halo=8, return_report=True,
            )  # fmt: skip
            labels, report = client.gather([client.compute(labels), client.compute(report)])
            np.testing.assert_array_equal(labels, expected)
            assert report.halo_retries > 0
