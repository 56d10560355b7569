"""Neighbours of cells: as a look at every pair gives them, and chance as all permutations give it."""

from __future__ import annotations

import itertools
import math

import dask.array as da
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import daskcell as dc
from daskcell.clustering import neighbourhoods as room
from daskcell.errors import InputError


@st.composite
def cells(draw):
    """Label images of small cells with ids 1..N, types for them, chunks."""
    shape = draw(st.tuples(st.integers(2, 40), st.integers(2, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    image = np.zeros(shape, np.uint32)
    for label in range(1, draw(st.integers(1, 15)) + 1):
        y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        h, w = rng.integers(1, 6, 2)
        image[y : y + h, x : x + w] = label
    ids, image = np.unique(image, return_inverse=True)
    image = image.reshape(shape) + (ids[0] != 0)
    types = rng.integers(-1, 3, image.max())
    return image, types, tuple(draw(st.integers(1, side)) for side in shape)


def by_hand(image, types, radius=None, k=None, gap=None):
    """Pairs of neighbours, one pair of cells at a time."""
    n = len(types)
    pixels = [np.argwhere(image == label) for label in range(1, n + 1)]
    centres = np.array([p.sum(axis=0) / len(p) for p in pixels])
    squares = ((centres[:, None] - centres[None]) ** 2).sum(axis=-1)
    typed = [i for i in range(n) if types[i] >= 0]
    pairs = set()
    for i, j in itertools.combinations(typed, 2):
        if radius is not None and squares[i, j] <= radius**2:
            pairs.add((i, j))
        if gap is not None:
            apart = np.sqrt(((pixels[i][:, None] - pixels[j][None]) ** 2).sum(axis=-1)).min()
            if apart <= gap + math.sqrt(2):
                pairs.add((i, j))
        if k is not None:
            for one, other in ((i, j), (j, i)):
                order = sorted((x for x in typed if x != one), key=lambda x: (squares[one, x], x))
                if other in order[:k]:
                    pairs.add((i, j))
    return pairs, np.sqrt(squares)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    cells(), st.sampled_from([{"radius": 4.5}, {"radius": 12}, {"k": 1}, {"k": 4}, {"gap": 0}, {"gap": 3}])
)
def test_neighbours_are_those_that_a_look_at_every_pair_finds(drawn, way):
    image, types, chunks = drawn
    pairs, distances = by_hand(image, types, **way)
    names = sorted(set(types[types >= 0]))
    counts = pd.DataFrame(0, names, names)
    composition = np.zeros((len(types), len(names)), int)
    for i, j in pairs:
        counts.loc[types[i], types[j]] += 1
        if types[i] != types[j]:
            counts.loc[types[j], types[i]] += 1
        composition[i, names.index(types[j])] += 1
        composition[j, names.index(types[i])] += 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "PORTION", 3)
        for labels in (image, da.from_array(image, chunks=chunks)):
            found = dc.neighbours(labels, types, **way)
            pd.testing.assert_frame_equal(found.counts, counts, check_dtype=False)
            np.testing.assert_array_equal(found.composition.to_numpy(), composition)
            for column, name in enumerate(names):
                for i in range(len(types)):
                    others = [distances[i, j] for j in range(len(types)) if types[j] == name and j != i]
                    np.testing.assert_allclose(found.nearest.iloc[i, column], min(others, default=np.nan))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(2, 3), (1, 1, 3), (6,), (2, 2, 2), (1, 5), (4, 1), (3, 3)]))
def test_mean_and_variance_are_those_of_all_permutations(seed, sizes):
    n = sum(sizes)
    rng = np.random.default_rng(seed)
    edges = [pair for pair in itertools.combinations(range(n), 2) if rng.random() < 0.5]
    degrees = np.bincount(np.array(edges, int).ravel(), minlength=n)
    seen = []
    for dealt in set(itertools.permutations(np.repeat(np.arange(len(sizes)), sizes).tolist())):
        counts = np.zeros((len(sizes),) * 2, int)
        for i, j in edges:
            counts[dealt[i], dealt[j]] += 1
            if dealt[i] != dealt[j]:
                counts[dealt[j], dealt[i]] += 1
        seen.append(counts)
    mean, variance = room.chance(degrees, sizes)
    np.testing.assert_allclose(mean, np.mean(seen, axis=0), atol=1e-12)
    np.testing.assert_allclose(variance, np.var(seen, axis=0), atol=1e-9)


def test_types_that_stay_together_are_enriched():
    rng = np.random.default_rng(0)
    image = np.zeros((300, 300), np.uint32)
    image[5::10, 5::10] = np.arange(1, 901).reshape(30, 30)
    halves = np.where(np.arange(900) % 30 < 15, "left", "right")
    found = dc.neighbours(image, halves, radius=15)
    assert found.enrichment.loc["left", "left"] > 10
    assert found.enrichment.loc["left", "right"] < -10
    mixed = dc.neighbours(image, rng.permutation(halves), radius=15)
    assert mixed.enrichment.abs().to_numpy().max() < 4


@pytest.mark.slow
def test_the_graph_of_many_cells_is_never_whole():
    """What a portion gives stays small: pairs of that many cells, not of all."""
    points = np.random.default_rng(0).uniform(0, 3000, (200_000, 2))
    assert max(len(first) for first, _ in room._within(points, 15.0)) < 1_000_000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "one of radius, k and gap, not none"),
        ({"radius": 3, "gap": 1}, "not radius and gap"),
        ({"radius": 0.5}, "radius must be a number of pixels, 1 or more, not 0.5"),
        ({"radius": np.nan}, "radius must be"),
        ({"k": 1.5}, "k must be a whole number, 1 or more"),
        ({"k": 0}, "k must be"),
        ({"gap": -1}, "gap must be a number of pixels, 0 or more"),
        ({"radius": "far"}, "radius must be"),
    ],
)
def test_neighbours_that_nothing_defines_are_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        dc.neighbours(np.array([[1, 2]]), [0, 1], **arguments)


def test_types_that_do_not_fit_are_refused():
    labels = np.array([[1, 2, 0, 4]])
    with pytest.raises(InputError, match="have the id 4, but there are types for 2 cells"):
        dc.neighbours(labels, [0, 1], k=1)
    with pytest.raises(InputError, match="No pixel has the label 3"):
        dc.neighbours(labels, [0, 1, 1, 0], k=1)
    with pytest.raises(InputError, match="numbers or names, not both"):
        dc.neighbours(np.array([[1, 2]]), [0, "a"], k=1)


def test_cells_without_a_type_are_nobodys_neighbours():
    found = dc.neighbours(np.array([[1, 2, 3]]), ["a", None, "b"], radius=1.5)
    assert found.counts.to_numpy().sum() == 0
    assert found.composition.to_numpy().sum() == 0
    nobody = dc.neighbours(np.array([[1, 2, 3]]), [-1, -1, -1], gap=0)
    assert nobody.counts.shape == (0, 0)
