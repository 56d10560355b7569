"""A block that does not fit a worker is refused with one that does."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile

from daskcell import run
from daskcell.config import parse_config
from daskcell.errors import ComputeError
from daskcell.geometry import Box
from daskcell.pipeline.worker_pool import networks_bytes, refuse_small_workers
from daskcell.segmentation.core.ownership import Thresholds, own_labels
from daskcell.segmentation.memory import needed_memory, refuse_too_little_memory
from daskcell.segmentation.methods import touches_rim


@pytest.mark.parametrize("block", [512, 2048, 4096, 8192])
def test_the_block_that_is_named_fits_and_the_next_does_not(block):
    refuse_too_little_memory(None, block)
    refuse_too_little_memory(needed_memory(block), block)
    with pytest.raises(ComputeError, match=f"blocks of {block} pixels need") as refusal:
        refuse_too_little_memory(needed_memory(block) - 1, block)
    named = int(re.search(r"compute.block to (\d+)", str(refusal.value))[1])
    assert named < block
    refuse_too_little_memory(needed_memory(block) - 1, named)
    assert needed_memory(named + 256) > needed_memory(block) - 1


def test_memory_that_fits_no_block_asks_for_more():
    with pytest.raises(ComputeError, match=r"Please raise compute.memory to 1.08 GiB"):
        refuse_too_little_memory(300 * 2**20, 2048)


@pytest.mark.parametrize(
    ("kind", "given", "setting"),
    [
        ("local", False, "compute.memory"),
        ("slurm", False, "compute.jobs.memory"),
        ("tcp://host:8786", False, "the memory limit of your Dask workers"),
        ("local", True, "the memory limit of your Dask workers"),
    ],
)
def test_the_setting_that_says_how_much_memory_there_is_is_named(kind, given, setting):
    config = parse_config({"compute": {"kind": kind, "jobs": {"cores": 1, "memory": "1GB"}}})
    with pytest.raises(ComputeError, match=rf"raise {setting} to 1.\d+ GiB or more") as refusal:
        refuse_small_workers(SimpleNamespace(memory=2**20), config, given=given)
    assert ("fewer workers" in str(refusal.value)) == (setting == "compute.memory")


def test_networks_count_as_much_as_blocks():
    """Cellpose-SAM's file has 1234 MB, and a worker of 2.4 GB was measured with it."""
    weights = 1_234_000_000
    assert 2.4e9 < needed_memory(512, weights) < 3.2e9
    refuse_too_little_memory(4 * 2**30, 1024, weights)
    with pytest.raises(ComputeError, match=r"1024 pixels and the networks need .* Please raise"):
        refuse_too_little_memory(2 * 2**30, 1024, weights)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_networks_count_where_every_worker_loads_them(device, tmp_path):
    (tmp_path / "network").write_bytes(b"x" * 1000)
    (tmp_path / "encoder.pt").write_bytes(b"x" * 200)
    paths = {
        "segment": {"model": str(tmp_path / "network")},
        "features": {"encoder": str(tmp_path / "encoder.pt")},
    }
    config = parse_config(paths | {"compute": {"device": device}})
    assert networks_bytes(config) == (1200 if device == "cpu" else 0)
    other = parse_config({"segment": {"method": "watershed"}, "features": paths["features"]})
    assert networks_bytes(other) == 200


def test_a_run_is_refused_before_any_work(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.uint8))
    config = {"compute": {"workers": 1, "memory": "1GiB", "block": 4096}}
    with pytest.raises(ComputeError, match=r"has 1.00 GiB of memory, .*compute.block to 1536 or less"):
        run(tmp_path / "a.tif", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_a_block_that_looks_further_holds_one_part_at_a_time():
    shape, held_before = (400, 400), []
    truth = np.zeros(shape, np.int32)
    truth[60:300, 60:300] = 1  # far beyond the first halo

    def look(held):
        assert all(array() is None for array in held_before)
        labels = truth[held.slices].copy()
        unsafe = touches_rim(labels, held, shape)
        held_before.extend(map(weakref.ref, (labels, unsafe)))
        return labels, unsafe, None

    found, doublings = own_labels(Box(0, 0, 100, 100), 32, shape, look, Thresholds(flow=0.0))
    assert doublings > 1
    assert found.owned.sum() == 1


def peak_memory() -> int:
    """Of this process (that of `getrusage` begins with its parent's)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return 1024 * int(line.split()[1])


def label_a_block(diameter: float, block: int) -> float:
    """Bytes that this process has grown by, at most, while it labels a real block that is full of cells."""
    from daskcell.segmentation.core.tiles import TILE
    from daskcell.segmentation.image_params import ImageParams
    from daskcell.segmentation.methods import CellposeMethod

    side = 3 * block
    shape = (side, side)
    method = CellposeMethod(None, diameter=diameter)
    frozen = ImageParams(shape, ((0.0, 255.0),), diameter)

    class Everywhere(dict):
        """Network outputs of tiles full of cells, made when they are asked for, as from disk."""

        def __contains__(self, tile):
            return True

        def __getitem__(self, tile):
            out = np.full((3, TILE, TILE), 5.0, np.float32)
            box = frozen.tiles.box(tile)
            scale = frozen.tiles.scaled[0] / side
            for axis, start in enumerate((box.y0, box.x0)):
                at = np.arange(start, start + TILE) / scale
                centre = (at // diameter + 0.5) * diameter
                flow = 5 * np.clip((centre - at) / 3, -1, 1)
                out[axis] = flow[:, None] if axis == 0 else flow[None]
            return out

    core = Box(block, block, 2 * block, 2 * block)
    before = peak_memory()
    look = method.look(frozen, lambda box: np.zeros((1, *box.shape), np.uint8), Everywhere())
    found, _ = own_labels(core, method.halo, shape, look, method.thresholds)
    assert found.owned.sum() > (block / diameter) ** 2 / 8
    return peak_memory() - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process")
def test_what_a_worker_should_have_is_enough_for_a_block_of_large_cells():
    """By the peak of a process of its own; with a halo for small cells it was too little."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from daskcell.segmentation.memory import PROCESS, settings_halo

    diameter, block = 150.0, 256
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(label_a_block, diameter, block).result()
    halo = settings_halo(parse_config({"segment": {"diameter": diameter}}).segment)
    libraries = 32 * 2**20  # that load on their first use; the room for these is in PROCESS
    assert needed_memory(block, halo=100) - PROCESS < peak - libraries
    assert peak - libraries < needed_memory(block, halo=halo) - PROCESS


@pytest.mark.parametrize(("diameter", "halo"), [(None, 96), (20, 96), ("auto", 122), (100, 332), (150, 482)])
def test_the_halo_is_that_of_the_method(diameter, halo):
    from daskcell.segmentation.memory import settings_halo

    config = parse_config({"segment": {"diameter": diameter}, "compute": {"kind": "local"}})
    assert settings_halo(config.segment) == halo
    needed = needed_memory(2048, networks_bytes(config), halo)
    refuse_small_workers(SimpleNamespace(memory=needed), config)
    with pytest.raises(ComputeError, match="Please"):
        refuse_small_workers(SimpleNamespace(memory=needed - 1), config)
