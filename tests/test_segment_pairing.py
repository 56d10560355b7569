"""Growing labels, and nuclei with their cells: as on the whole image, whatever the blocks."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.segmentation import expand_labels

import daskcell as dc
from daskcell.errors import InputError
from daskcell.segmentation.expansion import expand_block


@st.composite
def label_images(draw, count=1):
    """Label images of one shape with rectangles and single pixels, ids with gaps; and chunks for them."""
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images = []
    for _ in range(count):
        image = np.zeros(shape, np.uint32)
        ids = rng.choice(2**32 - 2, draw(st.integers(0, 12)), replace=False) + 1
        for label in ids:
            y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
            h, w = rng.integers(1, 9, 2)
            image[y : y + h, x : x + w] = label
        images.append(image)
    chunks = tuple(draw(st.integers(1, side)) for side in shape)
    return images, chunks


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(label_images(), st.sampled_from([0, 0.5, 1, 1.5, 2, 3.7, 6, 100]))
def test_grown_labels_are_those_of_the_whole_image(drawn, distance):
    (image,), chunks = drawn
    expected = expand_labels(image, distance)
    for given_image in (image, da.from_array(image, chunks=chunks)):
        found = dc.expand(given_image, distance)
        assert found.dtype == image.dtype
        np.testing.assert_array_equal(found.compute(scheduler="sync"), expected)


def test_blocks_without_a_margin_grow_other_labels():
    image = np.zeros((1, 12), np.uint32)
    image[0, 5] = 1
    alone = da.from_array(image, chunks=(1, 6)).map_blocks(expand_block, distance=3).compute()
    assert (alone != expand_labels(image, 3)).any()


@pytest.mark.parametrize("distance", [-1, np.nan, np.inf, "far", None])
def test_distances_that_are_none_are_refused(distance):
    with pytest.raises(InputError, match="must be a number of pixels"):
        dc.expand(np.zeros((3, 3), int), distance)


def paired(nuclei, cells, unmatched, several, grow):
    """`pair` on the whole image, one nucleus and one cell at a time."""
    shared = {}
    for n, c in zip(nuclei.ravel().tolist(), cells.ravel().tolist(), strict=True):
        shared[n, c] = shared.get((n, c), 0) + 1
    all_cells = sorted({c for _, c in shared} - {0})
    owner, inside = {}, {}
    for nucleus in sorted({n for n, _ in shared} - {0}):
        best = max(((k, -c) for (n, c), k in shared.items() if n == nucleus and c), default=(0, 0))
        inside[nucleus], owner[nucleus] = best[0], -best[1]
    new_nuclei, new_cells = np.zeros(nuclei.shape, np.uint32), np.zeros(cells.shape, np.uint32)
    next_id = 1
    for cell in all_cells:
        own = [n for n in owner if owner[n] == cell]
        if (not own and unmatched == "drop") or (len(own) > 1 and several == "drop"):
            continue
        if several == "largest" and own:
            own = [max(own, key=lambda n: (inside[n], -n))]
        mine = cells == cell
        new_cells[mine] = next_id
        for n in own:
            within = (nuclei == n) & (mine | (cells == 0))
            new_nuclei[within] = new_cells[within] = next_id
            if several == "split" and n != own[-1]:
                next_id += 1
        if several == "split" and len(own) > 1:
            y, x = np.nonzero(mine)
            box = np.s_[y.min() : y.max() + 1, x.min() : x.max() + 1]
            seeds = np.where(mine, new_nuclei, 0)[box]
            new_cells[box][mine[box]] = expand_labels(seeds, max(seeds.shape) * 2)[mine[box]]
        next_id += 1
    lone = [n for n in owner if not owner[n]] if unmatched == "keep" else []
    first = next_id
    for n in lone:
        new_nuclei[nuclei == n] = new_cells[nuclei == n] = next_id
        next_id += 1
    grown = expand_labels(new_cells, grow)
    new_cells[(new_cells == 0) & (grown >= first)] = grown[(new_cells == 0) & (grown >= first)]
    return new_nuclei, new_cells


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    label_images(2),
    st.sampled_from(["keep", "drop"]),
    st.sampled_from(["keep", "largest", "split", "drop"]),
    st.sampled_from([0, 2, 5.5]),
)
def test_pairs_are_those_of_the_whole_image(drawn, unmatched, several, grow):
    (nuclei, cells), chunks = drawn
    expected = paired(nuclei, cells, unmatched, several, grow)
    other = da.from_array(nuclei, chunks=chunks[::-1] if chunks[::-1] < nuclei.shape else chunks)
    for n, c in ((nuclei, cells), (other, da.from_array(cells, chunks=chunks))):
        found = dc.pair(n, c, unmatched=unmatched, several=several, grow=grow)
        for image, right in zip(found, expected, strict=True):
            assert image.dtype == np.uint32
            np.testing.assert_array_equal(image.compute(scheduler="sync"), right)


@settings(max_examples=40, deadline=None)
@given(label_images(2))
def test_a_nucleus_lies_in_its_cell_and_ids_have_no_gaps(drawn):
    nuclei, cells = (x.compute(scheduler="sync") for x in dc.pair(*drawn[0]))
    assert (cells[nuclei > 0] == nuclei[nuclei > 0]).all()
    np.testing.assert_array_equal(np.unique(cells[cells > 0]), np.arange(1, cells.max() + 1))


def test_what_cannot_be_paired_is_refused():
    good = np.ones((4, 5), int)
    with pytest.raises(InputError, match="must have the same shape"):
        dc.pair(good, good[:3])
    with pytest.raises(InputError, match="unmatched must be one of keep, drop, not 'grow'"):
        dc.pair(good, good, unmatched="grow")
    with pytest.raises(InputError, match="several must be one of"):
        dc.pair(good, good, several="all")
    with pytest.raises(InputError, match="Ids of cells must be from 0"):
        dc.pair(good, good * 2**40)
    with pytest.raises(InputError, match="nuclei must not be below 0"):
        dc.pair(-good, good)
    with pytest.raises(InputError, match="Ids of nuclei must be from 0"):
        dc.pair(da.from_array(-good), good)
