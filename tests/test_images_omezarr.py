"""OME-Zarr as others write it: every version, type of pixels, order of axes, pyramid and collection."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr

import daskcell as dc
from daskcell.errors import ImageError
from daskcell.images import find_images, open_image, read_block
from daskcell.images.readers import open_reader

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr's, of types that Zarr 3 does not specify

RNG = np.random.default_rng(0)
BASE = RNG.integers(0, 200, (2, 40, 60))
SETTINGS = {"segment": {"method": "watershed"}, "cluster": {"k": 2}, "compute": {"kind": "inline"}}


def write(
    path: Path,
    levels: list[np.ndarray],
    axes: Any = ("c", "y", "x"),
    *,
    zarr_format: int = 2,
    version: str | None = None,
    datasets: list[dict] | None = None,
    more: dict | None = None,
    image: dict | None = None,
    **options: Any,
) -> Path:
    """An OME-Zarr image, written with zarr alone, with metadata as they are given."""
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    for number, pixels in enumerate(levels):
        chunks = options.get("chunks") or (1,) * (pixels.ndim - 2) + (17, 23)
        array = group.create_array(
            str(number), shape=pixels.shape, dtype=pixels.dtype, **{**options, "chunks": chunks}
        )
        array[...] = pixels
    scale: dict[str, Any] = {"datasets": [{"path": str(n)} for n in range(len(levels))]}
    if datasets is not None:
        scale["datasets"] = datasets
    if axes is not None:
        scale["axes"] = list(axes)
    if version is not None and zarr_format == 2:
        scale["version"] = version
    found = {"multiscales": [scale | (image or {})]} | (more or {})
    group.attrs.put({"ome": {"version": "0.5", **found}} if zarr_format == 3 else found)
    return path


def named(axes: str) -> list[dict[str, str]]:
    kinds = {"t": "time", "c": "channel"}
    return [{"name": axis, "type": kinds.get(axis, "space")} for axis in axes]


TYPES = {
    ">u2": "<u2", "<u2": "<u2", ">i2": "<i2", ">f4": "<f4", ">f8": "<f8", ">u4": "<u4", ">i4": "<i4",
    "?": "<u1", "<f2": "<f4", "u1": "u1", "<i8": "<f8", ">u8": "<f8",
}  # fmt: skip
STORED = {
    "plain": {},
    "columns first": {"order": "F"},
    "uncompressed": {"compressors": None},
    "blosc": {"compressors": numcodecs.Blosc()},
    "gzip": {"compressors": numcodecs.GZip()},
    "lzma": {"compressors": numcodecs.LZMA()},
    "filter": {"filters": [numcodecs.Delta("u1")]},
    "nested": {"chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "one chunk": {"chunks": (2, 40, 60)},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_of_pixels_is_read_and_converted(tmp_path: Path, dtype: str) -> None:
    expected = BASE.astype(dtype).astype(TYPES[dtype])
    for zarr_format, order in ((2, "C"), (2, "F"), (3, "C")):
        path = write(
            tmp_path / f"{zarr_format}{order}.zarr",
            [BASE.astype(dtype)],
            zarr_format=zarr_format,
            order=order,
        )
        image = open_image(path)
        assert image.dtype == np.dtype(TYPES[dtype])
        np.testing.assert_array_equal(image.data.compute(), expected)
        made = dc.convert(path, tmp_path / f"made{zarr_format}{order}.zarr")
        assert made.dtype == np.dtype(TYPES[dtype])
        np.testing.assert_array_equal(made.data.compute(), expected)


@pytest.mark.parametrize("stored", STORED)
def test_however_chunks_are_stored(tmp_path: Path, stored: str) -> None:
    path = write(tmp_path / "a.zarr", [BASE.astype("u1")], **STORED[stored])
    np.testing.assert_array_equal(open_image(path).data.compute(), BASE)


@pytest.mark.parametrize(
    "options",
    [
        {"shards": (2, 34, 46), "chunks": (1, 17, 23)},
        {"serializer": zarr.codecs.BytesCodec(endian="big")},
        {"filters": [zarr.codecs.TransposeCodec(order=(2, 0, 1))]},
        {"compressors": zarr.codecs.GzipCodec()},
        {"chunk_key_encoding": {"name": "default", "separator": "."}},
        {"chunk_key_encoding": {"name": "v2", "separator": "/"}},
    ],
    ids=["shards", "big endian", "transposed", "gzip", "dots", "as Zarr 2"],
)
def test_however_chunks_of_zarr_3_are_stored(tmp_path: Path, options: dict) -> None:
    path = write(tmp_path / "a.zarr", [BASE.astype("u2")], named("cyx"), zarr_format=3, **options)
    np.testing.assert_array_equal(open_image(path).data.compute(), BASE)


def test_chunks_that_are_not_there_are_the_fill_value(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", [BASE.astype("u2")], fill_value=7)
    (path / "0" / "0.1.1").unlink()
    expected = BASE.copy()
    expected[0, 17:34, 23:46] = 7
    np.testing.assert_array_equal(open_image(path).data.compute(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.1", "0.2", "0.3", "0.4", "0.5"])
def test_every_version_of_the_specification(tmp_path: Path, version: str) -> None:
    """0.1 and 0.2 have five axes and name none; 0.3 names them; 0.4 has types; 0.5 is Zarr 3."""
    pixels = RNG.integers(0, 4000, (2, 2, 3, 40, 60), np.uint16)  # TCZYX
    axes: Any = {"0.1": None, "0.2": None, "0.3": list("tczyx")}.get(version, named("tczyx"))
    path = write(
        tmp_path / "a.zarr",
        [pixels, np.ascontiguousarray(pixels[..., ::2, ::2])],
        axes,
        version=version,
        zarr_format=3 if version == "0.5" else 2,
        chunk_key_encoding={"name": "v2", "separator": "." if version == "0.1" else "/"},
    )
    found = find_images(path)
    assert [source.t for source in found] == [0, 1]
    for t, source in enumerate(found):
        image = open_image(source)
        assert image.pixel_size is None
        assert image.channels == ("channel 1", "channel 2")
        np.testing.assert_array_equal(image.data.compute(), pixels[t].max(axis=1))
        made = dc.convert(source, tmp_path / f"{t}.zarr")
        np.testing.assert_array_equal(made.data.compute(), pixels[t].max(axis=1))
    assert open_reader(path).levels == ((40, 60), (20, 30))


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", ["yx", "cyx", "zyx", "tyx", "czyx", "tzyx", "tczyx", "zcyx", "xyz", "yxc", "ctyx"]
)
def test_axes_in_any_order(tmp_path: Path, axes: str) -> None:
    lengths = {"t": 1, "c": 2, "z": 3, "y": 40, "x": 60}
    pixels = RNG.integers(0, 4000, [lengths[axis] for axis in axes], np.uint16)
    whole = np.einsum(f"{axes}->{''.join(sorted(axes, key='tczyx'.index))}", pixels)
    for axis in "tczyx":
        if axis not in axes:
            whole = np.expand_dims(whole, "tczyx".index(axis))
    chunks = tuple(17 if axis in "yx" else 1 for axis in axes)
    path = write(tmp_path / "a.zarr", [pixels], named(axes), chunks=chunks)
    image = open_image(path)
    np.testing.assert_array_equal(image.data.compute(), whole[0].max(axis=1))
    plane = open_image(path, dc.config.InputSettings(z=whole.shape[2] - 1))
    np.testing.assert_array_equal(plane.data.compute(), whole[0, :, -1])


def test_names_of_axes_are_free_and_types_tell(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 4000, (3, 40, 60), np.uint16)
    space = [{"name": "row", "type": "space"}, {"name": "column", "type": "space"}]
    for number, (first, expected) in enumerate(
        (
            ({"name": "stain", "type": "channel"}, pixels),
            ({"name": "C"}, pixels),
            ({"name": "angle", "type": "custom"}, pixels),
            ({"name": "angle"}, pixels),
            ({"name": "depth", "type": "space"}, pixels.max(axis=0, keepdims=True)),
        )
    ):
        path = write(tmp_path / f"{number}.zarr", [pixels], [first, *space])
        np.testing.assert_array_equal(open_image(path).data.compute(), expected)
    path = write(
        tmp_path / "one.zarr", [pixels[None]], [{"name": "angle"}, {"name": "c", "type": "channel"}, *space]
    )
    np.testing.assert_array_equal(open_image(path).data.compute(), pixels)
    path = write(tmp_path / "two.zarr", [pixels[:, None]], [{"name": "angle"}, {"name": "q"}, *space])
    with pytest.raises(ImageError, match=r"axes angle, q, row, column .*0\.1 to 0\.5") as error:
        open_image(path)
    assert "\n" not in str(error.value)


def scaled(*sizes: float, path: str = "0", shift: tuple[float, ...] | None = None) -> dict:
    steps: list[dict] = [{"type": "scale", "scale": list(sizes)}]
    if shift is not None:
        steps.append({"type": "translation", "translation": list(shift)})
    return {"path": path, "coordinateTransformations": steps}


@pytest.mark.parametrize(
    ("unit", "factor"), [("micrometer", 1.0), ("nanometer", 1e-3), ("meter", 1e6), ("um", 1.0), (None, None)]
)
def test_pixel_size_in_any_unit_of_length(tmp_path: Path, unit: str | None, factor: float | None) -> None:
    axes = [axis | ({"unit": unit} if unit and axis["name"] != "c" else {}) for axis in named("cyx")]
    path = write(
        tmp_path / "a.zarr",
        [BASE.astype("u1")],
        axes,
        datasets=[scaled(1, 3, 2)],
        image={"coordinateTransformations": [{"type": "scale", "scale": [1, 10, 10]}]},
    )
    size = open_image(path).pixel_size
    assert size == (pytest.approx((30 * factor, 20 * factor)) if factor else None)


PYRAMIDS: dict[str, tuple[list[slice | int], list[dict] | None]] = {
    "by three": ([1, 3, 9], None),
    "by two, then by four": ([1, 2, 8], None),
    "shifted by half a pixel": (
        [1, 2],
        [scaled(1, 1, 1, shift=(0, 0, 0)), scaled(1, 2, 2, path="1", shift=(0, 0.5, 0.5))],
    ),
    "a part, enlarged": (
        [1, 2],
        [scaled(1, 1, 1, shift=(0, 0, 0)), scaled(1, 2, 2, path="1", shift=(0, 30, 30))],
    ),
}


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_pyramids_of_any_kind(tmp_path: Path, kind: str) -> None:
    """Levels that halve the one before are taken over; all others are made anew, from all pixels."""
    steps, datasets = PYRAMIDS[kind]
    pixels = RNG.integers(0, 255, (1, 1101, 1203), np.uint8)
    levels = [np.ascontiguousarray(pixels[..., ::step, ::step]) for step in steps]
    path = write(tmp_path / "a.zarr", levels, named("cyx"), datasets=datasets, chunks=(1, 300, 400))
    made = dc.convert(path, tmp_path / "b.zarr")
    np.testing.assert_array_equal(made.data.compute(), pixels)
    info = dc.images.image_info(tmp_path / "b.zarr")
    assert info.levels == ((1101, 1203), (551, 602))
    second = read_block(tmp_path / "b.zarr", dc.geometry.Box(0, 0, 551, 602), 1)
    if kind in ("by two, then by four", "shifted by half a pixel"):
        np.testing.assert_array_equal(second, levels[1])
    else:
        assert abs(second.astype(int) - pixels[..., ::2, ::2]).max() > 0  # means, not the file's own


def test_levels_of_fewer_planes_are_no_smaller_copies(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (4, 1100, 40), np.uint8)
    path = write(tmp_path / "a.zarr", [pixels, np.ascontiguousarray(pixels[::2, ::2, ::2])], named("zyx"))
    assert open_reader(path).levels == ((1100, 40),)
    np.testing.assert_array_equal(dc.convert(path, tmp_path / "b.zarr").data.compute()[0], pixels.max(axis=0))


MISSING: dict[str, dict[str, Any]] = {
    "no omero": {},
    "omero is none": {"more": {"omero": None}},
    "omero is text": {"more": {"omero": "broken"}},
    "channels are none": {"more": {"omero": {"channels": [None, None]}}},
    "fewer channels": {"more": {"omero": {"channels": [{"label": "DAPI"}]}}},
    "a level is not there": {"datasets": [{"path": "0"}, {"path": "1"}, {"path": "2"}]},
    "a level without path": {"datasets": [{"path": "0"}, {}]},
    "scale of a wrong length": {"datasets": [scaled(1.0)]},
    "scale in a file": {
        "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "path": "scale"}]}]
    },
    "broken transformations": {"datasets": [{"path": "0", "coordinateTransformations": ["?"]}]},
    "unknown unit": {"axes": [{**axis, "unit": "parrot"} for axis in named("cyx")]},
}


@pytest.mark.parametrize("what", MISSING)
def test_one_missing_part_does_not_lose_the_pixels(tmp_path: Path, what: str) -> None:
    path = write(tmp_path / "a.zarr", [BASE.astype("u1")], **{"axes": named("cyx"), **MISSING[what]})
    image = open_image(path)
    np.testing.assert_array_equal(image.data.compute(), BASE)
    assert image.pixel_size is None
    assert len(image.channels) == 2


def test_stale_consolidated_metadata_are_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", [BASE.astype("u1")], named("cyx"))
    zarr.consolidate_metadata(path)
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    array = group.create_array("0", shape=(2, 50, 70), dtype="u1", chunks=(1, 50, 70), overwrite=True)
    array[...] = 3
    assert open_image(path).shape == (2, 50, 70)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"datasets": [{"path": "5"}]}, "array '5' is not there"),
        ({"datasets": []}, "broken"),
        ({"axes": [{"name": "y"}, {"name": "x"}]}, "2 axes"),
        ({"axes": named("tzc")}, "axes t, z, c"),
        ({"image": {"datasets": None}}, "broken"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, options: dict, reason: str) -> None:
    path = write(tmp_path / "a.zarr", [BASE.astype("u1")], **{"axes": named("cyx"), **options})
    for door in (open_image, lambda path: dc.convert(path, tmp_path / "b.zarr")):
        with pytest.raises(ImageError, match=reason) as error:
            door(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_values_that_are_no_intensities_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", [BASE.astype("c8")], named("cyx"))
    with pytest.raises(ImageError, match="complex64 are not intensities"):
        open_image(path)
    path = write(tmp_path / "b.zarr", [np.full((1, 9, 9), 2**60 + 1)], named("cyx"))
    with pytest.raises(ImageError, match="exactly"):
        open_image(path).data.compute()


# ---------------------------------------------------------------------- over http


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that hands out the files of `tmp_path`, and lists no folder."""

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


