"""Cells of stained smears outlined without a network: right on drawn and on real ones."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from skimage.io import imread

from daskcell.training.smears import optical_density, outline_smear

WHITE, NUCLEUS, RED = (150, 140, 190), (70, 40, 130), (205, 150, 150)


def smear(shape=(260, 280), glass=(215, 208, 190), shade=0.0):
    """A white cell with two lobes, two red cells that touch, one with a pallor; and the whole cells."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    image = np.empty((*shape, 3))
    image[:] = glass
    truth = np.zeros(shape, int)

    def disc(cy, cx, radius, color, label=0):
        inside = np.hypot(y - cy, x - cx) < radius
        image[inside] = color
        if label:
            truth[inside] = label

    disc(90, 90, 60, WHITE, 1)
    disc(80, 75, 22, NUCLEUS)
    disc(105, 112, 22, NUCLEUS)
    for label, (cy, cx) in enumerate([(60, 200), (119, 210), (210, 120)], start=2):
        disc(cy, cx, 31, RED, label)
    disc(210, 120, 10, glass)
    image *= (1 + shade * (x / shape[1] - 0.5))[..., None]
    noise = np.random.default_rng(0).normal(0, 2, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), truth


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(("shade", "factor"), [(0.0, 1), (0.0, 2), (0.12, 1)])
def test_drawn_cells_are_outlined(shade, factor):
    image, truth = (a[::factor, ::factor] for a in smear((330, 340), shade=shade))
    cells, nuclei = outline_smear(image, 130 / factor)
    assert cells.max() == len(np.unique(cells)) - 1 == 4
    for label in range(1, 5):
        found = np.bincount(cells[truth == label]).argmax()
        # Nothing but their shape tells the two that touch apart.
        assert iou(cells == found, truth == label) > (0.75 if label in (2, 3) else 0.9), label
    assert (np.unique(nuclei[nuclei > 0]) == cells[90 // factor, 90 // factor]).all(), (
        "two lobes, one nucleus"
    )


def test_density_of_glass_is_zero_however_the_light_falls_off():
    image, truth = smear((330, 340), shade=0.25)
    density = optical_density(image)
    assert np.abs(np.median(density[:, :50][truth[:, :50] == 0], axis=0)).max() < 0.01
    assert np.abs(np.median(density[:, -50:][truth[:, -50:] == 0], axis=0)).max() < 0.01


@pytest.mark.parametrize("level", [0, 120, 255])
def test_an_empty_image_has_no_cells(level):
    cells, nuclei = outline_smear(np.full((80, 90, 3), level, np.uint8))
    assert not cells.any()
    assert not nuclei.any()


@pytest.mark.data
def test_whole_white_cells_agree_with_what_people_drew(data_dir):
    folder, found = data_dir / "wbc-tecom", []
    for file in sorted((folder / "images").glob("*.png"))[::5]:
        truth = tifffile.imread(folder / "masks" / f"{file.stem}.tif") > 0
        cells, _ = outline_smear(imread(file)[..., :3], 75)
        label = np.bincount(cells[truth], minlength=2)[1:].argmax() + 1
        found.append(iou(cells == label, truth))
    assert np.mean(found) > 0.9
    assert np.mean(np.array(found) > 0.8) > 0.85
