"""A file that makes its reader crash, hang or eat the memory harms nobody but itself."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
from PIL import Image

import daskcell as dc
from daskcell import images
from daskcell.cli import app
from daskcell.errors import DaskcellError, ImageError
from daskcell.geometry import Box
from daskcell.images import reader_process
from daskcell.images.joined import SourceReader
from daskcell.images.readers import Reader, kinds, omezarr

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(os.name != "posix", reason="limits of processes are POSIX"),
]

EVIL = """
import os, signal, time
import numpy as np

def matches(path, head):
    return head.startswith(b"EVIL")

class open:
    def __init__(self, path, *, t=0, z="max"):
        self.act(Path(path).read_text().split()[1:2])
        self.what = Path(path).read_text().split()[2:3]
        self.name, self.axes, self.levels, self.channels = "evil", "YX", ((8, 8),), ("grey",)
        self.pixel_size, self.dtype, self.is_rgb = None, np.dtype("uint8"), False
        self.sizes, self.piece, self.files = {"t": 1, "z": 1}, (8, 8), (path,)

    def act(self, what):
        if what == ["crash"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == ["exit"]:
            os._exit(3)
        if what == ["hang"]:
            while True:
                pass
        if what == ["eat"]:
            self.eaten = bytearray(8 * 2**30)
        if what == ["raise"]:
            raise RuntimeError("two\\nlines")

    def read(self, level, box):
        self.act(self.what)
        return np.ones((1, *box.shape), np.uint8)

    def close(self):
        pass
""".replace("import os, signal, time", "import os, signal\nfrom pathlib import Path")


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A reader of files that misbehave as they say, registered as another package's, and a reader process."""
    package = tmp_path / "package"
    (package / "evil-1.dist-info").mkdir(parents=True)
    (package / "evil-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    (package / "evil-1.dist-info" / "entry_points.txt").write_text("[daskcell.readers]\nevil = evil_reader\n")
    (package / "evil_reader.py").write_text(EVIL)
    monkeypatch.setenv("PYTHONPATH", str(package))
    monkeypatch.setattr(reader_process, "OPEN_SECONDS", 0.4)
    monkeypatch.setattr(reader_process, "READ_SECONDS", 0.4)
    own = reader_process.ReaderProcess()
    monkeypatch.setattr(reader_process, "get_reader_process", lambda: own)

    def source(*words: str) -> images.Source:
        path = tmp_path / f"{'_'.join(words)}.evil"
        path.write_text(" ".join(("EVIL", *words)))
        return images.Source(path.stem, (str(path),))

    yield source
    own.stop()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("crash", "decoding it crashed .SIGSEGV"),
        ("exit", "decoding it crashed .exit code 3"),
        ("hang", "does not come to an end"),
        ("eat", "more memory"),
        ("raise", "two lines"),
    ],
)
@pytest.mark.parametrize("when", ["open", "read"])
def test_misbehaving_file_is_one_sentence_and_the_next_file_is_fine(
    evil, when: str, what: str, reason: str
) -> None:
    bad = evil(what) if when == "open" else evil("fine", what)
    with pytest.raises(ImageError, match=reason) as error:
        reader_process.open_safely(bad).read(0, Box(0, 0, 4, 4))
    assert bad.files[0] in str(error.value)
    assert "\n" not in str(error.value)
    good = reader_process.open_safely(evil("fine", "fine"))
    assert good.read(0, Box(0, 0, 4, 4)).sum() == 16
    with pytest.raises(ImageError, match=reason):  # and again
        reader_process.open_safely(bad).read(0, Box(0, 0, 4, 4))


def test_an_interrupted_question_is_not_answered_with_the_next(evil, monkeypatch: pytest.MonkeyPatch) -> None:
    good, own = reader_process.open_safely(evil("fine", "fine")), reader_process.get_reader_process()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(own, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            good.read(0, Box(0, 0, 4, 4))
    assert good.read(0, Box(0, 0, 2, 3)).shape == (1, 2, 3)


def test_a_crash_in_conversion_leaves_nothing(evil, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="crashed"):
        images.convert_slide(evil("fine", "crash"), tmp_path / "out" / "a.zarr")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "pipe"])
def test_pixels_and_header_pass_through_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    if not shared:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    pixels = np.random.default_rng(0).integers(0, 4000, (3, 700, 900), np.uint16)
    tifffile.imwrite(
        tmp_path / "a.ome.tif", pixels, tile=(64, 64), metadata={"axes": "CYX"}, photometric="minisblack"
    )
    (source,) = images.find_images(tmp_path / "a.ome.tif")
    safe, plain = reader_process.open_safely(source), SourceReader(source)
    for name in Reader.__annotations__:
        assert getattr(safe, name) == getattr(plain, name), name
    box = Box(3, 5, 680, 890)
    np.testing.assert_array_equal(safe.read(0, box), pixels[:, 3:680, 5:890])