def field_with_cells(dtype: str = "<u2") -> np.ndarray:
    pixels = RNG.integers(0, 20, (90, 90)).astype(dtype)
    pixels[20:50, 20:50] = pixels[60:80, 55:80] = 200
    return pixels


@pytest.mark.slow
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_images_on_a_web_server(tmp_path: Path, web: str, zarr_format: int) -> None:
    pytest.importorskip("aiohttp")
    pixels = field_with_cells()
    write(tmp_path / "a.zarr", [pixels], named("yx"), zarr_format=zarr_format)
    np.testing.assert_array_equal(open_image(f"{web}/a.zarr").data.compute()[0], pixels)
    np.testing.assert_array_equal(dc.convert(f"{web}/a.zarr", tmp_path / "b.zarr").data.compute()[0], pixels)
    study = dc.run(f"{web}/a.zarr", tmp_path / "study", SETTINGS)
    assert study.failures == []
    assert len(study.cells("a")) == 2
    with pytest.raises(ImageError, match="no file or folder"):
        open_image(f"{web}/none.zarr")


@pytest.mark.parametrize("name", ["a.zarr", "a.tif"])
def test_without_aiohttp_one_sentence_says_which_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    for scheme in ("http", "https"):
        monkeypatch.delitem(_registry, scheme, raising=False)
        with pytest.raises(ImageError, match=r"needs a package .*pip install 'daskcell\[http\]'") as error:
            open_image(f"{scheme}://127.0.0.1:9/{name}")
        assert "\n" not in str(error.value)


