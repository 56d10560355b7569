"""What is taken for an image: never a result, each file once, and what is left out is told."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

import daskcell as dc
from daskcell.config import InputSettings
from daskcell.errors import ImageError, InputWarning
from daskcell.images import find_images
from daskcell.pipeline.progress import Progress

SETTINGS = {"segment": {"method": "watershed"}, "cluster": {"k": 2}, "compute": {"kind": "inline"}}


def picture() -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 20, (96, 96), np.uint8)
    pixels[20:50, 20:50] = pixels[60:90, 60:90] = 200
    return pixels


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".tif", ".png", ".jpg"):
            tifffile.imwrite(path, picture())
        elif path.suffix == ".npy":
            np.save(path, picture())
        else:
            path.write_text("1 2 3")
    return folder


def found(*inputs: Path | str, **settings: object) -> tuple[list[str], list[str]]:
    """Names of the images, and what is told."""
    said: list[str] = []
    sources = find_images(list(inputs), InputSettings(**settings), said.append)
    return sorted(source.name for source in sources), said


class Said(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.slow
def test_a_study_among_its_own_inputs_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "pics", "a.tif", "deep/b.tif")
    settings = SETTINGS | {"output": {"preprocessed": True}}
    out = tmp_path / "pics" / "study"
    study = dc.run(tmp_path / "pics", out, settings)
    progress = Said()
    for _ in range(2):
        study = dc.run(tmp_path / "pics", out, settings, progress=progress)
        assert study.slides == ["a", "deep_b"]
    assert sum(f"{out} is a study of daskcell" in text for text in progress.said) == 2
    assert found(tmp_path)[0] == ["pics_a", "pics_deep_b"]
    assert found(tmp_path / "pics" / "**" / "*.tif")[0] == ["a", "b"]
    with pytest.raises(ImageError, match="is a study of daskcell"):
        find_images(out)
    assert found(out / "images")[0] == ["a", "deep_b"]


@pytest.mark.parametrize(
    "record", ['{"format": 0, "inputs": [], "slides": []}', '{"inputs": 1, "slides": {}}']
)
def test_studies_of_other_formats_are_not_searched(tmp_path: Path, record: str) -> None:
    write(tmp_path, "a.tif", "old/overlays/a.png", "other/b.tif")
    (tmp_path / "old" / "study.json").write_text(record)
    (tmp_path / "other" / "study.json").write_text('{"title": "of somebody else"}')
    assert found(tmp_path)[0] == ["a", "other_b"]


def test_our_exports_and_crops_are_not_searched(tmp_path: Path) -> None:
    write(tmp_path, "a.tif", "cells/cluster-0/a-1.png", "cells/cells.csv", ".hidden/c.tif")
    write(tmp_path, f"encoder/crops/{'0f' * 16}.npy", "crops/mine.npy")
    names, said = found(tmp_path)
    assert names == ["a", "crops_mine"]
    assert len(said) == 2


def test_a_zarr_we_made_of_an_image_beside_it_is_left_out_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path, "a.tif", "b.tif")
    dc.convert(tmp_path / "a.tif", tmp_path / "a.zarr")
    dc.convert(tmp_path / "b.tif", tmp_path / "c.zarr", version="0.4")
    names, said = found(tmp_path)
    assert names == ["a", "b"]
    assert len(said) == 1
    assert "a.zarr" in said[0]
    assert "c.zarr" in said[0]
    assert found(tmp_path / "a.zarr") == (["a"], [])


RESULTS = """
a_cp_masks.png a_masks.tif a_mask.png a_seg.npy a_flows.tif a_outlines.txt a_cp_outlines.png a_cp_output.png
a-labels.tif a_label.tif a_stardist.tif a_Simple Segmentation.tif a_Probabilities.npy a_Object Predictions.tif
a_Object-Identities.tif a_nuclei_mask.tif a_cell_labels.tif a_Overlay.tif a.tif_mask.png a-Nuclei-Masks.tif
a_cp_masks_overlay.png A_SEGMENTATION.tif a.ome_masks.tif
"""


@pytest.mark.parametrize("name", [line.strip() for line in RESULTS.replace("a_Simple ", "a_Simple@").replace(
    "_Object P", "_Object@P").split() if line])  # fmt: skip
def test_results_beside_images_are_left_out_and_told(tmp_path: Path, name: str) -> None:
    name = name.replace("@", " ")
    write(tmp_path, "a.tif", "b.tif", name, "a_cp_masks.png")
    names, said = found(tmp_path)
    assert names == ["a", "b"]
    assert len(said) == 1
    assert Path(name).suffix == ".txt" or str(tmp_path / name) in said[0]
    if name.endswith(".txt"):
        return
    assert len(found(tmp_path / name)[0]) == 1
    assert len(found(tmp_path / "a.tif", tmp_path / name)[0]) == 2
    assert found(str(tmp_path / "*"))[0] == ["a", "b"]


def test_without_an_image_beside_it_a_name_says_nothing(tmp_path: Path) -> None:
    names = [
        "cell_mask.tif",
        "labels.tif",
        "overlay_2.tif",
        "test_masks.tif",
        "masked.tif",
        "a_maskX.tif",
        "a.tif",
    ]
    assert found(write(tmp_path, *names)) == (sorted(Path(name).stem for name in names), [])


def test_results_of_images_with_one_file_a_channel_are_left_out(tmp_path: Path) -> None:
    names = [f"s{i}_{c}.tif" for i in (1, 2) for c in ("red", "green")]
    write(tmp_path, *names, "s1_masks.tif", "s2_red_cp_masks.png", "s2_green_seg.npy")
    assert found(tmp_path)[0] == ["s1", "s2"]
    write(tmp_path / "x", "Red.tif", "Green.tif", "masks.tif")
    assert found(tmp_path / "x")[0] == ["x"]
    write(tmp_path / "y", "Image_CH1.tif", "Image_CH2.tif", "Image_Overlay.tif")
    assert found(tmp_path / "y")[0] == ["Image"]
    guid = "AF2504E0-4F89-11D3-9A0C-0305E82C330"
    write(tmp_path / "z", *(f"p_s1_w{w}{t}{guid}{w}.tif" for w in (1, 2) for t in ("", "_thumb")))
    assert found(tmp_path / "z")[0] == ["p_s1"]


def test_folders_of_masks_beside_images_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "one/images/a.tif", "one/masks/a.png", "one/masks/b.png")
    write(tmp_path, "two/a.tif", "two/labels/a.tif", "two/labels/c.tif")
    write(tmp_path, "three/masks/a.tif")
    names, said = found(tmp_path)
    assert names == ["one_images_a", "three_masks_a", "two_a", "two_labels_c"]
    assert len(said) == 1
    assert found(tmp_path / "one" / "masks") == (["a", "b"], [])


def test_a_pattern_may_ask_for_masks(tmp_path: Path) -> None:
    write(tmp_path, "a.tif", "a_masks.tif")
    assert found(tmp_path, pattern="{name}.tif")[0] == ["a"]
    assert found(tmp_path, pattern="{name}_masks.tif") == (["a"], [])


def test_labels_of_an_ome_zarr_are_no_images(tmp_path: Path) -> None:
    import zarr

    write(tmp_path, "a.tif")
    dc.convert(tmp_path / "a.tif", tmp_path / "b.zarr")
    zarr.open_group(tmp_path / "b.zarr").create_array("labels/cells/0", shape=(96, 96), dtype="u4")
    (tmp_path / "a.tif").unlink()
    assert found(tmp_path) == (["b"], [])


def test_without_progress_what_is_left_out_is_a_warning(tmp_path: Path) -> None:
    write(tmp_path, "a.tif", "a_masks.tif")
    with pytest.warns(InputWarning, match=r"a_masks\.tif"):
        assert dc.open_image(tmp_path).name == "a"


@pytest.mark.slow
def test_the_command_channels_names_what_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.tif", "a_masks.tif")
    command = [sys.executable, "-m", "daskcell", "channels", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "a_masks.tif: left out" in done.stdout


def test_links_are_followed_once_and_without_loops(tmp_path: Path) -> None:
    pictures = write(tmp_path / "pictures", "a.tif", "deep/b.tif")
    write(tmp_path / "elsewhere", "c.tif", "d.tif")
    for name, target in {
        "1-again": pictures / "deep",
        "2-other": tmp_path / "elsewhere",
        "3-other": tmp_path / "elsewhere",
        "deep/up": pictures,
        "deep/self": pictures / "deep" / "self",
        "deep/disk": tmp_path,
        "0.tif": pictures / "a.tif",
        "e.tif": tmp_path / "elsewhere" / "c.tif",
    }.items():
        os.symlink(target, pictures / name)
    names, said = found(pictures)
    assert names == ["2-other_c", "2-other_d", "a", "deep_b"]
    assert len(said) == 1
    assert "0.tif" in said[0]
    os.unlink(pictures / "2-other")
    os.unlink(pictures / "3-other")
    assert found(pictures)[0] == ["a", "deep_b", "e"]
    assert found(pictures, pictures / "0.tif")[0] == ["a", "deep_b", "e"]


@pytest.mark.slow
def test_a_dangling_link_is_set_aside_alone(tmp_path: Path) -> None:
    write(tmp_path / "pics", "a.tif", "b.tif")
    os.symlink(tmp_path / "gone.tif", tmp_path / "pics" / "c.tif")
    study = dc.run(tmp_path / "pics", tmp_path / "out", SETTINGS)
    (failure,) = study.failures
    assert failure["slide"] == "c"
    assert f"a link to {tmp_path / 'gone.tif'}" in failure["error"]
    assert len(study.cells("a")) == 2
    with pytest.raises(ImageError, match="it is a link to"):
        find_images(tmp_path / "pics" / "c.tif")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_a_name_that_is_not_utf8_is_as_good_as_any(tmp_path: Path) -> None:
    write(tmp_path / "pics", "a.tif", "x.tif", "y.tif")
    for name, new in (("x.tif", b"caf\xe9.tif"), ("y.tif", b"\xff\xfe.tif")):
        os.rename(tmp_path / "pics" / name, os.fsencode(tmp_path / "pics") + b"/" + new)
    Path(os.fsdecode(os.fsencode(tmp_path / "pics") + b"/\xff\xfe.tif")).write_bytes(b"no image")
    for _ in range(2):
        study = dc.run(tmp_path / "pics", tmp_path / "out", SETTINGS)
        assert len(study.slides) == 3
        assert len(study.failures) == 1
        assert {len(study.cells(name)) for name in study.slides if name != study.failures[0]["slide"]} == {2}
    assert "\\xff\\xfe.tif" in study.failures[0]["error"]
    command = [sys.executable, "-m", "daskcell", "channels", str(tmp_path / "pics")]
    done = subprocess.run(command, capture_output=True, check=True)
    assert b"caf\\xe9.tif" in done.stdout


@pytest.fixture
def not_root() -> Iterator[None]:
    """Permissions do not hold for root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_folders_that_cannot_be_searched_are_named(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    write(tmp_path, "a.tif", "closed/b.tif")
    for path in (tmp_path, *tmp_path.parents):
        if path == Path(tempfile.gettempdir()):
            break
        path.chmod(0o755)
    (tmp_path / "closed").chmod(0)
    request.getfixturevalue("not_root")
    names, said = found(tmp_path)
    assert names == ["a"]
    assert said == [f"The folder {tmp_path / 'closed'} cannot be searched for images (Permission denied)."]
