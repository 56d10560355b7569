"""Maps pooled over cells equal a plain loop over the whole image, for any blocks."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskcell.errors import InputError
from daskcell.features import embed, feature_maps
from daskcell.features.cell_index import block_records
from daskcell.features.feature_maps import WIDTH, as_feature_maps
from daskcell.features.tiles import MARGIN, NetworkTiling
from daskcell.geometry import Box, Grid


def small_network():
    import torch

    class Small(torch.nn.Module):
        """Two stages, at a half and a quarter of the image's sides."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)
            self.second = torch.nn.Conv2d(6, 80, 3, stride=2, padding=1)

        def stages(self, x):
            first = torch.relu(self.first(x))
            return [first, torch.relu(self.second(first))]

    return Small()


def field(shape=(760, 900), count=120, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Round cells that touch, and a long one over several tiles; label 9 is missing."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint32)
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    for i in range(count):
        y, x, r = rng.integers(0, shape[0]), rng.integers(0, shape[1]), rng.uniform(4, 18)
        labels[(yy - y) ** 2 + (xx - x) ** 2 < r * r] = i + 1
    labels[shape[0] // 2 : shape[0] // 2 + 9, 20 : shape[1] - 20] = count + 1
    labels[labels == 9] = 0
    image = rng.random((3, *shape), dtype=np.float32) * 0.3 + 0.5 * (labels > 0)
    return image.astype(np.float32), labels


def plain(image: np.ndarray, labels: np.ndarray, network, mask: bool = True) -> np.ndarray:
    """Scale 1, one cell and one pixel after another; the tiles of the global grid laid by hand."""
    import torch

    height, width = labels.shape
    frame = [min(512, -(-(side + 2 * MARGIN) // 32) * 32) for side in labels.shape]
    core = [side - 2 * MARGIN for side in frame]
    ground = np.array([np.median(channel[labels == 0]) for channel in image], np.float32)
    padded = np.empty((3, height + 1200, width + 1200), np.float32)
    padded[:] = ground[:, None, None]
    seen = np.where((labels == 0) & mask, ground[:, None, None], image)
    padded[:, 600 : 600 + height, 600 : 600 + width] = seen
    maps: dict = {}

    def maps_at(i, j):
        if (i, j) not in maps:
            y, x = 600 + i * core[0] - MARGIN, 600 + j * core[1] - MARGIN
            tile = torch.from_numpy(padded[None, :, y : y + frame[0], x : x + frame[1]].copy())
            with torch.no_grad():
                first, second = network.stages(tile)
            folded = np.zeros((WIDTH, *second.shape[2:]))
            signs = feature_maps._signs(80)[:, :, 0, 0]
            for c in range(80):
                folded[c % WIDTH] += signs[c % WIDTH, c] * second[0, c].numpy()
            maps[i, j] = [first[0].numpy(), folded]
        return maps[i, j]

    rows = []
    for record in block_records(labels):
        ys, xs = np.nonzero(labels == record["label"])
        middle = (record["y0"] + record["y1"]) / 2, (record["x0"] + record["x1"]) / 2
        home = [int(m // c) for m, c in zip(middle, core, strict=True)]
        home = [min(h, -(-s // c) - 1) for h, s, c in zip(home, labels.shape, core, strict=True)]
        low = [h * c - MARGIN + 16 for h, c in zip(home, core, strict=True)]
        high = [h * c + c + MARGIN - 16 for h, c in zip(home, core, strict=True)]
        alone = record["y0"] >= low[0] and record["x0"] >= low[1]
        alone = alone and record["y1"] <= high[0] and record["x1"] <= high[1]
        differs = np.abs(image[:, ys, xs] - ground[:, None]).sum(axis=0, dtype=np.float64)
        inner = differs > differs.mean() + 0.3 * differs.std()
        vector = []
        for stage, stride in ((0, 2), (1, 4)):
            values = []
            for y, x in zip(ys, xs, strict=True):
                i, j = home if alone else (y // core[0], x // core[1])
                a = (y - (i * core[0] - MARGIN)) // stride
                b = (x - (j * core[1] - MARGIN)) // stride
                values.append(maps_at(i, j)[stage][:, a, b])
            values = np.array(values, np.float64)
            regions = [values, values[inner], values[~inner]]
            regions = [part if len(part) else values for part in regions]
            vector += [part.mean(axis=0) for part in regions] + [part.std(axis=0) for part in regions]
        rows.append(np.concatenate(vector))
    return np.array(rows)


@pytest.fixture(scope="module")
def pooled():
    image, labels = field()
    return image, labels, embed(image, labels, small_network(), pooling="mask", scale=1)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [True, False])
def test_equals_a_loop_over_the_whole_image(mask):
    image, labels = field()
    got = embed(image, labels, small_network(), pooling="mask", scale=1, mask=mask)
    expected = plain(image, labels, small_network(), mask)
    there = np.unique(labels)[1:] - 1
    assert got.shape == (121, 6 * (6 + WIDTH))
    np.testing.assert_allclose(got[there], expected, atol=2e-4)
    assert np.isnan(got[8]).all()


@pytest.mark.slow
@given(rows=st.integers(90, 760), columns=st.integers(90, 900), scale=st.sampled_from([1, 0.6, 1.3]))
@settings(max_examples=6, deadline=None)
def test_no_bit_depends_on_the_chunks(rows, columns, scale):
    image, labels = field((600, 700), 60)
    expected = embed(image, labels, small_network(), pooling="mask", scale=scale)
    cut = embed(
        da.from_array(image, chunks=(3, columns, rows)),
        da.from_array(labels, chunks=(rows, columns)),
        small_network(),
        pooling="mask",
        scale=scale,
    )
    np.testing.assert_array_equal(cut, expected)


def test_tiles_laid_from_each_block_would_show(pooled):
    """Control: the same network, its tiles laid over two halves by themselves."""
    image, labels, whole = pooled
    half = labels[:, 450:]
    inside = np.setdiff1d(np.unique(half), np.unique(labels[:, :450]))
    inside = inside[inside > 0] - 1
    part = embed(image[:, :, 450:], half, small_network(), pooling="mask", scale=1)
    assert np.abs(part[inside] - whole[inside]).max() > 1e-3


def test_every_cell_is_planned_once_and_read_whole():
    _, labels = field()
    records = block_records(labels)
    for scale in (0.4, 1.0, 2.3):
        tiling = NetworkTiling(labels.shape, scale)
        for block in (100, 400, 2000):
            plans = tiling.plan(records, block)
            reads = [read for some in plans.values() for read in some]
            ids = np.concatenate([read.records["label"] for read in reads])
            assert sorted(ids) == sorted(records["label"])
            for read in reads:
                for record, tiles in zip(read.records, tiling.tiles_of(read.records), strict=True):
                    boxes = [Box(*(int(record[name]) for name in ("y0", "x0", "y1", "x1")))]
                    for box in boxes + [tiling.source(tile) for tile in tiles]:
                        assert (box & read.box) == box


@given(st.floats(0.2, 3), st.integers(1, 1500), st.integers(1, 1500))
@settings(max_examples=40, deadline=None)
def test_cores_cover_the_image(scale, height, width):
    tiling = NetworkTiling((height, width), scale)
    assert all(side % 32 == 0 for side in tiling.frame)
    for y, x in ((0, 0), (height - 1, width - 1), (height // 2, width // 3)):
        i, j = tiling.at(y, x)
        origin = tiling.origin((i, j))
        for p, start, side in zip((y, x), origin, tiling.frame, strict=True):
            position = (p + 0.5) * scale - start
            assert MARGIN - 1e-6 <= position <= side - MARGIN + 1e-6


@pytest.mark.parametrize("scale", [0.37, 0.5, 1.0, 1.7])
def test_a_tile_is_the_image_resized(scale):
    """As torch resizes the whole image, away from its border; background beyond it."""
    import torch

    rng = np.random.default_rng(0)
    image = rng.random((2, 700, 640)).astype(np.float32)
    tiling = NetworkTiling((700, 640), scale)
    tile = (0, tiling.counts[1] - 1)
    background = np.array([7.0, 8.0], np.float32)
    got = tiling.resample(image[(slice(None), *tiling.source(tile).slices)], tile, background)
    assert got.shape == (2, *tiling.frame)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(image)[None],
        scale_factor=scale,
        mode="bilinear",
        antialias=True,
        recompute_scale_factor=False,
    )[0].numpy()
    y0, x0 = tiling.origin(tile)
    inner = Box(4, 4, resized.shape[1] - 4, resized.shape[2] - 4)
    frame = Box(y0, x0, y0 + tiling.frame[0], x0 + tiling.frame[1])
    both = inner & frame
    assert both.shape[0] > 100
    np.testing.assert_allclose(
        got[(slice(None), *both.within(frame))], resized[(slice(None), *both.slices)], atol=1e-4
    )
    beyond = got[:, :, int(np.ceil(640 * scale)) - x0 + 2 :]
    assert beyond.size
    assert (beyond == background[:, None, None]).all()


def test_automatic_scale_shows_the_median_cell_at_the_networks_size():
    from daskcell.features.pooling import natural_scale

    labels = np.zeros((400, 400), np.uint32)
    for i in range(9):
        labels[i * 40 : i * 40 + 20, 10:30] = i + 1
    assert natural_scale(block_records(labels), 32) == pytest.approx(32 / np.sqrt(400 * 4 / np.pi))
    image = np.random.default_rng(0).random((3, 400, 400)).astype(np.float32)
    auto = embed(image, labels, small_network(), pooling="mask", scale="auto")
    told = embed(image, labels, small_network(), pooling="mask", scale=48 / np.sqrt(400 * 4 / np.pi))
    np.testing.assert_array_equal(auto, told)


def test_resnets_show_the_stages_of_torchvision():
    import torch
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    image = np.random.default_rng(0).random((3, 64, 96)).astype(np.float32)
    from torchvision.models.feature_extraction import create_feature_extractor

    with torch.inference_mode():
        nodes = {"relu": "0", "layer1": "1", "layer2": "2", "layer3": "3", "layer4": "4"}
        extractor = create_feature_extractor(model, nodes)
        expected = extractor(torch.from_numpy(image)[None])
    maps = as_feature_maps(model)([image], np.zeros(3, np.float32))[0]
    assert [stage.shape for stage in maps] == [
        (32, 48, 64),
        (16, 24, 64),
        (8, 12, 64),
        (4, 6, 64),
        (2, 3, 64),
    ]
    np.testing.assert_allclose(maps[0], expected["0"][0].permute(1, 2, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps[1], expected["1"][0].permute(1, 2, 0), rtol=1e-4, atol=1e-4)


def test_folding_keeps_distances():
    import torch

    rng = np.random.default_rng(0)
    maps = torch.from_numpy(rng.normal(size=(1, 2048, 1, 60)).astype(np.float32))
    folded = feature_maps._fold(maps)
    assert folded.shape == (1, WIDTH, 1, 60)
    before, after = (torch.cdist(m[0, :, 0].T, m[0, :, 0].T) for m in (maps, folded))
    ratio = (after / before)[~torch.eye(60, dtype=bool)]
    assert 0.9 < ratio.mean() < 1.1
    assert ratio.std() < 0.15


def test_what_has_no_feature_maps_is_refused():
    import torch

    image, labels = field((80, 80), 3)
    with pytest.raises(InputError, match="accessible feature maps"):
        embed(image, labels, lambda batch: batch[:, 0, 0], pooling="mask")
    with pytest.raises(InputError, match="accessible feature maps"):
        embed(image, labels, torch.nn.Flatten(), pooling="mask")
    with pytest.raises(InputError, match="layer and size are for pooling='crop'"):
        embed(image, labels, "tiny", pooling="mask", size=64)


def test_no_cell_gives_no_row():
    image = np.ones((1, 50, 60))
    assert embed(image, np.zeros((50, 60), int), "tiny", pooling="mask").shape[0] == 0


def test_a_cell_without_contrast_gives_finite_numbers():
    labels = np.zeros((60, 60), np.uint32)
    labels[20:30, 20:30], labels[40, 40] = 1, 2
    vectors = embed((labels > 0)[None] * 0.5, labels, "tiny", pooling="mask", scale=1)
    assert np.isfinite(vectors).all()


def test_the_grid_of_an_uneven_chunking_plans_too():
    labels = da.from_array(field((300, 310), 20)[1], chunks=((13, 287), (300, 10)))
    assert Grid.from_chunks(labels.chunks).shape == (300, 310)
    image, plain_labels = field((300, 310), 20)
    np.testing.assert_array_equal(
        embed(da.from_array(image), labels, "tiny", pooling="mask"),
        embed(image, plain_labels, "tiny", pooling="mask"),
    )
