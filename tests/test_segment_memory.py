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
from daskcell.segmentation import blocks
from daskcell.segmentation.core.ownership import Thresholds, own_labels
from daskcell.segmentation.core.tiles import TILE
from daskcell.segmentation.image_params import ImageParams
from daskcell.segmentation.memory import PROCESS, needed_memory, refuse_too_little_memory, settings_halo
from daskcell.segmentation.methods import CellposeMethod, touches_rim


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
    (tmp_path / "encoder.npz").write_bytes(b"x" * 200)
    paths = {
        "segment": {"model": str(tmp_path / "network")},
        "features": {"encoder": str(tmp_path / "encoder.npz")},
    }
    config = parse_config(paths | {"compute": {"device": device}})
    assert networks_bytes(config) == (1200 if device == "cpu" else 0)
    other = parse_config({"segment": {"method": "watershed"}, "features": paths["features"]})
    assert networks_bytes(other) == 200


@pytest.mark.slow
def test_a_run_is_refused_before_any_work(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.uint8))
    config = {"compute": {"workers": 1, "memory": "1GiB", "block": 4096}}
    with pytest.raises(ComputeError, match=r"has 1.00 GiB of memory, .*compute.block to 1536 or less"):
        run(tmp_path / "a.tif", tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_a_block_that_looks_further_holds_one_part_at_a_time():
    shape, parts_before = (400, 400), []
    truth = np.zeros(shape, np.int32)
    truth[60:300, 60:300] = 1  # far beyond the first halo

    def segment_box(box):
        assert all(array() is None for array in parts_before)
        labels = truth[box.slices].copy()
        unsafe = touches_rim(labels, box, shape)
        parts_before.extend(map(weakref.ref, (labels, unsafe)))
        return labels, unsafe, None

    found, doublings = own_labels(Box(0, 0, 100, 100), 32, shape, segment_box, Thresholds(flow=0.0))
    assert doublings > 1
    assert found.owned.sum() == 1


def memory(name: str) -> int:
    """Bytes of this process: ``VmRSS``, or ``VmHWM``, the most since `label_blocks` forgot the last peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if name in line)
    return 1024 * int(line.split()[1])


def label_block(diameter: float, block: int) -> None:
    """Label a real block that is full of cells, from outputs made when they are asked for, as from disk."""
    method = CellposeMethod(None, diameter=diameter, steps=int(diameter))  # as far as a cell is wide
    first = method.halo + 16
    side = block + 2 * first
    shape = (side, side)
    params = ImageParams(shape, ((0.0, 255.0),), diameter)

    class Everywhere(dict):
        def __contains__(self, tile):
            return True

        def __getitem__(self, tile):
            out = np.full((3, TILE, TILE), 5.0, np.float32)
            box = params.tiles.box(tile)
            scale = params.tiles.scaled[0] / side
            for axis, start in enumerate((box.y0, box.x0)):
                at = np.arange(start, start + TILE) / scale
                centre = (at // diameter + 0.5) * diameter
                flow = 5 * np.clip((centre - at) / 3, -1, 1)
                out[axis] = flow[:, None] if axis == 0 else flow[None]
            return out

    def read(box):
        raise AssertionError("no tile is missing")

    core = Box(first, first, first + block, first + block)
    labelled = blocks.label_block(method, params, read, core, method.halo, shape, Everywhere())
    assert labelled.found.owned.sum() > (block / diameter) ** 2 / 8


def label_blocks(diameter: float, block: int) -> int:
    """Bytes that this process grows by, at most, while it labels a block."""
    label_block(10.0, 32)  # loads and compiles
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    label_block(diameter, block)
    return memory("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize(("diameter", "block"), [(30.0, 512), (80.0, 384), (150.0, 256)])
def test_what_a_worker_should_have_is_enough_for_a_block_and_not_twice_as_much(diameter, block):
    """By the peak of a process of its own, as the halo takes more than the block where cells are large."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(label_blocks, diameter, block).result()
    halo = settings_halo(parse_config({"segment": {"diameter": diameter}}).segment)
    needed = needed_memory(block, halo=halo) - PROCESS
    assert peak <= needed <= 2 * peak


@pytest.mark.parametrize(("diameter", "halo"), [(None, 96), (20, 96), ("auto", 122), (100, 332), (150, 482)])
def test_the_halo_is_that_of_the_method(diameter, halo):
    config = parse_config({"segment": {"diameter": diameter}, "compute": {"kind": "local"}})
    assert settings_halo(config.segment) == halo
    needed = needed_memory(2048, networks_bytes(config), halo)
    refuse_small_workers(SimpleNamespace(memory=needed), config)
    with pytest.raises(ComputeError, match="Please"):
        refuse_small_workers(SimpleNamespace(memory=needed - 1), config)
