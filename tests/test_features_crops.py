"""Crops hold the cell whole, on a ground of background, the same wherever the blocks are cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskcell.errors import InputError
from daskcell.features.cell_index import block_records, merge_records, plan_reads
from daskcell.features.crops import (
    Framing,
    background_sample,
    crop_batches,
    cut_cells,
    fit_framing,
    resize,
    resize_together,
    sample_boxes,
    three_channels,
)
from daskcell.features.encoders import Encoder
from daskcell.geometry import Box, Grid


def framing(channels: int = 1, **changes) -> Framing:
    defaults = {
        "size": 16,
        "low": (0.0,) * channels,
        "high": (1.0,) * channels,
        "background": (0.25,) * channels,
        "margin": 0.0,
    }
    return Framing(**(defaults | changes))


def crops_of(image: np.ndarray, labels: np.ndarray, frame: Framing) -> np.ndarray:
    whole = Box(0, 0, *labels.shape)
    return np.concatenate(list(crop_batches(image, labels, whole, block_records(labels), frame)))


def two_cells() -> tuple[np.ndarray, np.ndarray]:
    labels = np.zeros((40, 40), np.uint32)
    labels[10:26, 10:26] = 1
    labels[24:26, 24:26] = 2
    image = np.random.default_rng(0).random((1, 40, 40)).astype(np.float32)
    return image, labels


def test_a_masked_crop_is_the_cell_on_background():
    image, labels = two_cells()
    crop = crops_of(image, labels, framing())[0]
    expected = np.where(labels == 1, image[0], np.float32(0.25))[10:26, 10:26]
    assert crop.dtype == np.float32
    np.testing.assert_array_equal(crop, [expected] * 3)


def test_an_unmasked_crop_keeps_the_neighbours():
    image, labels = two_cells()
    crop = crops_of(image, labels, framing(mask=False))[0]
    np.testing.assert_array_equal(crop[0], image[0, 10:26, 10:26])


def test_a_crop_beyond_the_image_is_filled_with_background():
    labels = np.zeros((20, 20), np.uint32)
    labels[0:4, 0:4] = 1
    crop = crops_of(np.ones((1, 20, 20)), labels, framing(mask=False, window=16))[0, 0]
    expected = np.full((16, 16), 0.25, np.float32)
    expected[6:, 6:] = 1
    np.testing.assert_array_equal(crop, expected)


def test_a_window_keeps_cells_at_one_scale():
    labels = np.zeros((60, 60), np.uint32)
    labels[10:20, 10:20], labels[40:45, 40:45] = 1, 2
    crops = crops_of(np.ones((1, 60, 60)), labels, framing(window=32, background=(0.0,)))
    areas = crops[:, 0].sum(axis=(1, 2)) * 4
    assert areas == pytest.approx([100, 25], rel=0.05)


@given(st.integers(12, 80), st.integers(12, 80), st.floats(0, 0.5), st.booleans())
@settings(max_examples=20, deadline=None)
def test_no_bit_depends_on_the_blocks(rows, columns, margin, mask):
    rng = np.random.default_rng(3)
    labels = np.kron(rng.permutation(25).reshape(5, 5), np.ones((13, 17), int)).astype(np.uint32)
    image = rng.integers(0, 60000, (2, *labels.shape)).astype(np.uint16)
    frame = framing(2, high=(60000.0, 50000.0), margin=margin, mask=mask)
    expected = crops_of(image, labels, frame)
    grid = Grid.from_chunks(
        tuple(
            tuple(min(size, side - i) for i in range(0, side, size))
            for side, size in zip(labels.shape, (rows, columns), strict=True)
        )
    )
    cores = [grid.core(index) for index in grid]
    records = merge_records([block_records(labels[core.slices], (core.y0, core.x0)) for core in cores])
    got = np.full_like(expected, np.nan)
    for reads in plan_reads(records, grid, margin).values():
        for read in reads:
            pixels = image[(slice(None), *read.box.slices)], labels[read.box.slices]
            crops = np.concatenate(list(crop_batches(*pixels, read.box, read.records, frame, batch=3)))
            got[read.records["label"] - 1] = crops
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("count", range(1, 8))
def test_any_number_of_channels_becomes_three_between_0_and_1(count):
    crop = np.random.default_rng(0).random((count, 4, 4)).astype(np.float32)
    out = three_channels(crop)
    assert out.shape == (3, 4, 4)
    assert out.min() >= 0
    assert out.max() <= 1
    np.testing.assert_allclose(three_channels(np.ones((count, 2, 2))).max(), 1)


def test_cyan_is_added_to_green_and_blue():
    crop = np.zeros((4, 1, 1), np.float32)
    crop[3] = 1
    assert three_channels(crop)[:, 0, 0].tolist() == [0, 0.5, 0.5]


def test_eight_channels_are_refused():
    with pytest.raises(InputError, match="at most 7"):
        three_channels(np.zeros((8, 2, 2), np.float32))


def test_shrinking_does_not_alias():
    stripes = np.tile(np.array([0, 1], np.float32), (1, 64, 32))
    assert resize(stripes, 8) == pytest.approx(0.5, abs=0.02)


def test_background_is_the_median_outside_all_cells():
    labels = np.zeros((10, 10), np.uint32)
    labels[:5] = 1
    image = np.full((2, 10, 10), 255, np.uint8)
    image[0, 5:] = 51
    frame = fit_framing([background_sample(image, labels, 1)], size=8)
    assert frame.background == (0.2, 1.0)
    assert (frame.low, frame.high) == ((0, 0), (255, 255))
    crowded = fit_framing([background_sample(image, np.ones_like(labels), 1)], size=8)
    assert crowded.background == (0, 0)


def test_deep_images_are_scaled_by_their_own_range_and_fractions_are_not():
    labels = np.zeros((2, 2), np.uint8)
    deep = background_sample(np.array([[[100, 200], [300, 1100]]], np.uint16), labels, 1)
    assert fit_framing([deep], size=8).high == (1100,)
    assert fit_framing([deep], size=8, limits=(0, 4095)).high == (4095,)
    fraction = background_sample(np.array([[[0.1, 0.2], [0.3, np.nan]]]), labels, 1)
    assert fit_framing([fraction], size=8).high == (1,)


def test_a_missing_pixel_becomes_background():
    image = np.full((1, 16, 16), 0.5, np.float32)
    image[0, 3, 4] = np.nan
    crop = crops_of(image, np.ones((16, 16), np.uint32), framing())[0, 0]
    assert crop[3, 4] == 0.25
    assert np.isfinite(crop).all()


def test_channels_that_are_not_there_are_refused():
    sample = background_sample(np.zeros((2, 4, 4)), np.zeros((4, 4), int), 1)
    with pytest.raises(InputError, match="channel 2"):
        fit_framing([sample], size=8, channels=[0, 2])


def test_samples_cover_a_small_image_and_bound_a_large_one():
    boxes, step = sample_boxes((300, 520))
    assert sum(box.shape[0] * box.shape[1] for box in boxes) == 300 * 520
    assert step == 1
    boxes, step = sample_boxes((100_000, 80_000))
    assert len(boxes) == 256
    assert sum(np.prod([-(-side // step) for side in box.shape]) for box in boxes) < 1.1 * 2**20
    assert boxes[-1].y1 == 100_000
    assert boxes[-1].x1 == 80_000


@pytest.mark.parametrize("size", [16, 64])
def test_crops_resized_together_equal_those_resized_one_by_one(size):
    """What a GPU does, here on the CPU: crops that grow, shrink and stay."""
    rng = np.random.default_rng(0)
    crops = [rng.random((3, side, side)).astype(np.float32) for side in (1, 5, 16, 23, 64, 150)]
    together = resize_together(crops, size, "cpu").numpy()
    assert together.shape == (6, 3, size, size)
    for got, crop in zip(together, crops, strict=True):
        np.testing.assert_allclose(got, resize(crop, size), atol=2e-5)


def test_crops_that_grow_are_those_of_roi_align_and_crops_that_shrink_are_smoother():
    import torch
    from torchvision.ops import roi_align

    image = torch.from_numpy(np.random.default_rng(0).random((1, 3, 90, 90)).astype(np.float32))
    for side, size, same in ((64, 64, True), (23, 64, True), (80, 16, False)):
        box = torch.tensor([[0.0, 5, 7, 5 + side, 7 + side]])
        cut = image[0, :, 7 : 7 + side, 5 : 5 + side].numpy()
        aligned = roi_align(image, box, size, sampling_ratio=1, aligned=True)[0].numpy()
        ours = resize_together([cut], size, "cpu")[0].numpy()
        inner = (slice(None), slice(2, -2), slice(2, -2))  # at its border roi_align sees the neighbours
        assert np.allclose(ours[inner], aligned[inner], atol=1e-3) is same


def test_an_encoder_on_a_device_sees_the_same_crops():
    image, labels = two_cells()
    frame = framing(size=24, margin=0.1)
    seen = []

    def see(batch):
        seen.append(np.asarray(batch))
        return np.zeros((len(batch), 1), np.float32)

    cells = list(cut_cells(image, labels, Box(0, 0, 40, 40), block_records(labels), frame))
    encoder = Encoder("test", see, size=24, batch_size=4, mean=(0.5,) * 3, std=(0.2,) * 3)
    list(encoder.stream(resize(cell, 24) for cell in cells))
    # torch's "meta" aside, every device but "cpu" goes this way: the name of a CPU with a number will do.
    list(dataclasses.replace(encoder, device="cpu:0").stream(cells))
    np.testing.assert_allclose(seen[1][:2], seen[0][:2], atol=1e-3)
