"""Memory shared with the process that opens files is reused, but never while an array refers to it."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import tifffile

from daskcell import images
from daskcell.geometry import Box
from daskcell.images import shared_buffers
from daskcell.images.reader_process import open_safely

pytestmark = pytest.mark.skipif(not shared_buffers.is_available(), reason="needs memfd_create")


@pytest.mark.slow
def test_a_buffer_is_used_again_when_the_last_view_is_gone() -> None:
    pool = shared_buffers.BufferPool()
    buffer = pool.acquire(600)
    array = pool.array(buffer, (2, 10, 15), np.dtype(np.uint16))
    views = [array[1], array[:, 2:].T, array.reshape(-1), array.view(np.uint8)]
    del array
    while views:
        assert pool.acquire(600) is not buffer
        views.pop()
        gc.collect()
    assert pool.acquire(500) is buffer
    assert pool.acquire(500) is not buffer


@pytest.mark.slow
def test_larger_buffers_are_made_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_buffers, "KEPT_BYTES", 5000)
    pool = shared_buffers.BufferPool()
    for size, memory in ((1000, 1000), (4000, 4000), (3000, 4000), (6000, 6000), (10, 10)):
        buffer = pool.acquire(size)
        assert len(buffer.memory) == memory
        pool.array(buffer, (size,), np.dtype(np.uint8))
        gc.collect()


def test_pixels_read_before_stay_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 250, (300, 400), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 64))
    reader = open_safely(images.find_images(tmp_path / "a.tif")[0])
    boxes = [Box(y, x, y + 100, x + 80) for y in range(0, 300, 50) for x in range(0, 300, 50) if y <= 200]
    kept = [reader.read(0, box)[:, 5:, 3:] for box in boxes]
    kept[1::2] = [None] * len(kept[1::2])
    again = [reader.read(0, box) for box in boxes]
    for box, first, second in zip(boxes, kept, again, strict=True):
        np.testing.assert_array_equal(second[0], pixels[box.slices])
        if first is not None:
            np.testing.assert_array_equal(first[0], pixels[box.slices][5:, 3:])
