"""Object storage: pictures are read in parts and written an object a shard, against a real local server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tifffile
from s3server import Server

from daskcell import images
from daskcell.config import InputSettings
from daskcell.errors import ImageError, StudyError
from daskcell.geometry import Box
from daskcell.images import convert, find_images, open_image
from daskcell.images.readers import open_reader
from daskcell.storage import paths
from daskcell.study import keys

RNG = np.random.default_rng(0)


def put(folder: str, path: Path) -> str:
    fsspec.filesystem("s3").put_file(str(path), f"{folder}/{path.name}")
    return f"{folder}/{path.name}"


def tiff(path: Path, shape: tuple[int, ...] = (300, 400), **options: object) -> np.ndarray:
    pixels = RNG.integers(0, 4000, shape, np.uint16)
    tifffile.imwrite(path, pixels, photometric="minisblack", **options)
    return pixels.reshape(-1, *shape[-2:])


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["tiles", "strips", "raw", "planes"])
def test_a_tiff_is_read_whole_and_in_parts(server: Server, bucket: str, tmp_path: Path, stored: str) -> None:
    options = {
        "tiles": {"tile": (64, 64), "compression": "zlib"},
        "strips": {"rowsperstrip": 16, "compression": "lzw"},
        "raw": {},
        "planes": {"tile": (64, 64), "metadata": {"axes": "CYX"}},
    }[stored]
    pixels = tiff(tmp_path / "a.tif", (3, 300, 400) if stored == "planes" else (300, 400), **options)
    url = put(bucket, tmp_path / "a.tif")
    reader = open_reader(url)
    np.testing.assert_array_equal(reader.read(0, Box(0, 0, 300, 400)), pixels)
    np.testing.assert_array_equal(reader.read(0, Box(70, 90, 200, 130)), pixels[:, 70:200, 90:130])
    assert reader.files == (url,)
    reader.close()
    image = open_image(url)
    assert image.name == "a"
    np.testing.assert_array_equal(image.data[:, 100:120, 30:60].compute(), pixels[:, 100:120, 30:60])


def test_a_part_of_a_slide_is_a_few_requests_for_a_small_part_of_the_file(
    server: Server, bucket: str, tmp_path: Path
) -> None:
    pixels = tiff(tmp_path / "a.tif", (2048, 2048), tile=(128, 128))
    size = (tmp_path / "a.tif").stat().st_size
    url = put(bucket, tmp_path / "a.tif")
    with server.asked() as requests:
        reader = open_reader(url)
    assert len(requests) <= 6
    with server.asked() as requests:
        part = reader.read(0, Box(1000, 1000, 1200, 1200))
    np.testing.assert_array_equal(part[0], pixels[0, 1000:1200, 1000:1200])
    # Three rows of three tiles that lie side by side in the file.
    assert [method for method, *_ in requests] == ["GET"] * 3
    spans = [tuple(map(int, asked.removeprefix("bytes=").split("-"))) for *_, asked in requests]
    assert sum(end - start + 1 for start, end in spans) == 9 * 128 * 128 * 2 < size / 20
    reader.close()


@pytest.mark.slow
def test_ranges_come_back_in_the_order_asked(
    server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = RNG.bytes(200_000)
    fsspec.filesystem("s3").pipe_file(f"{bucket}/a", content)
    monkeypatch.setattr(paths, "RANGE_BYTES", 30_000)
    monkeypatch.setattr(paths, "GAP_BYTES", 500)
    for _ in range(20):
        ranges = [(int(RNG.integers(190_000)), int(RNG.integers(0, 9000))) for _ in range(RNG.integers(1, 9))]
        got = paths.read_ranges(f"{bucket}/a", ranges)
        assert got == [content[offset : offset + count] for offset, count in ranges]
    with server.asked() as requests:
        paths.read_ranges(f"{bucket}/a", [(0, 100), (150_000, 10), (300, 100), (150_300, 10)])
    assert len(requests) == 2


@pytest.mark.slow
def test_pictures_and_folders_and_patterns(server: Server, bucket: str, tmp_path: Path) -> None:
    for name in ("s_red.tif", "s_green.tif", "t.ome.tif"):
        tiff(tmp_path / name)
        put(f"{bucket}/deep/set", tmp_path / name)
    tifffile.imwrite(tmp_path / "u.tif", np.zeros((5, 5), np.uint8))
    put(f"{bucket}/deep", tmp_path / "u.tif")
    from PIL import Image

    Image.fromarray(np.eye(9, dtype=np.uint8)).save(tmp_path / "v.png")
    put(f"{bucket}/deep", tmp_path / "v.png")
    found = find_images(f"{bucket}/deep")
    assert sorted((s.name, s.file_channels) for s in found) == [
        ("set_s", ("red", "green")),
        ("set_t", None),
        ("u", None),
        ("v", None),
    ]
    (both,) = find_images(f"{bucket}/deep/set/s_*.tif")
    assert both.files == (f"{bucket}/deep/set/s_red.tif", f"{bucket}/deep/set/s_green.tif")
    (by_pattern,) = find_images(f"{bucket}/deep", InputSettings(pattern="{folder}/{field}_{channel}.tif"))
    assert (by_pattern.name, by_pattern.file_channels) == ("set_s", ("red", "green"))
    assert open_image(f"{bucket}/deep/v.png").data.sum().compute() == 9
    with pytest.raises(ImageError, match="no file or folder"):
        find_images(f"{bucket}/deep/w*.tif")


@pytest.mark.slow
def test_one_object_a_shard_and_metadata_last(server: Server, bucket: str, tmp_path: Path) -> None:
    pixels = tiff(tmp_path / "a.tif", (2, 1100, 1300), tile=(256, 256), metadata={"axes": "CYX"})
    with server.asked() as requests:
        image = convert(tmp_path / "a.tif", f"{bucket}/out/a.zarr")
    assert image.path == f"{bucket}/out/a.zarr"
    np.testing.assert_array_equal(image.data.compute(), pixels)
    written = [path for method, path, *_ in requests if method in ("PUT", "POST")]
    chunks = [path for path in written if "/c/" in path]
    local = convert(tmp_path / "a.tif", tmp_path / "b.zarr")
    assert len(chunks) == len(set(chunks)) == sum(p.is_file() for p in Path(local.path).rglob("c/**/*"))
    assert written[-2].endswith("/out/a.zarr/zarr.json")  # and then the word that it is unfinished is removed
    assert "delete" in [query for method, _, query, _ in requests if method == "POST"][-1]
    assert paths.children(f"{bucket}/out") == {"a.zarr"}
    for inside in Path(local.path).rglob("c/**/*"):
        if inside.is_file():
            there = paths.read(f"{bucket}/out/a.zarr/{inside.relative_to(local.path)}")
            assert there == inside.read_bytes()


@pytest.mark.slow
def test_back_from_object_storage(server: Server, bucket: str, tmp_path: Path) -> None:
    pixels = tiff(tmp_path / "a.tif", (600, 700))
    convert(put(bucket, tmp_path / "a.tif"), f"{bucket}/a.zarr")
    back = convert(f"{bucket}/a.zarr", tmp_path / "back.zarr")
    np.testing.assert_array_equal(back.data.compute(), pixels)
    assert images.image_info(f"{bucket}/a.zarr").shape == (1, 600, 700)
    with pytest.raises(ImageError, match="exists already"):
        convert(tmp_path / "a.tif", f"{bucket}/a.zarr")


@pytest.mark.slow
def test_a_conversion_that_was_killed_opens_nowhere_and_is_begun_again(
    server: Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from daskcell.images import conversion
    from daskcell.storage import staging

    pixels = tiff(tmp_path / "a.tif", (600, 700))

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(conversion.metadata, "write", killed)
        patch.setattr(staging.RemoteStaging, "rollback", lambda self: None)  # nobody cleans up after a kill
        with pytest.raises(Killed):
            convert(tmp_path / "a.tif", f"{bucket}/a.zarr")
    assert any("/c/" in key for key in paths.versions_below(f"{bucket}/a.zarr"))
    with pytest.raises(ImageError):
        open_image(f"{bucket}/a.zarr")
    np.testing.assert_array_equal(convert(tmp_path / "a.tif", f"{bucket}/a.zarr").data.compute(), pixels)


def test_what_is_not_ours_is_never_removed(server: Server, bucket: str, tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif")
    put(f"{bucket}/precious", tmp_path / "a.tif")
    with pytest.raises(ImageError, match="exists already"):
        convert(tmp_path / "a.tif", f"{bucket}/precious")
    assert paths.exists(f"{bucket}/precious/a.tif")


def test_identity_goes_by_size_and_etag(server: Server, bucket: str, tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", (30, 40))
    url = put(bucket, tmp_path / "a.tif")
    (source,) = find_images(url)
    identity, known = source.identity(), keys.identify([url])
    put(bucket, tmp_path / "a.tif")  # the same bytes at another time
    assert source.identity() == identity
    assert keys.unchanged([url], known)
    with server.asked() as requests:
        assert keys.identify([url]) == known
    assert {method for method, *_ in requests} <= {"HEAD", "GET"}
    assert not any(path.endswith("a.tif") and method == "GET" for method, path, *_ in requests)
    tiff(tmp_path / "a.tif", (30, 40))  # other bytes, the same size
    put(bucket, tmp_path / "a.tif")
    assert source.identity() != identity
    assert not keys.unchanged([url], known)


def test_errors_are_one_sentence(server: Server, bucket: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "cut.tif").write_bytes(b"II*\0\x08\0\0\0")
    for url, reason in (
        ("s3://no-such-bucket-here/a.tif", "no file or folder s3://no-such-bucket-here/a.tif"),
        (f"{bucket}/absent.tif", "no file or folder"),
        ("nowhere://bucket/a.tif", "nowhere://bucket/a.tif cannot be accessed .Protocol not known"),
        (put(bucket, tmp_path / "cut.tif"), r"Cannot read s3://.*cut\.tif"),
    ):
        with pytest.raises(ImageError, match=reason) as error:
            open_image(url)
        assert "\n" not in str(error.value)
    tiff(tmp_path / "b.tif")
    with pytest.raises(ImageError, match=r"no-such-bucket-here.*bucket does not exist"):
        convert(tmp_path / "b.tif", "s3://no-such-bucket-here/a.zarr")
    from daskcell.pipeline import api

    tiff(tmp_path / "a.tif")
    for out in ("s3://bucket/study", Path("s3://bucket/study")):
        with pytest.raises(StudyError, match="must be a folder on disk"):
            api.run(tmp_path / "a.tif", out)
    assert not Path("s3:").exists()


@pytest.mark.slow
def test_without_s3fs_the_sentence_names_the_extra(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from daskcell.images import find_images\n"
        "find_images('s3://bucket/a.tif')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'daskcell[s3]'" in done.stderr.splitlines()[-1]


def test_wrong_endpoint_is_a_sentence(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        fsspec.config.conf,
        "s3",
        {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}},
    )
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    with pytest.raises(ImageError, match=r"s3://bucket/a\.tif cannot be accessed"):
        open_image("s3://bucket/a.tif")


@pytest.mark.slow
def test_a_run_over_a_bucket_on_workers_ends_and_continues(
    server: Server, bucket: str, tmp_path: Path
) -> None:
    """Workers are other processes: they find the server by fsspec's own variables."""
    from skimage.data import binary_blobs

    for k in range(2):
        cells = binary_blobs(200, 0.1, volume_fraction=0.2, rng=k)
        tifffile.imwrite(tmp_path / f"{k}.tif", (cells * 200).astype(np.uint8))
        put(f"{bucket}/in", tmp_path / f"{k}.tif")
    command = [sys.executable, "-m", "daskcell", "run", f"{bucket}/in/*.tif", "-o", str(tmp_path / "study")]
    command += ["--method", "watershed", "-k", "2", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "2 slides" in done.stdout
    with server.asked() as requests:
        again = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert again.returncode == 0
    # A glance at each file, and no pixels: those that were converted are known by their ETags.
    assert all(asked for method, path, _, asked in requests if method == "GET" and path.endswith(".tif"))
    assert sum(path.endswith("/0.tif") for _, path, *_ in requests) <= 6