def test_a_healthy_file_is_opened_once(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.uint8))
    (source,) = images.find_images(tmp_path / "a.tif")
    reader = reader_process.open_safely(source)
    reader.read(0, Box(0, 0, 4, 4))
    child = reader_process.get_reader_process()._child
    assert child is not None
    opened = {file.path for file in psutil.Process(child.pid).open_files()}
    assert str(tmp_path / "a.tif") in opened
    (tmp_path / "a.tif").unlink()  # the open file is all that is needed
    assert not reader.read(0, Box(0, 0, 4, 4)).any()


def test_a_file_that_changed_is_opened_again(tmp_path: Path) -> None:
    for value, side in ((1, 64), (2, 65)):
        tifffile.imwrite(tmp_path / "a.tif", np.full((side, 64), value, np.uint8))
        (source,) = images.find_images(tmp_path / "a.tif")
        reader = reader_process.open_safely(source)
        assert reader.levels == ((side, 64),)
        assert (reader.read(0, Box(0, 0, 4, 4)) == value).all()


@pytest.mark.parametrize("what", ["crash", "hang"])
def test_a_file_that_ends_its_reader_is_one_sentence_from_every_door(
    evil, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """Opened in the child only, by whatever way a user comes; other images of a run are worked on."""
    path = Path(evil(what).files[0])
    reason = {"crash": "crashed", "hang": "does not come to an end"}[what]
    pixels = np.zeros((90, 90), np.uint8)
    pixels[20:50, 20:50] = pixels[60:80, 55:80] = 200
    tifffile.imwrite(tmp_path / "good.tif", pixels)
    settings = {"segment": {"method": "watershed"}, "cluster": {"k": 2}, "compute": {"kind": "inline"}}

    doors = {
        "open_image": lambda: dc.open_image(path),
        "convert": lambda: dc.convert(path, tmp_path / "a.zarr"),
        "one of a run": lambda: dc.run([path], tmp_path / "one", settings),
        "split": lambda: images.split_channels(path, tmp_path / "split"),
    }
    for name, door in doors.items():
        with pytest.raises(ImageError, match=reason) as error:
            door()
        assert str(path) in str(error.value), name
        assert "\n" not in str(error.value), name
    study = dc.run([path, tmp_path / "good.tif"], tmp_path / "two", settings)
    (failure,) = study.failures
    assert (failure["slide"], failure["stage"]) == (path.stem, "convert")
    assert reason in failure["error"]
    assert len(study.cells("good")) == 2
    app(["channels", str(path), str(tmp_path / "good.tif")], standalone_mode=False)
    assert re.search(rf"{path.stem} +\(cannot be read\)", capsys.readouterr().out)


def test_the_process_that_asks_decodes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind that is decoded here would fail; only a table of names is looked at."""
    pixels = np.zeros((90, 90), np.uint8)
    pixels[20:50, 20:50] = pixels[60:80, 55:80] = 200
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    tifffile.imwrite(tmp_path / "b.ome.tif", np.stack([pixels] * 2), metadata={"axes": "TYX"})
    Image.fromarray(pixels).save(tmp_path / "c.png")
    Image.fromarray(pixels).save(tmp_path / "d.jpg")
    np.save(tmp_path / "e.npy", pixels)

    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("decoded in the process that asks")

    for kind in kinds():
        if kind is not omezarr:
            monkeypatch.setattr(kind, "open", decoded)
    settings = {"segment": {"method": "watershed"}, "cluster": {"k": 2}, "compute": {"kind": "inline"}}
    files = [tmp_path / name for name in ("a.tif", "b.ome.tif", "c.png", "d.jpg", "e.npy")]
    study = dc.run(files, tmp_path / "study", settings)
    assert study.failures == []
    for file in files:
        if file.name != "b.ome.tif":
            np.testing.assert_allclose(dc.open_image(file).data.compute()[0], pixels, atol=40)
    app(["channels", *map(str, files)], standalone_mode=False)


def test_files_are_opened_in_one_place() -> None:
    """Nothing but the reader process joins the files of a source, and nothing but that opens a file."""
    package = Path(images.__file__).parents[1]
    texts = {str(p.relative_to(package)): p.read_text() for p in package.rglob("*.py")}
    named = {
        word: {name for name, text in texts.items() if re.search(rf"\b{word}\b", text)}
        for word in ("SourceReader", "open_reader")
    }
    assert named["SourceReader"] == {"images/joined.py", "images/reader_process.py"}
    assert named["open_reader"] == {"images/joined.py", "images/readers/__init__.py"}


ORPHAN = """
import sys, time
from daskcell import images
from daskcell.images import reader_process
from daskcell.images.readers import Reader
reader_process.open_safely(images.find_images(sys.argv[1])[0])
print(reader_process.get_reader_process()._child.pid, flush=True)
time.sleep(60)
"""


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), np.uint8))
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path / "a.tif")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(timeout=30)


# Made to break other readers, but sound: libtiff gives the same pixels. One is a PNG with a wrong name.
HARMLESS = {
    "ccitt-too-many-changes.tif", "g4-fillorder-test.tif", "lzw-buffer-overflow.tif",
    "lzw-colormap-iiobe.tif",
    "lzw-full-12-bit-table.tif", "multipage_out_of_order.tiff", "png_named.tif",
}  # fmt: skip


def by_libtiff(path: Path) -> np.ndarray:
    """What Pillow, that is libtiff, makes of the pages of the first one's size, without alpha."""
    from PIL import Image, ImageSequence

    pages = []
    with Image.open(path) as file:
        size = file.size
        for page in ImageSequence.Iterator(file):
            if page.size == size:
                shown = page.convert("RGB") if page.mode == "P" else page
                pages.append(np.moveaxis(np.atleast_3d(np.asarray(shown)), 2, 0)[:3])
    return np.concatenate(pages)


@pytest.mark.data
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_every_damaged_file_of_the_zoo_is_refused_in_time_and_memory(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "tiff-zoo"
    with (folder / "manifest.csv").open() as file:
        paths = [folder / row["file"] for row in csv.DictReader(file) if row["kind"] == "corrupt"]
    assert len(paths) > 70
    for path in paths:
        start = time.monotonic()
        if path.name in HARMLESS:
            images.convert_slide(images.find_images(path)[0], tmp_path / "a.zarr", overwrite=True)
            got = images.open_image(tmp_path / "a.zarr").data.compute()
            np.testing.assert_array_equal(got, by_libtiff(path), err_msg=path.name)
            continue
        with pytest.raises(DaskcellError) as error:
            images.convert_slide(images.find_images(path)[0], tmp_path / "b.zarr")
        assert "\n" not in str(error.value)
        assert path.name in str(error.value)
        assert time.monotonic() - start < 10
    child = reader_process.get_reader_process()._child
    assert child is not None
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
    assert peak is not None
    assert int(peak[1]) < 2**20


def test_memory_is_bounded_but_one_large_piece_is_read(tmp_path: Path) -> None:
    """A picture in one compressed strip can only be read whole: the child may then take more than usual."""
    side = 12_000
    pixels = (np.arange(side, dtype=np.uint8)[:, None] * np.arange(side, dtype=np.uint8)[None]).astype(
        np.uint16
    )
    tifffile.imwrite(tmp_path / "a.tif", pixels, rowsperstrip=side, compression="zlib")
    (source,) = images.find_images(tmp_path / "a.tif")
    reader = reader_process.open_safely(source)
    np.testing.assert_array_equal(reader.read(0, Box(11_000, 0, 11_500, 500))[0], pixels[11_000:11_500, :500])


def test_any_damage_ends_in_pixels_or_in_one_sentence(tmp_path: Path) -> None:
    """Bytes changed at random, most of them in the directory: never another exception, never a lost child."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (70, 90), np.uint8)
    originals = []
    for k, options in enumerate(
        (
            {},
            {"rowsperstrip": 8, "compression": "lzw"},
            {"tile": (32, 32), "compression": "zlib", "bigtiff": True},
        )
    ):
        tifffile.imwrite(tmp_path / f"{k}.tif", pixels, **options)
        originals.append((tmp_path / f"{k}.tif").read_bytes())
    refused = 0
    reader = reader_process.open_safely(images.Source("good", (str(tmp_path / "0.tif"),)))
    child = reader_process.get_reader_process()._child
    for _ in range(400):
        content = bytearray(originals[rng.integers(len(originals))])
        for _ in range(rng.integers(1, 6)):
            content[rng.integers(min(300, len(content)) if rng.random() < 0.7 else len(content))] = (
                rng.integers(256)
            )
        path = tmp_path / "damaged.tif"
        path.write_bytes(content[: rng.integers(1, len(content))] if rng.random() < 0.2 else content)
        try:
            reader = reader_process.open_safely(images.Source("damaged", (str(path),)))
            height, width = (min(side, 200) for side in reader.levels[0])
            got = reader.read(0, Box(0, 0, height, width))
            assert got.shape == (len(reader.channels), height, width)
        except ImageError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert 100 < refused < 400
    assert reader_process.get_reader_process()._child is child
