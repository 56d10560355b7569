"""The nearest centre is that of exact distances, although a single-precision product does most of it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from daskcell.clustering import assignment as room
from daskcell.clustering.assignment import TILE, NearestCenters, grid_steps


def brute_force(rows, centers):
    """The first of the nearest, in arithmetic far finer than what is tested."""
    difference = rows.astype(np.longdouble)[:, None] - centers.astype(np.longdouble)
    return (difference**2).sum(axis=-1).argmin(axis=1)


@pytest.mark.parametrize(
    ("n", "c", "k"), [(1, 1, 1), (TILE - 1, 5, 2), (3 * TILE + 7, 32, 11), (900, 256, 16)]
)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_nearest_centre_of_every_row(n, c, k, offset):
    rng = np.random.default_rng(n)
    rows, centers = rng.normal(offset, 1, (n, c)).astype(np.float32), rng.normal(offset, 1, (k, c))
    found = NearestCenters(centers)
    labels = found.labels(rows)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, brute_force(rows, centers))
    expected = ((rows.astype(float) - centers[labels]) ** 2).sum(axis=1)
    np.testing.assert_allclose(found.squares(rows, labels), expected, rtol=1e-12)


def between(n: int, c: int, k: int):
    """Rows so close to the middle between two centres that single precision cannot tell the nearer one."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(k, c)).astype(np.float32).astype(float)
    a, b = rng.integers(0, k, (2, n))
    middle = (centers[a] + centers[b]) / 2 + 1e-6 * rng.normal(size=(n, c))
    return middle.astype(np.float32), centers


def test_rows_between_two_centres_go_to_the_nearer():
    rows, centers = between(4000, 64, 6)
    found = NearestCenters(centers)
    np.testing.assert_array_equal(found.labels(rows), brute_force(rows, centers))
    assert 1000 < found.rechecked < 4000


def test_a_plain_product_sends_such_rows_to_the_farther_one():
    """Control: what decides, without the second look."""
    rows, centers = between(4000, 64, 6)
    single = centers.astype(np.float32)
    plain = ((single**2).sum(axis=1) / 2 - rows @ single.T).argmin(axis=1)
    assert (plain != brute_force(rows, centers)).sum() > 100


def test_few_rows_need_a_second_look():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(16, 256))
    rows = (centers[rng.integers(0, 16, 20000)] + rng.normal(0, 2, (20000, 256))).astype(np.float32)
    found = NearestCenters(centers)
    found.labels(rows)
    assert found.rechecked < 20


numbers = st.floats(-(2.0**60), 2.0**60, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, 1e-40])


def distances(row, centers):
    """Squared, as exact fractions: the elements below differ by more than any float can hold."""
    return [
        sum((Fraction(float(a)) - Fraction(float(b))) ** 2 for a, b in zip(row, c, strict=True))
        for c in centers
    ]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 7), st.integers(1, 12))
@example(None, 1, 2, 1)
def test_any_rows_and_centres(data, c, k, n):
    if data is None:  # the second centre is nearer by less than a long double holds
        rows, centers = np.array([[2.0**59]], np.float32), np.array([[0.0], [2.0**-5]])
    else:
        rows = data.draw(arrays(np.float32, (n, c), elements=numbers))
        centers = data.draw(arrays(np.float32, (k, c), elements=numbers)).astype(float)
    for row, label in zip(rows, NearestCenters(centers).labels(rows), strict=True):
        distance = distances(row, centers)
        assert distance[label] <= min(distance) * (1 + Fraction(1, 10**12))  # as double precision can tell
        assert not any((centers[j] == centers[label]).all() for j in range(label)), "the first of equal ones"


@pytest.mark.parametrize("tile", [1, 7, 512])
def test_the_tile_changes_no_label(tile, monkeypatch):
    rows, centers = between(1500, 20, 5)
    expected = NearestCenters(centers).labels(rows)
    monkeypatch.setattr(room, "TILE", tile)
    np.testing.assert_array_equal(NearestCenters(centers).labels(rows), expected)


def test_sums_are_exact_in_any_order():
    rng = np.random.default_rng(0)
    rows = (rng.gamma(2.0, size=(20000, 6)) * [1e-6, 1, 3, 1e3, 1e6, 0]).astype(np.float32)
    whole = grid_steps(rows[:1000])
    even = (np.rint(rows / whole) * whole).astype(np.float32)
    np.testing.assert_allclose(even[:, :5], rows[:, :5], atol=1e-6 * rows[:, :5].std(axis=0).max())
    centers = np.zeros((1, 6))
    sums = []
    for rows_now in (even, even[::-1], even[rng.permutation(len(even))]):
        total, counts = np.zeros((1, 6)), np.zeros(1, np.int64)
        NearestCenters(centers).add(np.ascontiguousarray(rows_now), total, counts)
        sums.append(total)
        assert counts.tolist() == [20000]
    np.testing.assert_array_equal(sums[0], sums[1])
    np.testing.assert_array_equal(sums[0], sums[2])
    # Control: as they come, the sums of the same rows have other last bits in another order.
    ragged = rows.astype(np.float64) * (1 + 1e-9)
    assert (np.cumsum(ragged, axis=0)[-1] != np.cumsum(ragged[::-1], axis=0)[-1]).any()
