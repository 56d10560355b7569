"""Rounds of k-means look at few rows again, and end as if they had looked at all."""

from __future__ import annotations

import numpy as np
import pytest

from daskcell.clustering import kmeans
from daskcell.clustering.assignment import NearestCenters, grid_steps
from daskcell.clustering.feature_blocks import ArrayBlock, FileBlock
from daskcell.clustering.kmeans import lloyd


def blobs(n: int, c: int, k: int, seed: int = 0, spread: float = 1.5):
    """Groups that overlap, in even steps, and first centres that are not yet right."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(k, c))
    x = (middles[rng.integers(0, k, n)] + rng.normal(0, spread, (n, c))).astype(np.float32)
    whole = grid_steps(x)
    return (np.rint(x / whole) * whole).astype(np.float32), x[:k].astype(float)


def plain(x: np.ndarray, centers: np.ndarray, times: int) -> np.ndarray:
    """Lloyd's rounds over all rows."""
    for _ in range(times):
        labels = NearestCenters(centers).labels(x)
        for i in range(len(centers)):
            if (labels == i).any():
                centers[i] = x[labels == i].sum(axis=0, dtype=np.float64) / (labels == i).sum()
    return centers


def cut(x: np.ndarray, size: int = 300) -> list[ArrayBlock]:
    return [ArrayBlock(x, i, min(i + size, len(x))) for i in range(0, len(x), size)]


@pytest.mark.slow
@pytest.mark.parametrize(("c", "k", "spread"), [(2, 9, 1.5), (32, 5, 1.0), (3, 40, 0.3), (4, 1, 1.0)])
@pytest.mark.parametrize("times", [1, 2, 7, 30])
def test_the_same_bits_as_with_a_look_at_every_row(c, k, spread, times, tmp_path, monkeypatch):
    x, first = blobs(3000, c, k, spread=spread)
    monkeypatch.setattr(kmeans, "_ROUNDS", times)
    found = lloyd(cut(x), first, -1.0, str(tmp_path))
    np.testing.assert_array_equal(found, plain(x, first.copy(), times))


def test_with_no_step_too_small_the_centres_stand_still(tmp_path):
    x, first = blobs(3000, 4, 6)
    found = lloyd(cut(x), first, 0.0, str(tmp_path))
    np.testing.assert_array_equal(found, plain(x, found.copy(), 1))


def test_later_rounds_look_at_few_rows(tmp_path, monkeypatch):
    x, first = blobs(20000, 16, 8, spread=0.5)
    looked = []
    look = NearestCenters.update

    def counted(self, rows, again, *others):
        looked.append(len(again))
        return look(self, rows, again, *others)

    monkeypatch.setattr(NearestCenters, "update", counted)
    lloyd([ArrayBlock(x, 0, len(x))], first, 0.0, str(tmp_path))
    assert looked[0] == 20000
    assert len(looked) > 8
    assert sum(looked[5:]) < 0.2 * 20000 * len(looked[5:])


def test_a_cluster_that_loses_its_rows_stays_where_it_is(tmp_path):
    x = np.repeat(np.array([[0.0], [1.0], [8.0]], np.float32), 50, axis=0)
    first = np.array([[0.5], [8.0], [100.0]])
    assert lloyd(cut(x), first, 0.0, str(tmp_path)).tolist() == [[0.5], [8.0], [100.0]]


def test_a_task_that_is_repeated_finds_the_same(tmp_path):
    x, centers = blobs(2000, 5, 6)
    blocks = [FileBlock.write(str(tmp_path / f"{i}.f4"), x[i * 500 : i * 500 + 500]) for i in range(4)]
    spent = np.zeros(6)
    for number in range(4):
        one = kmeans._update_sums((7, blocks), centers, spent, str(tmp_path), number)
        again = kmeans._update_sums((7, blocks), centers, spent, str(tmp_path), number)
        np.testing.assert_array_equal(one[0], again[0])
        np.testing.assert_array_equal(one[1], again[1])
        centers = centers + 0.01
        spent = spent + 2 * 0.01 * np.sqrt(5) + 1e-9
    assert len(list(tmp_path.glob("*.margins"))) == 2, "the last two rounds are kept"
