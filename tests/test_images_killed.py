"""A worker that is killed in the middle of a conversion: the same bytes, on disk and on object storage."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from s3server import Server

from daskcell import images
from daskcell.compute import Workers
from daskcell.storage import paths

pytestmark = pytest.mark.slow


def contents(path: str) -> dict[str, bytes]:
    if paths.is_remote(path):
        return {name: paths.read(f"{path}/{name}") for name in paths.versions_below(path)}
    return {str(f.relative_to(path)): f.read_bytes() for f in Path(path).rglob("*") if f.is_file()}


def begun(path: str) -> bool:
    """Whether a shard was written and the image is not finished."""
    if paths.is_remote(path):
        return paths.is_folder(f"{path}/0/c")
    folders = Path(path).parent.glob(".daskcell-*.partial")
    return any(f.is_file() for folder in folders for f in folder.rglob("0/c/**/*"))


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_killed_worker_changes_nothing(server: Server, bucket: str, tmp_path: Path, place: str) -> None:
    from distributed import Client, LocalCluster

    pixels = np.random.default_rng(0).integers(0, 255, (9000, 9000), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(256, 256), compression="zlib")
    (source,) = images.find_images(tmp_path / "a.tif")
    target = f"{bucket}/b.zarr" if place == "s3" else str(tmp_path / "b.zarr")
    killed: list[int] = []
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        victim = min(client.run(os.getpid).values())

        def kill() -> None:
            end = time.monotonic() + 60
            while not begun(target) and time.monotonic() < end:
                time.sleep(0.02)
            if begun(target):
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

        thread = threading.Thread(target=kill)
        thread.start()
        disturbed = images.convert_slide(source, target, Workers(client))
        thread.join()
        assert killed
        assert victim not in client.run(os.getpid).values()
    alone = images.convert_slide(source, tmp_path / "c.zarr")
    assert disturbed == alone
    found, expected = contents(target), contents(str(tmp_path / "c.zarr"))
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
