"""Cells found in blocks, put together, and given to the block that owns them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from daskcell.errors import InputError
from daskcell.features.cell_index import (
    block_records,
    crop_boxes,
    merge_records,
    owners,
    plan_reads,
)
from daskcell.geometry import Box, Grid

LABELS = hnp.arrays(np.uint32, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 6))


@st.composite
def cut_labels(draw):
    labels = draw(LABELS)
    edges = [
        (0, *sorted(draw(st.sets(st.integers(1, max(1, side - 1)), max_size=4)) - {side}), side)
        for side in labels.shape
    ]
    return labels, Grid(*edges)


def brute_force(labels: np.ndarray) -> list[tuple[int, ...]]:
    out = []
    for label in np.unique(labels[labels > 0]):
        pixels = [
            (y, x) for y in range(labels.shape[0]) for x in range(labels.shape[1]) if labels[y, x] == label
        ]
        ys, xs = zip(*pixels, strict=True)
        out.append((label, *pixels[0], min(ys), min(xs), max(ys) + 1, max(xs) + 1, len(pixels)))
    return out


def records_of(labels: np.ndarray, grid: Grid) -> np.ndarray:
    cores = [grid.core(index) for index in grid]
    return merge_records([block_records(labels[core.slices], (core.y0, core.x0)) for core in cores])


@given(cut_labels())
@settings(deadline=None)
def test_records_equal_a_brute_force_search_wherever_the_blocks_are_cut(case):
    labels, grid = case
    assert records_of(labels, grid).tolist() == brute_force(labels)


@given(cut_labels(), st.randoms())
@settings(deadline=None)
def test_parts_may_be_merged_in_any_order_and_grouping(case, random):
    labels, grid = case
    parts = [block_records(labels[core.slices], (core.y0, core.x0)) for core in map(grid.core, grid)]
    random.shuffle(parts)
    cut = random.randint(0, len(parts))
    merged = merge_records([merge_records(parts[:cut]), merge_records(parts[cut:])])
    assert merged.tolist() == brute_force(labels)


@given(cut_labels(), st.floats(0, 1), st.none() | st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_every_cell_is_read_once_and_whole_by_the_block_that_holds_its_anchor(case, margin, window):
    labels, grid = case
    records = records_of(labels, grid)
    seen = []
    for number, reads in plan_reads(records, grid, margin, window).items():
        core = grid.core(divmod(number, grid.counts[1]))
        for read in reads:
            assert len(read.records)
            for record, square in zip(read.records, crop_boxes(read.records, margin, window), strict=True):
                assert (record["anchor_y"], record["anchor_x"]) in core
                needed = Box(*square.tolist()).clip(grid.shape)
                assert needed & read.box == needed
                seen.append(record["label"])
    assert sorted(seen) == records["label"].tolist()


def test_a_large_cell_gets_a_read_of_its_own():
    labels = np.zeros((1000, 1000), np.uint32)
    labels[20:30, 20:30] = 1
    labels[50:950, 50:950] = 2
    labels[95:110, 20:40] = 3
    grid = Grid.regular(labels.shape, 100)
    plans = plan_reads(records_of(labels, grid), grid)
    assert list(plans) == [0]
    shared, alone = plans[0]
    assert shared.records["label"].tolist() == [1, 3]
    assert alone.records["label"].tolist() == [2]
    assert shared.box == Box(20, 20, 112, 40), "square around each cell"


def test_a_crop_is_a_square_that_holds_the_cell():
    labels = np.zeros((50, 50), np.uint8)
    labels[10:20, 30:34] = 1
    records = block_records(labels)
    (box,) = crop_boxes(records, 0.1)
    assert box.tolist() == [9, 26, 21, 38]
    (box,) = crop_boxes(records, 0.1, window=30)
    assert box.tolist() == [0, 17, 30, 47]
    (box,) = crop_boxes(records, 0.1, window=5)
    assert box[2] - box[0] == 10, "a cell larger than the window is not cut"


def test_owner_of_an_anchor_on_the_edge_of_a_block_is_the_block_that_begins_there():
    labels = np.zeros((4, 4), np.uint8)
    labels[2, 2] = 1
    assert owners(block_records(labels), Grid.regular((4, 4), 2)).tolist() == [3]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros((2, 2)), "whole numbers"),
        (np.zeros((1, 2, 2), int), r"\(Y, X\)"),
        (np.array([[-1, 0]]), "negative"),
        (np.array([[2**32, 0]]), "32 bits"),
    ],
)
def test_what_is_no_label_image_is_refused(labels, words):
    with pytest.raises(InputError, match=words):
        block_records(labels)
