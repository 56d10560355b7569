"""Outlines hold exactly the pixels of their cells."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from daskcell.render.outlines import trace, trace_all

masks = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 3))
)


def shape_of(parts):
    shapely = pytest.importorskip("shapely")
    polygons = [shapely.Polygon(p[0][:, ::-1], [ring[:, ::-1] for ring in p[1:]]) for p in parts]
    return shapely.MultiPolygon(polygons)


def ring_area(ring):
    y, x = ring.T.astype(int)
    return (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(masks)
def test_outlines_are_valid_and_hold_the_pixels_and_no_more(labels):
    shapely = pytest.importorskip("shapely")
    ids, outlines = trace_all(labels)
    y, x = np.mgrid[: labels.shape[0], : labels.shape[1]] + 0.5
    assert ids.tolist() == np.unique(labels[labels > 0]).tolist()
    for place, label in enumerate(ids):
        shape = shape_of(outlines.polygons(place))
        assert all(part.is_valid for part in shape.geoms), shapely.is_valid_reason(shape)
        assert len(shape.geoms) == ndimage.label(labels == label)[1]
        inside = np.zeros(labels.shape, int)
        for part in shape.geoms:
            inside += shapely.contains_xy(part, x, y)
        np.testing.assert_array_equal(inside, labels == label)


@settings(max_examples=100, deadline=None)
@given(masks)
def test_areas_of_rings_add_up_and_no_ring_visits_a_corner_twice(labels):
    ids, outlines = trace_all(labels)
    for place, label in enumerate(ids):
        parts = outlines.polygons(place)
        areas = [[ring_area(ring) for ring in part] for part in parts]
        assert sum(map(sum, areas)) == np.count_nonzero(labels == label)
        for part in areas:
            assert part[0] > 0
            assert all(hole < 0 for hole in part[1:])
        for part in parts:
            for ring in part:
                assert len(np.unique(ring, axis=0)) == len(ring)
                steps = np.abs(np.roll(ring, -1, axis=0) - ring)
                assert (np.count_nonzero(steps, axis=1) == 1).all()  # along the edges of pixels
                turns = np.roll(steps[:, 0] > 0, 1) != (steps[:, 0] > 0)
                assert turns.all()  # no point in the middle of a straight line


@pytest.mark.slow
def test_outlines_have_the_coordinates_of_the_whole_image():
    labels = np.zeros((6, 7), np.uint32)
    labels[2:4, 3:6] = 9
    outlines = trace(labels[1:, 2:], np.array([9]), np.array([[1, 1, 3, 4]]), origin=(1, 2))
    ((ring,),) = outlines.polygons(0)
    assert ring.tolist() == [[2, 6], [4, 6], [4, 3], [2, 3]]
    assert outlines.starts.tolist() == [0, 4]


def test_no_cells_have_no_outlines():
    ids, outlines = trace_all(np.zeros((3, 3), np.uint8))
    assert (len(ids), len(outlines.points), outlines.starts.tolist()) == (0, 0, [0])
