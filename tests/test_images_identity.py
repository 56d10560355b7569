"""A result is made again when any file that it was read from has changed, wherever that lies."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr

from daskcell.images import find_images, open_image
from daskcell.images.readers.openslide import files_of_slide
from daskcell.images.store import image_info
from daskcell.study import keys

SETTINGS: dict[str, Any] = {
    "segment": {"method": "watershed"},
    "cluster": {"k": 2},
    "compute": {"kind": "inline"},
}
SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def multi_file(folder: Path, values: tuple[int, ...], suffix: str = ".ome.tif") -> list[Path]:
    """An image in OME-TIFF with a file for each channel, all of one value; in each a bright square."""
    uuids = [f"urn:uuid:00000000-0000-0000-0000-00000000000{c}" for c in range(len(values))]
    planes = "".join(
        f'<TiffData FirstC="{c}" PlaneCount="1"><UUID FileName="c{c}{suffix}">{uuid}</UUID></TiffData>'
        for c, uuid in enumerate(uuids)
    )
    channels = "".join(f'<Channel ID="Channel:0:{c}" Name="n{c}"/>' for c in range(len(values)))
    files = []
    for c, (uuid, value) in enumerate(zip(uuids, values, strict=True)):
        xml = (
            f'<OME xmlns="{SCHEMA}" UUID="{uuid}"><Image ID="Image:0"><Pixels ID="Pixels:0" '
            f'DimensionOrder="XYCZT" Type="uint8" SizeX="60" SizeY="50" SizeC="{len(values)}" SizeZ="1" '
            f'SizeT="1">{channels}{planes}</Pixels></Image></OME>'
        )
        pixels = np.full((50, 60), value, np.uint8)
        pixels[10:30, 10:30] = 200
        files.append(folder / f"c{c}{suffix}")
        tifffile.imwrite(files[-1], pixels, description=xml, metadata=None)
    return files


@pytest.mark.parametrize(
    ("named", "suffix"),
    [("file", ".ome.tif"), ("folder", ".ome.tif"), ("manifest", ".ome.tif"), ("file", ".tif")],
)
def test_a_change_of_a_second_file_is_noticed(tmp_path: Path, named: str, suffix: str) -> None:
    first, second, third = multi_file(tmp_path, (1, 2, 3), suffix)
    (tmp_path / "list.csv").write_text(f"path\n{first.name}\n")
    inputs = {"file": first, "folder": tmp_path, "manifest": tmp_path / "list.csv"}[named]
    source = find_images(inputs)[0]
    assert source.files == (str(first),)
    assert set(source.all_files) == {str(first), str(second), str(third)}
    before, known = source.identity(), keys.identify(source.all_files)
    assert source.identity() == before
    multi_file(tmp_path, (1, 2, 9), suffix)
    os.utime(first, ns=(known[0]["mtime_ns"],) * 2)
    os.utime(second, ns=(known[1]["mtime_ns"],) * 2)
    assert source.identity() != before
    assert keys.identity(keys.identify(source.all_files, known)) != keys.identity(known)
    assert open_image(source).data[2].compute().min() == 9


@pytest.mark.slow
def test_a_study_works_again_on_an_image_whose_second_file_changed(tmp_path: Path) -> None:
    from daskcell.pipeline import run

    (tmp_path / "in").mkdir()
    multi_file(tmp_path / "in", (1, 2))
    study = run(tmp_path / "in", tmp_path / "study", SETTINGS)
    converted = study.out / "images" / "c0.zarr"
    assert open_image(converted).data[1].compute().min() == 2
    multi_file(tmp_path / "in", (1, 7))
    study = run(tmp_path / "in", tmp_path / "study", SETTINGS)
    assert study.slides == ["c0"]
    assert open_image(converted).data[1].compute().min() == 7


def test_the_files_of_slides_in_several_pieces(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "b.jpg", "map.jpg", "c.jpg"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b.vms").write_text("[Virtual Microscope Specimen]\nImageFile=b.jpg\nMapFile=map.jpg\n")
    (tmp_path / "d.svs").write_text("x")

    def names(file: str) -> list[str]:
        return [os.path.relpath(path, tmp_path) for path in files_of_slide(str(tmp_path / file))]

    assert names("a.mrxs") == ["a.mrxs", "a/Data0000.dat", "a/Slidedat.ini"]
    assert names("b.vms") == ["b.jpg", "b.vms", "map.jpg"]
    assert names("d.svs") == ["d.svs"]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that serves the files of `tmp_path`, and lists no folder."""
    pytest.importorskip("aiohttp")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def list_directory(self, path: Any) -> None:
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def later(file: Path) -> None:
    """Let a file look as if it had been written another second: web servers count whole ones."""
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 3 * 10**9))


def test_a_change_of_a_file_on_a_web_server_is_noticed(tmp_path: Path, web: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.full((20, 30), 1, np.uint8))
    (source,) = find_images(f"{web}/a.tif")
    before, known = source.identity(), keys.identify(source.all_files)
    assert source.identity() == before
    assert keys.unchanged(source.all_files, known)
    tifffile.imwrite(tmp_path / "a.tif", np.full((20, 30), 2, np.uint8))
    later(tmp_path / "a.tif")
    assert source.identity() != before
    assert not keys.unchanged(source.all_files, known)


@pytest.mark.slow
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_change_of_a_chunk_on_a_web_server_is_noticed(
    tmp_path: Path, web: str, zarr_format: int, sharded: bool
) -> None:
    if sharded and zarr_format == 2:
        pytest.skip("Zarr 2 has no shards")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=zarr_format)
    array = group.create_array(
        "0", shape=(2, 40, 40), chunks=(1, 20, 20), shards=(2, 40, 20) if sharded else None, dtype="u1"
    )
    array[:, :, 20:] = 1  # the other chunks are not there
    axes = [{"name": name, "type": "channel" if name == "c" else "space"} for name in "cyx"]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    ome = {"multiscales": [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]}
    if zarr_format == 3:
        group.attrs.put({"ome": {"version": "0.5", **ome}})
    else:
        ome["multiscales"][0]["version"] = "0.4"
        group.attrs.put(ome)
    assert image_info(tmp_path / "a.zarr").shape == (2, 40, 40)
    (source,) = find_images(f"{web}/a.zarr")
    known = keys.identify(source.all_files)
    assert keys.unchanged(source.all_files, known)
    chunk = max(path for path in (tmp_path / "a.zarr" / "0").rglob("[0-9]*") if path.is_file())
    later(chunk)
    assert not keys.unchanged(source.all_files, known)
    known = keys.identify(source.all_files)
    array[0, 0, 0] = 3  # a chunk that was not there
    assert not keys.unchanged(source.all_files, known)
