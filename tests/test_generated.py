"""Generated fields: what is promised about their truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from daskcell.errors import InputError
from daskcell.evaluation.generated import CELL_TYPES, synthesize_field, synthesize_nuclei

SHAPE = (320, 400)


@pytest.fixture(scope="module")
def field():
    return synthesize_field(SHAPE, seed=3, cells=66)


def test_shapes_and_types_of_the_arrays(field):
    assert field.channels.shape == (4, *SHAPE)
    assert field.channels.dtype == np.uint8
    assert field.labels.shape == SHAPE
    assert field.labels.dtype == np.uint32
    assert field.types.shape == (field.labels.max(),)


@pytest.mark.slow
def test_same_seed_same_picture_and_other_seed_another(field):
    again = synthesize_field(SHAPE, seed=3, cells=66)
    other = synthesize_field(SHAPE, seed=4, cells=66)
    assert all(np.array_equal(a, b) for a, b in zip(field, again, strict=True))
    assert not np.array_equal(field.channels, other.channels)


def test_ids_are_in_reading_order_without_gaps(field):
    ids, first = np.unique(field.labels, return_index=True)
    assert np.array_equal(ids, np.arange(len(ids)))
    assert np.all(np.diff(first[1:]) > 0)


def test_all_eleven_types_are_drawn(field):
    assert len(CELL_TYPES) == 11
    assert set(field.types.tolist()) == set(range(11))


def test_every_cell_is_one_piece(field):
    for i, box in enumerate(ndimage.find_objects(field.labels.astype(int)), start=1):
        assert ndimage.label(field.labels[box] == i)[1] == 1, f"cell {i}"


def test_some_cells_touch(field):
    right = (
        (field.labels[:, 1:] != field.labels[:, :-1]) & (field.labels[:, 1:] > 0) & (field.labels[:, :-1] > 0)
    )
    assert right.sum() > 10
    assert ndimage.label(field.labels > 0)[1] < field.labels.max()


def test_without_clumping_fewer_cells_touch():
    loose = synthesize_field(SHAPE, seed=3, cells=25, clumping=0.0)
    tight = synthesize_field(SHAPE, seed=3, cells=25, clumping=0.95)
    pieces = [ndimage.label(f.labels > 0)[1] / f.labels.max() for f in (loose, tight)]
    assert pieces[0] > pieces[1] + 0.1


def test_cells_are_brighter_than_the_background(field):
    light = field.channels.sum(0)
    ground = np.median(light[field.labels == 0])
    inside = ndimage.mean(light, field.labels, np.arange(1, field.labels.max() + 1))
    assert np.mean(inside > 1.5 * ground) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other", "channel"),
    [("granulocyte_cyan", "granulocyte_red", 3), ("epithelial", "epithelial_loose", 0)],
)
def test_near_twins_differ_in_the_stain_that_tells_them_apart(one, other, channel):
    names = [t.name for t in CELL_TYPES]
    means = []
    for name in (one, other):
        field = synthesize_field(SHAPE, seed=1, cells=25, types=[names.index(name)])
        means.append(field.channels[channel][field.labels > 0].mean())
    assert means[0] > 1.25 * means[1]


def test_sizes_follow_the_types():
    names = [t.name for t in CELL_TYPES]
    areas = {}
    for name in ("lymphocyte", "binucleate"):
        field = synthesize_field(SHAPE, seed=2, cells=15, types=[names.index(name)])
        areas[name] = np.median(np.bincount(field.labels.ravel())[1:])
    assert areas["lymphocyte"] == pytest.approx(np.pi * 9.5**2, rel=0.3)
    assert areas["binucleate"] == pytest.approx(np.pi * 25**2, rel=0.3)


def test_nuclei_lie_inside_their_cells():
    field, nuclei = synthesize_nuclei(SHAPE, 5, cells=40)
    assert np.array_equal(nuclei[nuclei > 0], field.labels[nuclei > 0])
    crescent = [t.name for t in CELL_TYPES].index("crescent")
    with_nucleus = set(np.unique(nuclei)) - {0}
    assert not any(field.types[i - 1] == crescent for i in with_nucleus)
    assert len(with_nucleus) > 0.9 * np.sum(field.types != crescent)


def test_no_noise_gives_a_smooth_background():
    clean = synthesize_field((96, 96), seed=0, cells=1, types=[0], noise=0.0)
    noisy = synthesize_field((96, 96), seed=0, cells=1, types=[0], noise=2.0)
    steps = [
        np.abs(np.diff(f.channels[0].astype(float), axis=1))[f.labels[:, 1:] == 0].mean()
        for f in (clean, noisy)
    ]
    assert steps[0] < 0.3 < steps[1]


def test_picture_with_odd_sides():
    field = synthesize_field((67, 41), seed=0)
    assert field.channels.shape == (4, 67, 41)


@pytest.mark.parametrize("wrong", [{"shape": (10, 300)}, {"types": [11]}, {"types": []}])
def test_impossible_wishes_are_refused(wrong):
    with pytest.raises(InputError):
        synthesize_field(**{"shape": (64, 64), **wrong})