def collection(path: Path, kind: str, zarr_format: int = 2) -> list[str]:
    """A folder with three images; returns their paths in it."""
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    inner = ["A/1/0", "A/1/1", "B/2/0"] if kind == "plate" else ["0", "1", "2"]
    if kind in ("listed series", "collection"):
        inner = ["first", "second", "10"]

    def put(where: Any, ome: dict) -> None:
        where.attrs.put({"ome": {"version": "0.5", **ome}} if zarr_format == 3 else ome)

    for value, name in enumerate(inner, 1):
        group.require_group(name)
        write(path / name, [np.full((20, 30), value, np.uint8)], named("yx"), zarr_format=zarr_format)
    if kind == "plate":
        put(group, {"plate": {"wells": [{"path": "A/1"}, {"path": "B/2"}], "rows": [], "columns": []}})
        put(group["A/1"], {"well": {"images": [{"path": "0"}, {"path": "1"}]}})
        put(group["B/2"], {"well": {"images": [{"path": "0"}]}})
    elif kind == "collection":
        put(group, {"items": [{"path": name} for name in inner]})
    elif kind == "well":
        put(group, {"well": {"images": [{"path": name} for name in inner]}})
    else:
        put(group, {"bioformats2raw.layout": 3})
        if kind == "listed series":
            put(group.require_group("OME"), {"series": inner})
    return inner


KINDS = ["plate", "well", "numbered series", "listed series", "collection"]


@pytest.mark.slow
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_image_of_a_collection_is_found(tmp_path: Path, web: str, kind: str, zarr_format: int) -> None:
    inner = collection(tmp_path / "a.zarr", kind, zarr_format)
    for place in (str(tmp_path), web):
        found = find_images(f"{place}/a.zarr")
        assert [source.name for source in found] == [f"a_{name.replace('/', '_')}" for name in inner]
        values = [open_image(source).data.compute().max() for source in found]
        assert values == [1, 2, 3]


@pytest.mark.slow
def test_a_well_that_is_not_there_does_not_lose_the_others(tmp_path: Path) -> None:
    import shutil

    collection(tmp_path / "a.zarr", "plate")
    shutil.rmtree(tmp_path / "a.zarr" / "A")
    for name, pixels in (("B/2/0", field_with_cells()),):
        write(tmp_path / "a.zarr" / name, [pixels], named("yx"))
    study = dc.run(tmp_path / "a.zarr", tmp_path / "study", SETTINGS)
    assert [failure["slide"] for failure in study.failures] == ["a_A_1"]
    assert len(study.cells("a_B_2_0")) == 2
